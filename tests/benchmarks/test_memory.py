"""Peak memory of a call, measured in a child process."""

import importlib
from pathlib import Path

import pytest
import torch

from benchmarks import memory

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _bench_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))


def test_a_known_allocation_is_measured() -> None:
    megabytes = importlib.import_module("bench_toy").MEGABYTES
    peak, reason = memory.peak_on_cpu("bench_toy", "cpu", "doubling", "hungry", timeout=300)
    assert reason is None
    assert peak == pytest.approx(megabytes * 1e6, rel=0.1)


def test_what_stays_below_the_base_is_not_counted() -> None:
    peak, reason = memory.peak_on_cpu("bench_toy", "cpu", "doubling", "add", timeout=300)
    assert reason is None
    assert peak is not None and peak < 4e6


def test_a_child_that_fails_gives_the_reason() -> None:
    peak, reason = memory.peak_on_cpu(
        "bench_toy", "cpu", "doubling", "no such variant", timeout=300
    )
    assert peak is None
    assert reason is not None and "KeyError" in reason


def test_a_mark_that_cannot_be_reset_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, text: str) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", refuse)
    peak, reason = memory.measure_here(lambda: None)
    assert peak is None
    assert reason is not None and "cannot be reset" in reason and "read-only" in reason


@pytest.mark.gpu
def test_a_known_allocation_on_the_gpu_is_measured() -> None:
    x = torch.ones(1, device="cuda")
    peak, reason = memory.peak_on_gpu(lambda: torch.ones(10**8, device="cuda") * x)
    assert reason is None
    assert peak == pytest.approx(8e8, rel=0.02)
