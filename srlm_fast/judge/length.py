"""Judges like long answers: two ways to keep pairs from teaching length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from srlm_fast.data.records import Sample

# DICE looks for its penalty on this grid (arXiv 2406.09760, section 3.2).
GRID = np.arange(1000) / 1000


@dataclass(frozen=True)
class Judged:
    """A candidate with its judge's `score`, and the `value` by which pairs are chosen."""

    value: float
    sample: Sample
    score: float

    @property
    def length(self) -> int:
        """Tokens of the response."""
        return len(self.sample.response_ids)

    def penalised(self, penalty: float) -> Judged:
        """With `penalty` taken from the value for every token."""
        return replace(self, value=self.score - penalty * self.length) if penalty else self


def balancing_penalty(groups: Sequence[Sequence[Judged]]) -> float:
    """What a token must cost for chosen and rejected responses, the best and the worst of each
    group, to differ least in their mean length (DICE); of several on `GRID` the smallest."""
    gaps = np.zeros(len(GRID))
    for group in groups:
        score = np.array([item.score for item in group])
        length = np.array([item.length for item in group])
        values = score - GRID[:, None] * length
        gaps += length[values.argmax(1)] - length[values.argmin(1)]
    return float(GRID[np.abs(gaps).argmin()])


def length_controlled(group: Sequence[Judged], rho: float) -> tuple[Judged, Judged]:
    """The shortest of those within `rho` of the best, and the longest of those within `rho` of the
    worst, in shares of the range of values (Meta-Rewarding, arXiv 2407.19594, section 2.2).

    rho = 0 is the best and the worst, the first of equals; it must be below 1/2.
    """
    values = [item.value for item in group]
    high, low = max(values), min(values)
    if rho == 0:
        return group[values.index(high)], group[values.index(low)]
    top = [item for item in group if item.value >= (1 - rho) * high + rho * low]
    bottom = [item for item in group if item.value <= (1 - rho) * low + rho * high]
    return min(top, key=lambda item: item.length), max(bottom, key=lambda item: item.length)
