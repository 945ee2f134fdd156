#!/usr/bin/env python3
"""Makes the golden files of this folder. See README.md for their contents.

    python make_golden.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --out .

Nothing here uses the Rust code. The model is read with the `gguf` package and
run in float64 with torch, in the Hugging Face weight layout (half-split RoPE);
the tokens come from llama.cpp through `llama_cpp` where that is installed, and
otherwise from the `tokenizers` package. The parts `attention` and `codecs` need
no model.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
MAX_BYTES = 64 * 1024
TOP = 1024
WINDOW = 256
WINDOWS = 4
CONTROL = 3  # llama.cpp's token type for special tokens

TOKEN_TEXTS = [
    # plain English
    "",
    "Hello",
    "Hello world",
    " Hello world",
    "The quick brown fox jumps over the lazy dog.",
    "\"Well,\" she said (quietly), \"that's that - isn't it?\"",
    # contractions
    "I'm sure we'll say they've gone, he'd know, it's theirs, you're late.",
    "DON'T SHOUT, I'M HERE; WE'LL SEE",
    "rock 'n' roll, o'clock, 'tis the dogs' dinner, it\u2019s",
    # digits
    "12345",
    "a1b22c333",
    "3.14159",
    "2024-02-29T23:59:60Z, 31/12/1999",
    "Call +44 20 7946 0018 or pay $1,299.00 (5% off).",
    " 7 8  9   10",
    # white space
    " ",
    "   ",
    "trailing space ",
    "trailing spaces   ",
    "  two leading, then   three   inside",
    "\tone\t\ttwo\t three \tfour",
    "\n",
    "line one\nline two\r\nline three\n\n\nline six\n",
    "a \n b\n  c \n\n  d\u00a0e\u3000f\u2009g",
    "    \n\n  x",
    "9 \n8\n\n7  6",
    # other scripts
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u5929\u662f2024\u5e745\u67081\u65e5\u3002",
    "\u3053\u3093\u306b\u3061\u306f\u3001\u30ab\u30bf\u30ab\u30ca\u3067\u3059",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u0643\u064a\u0641 \u0627\u0644\u062d\u0627\u0644\u061f",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    # emoji, with zero-width joiners, skin tones, a flag and a key cap
    "ok \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 "
    "\U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 1\ufe0f\u20e3",
    # precomposed and combining accents
    "caf\u00e9 cafe\u0301 na\u00efve Zu\u0308rich A\u030angstro\u0308m",
    # numbers outside ASCII
    "\u00bd cup, x\u00b2\u00b3, \u0663\u0664, \u2163, \u2460, \uff11\uff12",
    # code
    "def f(x):\n    if x > 10:\n        return x ** 2\n    return [i for i in range(x)]\n",
    "fn main() {\n\tlet v: Vec<u32> = (0..16).map(|i| i << 2).collect();\n\tprintln!(\"{v:?}\");\n}\n",
    "for (int i = 0; i != n; ++i) { a[i] += 0x1F; } // done...",
    "SELECT name, COUNT(*) FROM t_1 WHERE id >= 100 GROUP BY name;",
    "https://example.org/a/b_c?q=1&r=%20x#frag user@mail.example",
    # a long word, runs of one character, controls
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa==================----------",
    "a\x00b\x07c\x7fd\u200be\ufefff\ufffd",
    # bytes that have no token: llama.cpp drops them, but only after merging, so
    # they keep their neighbours apart; `tokenizers` drops them before and differs
    "wow!\x04! no.\x16.. \U000e5108\U00092219",
    # special tokens
    "<|im_start|>user\nHi there!<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nYou are 2 kind.<|im_end|>\n<|im_start|>user\n  Why?  <|im_end|>",
    "end <|endoftext|> start<|im_end|><|im_end|>  <|im_start|>",
    "not special: <|im_start> <im_start|> <|im_star t|> <| im_end |>",
]


class Gguf:
    """Metadata and float64 tensors of a llama-architecture GGUF file."""

    def __init__(self, path):
        self.path = str(path)
        self.reader = GGUFReader(path)
        self.tensors = {t.name: t for t in self.reader.tensors}

    def meta(self, key, default=None):
        field = self.reader.fields.get(key)
        return default if field is None else field.contents()

    def vector(self, name):
        """A norm weight: f32 in the file, kept as it is."""
        t = self.tensors[name]
        return torch.from_numpy(dequantize(t.data, t.tensor_type).astype(np.float64))

    def matrix(self, name):
        """A weight matrix [out, in], dequantised and rounded to f16."""
        t = self.tensors[name]
        w = dequantize(t.data, t.tensor_type).astype(np.float16)
        assert np.isfinite(w).all(), name
        return torch.from_numpy(w.astype(np.float64))


def unpermute(w, heads):
    """Undo the row order that the GGUF conversion gives to q and k.

    The conversion interleaves the two halves of every head, so that RoPE can
    turn adjacent pairs. This returns the original order, where RoPE turns
    element i together with element i + head_dim / 2.
    """
    rows, cols = w.shape
    half = rows // heads // 2
    return w.reshape(heads, half, 2, cols).transpose(1, 2).reshape(rows, cols)


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class Llama:
    """The whole forward pass in float64, without a KV cache."""

    def __init__(self, g):
        arch = g.meta("general.architecture")
        assert arch == "llama", arch
        key = lambda name, default=None: g.meta(f"{arch}.{name}", default)
        self.layers_n = int(key("block_count"))
        self.dim = int(key("embedding_length"))
        self.heads = int(key("attention.head_count"))
        self.kv_heads = int(key("attention.head_count_kv", self.heads))
        self.eps = float(key("attention.layer_norm_rms_epsilon"))
        self.base = float(key("rope.freq_base", 10000.0))
        self.head_dim = int(key("attention.key_length", self.dim // self.heads))
        assert int(key("rope.dimension_count", self.head_dim)) == self.head_dim
        assert "rope_freqs.weight" not in g.tensors and key("rope.scaling.type") in (None, "none")

        self.embed = g.matrix("token_embd.weight")
        self.output = g.matrix("output.weight") if "output.weight" in g.tensors else self.embed
        self.output_norm = g.vector("output_norm.weight")
        self.layers = []
        for i in range(self.layers_n):
            b = f"blk.{i}."
            self.layers.append({
                "attn_norm": g.vector(b + "attn_norm.weight"),
                "q": unpermute(g.matrix(b + "attn_q.weight"), self.heads),
                "k": unpermute(g.matrix(b + "attn_k.weight"), self.kv_heads),
                "v": g.matrix(b + "attn_v.weight"),
                "o": g.matrix(b + "attn_output.weight"),
                "ffn_norm": g.vector(b + "ffn_norm.weight"),
                "gate": g.matrix(b + "ffn_gate.weight"),
                "up": g.matrix(b + "ffn_up.weight"),
                "down": g.matrix(b + "ffn_down.weight"),
            })

    def norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight

    def logits(self, ids, first):
        """Logits [len(ids) - first, vocab] of the positions from `first` on."""
        n, d = len(ids), self.head_dim
        inv = self.base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        angle = torch.outer(torch.arange(n, dtype=torch.float64), inv)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos(), angle.sin()
        rope = lambda t: t * cos + rotate_half(t) * sin

        x = self.embed[torch.tensor(ids, dtype=torch.int64)]
        for w in self.layers:
            h = self.norm(x, w["attn_norm"])
            split = lambda m, heads: (h @ m.T).view(n, heads, d).transpose(0, 1)
            q = rope(split(w["q"], self.heads))
            group = self.heads // self.kv_heads
            k = rope(split(w["k"], self.kv_heads)).repeat_interleave(group, dim=0)
            v = split(w["v"], self.kv_heads).repeat_interleave(group, dim=0)
            a = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + a.transpose(0, 1).reshape(n, self.heads * d) @ w["o"].T
            h = self.norm(x, w["ffn_norm"])
            x = x + (torch.nn.functional.silu(h @ w["gate"].T) * (h @ w["up"].T)) @ w["down"].T
        return self.norm(x[first:], self.output_norm) @ self.output.T


class HfTokenizer:
    """Byte-level BPE of the `tokenizers` package, from the GGUF's vocabulary."""

    name = "tokenizers"

    def __init__(self, g):
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens = g.meta("tokenizer.ggml.tokens")
        types = g.meta("tokenizer.ggml.token_type")
        merges = [tuple(m.split(" ")) for m in g.meta("tokenizer.ggml.merges")]
        vocab = {t: i for i, t in enumerate(tokens)}
        self.tok = Tokenizer(models.BPE(vocab=vocab, merges=merges))
        self.tok.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ])
        self.tok.decoder = decoders.ByteLevel()
        self.tok.add_special_tokens([
            AddedToken(t, normalized=False, special=True)
            for t, kind in zip(tokens, types) if kind == CONTROL
        ])

    def encode(self, text):
        return self.tok.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.tok.decode(list(ids), skip_special_tokens=False)


