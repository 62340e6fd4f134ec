"""What a preference loss is given, and what every loss here is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """What is known of P pairs; every field is [P], fp32 (fp64 for fp64 inputs).

    Sums of token log-probabilities over the response under the policy, the reference and the
    extrapolated logits (the last two never carry gradients), and the number of scored tokens.
    Without a reference its sums are 0; without extrapolation `ext_*` are the policy's sums.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    ext_chosen: Tensor
    ext_rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        return self.chosen_ratio - self.rejected_ratio

    @property
    def ext_margin(self) -> Tensor:
        """The margin with the extrapolated policy in the policy's place."""
        return (self.ext_chosen - self.ref_chosen) - (self.ext_rejected - self.ref_rejected)

    @property
    def mean_margin(self) -> Tensor:
        """The margin of the log-ratios per token; an empty response counts as one token."""
        chosen = self.chosen_ratio / self.chosen_len.clamp(min=1)
        return chosen - self.rejected_ratio / self.rejected_len.clamp(min=1)


class WrittenLoss:
    """Keeps a loss written down: `text` is its name and its options in order, as JSON."""

    text: str

    def __post_init__(self) -> None:
        # Written when the loss is made. To a compiled function a string is a constant, but a float
        # may be an input of the graph, which nothing can print.
        options = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        parts = [f'"{type(self).__name__}"', *map(_json, options)]
        object.__setattr__(self, "text", f"[{', '.join(parts)}]")


def _json(option: object) -> str:
    if isinstance(option, Tensor):
        return '"tensor"'  # a placeholder: tensors travel beside the text
    if isinstance(option, bool):
        return "true" if option else "false"
    if isinstance(option, (int, float)):
        return f"{float(option)}".replace("inf", "Infinity").replace("nan", "NaN")
    return getattr(option, "text", "null")


@dataclass(frozen=True)
class PairLoss(WrittenLoss):
    """Base of the losses.

    `coupled`: what a pair adds to the summed loss depends on the other pairs, so all sums must be
    known first. `antisymmetric`: d loss/d rejected = -(d loss/d chosen) for every pair.
    """

    coupled: ClassVar[bool] = False
    antisymmetric: ClassVar[bool] = False

    beta: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
