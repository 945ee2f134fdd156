#!/usr/bin/env python3
"""Attention and products of PyTorch, measured as `concertina bench kernels` measures ours.

    python3 torch_peers.py --json torch.json
    python3 torch_peers.py --only decode/16x32k matvec
    python3 torch_peers.py --list

Protocol: the card is busy for 0.4 s before anything counts; a run reads inputs that no cache still holds, because runs take
turns over copies of 300 MB in all, or of five times the L2; times are CUDA events around each run, and all runs of a sample
wait behind a kernel that spins, so that the host is never what is measured; the median of 30. Outputs are compared with f64
before and after, and have to differ from what other inputs give.
"""

import argparse
import contextlib
import math
import sys
import time
import warnings

import figures

try:
    import torch
except ImportError as missing:
    sys.exit(f"error: PyTorch can not be imported ({missing}); install torch with CUDA")

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

WARM_UP_S = 0.4
SAMPLES = 30
COLD_BYTES = 300_000_000
# Host seconds of a warm-up at most, compilation aside.
MOST_WARM_UP_S = 3.0
# Normalised mean squared error that f16 products and f16 outputs stay below by far.
NMSE_LIMIT = 1e-5
KV_HEADS, GROUP, WIDTH = 8, 4, 128
SHAPE = f"g{GROUP}-d{WIDTH}"

DECODE = [("16x4k", 16, 4 << 10), ("16x32k", 16, 32 << 10), ("1x128k", 1, 128 << 10)]
PREFILL = [("1k", 1 << 10), ("4k", 4 << 10), ("16k", 16 << 10)]
PRODUCTS = [("matmul", 1024, 4096, 4096)] + [
    ("matvec", rows, k, cols) for k, cols in [(4096, 4096), (4096, 14336), (576, 1536)] for rows in (1, 4, 16)
]


class Unsupported(Exception):
    """A case that this backend does not run."""


class Timer:
    """Times of single runs on the device."""

    # At least the clock of any card: a spin is longer rather than shorter.
    CYCLES_PER_S = 2.5e9

    def __init__(self):
        self.host_s_per_run = 2e-4

    def times(self, run, first, n):
        """Seconds of `run(first)`, `run(first + 1)`, ...; none of them waits for the host."""
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
        spin_s = 2 * n * self.host_s_per_run + 1e-3
        torch.cuda._sleep(int(spin_s * self.CYCLES_PER_S))
        started = time.perf_counter()
        for i, (begin, end) in enumerate(events):
            begin.record()
            run(first + i)
            end.record()
        self.host_s_per_run = (time.perf_counter() - started) / n
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in events]


def measure(timer, run):
    """Spread of the seconds of a run; `run(i)` reads copy `i` of its inputs."""
    run(0)  # compiles, chooses algorithms
    torch.cuda.synchronize()
    timer.host_s_per_run = 2e-4
    started, busy, turn, n = time.perf_counter(), 0.0, 1, 1
    while busy < WARM_UP_S and time.perf_counter() - started < MOST_WARM_UP_S:
        times = timer.times(run, turn, n)
        turn, busy = turn + n, busy + sum(times)
        n = max(1, min(64, int(0.02 / max(times[-1], 1e-6))))
    times = []
    while len(times) < SAMPLES:
        batch = min(SAMPLES - len(times), max(n, 5))
        times += timer.times(run, turn, batch)
        turn += batch
    return figures.spread(times)


def copies(bytes_of_one, cold_bytes):
    """How often inputs are there."""
    return max(1, math.ceil(cold_bytes / bytes_of_one))


def nmse(got, want):
    """Normalised mean squared error."""
    got, want = got.double().flatten(), want.double().flatten()
    return ((got - want).square().sum() / want.square().sum()).item()


def checked(got, want, other):
    """The error of a result; `other` is what other inputs give, so that the comparison can fail."""
    error = nmse(got, want)
    if not error <= NMSE_LIMIT:
        raise AssertionError(f"wrong: the NMSE is {error:.1e}; at most {NMSE_LIMIT:.0e} is allowed")
    if nmse(got, other) <= NMSE_LIMIT:
        raise AssertionError("the check can not tell this result from that of other inputs")
    return error


def attend(q, k, v, causal_first=None):
    """Attention in f64: q [rows, D] over k, v [tokens, D]; row i sees tokens up to causal_first + i where that is given."""
    scores = q.double() @ k.double().T / math.sqrt(q.shape[-1])
    if causal_first is not None:
        seen = torch.arange(k.shape[0], device=k.device)[None, :] <= causal_first + torch.arange(
            q.shape[0], device=q.device
        ).unsqueeze(1)
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v.double()


@contextlib.contextmanager
def backend(which):
    """One backend of SDPA alone; where it refuses, its warnings are the reason."""
    with warnings.catch_warnings(record=True) as said, sdpa_kernel(which):
        warnings.simplefilter("always")
        try:
            yield
        except RuntimeError as error:
            why = "; ".join(str(w.message).split(" (Triggered")[0].strip() for w in said)
            raise Unsupported(f"{error} {why}".strip()[:400]) from error


