#!/usr/bin/env python3
"""Times PyTorch's dense attention, cuDNN's and FlashAttention-2's, as bench/cuda_timing.h times MoBA, and draws both:
forward alone, and forward with backward ("training").

Prints lines 'figure NAME VALUE UNIT' to stdout. Takes PyTorch with a GPU, and matplotlib for the picture.

  torch_attention.py                                      only the times
  torch_attention.py --figures FILE --plot crossover.svg  FILE holds the figures that moba_bench_cuda printed
"""

import argparse
import itertools
import statistics
import sys
import time

TOKENS = {"2k": 2048, "4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "64k": 65536, "128k": 131072}
LONGER = {"256k": 262144, "512k": 524288, "1m": 1048576}  # where dense attention is not timed
QUICK = ("8k", "32k", "64k")
HEADS, HEAD_DIM = 16, 128
LONG_CALL_MS = 200
HEAD_START_CYCLES = 4_000_000  # about 2 ms, in which the host gets ahead of the device


def figure(name, value, unit):
    print(f"figure {name} {value:.4g} {unit}", flush=True)


def rested_ms(torch, call):
    """Median of 5 calls (3 of long ones) in a row, behind 2 that do not count, after 0.6 seconds of rest."""

    def run(count):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in zip(events, events[1:])]

    calls = 3 if run(2)[1] > LONG_CALL_MS else 5
    time.sleep(0.6)
    torch.cuda._sleep(HEAD_START_CYCLES)
    return statistics.median(run(2 + calls)[2:])


def attention_calls(torch, tokens):
    """What is timed of a size: 'forward' and 'training'."""
    # [tokens, heads, d] in memory, as MoBA's, seen as PyTorch wants it.
    q, k, v, dout = (
        torch.randn(1, tokens, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def attend(*inputs):
        return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)

    return {
        "forward": lambda: attend(q, k, v),
        "training": lambda: torch.autograd.grad(attend(*leaves), leaves, dout),
    }


def measure(torch, sizes):
    """Milliseconds by (size, 'cudnn' or 'fa2', what); a back end that refuses is said so and left out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    print(f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {torch.cuda.get_device_name()}",
          file=sys.stderr)
    torch.manual_seed(1)
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(matrix)
    ms = rested_ms(torch, lambda: torch.mm(matrix, matrix, out=product))
    figure("torch.matmul", 2 * 8192**3 / ms / 1e9, "TFLOP/s")
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
    times = {}
    for size in sizes:
        calls = attention_calls(torch, TOKENS[size])
        for (name, backend), (what, call) in itertools.product(backends.items(), calls.items()):
            try:
                with sdpa_kernel(backend):
                    times[size, name, what] = rested_ms(torch, call)
            except RuntimeError as error:
                print(f"{name} {what} at {size}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            figure(f"torch.{size}.{name}_{what}", times[size, name, what], "ms")
    return times


def read_figures(path):
    figures = {}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            words = line.split()
            if len(words) == 4 and words[0] == "figure":
                figures[words[1]] = float(words[2])
    return figures


def compare(figures, times):
    for (size, name, what), ms in times.items():
        moba = figures.get(f"cuda.{size}.{what}")
        if moba:
            figure(f"torch.{size}.{name}_{what}_over_moba", ms / moba, "ratio")


def draw_one(axes, title, curves):
    lengths = {**TOKENS, **LONGER}
    measured = set()
    for label, style, color, values in curves:
        points = [(lengths[size], ms) for size, ms in values.items() if ms]
        if points:
            measured.update(tokens for tokens, _ in points)
            axes.loglog(*zip(*points), style, color=color, label=label, linewidth=1.8, markersize=5)
    names = {tokens: size for size, tokens in lengths.items()}
    axes.set_xticks(sorted(measured), [names[tokens].upper() for tokens in sorted(measured)])
    axes.minorticks_off()
    axes.set_xlabel("tokens of one causal sequence")
    axes.set_title(title, fontsize=11)
    axes.yaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)


def draw(figures, times, path):
    """Time over sequence length, both logarithmic: where MoBA and dense attention cross."""
    import matplotlib
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "moba"  # the same picture for the same figures
    sizes = (*TOKENS, *LONGER)
    dense = {s: figures.get(f"cuda.{s}.dense") for s in sizes}
    back = {s: figures.get(f"cuda.{s}.dense_backward") for s in sizes}
    ours = {"forward": dense, "training": {s: dense[s] + back[s] for s in sizes if dense[s] and back[s]}}
    plot, panels = pyplot.subplots(1, 2, figsize=(12, 5))
    for axes, (what, title) in zip(panels, (("forward", "forward"), ("training", "forward and backward"))):
        draw_one(axes, title, [
            ("FlashAttention-2, dense (PyTorch)", "s--", "#9467bd", {s: times.get((s, "fa2", what)) for s in sizes}),
            ("cuDNN, dense (PyTorch)", "^--", "#7f7f7f", {s: times.get((s, "cudnn", what)) for s in sizes}),
            ("libmoba, dense", "D--", "#1f77b4", ours[what]),
            ("libmoba, MoBA, B = 128, k = 8", "o-", "#d62728", {s: figures.get(f"cuda.{s}.{what}") for s in sizes}),
        ])
    panels[0].set_ylabel("milliseconds")
    plot.suptitle(f"bfloat16, {HEADS} heads, d = {HEAD_DIM}, random input", fontsize=11)
    plot.patch.set_facecolor("white")
    plot.tight_layout()
    plot.savefig(path, format="svg", metadata={"Date": None})
    print(f"drew {path}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", help="output of moba_bench_cuda, to compare with")
    parser.add_argument("--plot", help="SVG file to draw")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        sys.exit("torch_attention.py: PyTorch is not installed for this python3")
    if not torch.cuda.is_available():
        sys.exit("torch_attention.py: PyTorch sees no GPU")

    figures = read_figures(arguments.figures) if arguments.figures else {}
    times = measure(torch, QUICK if arguments.quick else TOKENS)
    compare(figures, times)
    if arguments.plot:
        try:
            draw(figures, times, arguments.plot)
        except ImportError:
            print("torch_attention.py: matplotlib is not installed: no picture", file=sys.stderr)


if __name__ == "__main__":
    main()
