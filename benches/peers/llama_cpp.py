#!/usr/bin/env python3
"""Figures of llama.cpp, from programs that it comes with, under the case names of this project.

    python3 llama_cpp.py --backend-ops build/bin/test-backend-ops --json llama.json
    python3 llama_cpp.py --bench build/bin/llama-bench --model m.gguf --depth 1024 4096 --json llama.json
    python3 llama_cpp.py --backend-ops-log perf.txt --bench-log bench.json

`test-backend-ops perf -o FLASH_ATTN_EXT` times its own list of shapes with the host's clock, over one copy of its inputs, so
short shapes are read from the L2. Rows of one token become `decode/...`; others keep the names that it gives them.
`llama-bench -n` generates with one sequence behind `--depth` tokens, which becomes `step/1x<depth>/...`.
"""

import argparse
import json
import re
import subprocess
import sys

import figures

COLOR = re.compile(r"\x1b\[[0-9;]*m")
TIMED = re.compile(r"FLASH_ATTN_EXT\((?P<shape>.*)\):\s+(?P<runs>\d+) runs -\s+(?P<us>[\d.]+) us/run")
FIELD = re.compile(r"(\w+)=(\[[^\]]*\]|[^,]*)")
# Bits of an element with its share of scales.
BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0}


def tokens(n):
    """A number of tokens as case names have it."""
    return f"{n >> 10}k" if n % 1024 == 0 else str(n)


def attention_row(shape, us, runs):
    """One line of `test-backend-ops perf`."""
    fields = dict(FIELD.findall(shape))
    width, value_width, heads, kv, rows = (int(fields[key]) for key in ("hsk", "hsv", "nh", "kv", "nb"))
    group, batch = json.loads(fields["nr23"])
    k, v = (fields.get(key, fields.get("type_KV")) for key in ("type_K", "type_V"))
    codec = k if k == v else f"{k}-{v}"
    plain = (width == value_width, heads == 8, rows == 1, fields.get("sinks", "0") == "0")
    case = f"decode/{batch}x{tokens(kv)}/g{group}-d{width}/{codec}" if all(plain) else f"FLASH_ATTN_EXT({shape})"
    pairs = batch * heads * kv
    known = k in BITS and v in BITS
    bytes_read = pairs * (width * BITS[k] + value_width * BITS[v]) / 8 if known else 0
    seconds = {"median": us * 1e-6, "p10": us * 1e-6, "p90": us * 1e-6, "n": runs}
    flop = 2 * pairs * group * rows * (width + value_width)
    return {"case": case, "peer": "llama.cpp attention", "seconds": seconds, "bytes": bytes_read, "flop": flop}


def attention_rows(text):
    """What `test-backend-ops perf -o FLASH_ATTN_EXT` printed."""
    found = (TIMED.search(COLOR.sub("", line)) for line in text.splitlines())
    rows = [attention_row(m["shape"], float(m["us"]), int(m["runs"])) for m in found if m]
    if not rows:
        raise SystemExit("error: test-backend-ops printed no time of FLASH_ATTN_EXT; is the backend there? see its output")
    return rows


def step_rows(text):
    """What `llama-bench -o json` printed: seconds of a token where something was generated."""
    try:
        results = json.loads(text)
    except ValueError as error:
        raise SystemExit(f"error: llama-bench printed no JSON: {error}") from error
    rows = []
    for result in results:
        if not result.get("n_gen") or result.get("n_prompt"):
            continue
        k, v = result["type_k"], result["type_v"]
        cache = "full" if k == v == "f16" else k if k == v else f"{k}-{v}"
        seconds = figures.spread([ns * 1e-9 / result["n_gen"] for ns in result["samples_ns"]])
        case = f"step/1x{tokens(result.get('n_depth', 0))}/{cache}"
        name = f"llama.cpp {result.get('backends', '')}".strip()
        rows.append({"case": case, "peer": name, "seconds": seconds, "bytes": 0, "flop": 0})
    if not rows:
        raise SystemExit("error: llama-bench generated nothing: run it with -p 0 and -n above 0")
    return rows


def output_of(command):
    """What a program prints; its own words where it fails."""
    print("running:", " ".join(command), file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SystemExit(f"error: can not run '{command[0]}': {error.strerror}") from error
    if done.returncode != 0:
        raise SystemExit(f"error: '{command[0]}' ended with {done.returncode}: {done.stderr.strip()[-600:]}")
    return done.stdout


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise SystemExit(f"error: can not read '{path}': {error.strerror}") from error


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend-ops", metavar="PROGRAM", help="test-backend-ops")
    parser.add_argument("--backend", metavar="NAME", help="its backend, such as CUDA0 or Vulkan0")
    parser.add_argument("--backend-ops-log", metavar="FILE", help="what test-backend-ops printed elsewhere")
    parser.add_argument("--bench", metavar="PROGRAM", help="llama-bench")
    parser.add_argument("--bench-log", metavar="FILE", help="what llama-bench -o json printed elsewhere")
    parser.add_argument("--model", metavar="FILE", help="the model for llama-bench")
    parser.add_argument("--depth", nargs="+", type=int, default=[1024], metavar="TOKENS", help="tokens before the first one")
    parser.add_argument("--device", metavar="NAME", default="", help="the device's name, as `concertina devices` shows it")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file, or to standard output as -")
    options = parser.parse_args()
    if options.bench and not options.model:
        parser.error("--bench needs --model")
    if not (options.backend_ops or options.backend_ops_log or options.bench or options.bench_log):
        parser.error("nothing to run: name --backend-ops or --bench, or a log of them")
    return options


def main():
    options = arguments()
    rows = []
    if options.backend_ops:
        named = ["-b", options.backend] if options.backend else []
        rows += attention_rows(output_of([options.backend_ops, "perf", "-o", "FLASH_ATTN_EXT", *named]))
    if options.backend_ops_log:
        rows += attention_rows(read(options.backend_ops_log))
    if options.bench:
        depth = ",".join(map(str, options.depth))
        words = ["-m", options.model, "-p", "0", "-n", "64", "-d", depth, "-fa", "1", "-r", "5", "-o", "json"]
        rows += step_rows(output_of([options.bench, *words]))
    if options.bench_log:
        rows += step_rows(read(options.bench_log))
    for row in rows:
        print(figures.line(row), file=sys.stderr if options.json == "-" else sys.stdout)
    if options.json:
        report = {"kind": "peers", "peer": "llama.cpp", "device": options.device, "rows": rows}
        figures.write_json(options.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
