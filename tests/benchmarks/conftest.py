"""The command line of the benchmarks, run on bench files that lie beside the tests."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.rows import read_rows

HERE = Path(__file__).parent
Bench = Callable[..., list[dict[str, Any]]]


class Clock:
    """The real clock, and it can be put forward."""

    def __init__(self) -> None:
        self.now, self.ahead = time.perf_counter, 0.0

    def read(self) -> float:
        return self.now() + self.ahead

    def sleep(self, seconds: float) -> None:
        self.ahead += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """For budgets, timers and `bench_sleep`, whose seconds then pass at once."""
    monkeypatch.syspath_prepend(str(HERE))
    clock = Clock()
    monkeypatch.setattr("bench_sleep.sleep", clock.sleep)
    monkeypatch.setattr("benchmarks.budget.monotonic", clock.read)
    monkeypatch.setattr("benchmarks.timing.perf_counter", clock.read)
    return clock


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """`bench(*arguments)` runs the smoke suite of the bench files here; returns the rows so far."""
    monkeypatch.syspath_prepend(str(HERE))

    def run(*arguments: str, folder: Path = HERE) -> list[dict[str, Any]]:
        path = tmp_path / "rows.jsonl"
        assert main(["--threads", "1", "--json", str(path), *arguments], folder) == 0
        return read_rows(path)

    return run
