"""SPA's self-refinement: when it is on, and which labels it takes for noise.

Equation numbers are those of the paper (arXiv 2406.04412). The thresholded margins are beta-scaled
and extrapolated (eq. 11-12); margin < tau is the paper's p < tau with tau as a log-odds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.parallel import ALONE, Ranks
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

    Each of several `ranks` observes its own pairs of a step. A window holds those of all, as if one
    rank had seen them; `official` knows its own rank's micro-batches only, as the SPA code does.
    """

    def __init__(
        self,
        refine: Refinement,
        *,
        beta: float,
        num_pairs: int,
        steps: int,
        like: Tensor,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self.refine, self.beta, self.steps = refine, beta, steps
        # A window that the round cannot fill would leave tau at 0 and K without a say.
        widest = num_pairs // 2 if refine.window else min(MAX_WINDOW, num_pairs // 4)
        self.window = max(1, min(refine.window or widest, widest))
        self.alpha = 0.0
        self.tau = torch.zeros_like(like)
        self._seen = like.new_empty(0)
        self._order: Sequence[int] = ()
        self._step: list[tuple[Sequence[int], Tensor]] = []
        self._means: deque[Tensor] = deque(maxlen=OFFICIAL_WINDOW)
        self._scored_at: int | None = None
        self._flagged: list[tuple[int, Sequence[int], Tensor]] = []
        self._start = (-1, self.tau, self._seen, self._means.copy(), 0)

    def begin_step(self, step: int, score: Callable[[], Tensor], order: Sequence[int] = ()) -> None:
        """Sets alpha for optimiser step `step` (from 0), and tau, but in `official` mode.

        `score` gives the extrapolated margins of all pairs of the round, nats without beta. `order`
        is the step's pairs on all ranks, in the order in which they enter a window; a single rank
        may leave it to `observe`. For a step that begins again everything is as it was when it
        began first.
        """
        if step == self._start[0]:
            _, self.tau, self._seen, means, flagged = self._start
            self._means, self._step = means.copy(), []
            del self._flagged[flagged:]
            return
        # Not at the end of a step, where a rank that ran out of memory would be waited for.
        self._move_window()
        self._order = order
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
            self._flagged.append((self._start[0], indices, flagged))
        if self.refine.tau == "window":
            self._step.append((indices, margins))
        elif self.refine.tau == "official" and indices:
            self._means.append(margins.mean())
            if len(self._means) == OFFICIAL_WINDOW:
                self.tau = _official_tau(torch.stack(list(self._means)), self.refine.k_percent)
        return sums

    def _move_window(self) -> None:
        """Takes the pairs of the step before into the window, and renews tau in `window` mode."""
        if self.refine.tau != "window":
            return
        margins = torch.cat([self._seen[:0], *(part for _, part in self._step)])
        if self._ranks.world > 1:  # each rank fills in its own pairs, and the sum has all
            place = {index: i for i, index in enumerate(self._order)}
            mine = [place[index] for indices, _ in self._step for index in indices]
            places = torch.tensor(mine, dtype=torch.int64).to(margins.device, non_blocking=True)
            margins = margins.new_zeros(len(place)).index_copy(0, places, margins)
            self._ranks.sum_([margins])
        self._step = []
        self._seen = torch.cat([self._seen, margins])[-self.window :]
        if len(self._seen) == self.window:
            self.tau = quantile(self._seen, self.refine.k_percent)

    def state(self) -> dict[str, Any]:
        """What the steps of this rank have left, between two of them; for `restore`."""
        return {
            "tau": float(self.tau),
            "seen": self._seen.tolist(),
            "order": list(self._order),
            "step": [(list(indices), margins.tolist()) for indices, margins in self._step],
            "means": [float(mean) for mean in self._means],
            "scored_at": self._scored_at,
            "flagged": [(step, list(indices), f.tolist()) for step, indices, f in self._flagged],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave; alpha follows from the next step's number."""
        like = self.tau
        self.tau, self._seen = like.new_tensor(state["tau"]), like.new_tensor(state["seen"])
        self._order, self._scored_at = state["order"], state["scored_at"]
        self._step = [(indices, like.new_tensor(margins)) for indices, margins in state["step"]]
        self._means.extend(like.new_tensor(mean) for mean in state["means"])
        self._flagged = [(step, i, like.new_tensor(f).bool()) for step, i, f in state["flagged"]]

    def flags(self, num_pairs: int) -> list[bool | None]:
        """For each pair whether it was flagged when last trained on; None: alpha was 0."""
        flags: list[bool | None] = [None] * num_pairs
        mine = [(step, list(indices), f.tolist()) for step, indices, f in self._flagged]
        for _, indices, flagged in sorted(self._ranks.gather(mine), key=lambda micro: micro[0]):
            for index, flag in zip(indices, flagged, strict=True):
                flags[index] = flag
        return flags


def quantile(margins: Tensor, k_percent: float) -> Tensor:
    """The margin below which exactly floor(K percent) of `margins` [n] lie (ties aside), 0-d."""
    rank = min(math.floor(len(margins) * k_percent / 100), len(margins) - 1)
    return margins.kthvalue(rank + 1).values


def _official_tau(means: Tensor, k_percent: float) -> Tensor:
    low = min(int(len(means) * k_percent / 100), len(means) - 2)
    return means.sort().values[low : low + 2].mean()
