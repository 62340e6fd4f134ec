"""Training metrics that stay on the device until they are logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from srlm_fast.parallel import ALONE, Ranks

Log = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class Micro:
    """One micro-batch's contribution to an optimiser step.

    loss: 0-d, already divided by the pairs or response tokens of the whole step; the training loop
        calls its backward.
    count: the pairs or response tokens of this micro-batch.
    num_tokens: the tokens that went through the policy.
    sums: detached 0-d sums over the micro-batch, of the same names in every one; reported divided
        by the counts.
    """

    loss: Tensor
    count: int
    num_tokens: int
    sums: dict[str, Tensor] = field(default_factory=dict)


class Metrics:
    """Running sums of the steps since the last `read`; steps that were not taken are left out.

    like: 0-d, of the device and dtype of the losses. Each of several `ranks` adds what it computes;
    a rank may have nothing in a step, or ever.
    """

    def __init__(self, like: Tensor, ranks: Ranks = ALONE) -> None:
        self._like, self._ranks = like, ranks
        self._names: list[str] = []
        self._micros: list[Tensor] = []
        self._count = 0
        self._total: Tensor | None = None

    def add(self, micro: Micro) -> None:
        """Takes in a micro-batch of the step under way."""
        self._names = list(micro.sums)
        row = torch.stack([micro.loss.detach(), *micro.sums.values()])
        self._micros.append(row.to(self._like.dtype))
        self._count += micro.count

    def discard_step(self) -> None:
        """Forgets the step under way."""
        self._micros, self._count = [], 0

    def step_loss(self) -> Tensor:
        """0-d: this rank's part of the loss of the step under way."""
        return torch.stack([self._like, *(micro[0] for micro in self._micros)]).sum()

    def end_step(self, grad_norm: Tensor, taken: Tensor) -> None:
        """Closes a step; `grad_norm` and `taken` as `Optimizer.step` gives them."""
        nothing = self._like.new_zeros(1 + len(self._names))
        sums = torch.stack([nothing, *self._micros]).sum(0)
        norm = grad_norm.to(sums.dtype)[None]
        head = [norm, sums.new_ones(1), sums.new_full((1,), self._count)]
        row = torch.where(taken, torch.cat([*head, sums]), 0.0)
        if self._total is not None:  # from before this rank knew what is counted, it is shorter
            row[: len(self._total)] += self._total
        self._total = row
        self._micros, self._count = [], 0

    def state(self) -> dict[str, Any]:
        """What this rank has summed since the last read, between steps; for `restore`."""
        return {
            "names": self._names,
            "total": None if self._total is None else self._total.tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        self._names, total = state["names"], state["total"]
        self._total = None if total is None else self._like.new_tensor(total)

    def read(self) -> dict[str, float]:
        """Means since the last read, of one transfer: loss and grad_norm over steps, the rest over
        what they count on all ranks; NaN if no step was taken."""
        nothing = self._like.new_zeros(4 + len(self._names))
        total = nothing if self._total is None else self._total
        totals = self._ranks.gather([total.tolist()])
        names = max(self._ranks.gather([self._names]), key=len)
        self._total = None
        grad_norm, steps = totals[0][:2]  # the same on all ranks
        columns = zip_longest(*(total[2:] for total in totals), fillvalue=0.0)
        count, loss, *sums = map(sum, columns)
        taken, counted = steps or math.nan, count or math.nan
        means = {name: value / counted for name, value in zip(names, sums, strict=True)}
        return {"loss": loss / taken, "grad_norm": grad_norm / taken, **means}


class LateMeans:
    """Means over the steps from `start` on, of all `ranks`; micro-batches of which a sum is not
    finite are left out."""

    def __init__(self, start: int, ranks: Ranks = ALONE) -> None:
        self._start, self._ranks = start, ranks
        self._names: list[str] = []
        self._steps: dict[int, list[tuple[int, Tensor]]] = {}
        self._micros: list[tuple[int, Tensor]] = []

    def begin_step(self, step: int) -> None:
        """A step that begins again has nothing yet."""
        self._micros = []
        if step >= self._start:
            self._steps[step] = self._micros

    def add(self, count: int, sums: dict[str, Tensor]) -> None:
        """Takes in a micro-batch of the step under way: 0-d sums over what it counts."""
        self._names = list(sums)
        self._micros.append((count, torch.stack([*sums.values()])))

    def state(self) -> dict[str, Any]:
        """The steps of this rank, for `restore`."""
        steps = [(s, [(n, sums.tolist()) for n, sums in self._steps[s]]) for s in self._steps]
        return {"names": self._names, "steps": steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` gave."""
        self._names = state["names"]
        for step, micros in state["steps"]:
            # float64 holds the sums of any dtype.
            kept = [(count, torch.tensor(sums, dtype=torch.float64)) for count, sums in micros]
            self._steps[step] = kept

    def means(self) -> dict[str, float]:
        """By name; none where nothing was finite."""
        mine = [(n, sums.tolist()) for micros in self._steps.values() for n, sums in micros]
        names = max(self._ranks.gather([self._names]), key=len)
        rows = [(n, sums) for n, sums in self._ranks.gather(mine) if all(map(math.isfinite, sums))]
        count = sum(n for n, _ in rows)
        return {
            name: sum(sums[i] for _, sums in rows) / count for i, name in enumerate(names) if count
        }
