"""Preference losses as functions of summed log-probabilities: the only copy of their mathematics.

A loss is a frozen callable, `loss(s: PairLogps, **pair) -> [P]`, in nats. It never sees logits, so
any implementation of the log-probabilities, fused or not, can drive it.

Notation: `r_w`, `r_l` are the log-ratios policy / reference of the chosen and the rejected
response, `m = r_w - r_l` is the margin, `ls` the logarithm of the sigmoid. Names and normalisation
follow TRL's `DPOTrainer`, so that a TRL `loss_type` means the same here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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


@dataclass(frozen=True)
class PairLoss:
    """Base of the losses.

    `coupled`: a pair's loss depends on other pairs, so all sums must be known first.
    `antisymmetric`: d loss/d rejected = -(d loss/d chosen) for every pair.
    """

    coupled: ClassVar[bool] = False
    antisymmetric: ClassVar[bool] = False

    beta: float

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")


def _smoothed(x: Tensor, smoothing: float | Tensor) -> Tensor:
    """-(1 - smoothing) ls(x) - smoothing ls(-x)."""
    # Two log-sigmoids rather than ls(x) and x: the gradient stays exact for smoothing 1 as well.
    if isinstance(smoothing, (int, float)) and smoothing == 0:
        return -logsigmoid(x)
    return -(1 - smoothing) * logsigmoid(x) - smoothing * logsigmoid(-x)


@dataclass(frozen=True)
class dpo(PairLoss):
    """-ls(beta m); with label smoothing e: -(1-e) ls(beta m) - e ls(-beta m) (cDPO).

    A pair tensor `label_smoothing` [P] gives each pair its own e (CREAM's weight is 1-e).
    """

    antisymmetric: ClassVar[bool] = True

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")

    def __call__(self, s: PairLogps, *, label_smoothing: Tensor | None = None) -> Tensor:
        smoothing = self.label_smoothing if label_smoothing is None else label_smoothing
        return _smoothed(self.beta * s.margin, smoothing)


@dataclass(frozen=True)
class spa(PairLoss):
    """DPO whose suspect labels are smoothed by `alpha` (SPA, arXiv 2406.04412, eq. 10 to 12).

    A pair is suspect when `beta * ext_margin < threshold`, `threshold` being beta-scaled too. The
    authors' code also counts equality as suspect: `flag_equal=True`. `alpha=0` is `dpo` bit for
    bit. No gradient flows through the flag.
    """

    antisymmetric: ClassVar[bool] = True

    alpha: float
    threshold: float | Tensor
    flag_equal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")

    def flagged(self, ext_margin: Tensor) -> Tensor:
        """Which pairs count as suspect: bool, of the shape of `ext_margin` (nats, no beta)."""
        scaled = self.beta * ext_margin.detach()
        return scaled <= self.threshold if self.flag_equal else scaled < self.threshold

    def __call__(self, s: PairLogps) -> Tensor:
        smoothing = self.alpha * self.flagged(s.ext_margin).to(s.chosen.dtype)
        return _smoothed(self.beta * s.margin, smoothing)


@dataclass(frozen=True)
class robust(PairLoss):
    """[(1-e)(-ls(beta m)) - e (-ls(-beta m))] / (1-2e): unbiased under label flips of rate e."""

    antisymmetric: ClassVar[bool] = True

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")

    def __call__(self, s: PairLogps) -> Tensor:
        x, e = self.beta * s.margin, self.label_smoothing
        return (-(1 - e) * logsigmoid(x) + e * logsigmoid(-x)) / (1 - 2 * e)


@dataclass(frozen=True)
class hinge(PairLoss):
    """max(0, 1 - beta m) (SLiC on log-ratios)."""

    antisymmetric: ClassVar[bool] = True

    def __call__(self, s: PairLogps) -> Tensor:
        return torch.relu(1 - self.beta * s.margin)


@dataclass(frozen=True)
class ipo(PairLoss):
    """(m_mean - 1/(2 beta))^2, `m_mean` being the margin of per-token means (IPO, eq. 17)."""

    def __call__(self, s: PairLogps) -> Tensor:
        return (s.mean_margin - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class sigmoid_norm(PairLoss):
    """-ls(beta m_mean): length-normalised DPO. beta is larger than DPO's, about 5."""

    def __call__(self, s: PairLogps) -> Tensor:
        return -logsigmoid(self.beta * s.mean_margin)


@dataclass(frozen=True)
class simpo(PairLoss):
    """-ls(beta logp_w/len_w - beta logp_l/len_l - gamma) (SimPO); a reference is not used."""

    gamma: float = 0.5

    def __call__(self, s: PairLogps) -> Tensor:
        chosen = s.chosen / s.chosen_len.clamp(min=1)
        rejected = s.rejected / s.rejected_len.clamp(min=1)
        return -logsigmoid(self.beta * (chosen - rejected) - self.gamma)


@dataclass(frozen=True)
class sppo_hard(PairLoss):
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2 (SPPO with hard labels, beta = 1/eta)."""

    def __call__(self, s: PairLogps) -> Tensor:
        half = 0.5 / self.beta
        return (s.chosen_ratio - half) ** 2 + (s.rejected_ratio + half) ** 2


@dataclass(frozen=True)
class nca_pair(PairLoss):
    """-ls(beta r_w) - ls(-beta r_w)/2 - ls(-beta r_l)/2 (NCA)."""

    def __call__(self, s: PairLogps) -> Tensor:
        chosen, rejected = self.beta * s.chosen_ratio, self.beta * s.rejected_ratio
        return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


@dataclass(frozen=True)
class apo_zero(PairLoss):
    """sigmoid(-beta r_w) + sigmoid(beta r_l): chosen up, rejected down (APO, eq. 7)."""

    def __call__(self, s: PairLogps) -> Tensor:
        return (-self.beta * s.chosen_ratio).sigmoid() + (self.beta * s.rejected_ratio).sigmoid()


@dataclass(frozen=True)
class apo_down(PairLoss):
    """sigmoid(beta r_w) + sigmoid(-beta m): both down, rejected more (APO, eq. 8)."""

    def __call__(self, s: PairLogps) -> Tensor:
        return (self.beta * s.chosen_ratio).sigmoid() + (-self.beta * s.margin).sigmoid()


@dataclass(frozen=True)
class with_nll:
    """`loss` + alpha * the chosen response's mean negative log-likelihood (Iterative RPO)."""

    antisymmetric: ClassVar[bool] = False

    loss: Callable[..., Tensor]
    alpha: float

    @property
    def coupled(self) -> bool:
        return bool(getattr(self.loss, "coupled", False))

    def __call__(self, s: PairLogps, **pair: Tensor) -> Tensor:
        return self.loss(s, **pair) - self.alpha * s.chosen / s.chosen_len.clamp(min=1)


LOSSES: dict[str, type[PairLoss]] = {
    "sigmoid": dpo,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "sppo_hard": sppo_hard,
    "nca_pair": nca_pair,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
}
"""By TRL's `loss_type`; each is made by `LOSSES[name](beta=...)` plus its own options. `simpo` is
TRL's CPO loss of that name."""
