"""Preference losses as functions of summed log-probabilities: the only copy of their mathematics.

A loss is a frozen callable, `loss(s: PairLogps, **pair) -> [P]`, in nats. It never sees logits, so
any implementation of the log-probabilities, fused or not, can drive it.

Notation: `r_w`, `r_l` are the log-ratios policy / reference of the chosen and the rejected
response, `m = r_w - r_l` is the margin, `ls` the logarithm of the sigmoid and `e` the label
smoothing. Names and normalisation follow TRL's `DPOTrainer`, so that a TRL `loss_type` means the
same here. Numbers such as 2305.18290 are arXiv's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from srlm_kernels.pair_loss import PairLogps as PairLogps  # part of what this file offers
from srlm_kernels.pair_loss import PairLoss, WrittenLoss


@dataclass(frozen=True)
class _LabelSmoothing(PairLoss):
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")


def _smoothed(x: Tensor, smoothing: float | Tensor) -> Tensor:
    """-(1 - smoothing) ls(x) - smoothing ls(-x)."""
    # Two log-sigmoids rather than ls(x) and x: the gradient stays exact for smoothing 1 as well.
    if isinstance(smoothing, (int, float)) and smoothing == 0:
        return -logsigmoid(x)
    return _weighted(-logsigmoid(x), 1 - smoothing) + _weighted(-logsigmoid(-x), smoothing)


def _weighted(loss: Tensor, weight: float | Tensor) -> Tensor:
    """weight * loss; an infinite loss of weight 0, that of an impossible response, is no loss."""
    if isinstance(weight, Tensor):
        return (weight * loss).masked_fill(weight == 0, 0)
    return weight * loss if weight else torch.zeros_like(loss)


@dataclass(frozen=True)
class dpo(_LabelSmoothing):
    """-ls(beta m) (DPO, 2305.18290, eq. 7); smoothed: -(1-e) ls(beta m) - e ls(-beta m) (cDPO).

    A pair tensor `label_smoothing` [P] gives each pair its own e (CREAM's weight is 1-e).
    """

    antisymmetric: ClassVar[bool] = True

    def __call__(self, s: PairLogps, *, label_smoothing: Tensor | None = None) -> Tensor:
        smoothing = self.label_smoothing if label_smoothing is None else label_smoothing
        return _smoothed(self.beta * s.margin, smoothing)


@dataclass(frozen=True)
class spa(PairLoss):
    """DPO whose suspect labels are smoothed by `alpha` (SPA, 2406.04412, eq. 10 to 12).

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
        if isinstance(self.threshold, Tensor) and self.threshold.ndim:
            raise ValueError(
                f"threshold must be a number or 0-d, got shape {list(self.threshold.shape)}"
            )

    def flagged(self, ext_margin: Tensor) -> Tensor:
        """Which pairs count as suspect: bool, of the shape of `ext_margin` (nats, no beta)."""
        scaled = self.beta * ext_margin.detach()
        return scaled <= self.threshold if self.flag_equal else scaled < self.threshold

    def __call__(self, s: PairLogps) -> Tensor:
        smoothing = self.alpha * self.flagged(s.ext_margin).to(s.chosen.dtype)
        return _smoothed(self.beta * s.margin, smoothing)


@dataclass(frozen=True)
class r_dpo(PairLoss):
    """-ls(beta m + alpha (len_w - len_l)): a longer winner is pushed less (R-DPO, 2403.19159)."""

    antisymmetric: ClassVar[bool] = True

    alpha: float = 0.01

    def __call__(self, s: PairLogps) -> Tensor:
        return -logsigmoid(self.beta * s.margin + self.alpha * (s.chosen_len - s.rejected_len))


@dataclass(frozen=True)
class robust(PairLoss):
    """[(1-e)(-ls(beta m)) - e (-ls(-beta m))] / (1-2e) (robust DPO, 2403.00409).

    Unbiased when a fraction e of the labels is flipped.
    """

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
    """max(0, 1 - beta m) (SLiC, 2305.10425, on log-ratios; RSO, 2309.06657)."""

    antisymmetric: ClassVar[bool] = True

    def __call__(self, s: PairLogps) -> Tensor:
        return torch.relu(1 - self.beta * s.margin)


@dataclass(frozen=True)
class ipo(PairLoss):
    """(m_mean - 1/(2 beta))^2, `m_mean` being the margin of per-token means.

    IPO, 2310.12036, eq. 17; the means are TRL's reading, agreed with the authors.
    """

    def __call__(self, s: PairLogps) -> Tensor:
        return (s.mean_margin - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class sigmoid_norm(PairLoss):
    """-ls(beta m_mean): length-normalised DPO. beta is larger than DPO's, about 5."""

    def __call__(self, s: PairLogps) -> Tensor:
        return -logsigmoid(self.beta * s.mean_margin)


@dataclass(frozen=True)
class simpo(PairLoss):
    """-ls(beta logp_w/len_w - beta logp_l/len_l - gamma) (SimPO, 2405.14734, eq. 6).

    A reference is not used.
    """

    gamma: float = 0.5

    def __call__(self, s: PairLogps) -> Tensor:
        chosen = s.chosen / s.chosen_len.clamp(min=1)
        rejected = s.rejected / s.rejected_len.clamp(min=1)
        return -logsigmoid(self.beta * (chosen - rejected) - self.gamma)


@dataclass(frozen=True)
class sppo_hard(PairLoss):
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2 (SPPO, 2405.00675, eq. 4.7, beta = 1/eta).

    The winner's probability is taken to be 1 (hard labels).
    """

    def __call__(self, s: PairLogps) -> Tensor:
        half = 0.5 / self.beta
        return (s.chosen_ratio - half) ** 2 + (s.rejected_ratio + half) ** 2


@dataclass(frozen=True)
class nca_pair(PairLoss):
    """-ls(beta r_w) - ls(-beta r_w)/2 - ls(-beta r_l)/2 (NCA, 2402.05369)."""

    def __call__(self, s: PairLogps) -> Tensor:
        chosen, rejected = self.beta * s.chosen_ratio, self.beta * s.rejected_ratio
        return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


@dataclass(frozen=True)
class apo_zero(PairLoss):
    """sigmoid(-beta r_w) + sigmoid(beta r_l): chosen up, rejected down (2408.06266, eq. 7)."""

    def __call__(self, s: PairLogps) -> Tensor:
        return (-self.beta * s.chosen_ratio).sigmoid() + (self.beta * s.rejected_ratio).sigmoid()


@dataclass(frozen=True)
class apo_down(PairLoss):
    """sigmoid(beta r_w) + sigmoid(-beta m): both down, rejected more (2408.06266, eq. 8)."""

    def __call__(self, s: PairLogps) -> Tensor:
        return (self.beta * s.chosen_ratio).sigmoid() + (-self.beta * s.margin).sigmoid()


@dataclass(frozen=True)
class bco_pair(PairLoss):
    """-ls(beta r_w) - ls(-beta r_l): BCO, 2404.04656, on pairs, its reward shift left at 0."""

    def __call__(self, s: PairLogps) -> Tensor:
        return -logsigmoid(self.beta * s.chosen_ratio) - logsigmoid(-self.beta * s.rejected_ratio)


@dataclass(frozen=True)
class exo_pair(PairLoss):
    """KL(p || (1-e, e)), p = (sigmoid(beta m), sigmoid(-beta m)) (EXO, 2402.00856, eq. 16)."""

    antisymmetric: ClassVar[bool] = True

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in (0, 1), got {self.label_smoothing}")

    def __call__(self, s: PairLogps) -> Tensor:
        x, e = self.beta * s.margin, self.label_smoothing
        chosen = x.sigmoid() * (logsigmoid(x) - math.log1p(-e))
        return chosen + (-x).sigmoid() * (logsigmoid(-x) - math.log(e))


@dataclass(frozen=True)
class discopop(PairLoss):
    """-(1-g) ls(beta m) + g exp(-beta m), g = sigmoid(beta m / tau) (2406.08414, eq. 5)."""

    antisymmetric: ClassVar[bool] = True

    tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0:
            raise ValueError(f"tau must be positive, got {self.tau}")

    def __call__(self, s: PairLogps) -> Tensor:
        x = self.beta * s.margin
        # One exponential: the product sigmoid(x / tau) * exp(-x) is 0 * inf far below 0.
        exponential = (logsigmoid(x / self.tau) - x).exp()
        return exponential - (-x / self.tau).sigmoid() * logsigmoid(x)


def _in_order_of(x: Tensor, values: Tensor) -> Tensor:
    """`values` rearranged: its k-th smallest stands where `x` has its k-th smallest."""
    rank = x.argsort(stable=True).argsort()
    return values.sort(stable=True).values[rank]


@dataclass(frozen=True)
class aot(_LabelSmoothing):
    """DPO's loss of sorted(policy margins) - sorted(reference margins) (AOT, 2406.05882).

    Quantile is compared with quantile over all pairs of the call. The loss stands at the pair
    whose policy margin is meant (TRL leaves it in sorted order).
    """

    coupled: ClassVar[bool] = True
    antisymmetric: ClassVar[bool] = True

    def __call__(self, s: PairLogps) -> Tensor:
        policy = s.chosen - s.rejected
        reference = _in_order_of(policy, s.ref_chosen - s.ref_rejected)
        return _smoothed(self.beta * (policy - reference), self.label_smoothing)


@dataclass(frozen=True)
class aot_unpaired(_LabelSmoothing):
    """DPO's loss of sorted(r_w) - sorted(r_l), r over all pairs of the call (AOT, 2406.05882).

    The loss stands at the pair whose chosen response is meant (TRL leaves it in sorted order).
    """

    coupled: ClassVar[bool] = True

    def __call__(self, s: PairLogps) -> Tensor:
        rejected = _in_order_of(s.chosen_ratio, s.rejected_ratio)
        return _smoothed(self.beta * (s.chosen_ratio - rejected), self.label_smoothing)


@dataclass(frozen=True)
class with_nll(WrittenLoss):
    """`loss` - alpha * logp_w / len_w: the chosen response's NLL per token added (RPO, 2404.19733).

    Each response is normalised by its own length, as in the paper; TRL's `sft` term by the chosen
    tokens of the whole batch.
    """

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
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
    "r_dpo": r_dpo,
}
"""By TRL's `loss_type`; each is made by `LOSSES[name](beta=...)` plus its own options. `simpo` is
TRL's CPO loss of that name, and `r_dpo` has none.

Of `DPOTrainer`'s types only `sft` is missing: it has no rejected response (see `with_nll`). What
carries state from step to step has no place here: `BCOTrainer`'s running reward shift, which TRL's
own `bco_pair` leaves out too.
"""
