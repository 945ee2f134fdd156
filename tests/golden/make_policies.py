#!/usr/bin/env python3
"""What token policies cost, by definitions written down a second time. See README.md.

    python make_policies.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out .
    python make_policies.py --gguf ... --prefix 2048 --tail 256 --windows 2      # prints, writes nothing

Nothing here uses the Rust code: numpy, the `gguf` package for weights, the
`tokenizers` package for tokens. Keys and values are f32. The prefix is read over
a full cache; scores come from its whole attention matrix; each KV head keeps what
its policy says; then the tail runs over what is left, all rows at once.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, models, pre_tokenizers

HERE = Path(__file__).resolve().parent
KEEP = [0.5, 0.25, 0.1]
ALWAYS = 1e30  # better than any score


class Model:
    """SmolLM2 in float32; K and V before they are cached are rotated in interleaved pairs, as the GGUF stores them."""

    def __init__(self, path):
        reader = GGUFReader(path)
        get = lambda key: reader.fields[key].contents()
        self.w = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
        for name, w in self.w.items():
            if w.ndim == 2:  # matrices are stored in f16 on the device
                self.w[name] = w.astype(np.float16).astype(np.float32)
        self.layers = get("llama.block_count")
        self.heads = get("llama.attention.head_count")
        self.kv_heads = get("llama.attention.head_count_kv")
        self.group = self.heads // self.kv_heads
        self.dim = get("llama.embedding_length") // self.heads
        self.eps = get("llama.attention.layer_norm_rms_epsilon")
        self.freq = get("llama.rope.freq_base") ** (-np.arange(0, self.dim, 2) / self.dim)
        vocab = {t: i for i, t in enumerate(get("tokenizer.ggml.tokens"))}
        merges = [tuple(m.split(" ")) for m in get("tokenizer.ggml.merges")]
        self.tok = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        self.tok.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )

    def norm(self, x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.w[name]

    def turn(self, x, angle):
        cos, sin = np.cos(angle), np.sin(angle)
        out = np.empty(np.broadcast_shapes(x.shape, cos.shape[:-1] + (self.dim,)), np.float32)
        out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return out

    def run(self, tokens, first, cache=None, watch=None):
        """Logits of every row, and K and V of every (layer, KV head) behind what `cache` has."""
        n, d = len(tokens), self.dim
        angle = np.outer(np.arange(first, first + n), self.freq)[:, None, :]
        x, grown = self.w["token_embd.weight"][tokens], {}
        causal = np.triu(np.ones((n, n), bool), 1)
        for layer in range(self.layers):
            name = lambda part: f"blk.{layer}.{part}.weight"
            h = self.norm(x, name("attn_norm"))
            q, k, v = ((h @ self.w[name(f"attn_{c}")].T).reshape(n, -1, d) for c in "qkv")
            if watch is not None:
                watch.queries(layer, q)
            q, k = self.turn(q, angle), self.turn(k, angle)
            out = np.empty((n, self.heads, d), np.float32)
            for head in range(self.kv_heads):
                keys, values = k[:, head], v[:, head]
                if cache is not None:
                    before = cache[layer, head]
                    keys, values = np.concatenate([before[0], keys]), np.concatenate([before[1], values])
                grown[layer, head] = keys, values
                for at in range(head * self.group, (head + 1) * self.group):
                    s = q[:, at] @ keys.T / np.sqrt(d)
                    s[:, len(keys) - n :][causal] = -np.inf
                    p = np.exp(s - s.max(-1, keepdims=True))
                    p /= p.sum(-1, keepdims=True)
                    if watch is not None:
                        watch.attention((layer, head), p / self.group)
                    out[:, at] = p @ values
            x = x + out.reshape(n, -1) @ self.w[name("attn_output")].T
            h = self.norm(x, name("ffn_norm"))
            gate = h @ self.w[name("ffn_gate")].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ self.w[name("ffn_up")].T)) @ self.w[name("ffn_down")].T
        x = self.norm(x, "output_norm.weight")
        return x @ self.w.get("output.weight", self.w["token_embd.weight"]).T, grown


class Watch:
    """Attention that tokens of the prefix receive (a mean over query heads), and queries before they are rotated."""

    def __init__(self):
        self.all, self.window, self.last, self.q = {}, {}, {}, {}

    def attention(self, at, p):
        for kept, part in [(self.all, p), (self.window, p[-32:]), (self.last, p[-1:])]:
            kept[at] = kept.get(at, 0) + part.sum(0)

    def queries(self, layer, q):
        self.q[layer] = q


def cosine(keys):
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    anchor = unit.mean(0)
    return unit @ anchor / np.linalg.norm(anchor)


def expected(model, keys, values, q, n, sink=4, future=512):
    """Expected Attention: a Gaussian of queries, turned to the mean of the coming positions."""
    angle = np.outer(np.arange(n, n + future), model.freq)
    cos, sin = np.cos(angle).mean(0), np.sin(angle).mean(0)
    turn = np.zeros((model.dim, model.dim))
    even, odd = np.arange(0, model.dim, 2), np.arange(1, model.dim, 2)
    turn[even, even], turn[odd, odd], turn[even, odd], turn[odd, even] = cos, cos, -sin, sin
    total = np.zeros(n)
    for head in range(q.shape[1]):
        rows = q[sink:, head].astype(np.float64)
        mean, cov = turn @ rows.mean(0), turn @ np.cov(rows.T, bias=True) @ turn.T
        z = keys @ mean / np.sqrt(model.dim) + np.einsum("ti,ij,tj->t", keys, cov, keys) / (2 * model.dim)
        p = np.exp(z[sink:] - z[sink:].max())
        total[sink:] += p / p.sum() / q.shape[1]
    total *= np.linalg.norm(values, axis=-1)
    total[:sink] = ALWAYS
    return total


def scores(model, policy, cache, watch, kept):
    """What every token of every (layer, KV head) is worth."""
    worth = {}
    for at, (keys, values) in cache.items():
        n = len(keys)
        if policy == "streaming":
            s = np.arange(n, dtype=float)
            s[:4] = ALWAYS
        elif policy == "h2o":
            s = watch.all[at].astype(float)
            s[n - kept // 2 :] = ALWAYS
        elif policy == "tova":
            s = watch.last[at].astype(float)
        elif policy in ("snapkv", "adakv"):
            s = np.convolve(watch.window[at], np.ones(5) / 5, "same").astype(float)
            s[-32:] = ALWAYS
        elif policy == "expected":
            group = slice(at[1] * model.group, (at[1] + 1) * model.group)
            s = expected(model, keys, values, watch.q[at[0]][:, group], n)
        elif policy in ("keydiff", "keydiff-per-head"):
            s = -cosine(keys).astype(float)
        elif policy == "knorm":
            s = -np.linalg.norm(keys, axis=-1).astype(float)
        worth[at] = s
    if policy in ("tova", "keydiff"):  # one choice for all heads of a layer
        for layer in range(model.layers):
            mean = sum(worth[layer, head] for head in range(model.kv_heads)) / model.kv_heads
            worth.update({(layer, head): mean for head in range(model.kv_heads)})
    return worth


def best(s, n):
    return np.sort(np.argsort(-s, kind="stable")[:n])


def choose(model, policy, worth, kept):
    if policy != "adakv":
        return {at: best(s, kept) for at, s in worth.items()}
    chosen = {}
    for layer in range(model.layers):  # heads compete above a fifth of the budget
        lists = [worth[layer, head].copy() for head in range(model.kv_heads)]
        for s in lists:
            s[best(s, max(kept // 5, 32))] += ALWAYS
        every = np.concatenate(lists)
        stays = np.zeros(len(every), bool)
        stays[best(every, kept * len(lists))] = True
        for head, mask in enumerate(np.split(stays, len(lists))):
            chosen[layer, head] = np.flatnonzero(mask)
    return chosen


def log_softmax(x):
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--text", type=Path, default=HERE / "alice.txt")
    parser.add_argument("--prefix", type=int, default=320)
    parser.add_argument("--tail", type=int, default=32)
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--keep", type=float, nargs="+", default=KEEP)
    args = parser.parse_args()
    model = Model(args.gguf)
    tokens = model.tok.encode(args.text.read_text(), add_special_tokens=False).ids
    policies = ["streaming", "h2o", "tova", "snapkv", "adakv", "expected", "keydiff", "keydiff-per-head", "knorm"]
    results = []
    for window in range(args.windows):
        at = window * (args.prefix + args.tail + 1)
        prefix, tail = tokens[at : at + args.prefix], tokens[at + args.prefix : at + args.prefix + args.tail]
        watch = Watch()
        _, cache = model.run(prefix, 0, watch=watch)
        full = log_softmax(model.run(tail, args.prefix, cache)[0])
        for policy in policies:
            for keep in args.keep:
                kept = int(np.ceil(args.prefix * keep))
                stays = choose(model, policy, scores(model, policy, cache, watch, kept), kept)
                left = {at: (k[stays[at]], v[stays[at]]) for at, (k, v) in cache.items()}
                other = log_softmax(model.run(tail, args.prefix, left)[0])
                kl = (np.exp(full) * (full - other)).sum(-1)
                same = float((full.argmax(-1) == other.argmax(-1)).mean())
                row = dict(window=window, policy=policy, keep=keep, mean_kl=float(kl.mean()), top1=same)
                results.append(row | dict(median_kl=float(np.median(kl)), max_kl=float(kl.max())))
                print("{window} {policy:17} {keep:4} mean {mean_kl:.5f} median {median_kl:.5f} "
                      "max {max_kl:.3f} top-1 {top1:.3f}".format(**results[-1]), flush=True)
    if args.out:
        short = [{k: r[k] for k in ("policy", "keep", "mean_kl", "median_kl")} for r in results]
        text = json.dumps(dict(prefix=args.prefix, tail=args.tail, results=short), indent=1)
        (args.out / "policies.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
