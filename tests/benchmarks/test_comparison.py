"""One case: what is gated, what is timed, and what its rows say."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import ceilings
from benchmarks.case import Case, Work, relative_errors

Bench = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def rows(bench: Bench) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in bench("--only", "toy")}


def test_a_row_says_what_was_measured_and_where(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["double"]
    assert (row["op"], row["case"], row["params"]["n"]) == ("toy", "doubling", 1000)
    assert row["gate"] == {"ok": True, "errors": {"y": 0.0}, "tolerance": 1e-6}
    seconds, ratio = row["seconds"], row["ratio_to"]["add"]
    assert 3 <= seconds["rounds"] <= 25
    assert 0 < seconds["min"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"]
    assert 0 < ratio["q1"] <= ratio["median"] <= ratio["q3"]
    assert row["first_call_seconds"] > 0
    limit = row["ceiling"]
    assert limit["fraction"] == pytest.approx(limit["seconds"] / seconds["median"])
    assert row["skipped"] is None and row["threads"] == 1
    assert row["versions"]["torch"] == torch.__version__
    assert row["command"].startswith("python -m benchmarks --threads 1")
    assert row["cpu"] and row["commit"] and row["date"] and row["scheduler"]


def test_calls_are_those_of_gate_warm_up_and_rounds(bench: Bench) -> None:
    before = sys.modules["bench_toy"].CALLS.copy() if "bench_toy" in sys.modules else {}
    rounds = {r["variant"]: r["seconds"] for r in bench("--only", "toy")}["double"]["rounds"]
    assert sys.modules["bench_toy"].CALLS["double"] - before.get("double", 0) == 2 + rounds


def test_what_fails_the_gate_is_recorded_and_never_timed(bench: Bench) -> None:
    rows = {row["variant"]: row for row in bench("--only", "toy")}
    calls = sys.modules["bench_toy"].CALLS
    calls["wrong"] = 0
    rows = {row["variant"]: row for row in bench("--only", "toy")}
    assert calls["wrong"] == 1
    assert rows["wrong"]["gate"]["errors"]["y"] == pytest.approx(0.05, rel=1e-3)
    assert rows["not_a_number"]["gate"]["errors"] == {"y": "nan"}
    assert rows["silent"]["gate"]["errors"] == {"y": "inf"}
    assert rows["raises"]["gate"]["error"] == "RuntimeError: the kernel is broken"
    for name in ("wrong", "not_a_number", "silent", "raises"):
        assert rows[name]["gate"]["ok"] is False
        assert rows[name]["seconds"] is None and rows[name]["ratio_to"] is None


def test_what_is_not_installed_is_skipped_with_the_reason(rows: dict[str, dict[str, Any]]) -> None:
    row = rows["not_installed"]
    assert "a_package_that_nobody_has" in row["skipped"] and "ModuleNotFound" in row["skipped"]
    assert row["seconds"] is None and row["gate"] is None


def test_a_bound_is_timed_without_a_gate(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["bound"]["bound"] and rows["bound"]["seconds"] and not rows["add"]["bound"]


def test_relative_errors() -> None:
    want = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2), "c": torch.ones(2)}
    got = {"a": torch.tensor([3.0, 4.5]), "b": torch.zeros(2), "c": torch.ones(3), "d": want["c"]}
    assert relative_errors(got, want) == {"a": pytest.approx(0.1), "b": 0.0, "c": math.inf}


def test_the_ceiling_is_the_slower_of_products_and_copies() -> None:
    def case(flop: float, moved: float) -> Case:
        params = {"dtype": "float32", "device": "cpu"}
        work = Work(flop, moved, (64, 64, 64))
        return Case("op", "name", params, dict, {}, lambda i, c: {}, 0.0, work, ())

    products, copies = ceilings.ceiling(case(1e12, 1.0)), ceilings.ceiling(case(1.0, 1e12))
    assert products["bound"] == "gemm" and copies["bound"] == "copy"
    assert products["seconds"] == 1e12 / products["gemm_flop_per_s"]
    assert copies["seconds"] == 1e12 / copies["copy_bytes_per_s"]
    # Measured once a run: the same number for every row.
    assert products["gemm_flop_per_s"] == copies["gemm_flop_per_s"] > 1e6
