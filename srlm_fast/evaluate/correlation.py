"""Rank correlations and small statistics, exact and free of dependencies.

Sizes here are a few responses to a prompt, or a few thousand in all, so the quadratic form of
Kendall's tau is fast enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations


def mean(values: Sequence[float]) -> float | None:
    """The arithmetic mean, correctly rounded; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean, from the unbiased variance; None below two values."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    variance = math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def sign(value: float) -> int:
    """-1, 0 or 1."""
    return (value > 0) - (value < 0)


def average_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, ascending; equal values share the mean of the ranks they cover."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for position in order[start:stop]:
            ranks[position] = (start + 1 + stop) / 2
        start = stop
    return ranks


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The product-moment correlation; None if either side does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    dx, dy = [v - mean_x for v in x], [v - mean_y for v in y]
    return _dot(dx, dy) / math.sqrt(_dot(dx, dx) * _dot(dy, dy))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rho: the correlation of average ranks; None if either side does not vary."""
    return pearson(average_ranks(x), average_ranks(y))


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's tau-b, which corrects for ties; None if either side does not vary."""
    agreement = untied_x = untied_y = 0
    for i, j in combinations(range(len(x)), 2):
        order_x, order_y = sign(x[i] - x[j]), sign(y[i] - y[j])
        agreement += order_x * order_y
        untied_x += abs(order_x)
        untied_y += abs(order_y)
    if not untied_x or not untied_y:
        return None
    return agreement / math.sqrt(untied_x * untied_y)


def _dot(x: Sequence[float], y: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))