class LlamaCppTokenizer:
    """llama.cpp's own tokenizer: no BOS, special tokens are parsed."""

    name = "llama.cpp"

    def __init__(self, g):
        import llama_cpp

        self.llm = llama_cpp.Llama(model_path=g.path, vocab_only=True, verbose=False)

    def encode(self, text):
        return self.llm.tokenize(text.encode("utf-8"), add_bos=False, special=True)


def write_tensors(path, tensors, **meta):
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path,
              metadata={k: str(v) for k, v in meta.items()})
    report(path)


def report(path):
    size = path.stat().st_size
    print(f"{path.name}: {size} bytes")
    assert size <= MAX_BYTES, f"{path.name} is larger than {MAX_BYTES} bytes"


def make_logits(out, model, tokenizer, decode):
    """Last-position logits of the prompts in prompts.json."""
    tensors, names = {}, []
    for i, prompt in enumerate(json.loads((HERE / "prompts.json").read_text("utf-8"))):
        ids = tokenizer.encode(prompt["text"])
        if prompt["limit"] is not None:
            assert len(ids) >= prompt["limit"], (prompt["name"], len(ids))
            ids = ids[: prompt["limit"]]
        logits = model.logits(ids, first=len(ids) - 1)[0]
        top = torch.topk(logits, TOP, sorted=True)
        lse = torch.logsumexp(logits, dim=0)
        tensors[f"tokens_{i}"] = np.array(ids, dtype=np.uint32)
        tensors[f"top_ids_{i}"] = top.indices.numpy().astype(np.uint16)
        tensors[f"top_logits_{i}"] = top.values.numpy().astype(np.float32)
        tensors[f"lse_{i}"] = np.array([lse.item()], dtype=np.float64)
        names.append(prompt["name"])
        kept = torch.exp(top.values - lse).sum().item()
        best = top.indices[0].item()
        gap = (top.values[0] - top.values[1]).item()
        print(f"  {i} {prompt['name']}: {len(ids)} tokens, top {best} {decode([best])!r} "
              f"p {math.exp(top.values[0] - lse):.4f}, gap {gap:.4f}, top-{TOP} mass {kept:.6f}")
    write_tensors(out / "logits.safetensors", tensors, prompts=",".join(names))


