#!/usr/bin/env python3
"""One table of our figures and those of peers, case by case.

    python3 compare.py --ours kernels.json step.json --peers torch.json llama.json

Ours are what `concertina bench kernels --json` and `concertina bench step --json` wrote, the fastest candidate of each case.
A case whose codec no peer has is set beside the peers' f16 of the same shape, and marked so. `speed-up` is the peer's time
over ours: above 1 ours is faster.
"""

import argparse
import sys

import figures


def ours(reports):
    """{case: (seconds, candidate, part of the read ceiling)} of the fastest candidate."""
    best = {}
    for report in reports:
        for row in report.get("rows", []):
            measured = row.get("measured")
            if not measured:
                continue
            seconds = measured["seconds"]["median"]
            if row["case"] not in best or seconds < best[row["case"]][0]:
                best[row["case"]] = (seconds, row.get("candidate", ""), measured.get("of_read"))
    return best


def peers(reports):
    """{case: [(seconds, peer)]}, the fastest first."""
    found = {}
    for report in reports:
        for row in report["rows"]:
            if "seconds" in row:
                found.setdefault(row["case"], []).append((row["seconds"]["median"], row["peer"]))
    return {case: sorted(rows) for case, rows in found.items()}


def beside(case, found):
    """The peers' case to compare with, and whether it is that of another codec."""
    if case in found:
        return case, False
    kernel, _, codec = case.rpartition("/")
    for plain in ("f16", "full"):
        if codec != plain and f"{kernel}/{plain}" in found:
            return f"{kernel}/{plain}", True
    return None, False


def join(best, found):
    """Rows of the comparison, as dicts."""
    rows = []
    for case, (seconds, candidate, of_read) in best.items():
        with_case, other_codec = beside(case, found)
        for rank, (peer_seconds, peer) in enumerate(found.get(with_case, [])):
            rows.append({
                "case": case,
                "candidate": candidate,
                "seconds": seconds,
                "of_read": of_read,
                "peer": f"{peer} ({with_case.rpartition('/')[2]})" if other_codec else peer,
                "peer_seconds": peer_seconds,
                "speed_up": peer_seconds / seconds,
                "best_peer": rank == 0,
            })
    return rows


def device_of(report):
    """Its name: a word in the peers' reports, a part of the adapter in ours."""
    device = report.get("device", "")
    return device.get("adapter", device).get("name", "") if isinstance(device, dict) else device


def refuse_other_devices(reports):
    names = {name for name in map(device_of, reports) if name}
    if len(names) > 1:
        raise SystemExit(f"error: these figures are of different devices: {', '.join(sorted(names))}; see --any-device")


def show(rows):
    cells = [
        [
            row["case"],
            row["candidate"],
            figures.number(row["seconds"] * 1e6),
            "-" if row["of_read"] is None else f"{row['of_read'] * 100:.1f} %",
            row["peer"] + (" *" if row["best_peer"] else ""),
            figures.number(row["peer_seconds"] * 1e6),
            figures.number(row["speed_up"]),
        ]
        for row in rows
    ]
    return figures.table(["case", "candidate", "µs", "of read", "peer (* the fastest)", "its µs", "speed-up"], cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--peers", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--any-device", action="store_true", help="compare although devices have different names")
    parser.add_argument("--json", metavar="FILE", help="write the comparison to a file, or to standard output as -")
    options = parser.parse_args()
    our_reports, peer_reports = ([figures.read_json(path) for path in paths] for paths in (options.ours, options.peers))
    if not options.any_device:
        refuse_other_devices(our_reports + peer_reports)
    best, found = ours(our_reports), peers(peer_reports)
    rows = join(best, found)
    if not rows:
        return f"error: none of our {len(best)} cases is among the {len(found)} of the peers"
    out = sys.stderr if options.json == "-" else sys.stdout
    print(show(rows), file=out)
    used = {row["case"] for row in rows}
    alone = [sorted(set(best) - used), sorted(set(found) - {beside(case, found)[0] for case in best})]
    for whose, cases in zip(("ours", "the peers'"), alone):
        if cases:
            print(f"\nonly among {whose}: {', '.join(cases)}", file=out)
    if options.json:
        figures.write_json(options.json, {"kind": "peers compared", "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
