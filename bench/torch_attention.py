#!/usr/bin/env python3
"""Times PyTorch's dense attention, cuDNN's and FlashAttention-2's, as bench/cuda_timing.h times MoBA, and draws both.

Prints lines 'figure NAME VALUE UNIT' to stdout. Takes PyTorch with a GPU, and matplotlib for the picture.

  torch_attention.py                                      only the times
  torch_attention.py --figures FILE --plot crossover.svg  FILE holds the figures that moba_bench_cuda printed
"""

import argparse
import statistics
import sys
import time

TOKENS = {"2k": 2048, "4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768, "64k": 65536, "128k": 131072}
QUICK = ("8k", "32k", "64k")
HEADS, HEAD_DIM = 16, 128
LONG_CALL_MS = 200
HEAD_START_CYCLES = 4_000_000  # about 2 ms, in which the host gets ahead of the device


def figure(name, value, unit):
    print(f"figure {name} {value:.4g} {unit}", flush=True)


def rested_ms(torch, call):
    """Median of 7 calls (3 of long ones) in a row, behind 2 that do not count, after half a second of rest."""

    def run(count):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in zip(events, events[1:])]

    calls = 3 if run(2)[1] > LONG_CALL_MS else 7
    time.sleep(0.5)
    torch.cuda._sleep(HEAD_START_CYCLES)
    return statistics.median(run(2 + calls)[2:])


def measure(torch, sizes):
    """Milliseconds by (size, 'cudnn' or 'fa2'); a back end that refuses is said so and left out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    print(f"PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, {torch.cuda.get_device_name()}",
          file=sys.stderr)
    torch.manual_seed(1)
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
    times = {}
    with torch.inference_mode():
        matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        product = torch.empty_like(matrix)
        ms = rested_ms(torch, lambda: torch.mm(matrix, matrix, out=product))
        figure("torch.matmul", 2 * 8192**3 / ms / 1e9, "TFLOP/s")
        for size in sizes:
            # [tokens, heads, d] in memory, as MoBA's, seen as PyTorch wants it.
            q, k, v = (
                torch.randn(1, TOKENS[size], HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
                for _ in range(3))
            for name, backend in backends.items():
                def attention():
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

                try:
                    with sdpa_kernel(backend):
                        times[size, name] = rested_ms(torch, attention)
                except RuntimeError as error:
                    print(f"{name} at {size}: {str(error).splitlines()[0]}", file=sys.stderr)
                    continue
                figure(f"torch.{size}.{name}", times[size, name], "ms")
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
    for (size, name), ms in times.items():
        moba = figures.get(f"cuda.{size}.forward")
        if moba:
            figure(f"torch.{size}.{name}_over_moba", ms / moba, "ratio")


def draw(figures, times, path):
    """Time over sequence length, both logarithmic: where MoBA and dense attention cross."""
    import matplotlib
    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "moba"  # the same picture for the same figures
    lengths = {**TOKENS, "256k": 262144, "512k": 524288, "1m": 1048576}
    curves = [
        ("FlashAttention-2, dense (PyTorch)", "s--", "#9467bd", {s: times.get((s, "fa2")) for s in lengths}),
        ("cuDNN, dense (PyTorch)", "^--", "#7f7f7f", {s: times.get((s, "cudnn")) for s in lengths}),
        ("libmoba, dense", "D--", "#1f77b4", {s: figures.get(f"cuda.{s}.dense") for s in lengths}),
        ("libmoba, MoBA, B = 128, k = 8", "o-", "#d62728", {s: figures.get(f"cuda.{s}.forward") for s in lengths}),
    ]
    plot, axes = pyplot.subplots(figsize=(8, 5))
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
    axes.set_ylabel("forward, milliseconds")
    axes.set_title(f"bfloat16, {HEADS} heads, d = {HEAD_DIM}, random input", fontsize=11)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
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