def attention_case(rng, heads, kv_heads, dim, kv_len, n_q):
    """Causal attention of the last n_q positions, in float64."""
    q = (2.0 * rng.standard_normal((n_q, heads, dim))).astype(np.float32)
    k = rng.standard_normal((kv_len, kv_heads, dim)).astype(np.float16)
    v = rng.standard_normal((kv_len, kv_heads, dim)).astype(np.float16)
    by_head = lambda a, rep: (torch.from_numpy(a.astype(np.float64)).transpose(0, 1)
                              .repeat_interleave(rep, dim=0))
    tq, tk, tv = by_head(q, 1), by_head(k, heads // kv_heads), by_head(v, heads // kv_heads)
    row = torch.arange(n_q)[:, None] + (kv_len - n_q)
    mask = torch.arange(kv_len)[None, :] <= row
    scale = 1.0 / math.sqrt(dim)
    o = torch.nn.functional.scaled_dot_product_attention(tq, tk, tv, attn_mask=mask, scale=scale)
    score = (tq @ tk.transpose(1, 2) * scale).masked_fill(~mask, -math.inf)
    # log2(sum(exp2(score * log2(e)))), the same as the natural one over ln 2
    lse = torch.logsumexp(score, dim=-1) / math.log(2.0)
    again = torch.exp2(score / math.log(2.0) - lse[..., None]) @ tv
    assert torch.allclose(o, again, rtol=0, atol=1e-12)
    return {
        "q": q, "k": k, "v": v,
        "o": o.transpose(0, 1).numpy().astype(np.float32),
        "lse": lse.transpose(0, 1).numpy().astype(np.float32),
    }


def make_attention(out):
    # (query heads, KV heads, head dim, kv_len, n_q)
    files = {
        "attention.safetensors": [(9, 3, 64, 33, 5), (8, 8, 64, 5, 1)],
        "attention_wide.safetensors": [
            (7, 1, 80, 21, 2), (8, 1, 96, 17, 1), (4, 1, 128, 19, 2), (3, 1, 256, 7, 1)],
    }
    rng = np.random.default_rng(20250207)
    i = 0
    for name, cases in files.items():
        tensors = {}
        for case in cases:
            for part, data in attention_case(rng, *case).items():
                tensors[f"case{i}_{part}"] = data
            i += 1
        write_tensors(out / name, tensors, sm_scale="1/sqrt(head_dim)", lse="base 2")


def codec_keys(rng, tokens, channels):
    """Keys as models have them: a steady part and noise, turned by position.

    Pair `i` is channels 2i and 2i + 1. The two outliers are in slow pairs, so
    they stay large at every token of the page.
    """
    steady = rng.standard_normal(channels)
    steady[[50, 60]] = [10.0, -10.0]
    x = steady + 0.7 * rng.standard_normal((tokens, channels))
    pair = (x[:, 0::2] + 1j * x[:, 1::2])
    inv = 10000.0 ** (-np.arange(0, channels, 2) / channels)
    pair = pair * np.exp(1j * np.outer(np.arange(tokens), inv))
    out = np.empty((tokens, channels))
    out[:, 0::2], out[:, 1::2] = pair.real, pair.imag
    return out.astype(np.float16)


def to_fp8(x):
    """float16 values that torch's e4m3 stands for, saturating at 448."""
    t = torch.from_numpy(x.astype(np.float32)).clamp(-448.0, 448.0)
    y = t.to(torch.float8_e4m3fn).to(torch.float32)
    assert torch.isfinite(y).all()
    return y.to(torch.float16).numpy()


def fp8_edges(rng, shape):
    """Half-way points between neighbours of e4m3, the float16 on either side of
    each, the ends of the range, and random values of all magnitudes.
    """
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64).numpy()
    assert grid[1] == 2.0 ** -9 and grid[126] == 448.0 and (np.diff(grid) > 0).all()
    tie = ((grid[1:] + grid[:-1]) / 2).astype(np.float16)
    assert (tie.astype(np.float64) == (grid[1:] + grid[:-1]) / 2).all(), "exact in float16"
    near = np.concatenate([tie, np.nextafter(tie, np.float16(0)), np.nextafter(tie, np.float16(1000))])
    signed = near * rng.choice(np.array([-1, 1], dtype=np.float16), near.size)
    ends = [0.0, 2.0 ** -24, 2.0 ** -10, 448.0, 463.75, 464.0, 464.25, 480.0, 1000.0, 65504.0]
    ends = np.array(ends + [-x for x in ends], dtype=np.float16)
    rest = math.prod(shape) - signed.size - ends.size
    wide = rng.choice([-1, 1], rest) * np.exp2(rng.uniform(-12, 9.5, rest))
    return np.concatenate([signed, ends, wide.astype(np.float16)]).reshape(shape)


