"""SPA's self-refinement: when it is on, and which labels it takes for noise.

Equation numbers are those of the paper (arXiv 2406.04412). The thresholded margins are beta-scaled
and extrapolated (eq. 11-12); margin < tau is the paper's p < tau with tau as a log-odds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_kernels import losses

MAX_WINDOW = 512
OFFICIAL_WINDOW = 50


@dataclass(frozen=True)
class Refinement:
    """The settings of one SPA round; the defaults are the paper's.

    alpha: share of a flagged pair's label that is reversed (eq. 10). lam: extrapolation strength
    lambda (eq. 12). k_percent: share of pairs to flag, in percent. tau, window, interval: how the
    threshold is found, see `NoiseDetector`. warmup_fraction: alpha is 0 in this first share of the
    steps, while policy and reference are too close for the detector to see anything.
    """

    alpha: float = 0.1
    lam: float = 0.5
    k_percent: float = 10.0
    tau: Literal["window", "dataset", "official"] = "window"
    window: int = 0
    interval: int = 0
    warmup_fraction: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise UserError(f"spa.alpha must lie between 0 and 1, not {self.alpha}")
        if not 0.0 <= self.k_percent <= 100.0:
            raise UserError(f"spa.k_percent must lie between 0 and 100, not {self.k_percent}")
        if self.lam < 0.0:
            raise UserError(f"spa.lambdas must not be negative, not {self.lam}")


class NoiseDetector:
    """Flags pairs during one round's training; nothing here waits for the device.

    tau by `Refinement.tau`:
    window: exact K-quantile of the last W pairs' margins seen before this optimiser step, 0 until W
        are seen; W = `window`, at most half of the round's pairs, or min(512, a quarter of them).
    dataset: exact K-quantile over all pairs of the round, scored when alpha switches on and then
        every `interval` steps (0: once).
    official: as the SPA code: the mean of the order statistics int(50 K) and int(50 K) + 1 of the
        last 50 micro-batch means, 0 until 50 are seen, renewed after every micro-batch; a margin
        that equals tau is flagged too.
    """

    def __init__(
        self, refine: Refinement, *, beta: float, num_pairs: int, steps: int, like: Tensor
    ) -> None:
        self.refine, self.beta, self.steps = refine, beta, steps
        # A window that the round cannot fill would leave tau at 0 and K without a say.
        widest = num_pairs // 2 if refine.window else min(MAX_WINDOW, num_pairs // 4)
        self.window = max(1, min(refine.window or widest, widest))
        self.alpha = 0.0
        self.tau = torch.zeros_like(like)
        self._seen = like.new_empty(0)
        self._means: deque[Tensor] = deque(maxlen=OFFICIAL_WINDOW)
        self._scored_at: int | None = None
        self._flagged: list[tuple[Sequence[int], Tensor]] = []
        self._start = (-1, self.tau, self._seen, self._means.copy(), 0)

    def begin_step(self, step: int, score: Callable[[], Tensor]) -> None:
        """Sets alpha for optimiser step `step` (from 0), and tau in `dataset` mode.

        `score` gives the extrapolated margins of all pairs of the round, nats without beta. For a
        step that begins again everything is as it was when it began first.
        """
        if step == self._start[0]:
            _, self.tau, self._seen, means, flagged = self._start
            self._means = means.copy()
            del self._flagged[flagged:]
            return
        off = step < self.refine.warmup_fraction * self.steps
        self.alpha = 0.0 if off else self.refine.alpha
        if not off and self.refine.tau == "dataset" and self._is_due(step):
            self.tau = quantile(self.beta * score(), self.refine.k_percent)
            self._scored_at = step
        self._start = (step, self.tau, self._seen, self._means.copy(), len(self._flagged))

    def _is_due(self, step: int) -> bool:
        interval = self.refine.interval
        return self._scored_at is None or (interval > 0 and step >= self._scored_at + interval)

    def loss(self) -> losses.spa:
        """The refined loss (eq. 10) as of now."""
        official = self.refine.tau == "official"
        return losses.spa(self.beta, self.alpha, self.tau, flag_equal=official)

    def observe(self, indices: Sequence[int], ext_margins: Tensor) -> dict[str, Tensor]:
        """Takes in a micro-batch: the pairs' indices and margins [P] (nats, no beta).

        Returns the metrics, summed over the pairs.
        """
        flagged, margins = self.loss().flagged(ext_margins), self.beta * ext_margins
        sums = {
            "spa/tau": self.tau * len(indices),
            "spa/flagged_share": flagged.to(margins.dtype).sum() if self.alpha else self.tau * 0,
            "spa/extrapolated_margin": margins.sum(),
        }
        if self.alpha > 0.0:
            self._flagged.append((indices, flagged))
        if self.refine.tau == "window":
            self._seen = torch.cat([self._seen, margins])
        elif self.refine.tau == "official":
            self._means.append(margins.mean())
            if len(self._means) == OFFICIAL_WINDOW:
                self.tau = _official_tau(torch.stack(list(self._means)), self.refine.k_percent)
        return sums

    def end_step(self) -> None:
        """Renews tau in `window` mode: here, so that it is the same for all micro-batches."""
        if self.refine.tau == "window":
            self._seen = self._seen[-self.window :]
            if len(self._seen) == self.window:
                self.tau = quantile(self._seen, self.refine.k_percent)

    def flags(self, num_pairs: int) -> list[bool | None]:
        """For each pair whether it was flagged when last trained on; None: alpha was 0."""
        flags: list[bool | None] = [None] * num_pairs
        for indices, flagged in self._flagged:
            for index, flag in zip(indices, flagged.tolist(), strict=True):
                flags[index] = flag
        return flags


def quantile(margins: Tensor, k_percent: float) -> Tensor:
    """The margin below which exactly floor(K percent) of `margins` [n] lie (ties aside), 0-d."""
    rank = min(math.floor(len(margins) * k_percent / 100), len(margins) - 1)
    return margins.kthvalue(rank + 1).values


def _official_tau(means: Tensor, k_percent: float) -> Tensor:
    low = min(int(len(means) * k_percent / 100), len(means) - 2)
    return means.sort().values[low : low + 2].mean()
