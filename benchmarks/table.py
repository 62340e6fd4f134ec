"""Rows of results as Markdown tables, one per case, grouped by device.

python -m benchmarks.table [FILE ...]       # default: results/*.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.rows import RESULTS, Row, key, read_rows


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables of the named files, or of all results."""
    names = sys.argv[1:] if arguments is None else arguments
    paths = [Path(name) for name in names] or sorted(RESULTS.glob("*.jsonl"))
    print(render([row for path in paths for row in read_rows(path)]))


def render(rows: list[Row]) -> str:
    """Markdown. Of repeated rows the last counts; results of another kind are passed over."""
    latest = {key(row): row for row in rows if "case" in row}
    devices: dict[str, dict[tuple[str, str], list[Row]]] = {}
    for row in latest.values():
        cases = devices.setdefault(_device(row), {})
        cases.setdefault((row["op"], row["case"]), []).append(row)
    lines: list[str] = []
    for device, cases in devices.items():
        lines += [f"## {device}", ""]
        for (op, case), group in cases.items():
            lines += [f"### {op}, {case}", "", *_table(group), ""]
    return "\n".join(lines)


def _device(row: Row) -> str:
    if row["params"]["device"] == "cuda":
        return str(row["gpu"])
    policy = "" if row["scheduler"] == "other" else f", scheduler {row['scheduler']}"
    return f"{row['cpu']}, {row['threads']} threads{policy}"


def _table(group: list[Row]) -> list[str]:
    timed = [row for row in group if row["seconds"] is not None]
    named = {base for row in timed for base in row["ratio_to"]}
    bases = [row["variant"] for row in timed if row["variant"] in named]
    head = ["variant", "median", "quartiles", *(f"/ {b}" for b in bases), "peak MB", "of ceiling"]
    lines = [head, ["---"] * len(head)]
    for row in timed:
        s, ratios = row["seconds"], row["ratio_to"]
        cells = [row["variant"], duration(s["median"])]
        cells += [f"{duration(s['q1'])} to {duration(s['q3'])}"]
        cells += [f"{ratios[base]['median']:.2f}" if base in ratios else "" for base in bases]
        lines += [[*cells, _megabytes(row), f"{row['ceiling']['fraction']:.0%}"]]
    reasons = [f"- {row['variant']}: {why_not(row)}" for row in group if row["seconds"] is None]
    table = [f"| {' | '.join(cells)} |" for cells in lines] if timed else []
    return table + ["", *reasons] * bool(reasons)


def one_line(row: Row) -> str:
    """A row as it is printed while a run goes on."""
    if row["seconds"] is None:
        return f"  {row['variant']}: {why_not(row)}"
    ratios = ", ".join(f"{r['median']:.2f} x {b}" for b, r in row["ratio_to"].items())
    peak = f", {_megabytes(row)} MB" if row["peak_bytes"] is not None else ""
    ceiling = f", {row['ceiling']['fraction']:.0%} of the ceiling"
    return f"  {row['variant']}: {duration(row['seconds']['median'])}{peak}{ceiling}; {ratios}"


def why_not(row: Row) -> str:
    """Why a row has no time."""
    if row["skipped"] is not None:
        return f"not run: {row['skipped']}"
    return f"failed: {row['gate']['error']}"


def duration(seconds: float) -> str:
    """Three digits, with the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _megabytes(row: Row) -> str:
    return "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"


if __name__ == "__main__":
    main()
