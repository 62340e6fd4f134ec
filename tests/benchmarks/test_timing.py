"""Interleaving, rotation and the statistics of rounds."""

import pytest
import torch

from benchmarks import timing


def test_every_round_starts_with_the_next_variant() -> None:
    assert [timing.rotation(["a", "b", "c"], turn) for turn in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def test_rounds_are_interleaved() -> None:
    order: list[str] = []

    def timer(name: str) -> float:
        order.append(name)
        return 1.0

    timers = {name: lambda name=name: timer(name) for name in "abc"}
    times = timing.interleave(timers, 3, lambda: float("inf"))
    assert "".join(order) == "abcbcacab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_interleaving_stops_early_but_not_before_three_rounds() -> None:
    left = iter([5.0, 1.0])
    times = timing.interleave({"a": lambda: 2.0}, 25, lambda: next(left))
    assert times == {"a": [2.0] * 4}


@pytest.mark.parametrize(
    ("seconds", "left", "rounds"),
    [
        (0.001, 1e9, 25),  # quick: more rounds than usual, but not without end
        (1.0, float("inf"), 10),
        (60.0, float("inf"), 5),
        (60.0, 245.0, 4),  # what is left allows fewer
        (60.0, 1.0, 3),  # whoever starts goes round three times
    ],
)
def test_number_of_rounds(seconds: float, left: float, rounds: int) -> None:
    assert timing.rounds_for(seconds, left) == rounds


def test_ratios_are_taken_within_a_round() -> None:
    # The machine became ten times slower from round to round; the ratio knows nothing of it.
    base = [2.0, 20.0, 200.0]
    assert timing.paired_ratio([1.0, 10.0, 100.0], base) == {
        "median": 0.5, "min": 0.5, "q1": 0.5, "q3": 0.5
    }  # fmt: skip


def test_spread() -> None:
    found = timing.spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert found == {"median": 3.0, "min": 1.0, "q1": 2.0, "q3": 4.0}


def test_a_call_on_the_cpu_is_timed_with_its_result() -> None:
    seconds, result = timing.time_call(lambda: sum(range(100_000)), "cpu")
    assert result == 4999950000 and 1e-5 < seconds < 1


@pytest.mark.gpu
@pytest.mark.parametrize("flush_l2", [False, True])
def test_a_call_on_the_gpu_is_timed_by_the_device(flush_l2: bool) -> None:
    x = torch.rand(4096, 4096, device="cuda")
    x @ x
    seconds, product = timing.time_call(lambda: x @ x, "cuda", flush_l2=flush_l2)
    # The host returns at once; between 1 and 1000 TFLOP/s is what devices do.
    assert 2 * 4096**3 / 1e15 < seconds < 2 * 4096**3 / 1e12
    assert product.shape == x.shape
