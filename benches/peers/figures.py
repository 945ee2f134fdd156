"""What all peers' figures have in common: rows, spreads, and tables.

A row is a dict with `case` and `peer`, and either `seconds` (median, p10, p90, n), `bytes` and `flop`, or `failed`: why there
is no figure. Case names are those of `concertina bench kernels --list` and of `concertina bench step`.
"""

import json
import math
import sys


def spread(values):
    """Median, p10 and p90 by the nearest rank, as the program's own."""
    if not values:
        raise ValueError("no time was measured")
    ordered = sorted(values)

    def at(percent):
        return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]

    return {"median": at(50), "p10": at(10), "p90": at(90), "n": len(ordered)}


def number(value):
    """Three digits that count."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return str(value)
    decimals = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{decimals}f}"


def table(header, rows):
    """Aligned columns; words to the left, numbers to the right."""
    cells = [header] + [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]

    def is_word(i):
        return any(line[i][:1].isalpha() for line in cells[1:])

    def show(line):
        padded = [c.ljust(w) if is_word(i) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))]
        return "  ".join(padded).rstrip()

    return "\n".join(show(line) for line in cells)


def line(row):
    """A row as soon as it is measured."""
    name = f"{row['case']:<32} {row['peer']:<28}"
    if "failed" in row:
        return f"{name} no figure: {row['failed']}"
    seconds = row["seconds"]
    us = " ".join(f"{number(seconds[key] * 1e6):>8}" for key in ("median", "p10", "p90"))
    rates = f"{number(row['bytes'] / seconds['median'] * 1e-9):>7} GB/s"
    rates += f" {number(row['flop'] / seconds['median'] * 1e-12):>7} TFLOP/s" if row["flop"] else ""
    error = f"  NMSE {row['nmse']:.0e}" if "nmse" in row else ""
    return f"{name} {us} µs {rates}{error}"


def write_json(path, report):
    """To a file, or to standard output where it is `-`."""
    text = json.dumps(report, indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def read_json(path):
    """A report, or a sentence that says why it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: can not read '{path}': {error}") from error