def affine_codes(x, axis, levels):
    """Asymmetric codes of the groups along `axis`, as the papers write them."""
    x = x.astype(np.float64)
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    codes = np.round((x - low) / ((high - low) / levels))
    assert codes.min() == 0 and codes.max() == levels
    return codes.astype(np.uint8)


def kivi_codes(k, v, bits, group):
    """Keys per channel in groups of tokens, values per token in groups of channels."""
    (tokens, channels), levels = k.shape, 2 ** bits - 1
    keys = affine_codes(k.reshape(tokens // group, group, channels), 1, levels)
    values = affine_codes(v.reshape(tokens, channels // group, group), 2, levels)
    return keys.reshape(k.shape), values.reshape(v.shape)


def sign_vector(channels):
    """The signs of the rotation, from their definition: a hash of the channel."""
    signs = []
    for channel in range(channels):
        x = (channel + 1) * 0x9e3779b1 % 2 ** 32
        x ^= x >> 15
        signs.append(-1 if x * 0x85ebca6b % 2 ** 32 >= 2 ** 31 else 1)
    return np.array(signs, dtype=np.int8)


def sylvester(n):
    """The orthonormal Hadamard matrix of order n, a power of two."""
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    assert len(h) == n and (h @ h.T == n * np.eye(n)).all()
    return h / math.sqrt(n)


def lloyd_max(bits):
    """Levels and mean squared error of the best quantiser of a unit Gaussian."""
    density = lambda x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    below = lambda x: math.erfc(-x / math.sqrt(2)) / 2
    levels = np.linspace(-2, 2, 2 ** bits)
    for _ in range(100_000):
        edges = [-math.inf, *(levels[1:] + levels[:-1]) / 2, math.inf]
        mass = np.diff([below(e) for e in edges])
        moved = -np.diff([density(e) for e in edges]) / mass
        change, levels = np.abs(moved - levels).max(), moved
        if change < 1e-14:
            break
    # Every level is the mean of its cell: the error is what the levels lack in power.
    mse = 1 - (mass * levels ** 2).sum()
    # J. Max, Quantizing for Minimum Distortion (1960), table I
    assert abs(mse / {2: 0.1175, 3: 0.03454, 4: 0.009497}[bits] - 1) < 5e-4, mse
    return levels, mse


def lloyd_max_mse(y, bits):
    """Error over power of rows quantised to the levels times each row's rms."""
    levels, _ = lloyd_max(bits)
    unit = y / np.sqrt((y ** 2).mean(1, keepdims=True))
    nearest = levels[np.abs(unit[..., None] - levels).argmin(-1)]
    return (((nearest - unit) ** 2).mean(1) * (y ** 2).sum(1)).sum() / (y ** 2).sum()


def make_codecs(out):
    tokens, channels, group, rank = 64, 64, 32, 32
    rng = np.random.default_rng(20250321)
    k = codec_keys(rng, tokens, channels)
    v = rng.standard_normal((tokens, channels)).astype(np.float16)
    edges = fp8_edges(rng, (16, 32))
    (k4, v4), (k2, v2) = (kivi_codes(k, v, bits, group) for bits in (4, 2))
    signs = sign_vector(channels)
    rotate = lambda x: (x.astype(np.float64) * signs) @ sylvester(channels).T
    tensors = {
        "k": k, "v": v,
        "fp8_k": to_fp8(k), "fp8_edges": edges, "fp8_edges_decoded": to_fp8(edges),
        "int8_k": affine_codes(k, 1, 255), "int8_v": affine_codes(v, 1, 255),
        "kivi_k": k4 + 16 * k2, "kivi_v": v4 + 16 * v2,
        "signs": signs, "rotated_k": rotate(k).astype(np.float32),
    }
    for bits in (2, 3, 4):
        mse = [lloyd_max_mse(rotate(x), bits) for x in (k, v)]
        tensors[f"lloyd_max_mse_{bits}"] = np.array(mse)
        print(f"  Lloyd-Max, {bits} bits: {mse[0]:.6f} of K, {mse[1]:.6f} of V, "
              f"{lloyd_max(bits)[1]:.6f} of a Gaussian")
    singular = np.linalg.svd(v.astype(np.float64), compute_uv=False)
    tensors["low_rank_v"] = np.array([(singular[rank:] ** 2).sum()])
    print(f"  rank {rank}: {tensors['low_rank_v'][0]:.6f} of {(singular ** 2).sum():.6f}")
    write_tensors(out / "codecs.safetensors", tensors, group=group)


def make_perplexity(out, model, tokenizer):
    text = (HERE / "essay.txt").read_bytes().decode("utf-8")
    ids = tokenizer.encode(text)
    assert len(ids) >= WINDOW * WINDOWS
    half, per_window = WINDOW // 2, []
    for w in range(WINDOWS):
        part = ids[w * WINDOW:(w + 1) * WINDOW]
        logits = model.logits(part, first=half - 1)[:-1]
        target = torch.tensor(part[half:], dtype=torch.int64)
        nll = torch.nn.functional.cross_entropy(logits, target, reduction="mean")
        per_window.append(nll.item())
        print(f"  window {w}: nll {per_window[-1]:.6f}")
    mean = math.fsum(per_window) / WINDOWS
    path = out / "perplexity.json"
    path.write_text(json.dumps({
        "file": "essay.txt", "window": WINDOW, "windows": WINDOWS, "mean_nll": mean,
        "perplexity": math.exp(mean), "tokens": len(ids), "per_window_nll": per_window,
    }, indent=1) + "\n", "utf-8")
    print(f"  perplexity {math.exp(mean):.6f} over {len(ids)} tokens of text")
    report(path)


def make_tokens(out, tokenizer, other):
    rows, differ = [], 0
    texts = TOKEN_TEXTS + [p["text"] for p in json.loads((HERE / "prompts.json").read_text("utf-8"))]
    texts.append((HERE / "essay.txt").read_bytes().decode("utf-8"))
    for i, text in enumerate(texts):
        ids = [int(t) for t in tokenizer.encode(text)]
        if i < len(TOKEN_TEXTS):
            rows.append({"text": text, "ids": ids})
        theirs = other.encode(text)
        if ids != theirs:
            differ += 1
            print(f"  differs: {text[:80]!r}\n    {tokenizer.name}: {ids}\n    {other.name}: {theirs}")
    print(f"  {tokenizer.name} against {other.name}: {differ} of {len(texts)} texts differ")
    path = out / "tokens.json"
    body = ",\n".join(json.dumps(r, ensure_ascii=True, separators=(",", ":")) for r in rows)
    path.write_text(f"[\n{body}\n]\n", "utf-8")
    report(path)


def main():
    parts = ["logits", "attention", "codecs", "perplexity", "tokens"]
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--gguf", type=Path, help="the model file")
    p.add_argument("--out", type=Path, required=True, help="folder to write to")
    p.add_argument("--only", nargs="+", choices=parts, default=parts, help="make only these")
    p.add_argument("--tokenizer", choices=["llama.cpp", "tokenizers"], default="llama.cpp")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    if "attention" in args.only:
        make_attention(args.out)
    if "codecs" in args.only:
        make_codecs(args.out)
    if not set(args.only) - {"attention", "codecs"}:
        return
    if args.gguf is None:
        p.error("all parts but attention and codecs need --gguf")
    g = Gguf(args.gguf)
    hf = HfTokenizer(g)
    tokenizer = LlamaCppTokenizer(g) if args.tokenizer == "llama.cpp" else hf
    print(f"tokens from {tokenizer.name}")
    if "tokens" in args.only:
        make_tokens(args.out, tokenizer, hf)
    if "logits" in args.only or "perplexity" in args.only:
        with torch.no_grad():
            model = Llama(g)
            if "logits" in args.only:
                make_logits(args.out, model, tokenizer, hf.decode)
            if "perplexity" in args.only:
                make_perplexity(args.out, model, tokenizer)


if __name__ == "__main__":
    main()
