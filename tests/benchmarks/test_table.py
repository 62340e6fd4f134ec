"""Rows as Markdown."""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import table
from benchmarks.rows import RESULTS, read_rows

Bench = Callable[..., list[dict[str, Any]]]


def test_a_table_has_times_ratios_and_reasons(bench: Bench) -> None:
    rows = bench("--only", "toy")
    lines = table.render(rows).splitlines()
    assert lines[0].startswith("## ") and "1 threads" in lines[0]
    assert "### toy, doubling" in lines
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines if "|" in line}
    assert cells["variant"] == [
        "| variant", "median", "quartiles", "/ add", "peak MB", "of ceiling |"
    ]  # fmt: skip
    double = next(row for row in rows if row["variant"] == "double")
    assert cells["double"][1] == table.duration(double["seconds"]["median"])
    assert cells["double"][3] == f"{double['ratio_to']['add']['median']:.2f}"
    assert any(line.startswith("- not_installed: not run: a_package_that") for line in lines)
    assert "- raises: failed: RuntimeError: the kernel is broken" in lines
    widths = {line.count("|") for line in lines if "|" in line}
    assert widths == {7}


def test_the_last_of_repeated_rows_counts(bench: Bench) -> None:
    row = next(r for r in bench("--only", "toy") if r["variant"] == "add")
    later = row | {"seconds": row["seconds"] | {"median": 7.0}, "commit": "later"}
    assert "| add | 7 s |" in table.render([row, later])
    assert "7 s" not in table.render([later, row])


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.34, "12.3 s"), (0.5, "500 ms"), (0.0123, "12.3 ms"), (5e-6, "5 us")]
)
def test_durations(seconds: float, text: str) -> None:
    assert table.duration(seconds) == text


def test_committed_results_render() -> None:
    table.render([row for path in RESULTS.glob("*.jsonl") for row in read_rows(path)])
