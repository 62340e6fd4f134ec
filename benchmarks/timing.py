"""Timing one call, and several calls fairly against each other."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

MIN_ROUNDS, USUAL_ROUNDS, MAX_ROUNDS = 3, 5, 25
ENOUGH_SECONDS = 10.0  # of timing per case, where the usual rounds take less


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_call(call: Callable[[], Any], device: str, *, flush_l2: bool = False) -> tuple[float, Any]:
    """Seconds that one call takes, and what it returned.

    CPU: perf_counter. CUDA: events around the call, so that the host's launch time counts only
    where the device waits for it. `flush_l2` overwrites the device's L2 cache first.
    """
    if device != "cuda":
        start = perf_counter()
        result = call()
        return perf_counter() - start, result
    if flush_l2:
        _l2_sized_buffer().zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, result


@functools.cache
def _l2_sized_buffer() -> torch.Tensor:
    size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def rounds_for(seconds_per_round: float, left: float) -> int:
    """How often to go round: 5 or more where `left` seconds allow it, never fewer than 3."""
    wanted = min(MAX_ROUNDS, max(USUAL_ROUNDS, int(ENOUGH_SECONDS / seconds_per_round)))
    affordable = int(min(left, 1e9) / seconds_per_round)
    return max(MIN_ROUNDS, min(wanted, affordable))


def rotation(names: list[str], turn: int) -> list[str]:
    """The order of one round: each starts with another variant, so none is always the first."""
    start = turn % len(names)
    return names[start:] + names[:start]


def interleave(
    timers: dict[str, Callable[[], float]], rounds: int, left: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every variant in every round: all variants once, in rotated order, then again.

    Drifts of the machine (clock, temperature, neighbours) so fall on all variants alike. Stops
    early, but not before three rounds, when another one would not fit into `left()` seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds):
        if turn >= MIN_ROUNDS and sum(max(t) for t in times.values()) > left():
            break
        for name in rotation(list(timers), turn):
            times[name].append(timers[name]())
    return times


def paired_ratio(times: list[float], base: list[float]) -> dict[str, float]:
    """Spread of time / base within each round: 0.5 is twice as fast as the base."""
    return spread([a / b for a, b in zip(times, base, strict=True)])


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest value and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "min": min(values), "q1": q1, "q3": q3}