def sdpa(which, causal):
    """SDPA as it is."""
    name = {SDPBackend.FLASH_ATTENTION: "sdpa flash", SDPBackend.CUDNN_ATTENTION: "sdpa cudnn"}[which]

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return name, lambda: backend(which), attention


def sdpa_of_rows(which):
    """SDPA with the query heads of a KV head as rows of one head: the same of one token, and nothing is repeated."""
    name, context, _ = sdpa(which, False)

    def attention(q, k, v):
        rows = q.view(q.shape[0], KV_HEADS, GROUP, WIDTH)
        return F.scaled_dot_product_attention(rows, k, v).view_as(q)

    return f"{name}, heads as rows", context, attention


def flex():
    """FlexAttention, compiled for one shape."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    return "flex", contextlib.nullcontext, lambda q, k, v: compiled(q, k, v, enable_gqa=True)


class Decode:
    """One row of each sequence over a contiguous cache: q [B, 32, 1, D]; k, v [B, 8, S, D]."""

    def __init__(self, batch, tokens, device, cold_bytes):
        self.batch, self.tokens = batch, tokens
        made = torch.Generator(device=device).manual_seed(13)

        def tensor(*shape):
            return torch.randn(*shape, generator=made, device=device, dtype=torch.float16)

        # Larger queries make attention uneven, so that a wrong token shows.
        self.q = tensor(batch, KV_HEADS * GROUP, 1, WIDTH) * 2
        cache_bytes = 4 * batch * KV_HEADS * tokens * WIDTH
        self.caches = [
            tuple(tensor(batch, KV_HEADS, tokens, WIDTH) for _ in range(2)) for _ in range(copies(cache_bytes, cold_bytes))
        ]
        self.bytes = cache_bytes + 4 * self.q.numel()
        self.flop = 4 * batch * tokens * KV_HEADS * GROUP * WIDTH

    def run(self, attention, i):
        return attention(self.q, *self.caches[i % len(self.caches)])

    def check(self, out, i):
        k, v = self.caches[i % len(self.caches)]
        b, h = self.batch - 1, KV_HEADS - 2
        heads = slice(h * GROUP, (h + 1) * GROUP)
        q = self.q[b, heads, 0]
        return checked(out[b, heads, 0], attend(q, k[b, h], v[b, h]), attend(q, k[b, h + 1], v[b, h + 1]))


class Prefill:
    """A whole prompt, causal: q [1, 32, S, D]; k, v [1, 8, S, D]."""

    def __init__(self, tokens, device, cold_bytes):
        self.tokens = tokens
        made = torch.Generator(device=device).manual_seed(17)

        def tensor(heads):
            return torch.randn(1, heads, tokens, WIDTH, generator=made, device=device, dtype=torch.float16)

        self.bytes = 4 * tokens * WIDTH * (KV_HEADS + KV_HEADS * GROUP)
        n = copies(self.bytes, cold_bytes)
        self.inputs = [(tensor(KV_HEADS * GROUP) * 2, tensor(KV_HEADS), tensor(KV_HEADS)) for _ in range(n)]
        self.flop = 4 * KV_HEADS * GROUP * WIDTH * tokens * (tokens + 1) // 2

    def run(self, attention, i):
        return attention(*self.inputs[i % len(self.inputs)])

    def check(self, out, i):
        q, k, v = self.inputs[i % len(self.inputs)]
        h, first = KV_HEADS - 2, self.tokens // 2
        rows = slice(first, first + 8)
        want = [attend(q[0, h * GROUP, rows], k[0, kv], v[0, kv], first) for kv in (h, h + 1)]
        return checked(out[0, h * GROUP, rows], *want)


class Product:
    """y [rows, cols] = x [rows, k] times w [cols, k] transposed."""

    def __init__(self, rows, k, cols, device, cold_bytes):
        made = torch.Generator(device=device).manual_seed(23)

        def tensor(*shape):
            return torch.randn(*shape, generator=made, device=device, dtype=torch.float16)

        self.x = tensor(rows, k)
        self.w = [tensor(cols, k) for _ in range(copies(2 * cols * k, cold_bytes))]
        self.bytes, self.flop = 2 * (cols * k + rows * (k + cols)), 2 * rows * k * cols

    def run(self, product, i):
        return product(self.x, self.w[i % len(self.w)])

    def check(self, out, i):
        w = self.w[i % len(self.w)].double()
        return checked(out, self.x.double() @ w.T, self.x.double() @ w.roll(1, 0).T)


class Ceiling:
    """A GiB that is read, or copied."""

    def __init__(self, copied, device, n_bytes=1 << 30):
        self.copied = copied
        self.source = torch.randint(0, 3, (n_bytes // 4,), device=device, dtype=torch.int32).float()
        self.target = torch.empty_like(self.source) if copied else None
        self.bytes, self.flop = n_bytes * (2 if copied else 1), 0

    def run(self, _, _i):
        return self.target.copy_(self.source) if self.copied else self.source.sum()

    def check(self, out, _):
        if self.copied:
            return checked(out, self.source, self.source.roll(1))
        exact = self.source.sum(dtype=torch.float64)
        # A sum of so many f32 is off by its roundings; a missing thousandth of the numbers is more.
        return checked(out, exact, exact * 0.99)


def attention_peers(kind, names):
    """(name, context, function) of those that are asked for."""
    which = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if kind == "prefill":
        return [sdpa(one, True) for one in which]
    peers = [make(one) for one in which for make in (lambda w: sdpa(w, False), sdpa_of_rows)]
    return [flex()] if names == "compiled" else peers


def plan(device, cold_bytes):
    """(case, maker of inputs, peers), what compiles last."""
    linear = [("cublas f16", contextlib.nullcontext, F.linear)]
    torch_itself = [("torch", contextlib.nullcontext, None)]
    cases = [("ceiling/read", lambda: Ceiling(False, device), torch_itself)]
    cases.append(("ceiling/copy", lambda: Ceiling(True, device), torch_itself))
    for name, rows, k, cols in PRODUCTS:
        made = lambda r=rows, k=k, c=cols: Product(r, k, c, device, cold_bytes)  # noqa: E731
        cases.append((f"{name}/{rows}x{k}x{cols}", made, linear))
    for name, tokens in PREFILL:
        made = lambda n=tokens: Prefill(n, device, cold_bytes)  # noqa: E731
        cases.append((f"prefill/{name}/{SHAPE}/f16", made, attention_peers("prefill", "sdpa")))
    for names in ("sdpa", "compiled"):
        for name, batch, tokens in DECODE:
            made = lambda b=batch, n=tokens: Decode(b, n, device, cold_bytes)  # noqa: E731
            cases.append((f"decode/{name}/{SHAPE}/f16", made, attention_peers("decode", names)))
    return cases


def figure(timer, case, inputs, peer):
    """One row."""
    name, context, function = peer
    row = {"case": case, "peer": name}
    try:
        with context(), torch.inference_mode():
            before = inputs.check(inputs.run(function, 0), 0)
            seconds = measure(timer, lambda i: inputs.run(function, i))
            after = inputs.check(inputs.run(function, 1), 1)
        return row | {"seconds": seconds, "bytes": inputs.bytes, "flop": inputs.flop, "nmse": max(before, after)}
    except AssertionError as error:
        return row | {"failed": str(error), "wrong": True}
    except Exception as error:  # noqa: BLE001  a backend may refuse in any way; the reason is what is shown
        return row | {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file, or to standard output as -")
    parser.add_argument("--only", nargs="+", metavar="PART", default=[], help="cases whose name contains a part")
    parser.add_argument("--limit", type=float, default=45.0, metavar="SECONDS", help="begin nothing after this time")
    parser.add_argument("--list", action="store_true", help="name the cases")
    return parser.parse_args()


def main():
    options = arguments()
    started = time.perf_counter()
    if not options.list and not torch.cuda.is_available():
        return f"error: torch {torch.__version__} sees no CUDA device: these figures need one"
    device = "cpu" if options.list else "cuda"
    properties = None if options.list else torch.cuda.get_device_properties(0)
    cold_bytes = 0 if options.list else max(COLD_BYTES, 5 * getattr(properties, "L2_cache_size", 0))
    cases = [c for c in plan(device, cold_bytes) if not options.only or any(part in c[0] for part in options.only)]
    if not cases:
        return f"error: no case is named {' or '.join(options.only)}; see --list"
    if options.list:
        print("\n".join(dict.fromkeys(case for case, _, _ in cases)))
        return 0
    cudnn = torch.backends.cudnn.version()
    peer = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
    out = sys.stderr if options.json == "-" else sys.stdout
    print(f"{properties.name}: {peer}; {'µs: median, p10, p90':>40}", file=out, flush=True)
    timer, rows = Timer(), []

    def take(row):
        rows.append(row)
        print(figures.line(row), file=out, flush=True)

    for case, make, peers in cases:
        inputs = None
        for one in peers:
            if time.perf_counter() - started > options.limit:
                take({"case": case, "peer": one[0], "failed": f"not begun: {options.limit:.0f} s were over (--limit)"})
                continue
            try:
                inputs = inputs or make()
            except RuntimeError as error:
                take({"case": case, "peer": one[0], "failed": f"no inputs: {str(error).splitlines()[0]}"})
                continue
            take(figure(timer, case, inputs, one))
        del inputs
        torch.cuda.empty_cache()
    if options.json:
        protocol = {"warm_up_s": WARM_UP_S, "samples": SAMPLES, "cold_bytes": cold_bytes, "timed_by": "CUDA events"}
        report = {"kind": "peers", "peer": peer, "device": properties.name, "protocol": protocol, "rows": rows}
        figures.write_json(options.json, report)
    print(f"{time.perf_counter() - started:.0f} s in all", file=out)
    wrong = sum("wrong" in row for row in rows)
    return f"error: {wrong} results are wrong" if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
