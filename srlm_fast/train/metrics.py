"""Training metrics that stay on the device until they are logged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

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
    """Running sums of the steps since the last `read`; steps that were not taken are left out."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._micros: list[Tensor] = []
        self._count = 0
        self._total: Tensor | None = None

    def add(self, micro: Micro) -> None:
        """Takes in a micro-batch of the step under way."""
        self._names = list(micro.sums)
        self._micros.append(torch.stack([micro.loss.detach(), *micro.sums.values()]).float())
        self._count += micro.count

    def discard_step(self) -> None:
        """Forgets the step under way."""
        self._micros, self._count = [], 0

    def step_loss(self) -> Tensor:
        """0-d: the loss of the step under way."""
        return torch.stack([micro[0] for micro in self._micros]).sum()

    def end_step(self, grad_norm: Tensor, taken: Tensor) -> None:
        """Closes a step; `grad_norm` and `taken` as `Optimizer.step` gives them."""
        sums = torch.stack(self._micros).sum(0)
        head = [grad_norm.float()[None], sums.new_ones(1), sums.new_full((1,), self._count)]
        row = torch.where(taken, torch.cat([*head, sums]), 0.0)
        self._total = row if self._total is None else self._total + row
        self._micros, self._count = [], 0

    def read(self) -> dict[str, float]:
        """Means since the last read, of one transfer: loss and grad_norm over steps, the rest over
        what they count; NaN if no step was taken."""
        assert self._total is not None, "read() before any step"
        grad_norm, steps, count, loss, *sums = self._total.tolist()
        self._total = None
        steps, count = steps or math.nan, count or math.nan
        means = {name: value / count for name, value in zip(self._names, sums, strict=True)}
        return {"loss": loss / steps, "grad_norm": grad_norm / steps, **means}
