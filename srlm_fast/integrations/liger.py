"""Liger's fused linear DPO loss as our op: its arguments and results, without a chunk of logits.

For code that was written for `liger_kernel.chunked_loss.LigerFusedLinearDPOLoss` (TRL up to 1.12):
the import is the only line that changes. New code calls `srlm_kernels.linear_preference_loss`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from srlm_fast.errors import UserError
from srlm_kernels import PairLogps, PreferenceLoss, linear_preference_loss, losses

LOSS_TYPES = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop",
)  # fmt: skip
SMOOTHED = ("exo_pair", "robust")  # the others ignore the option, as Liger's do


class LigerFusedLinearDPOLoss(nn.Module):
    """The preference loss of padded pairs from hidden states and the LM head.

    ignore_index: target of tokens that do not count.
    alpha: weight of the chosen responses' mean negative log-likelihood, with `compute_nll_loss`;
        the mean is over all their tokens together.
    use_ref_model: False leaves the reference out of the log-ratios.
    average_log_prob: means over a response's tokens in place of sums; 0 for an empty response.
    discopop_tau: temperature of loss_type "discopop".
    compiled, chunk_size: accepted and of no effect; the op compiles nothing and chunks on its own.

    Raises UserError for a loss_type that Liger's class does not have, or options that it refuses.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        if loss_type not in LOSS_TYPES:
            raise UserError(f"unknown loss_type {loss_type!r}; known are {', '.join(LOSS_TYPES)}")
        options = {"label_smoothing": label_smoothing} if loss_type in SMOOTHED else {}
        if loss_type == "discopop":
            options["tau"] = discopop_tau
        make: Any = losses.LOSSES[loss_type]
        try:
            loss: Callable[..., Tensor] = make(beta=beta, **options)
        except ValueError as error:
            raise UserError(f"loss_type {loss_type}: {error}") from error
        if average_log_prob or compute_nll_loss:
            loss = _OfMeans(loss, average_log_prob)
        self.loss = loss
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean,
        nll_loss, chosen_rewards, rejected_rewards), which are detached; [P] each, means 0-d.

        lin_weight: [V, D], bias [V]: the LM head; ref_weight, ref_bias: the reference's.
        _input: [2P, S, D], the states that predict `target` [2P, S]: P chosen responses, then the
            P rejected ones in the same order. ref_input: like it, of the reference.
        Gradients of `_input`, `lin_weight` and `bias` are computed here; backward runs once.
        """
        pairs, length = target.shape[0] // 2, target.shape[1]
        if target.shape[0] != 2 * pairs or _input.shape[:2] != target.shape:
            raise UserError(
                f"expected states and targets of pairs, [2P, S, D] and [2P, S], got "
                f"{list(_input.shape)} and {list(target.shape)}: put the chosen responses first "
                "and as many rejected ones behind them"
            )
        if self.use_ref_model and ref_input is None:
            raise UserError("the reference is missing: pass ref_input, or use_ref_model=False")
        place = torch.arange(target.numel(), device=target.device).view(2, pairs, length)
        label = target.view(2, pairs, length).transpose(0, 1)
        scored = label != self.ignore_index
        counts = scored.sum(2)  # [P, 2]
        nll_share = counts.new_zeros(())
        pair = {}
        if self.compute_nll_loss:
            nll_share = 1 / counts[:, 0].sum().clamp(min=1)
            pair["nll_scale"] = (self.alpha * pairs * nll_share).expand(pairs)
        reference: dict[str, Any] = {}
        if self.use_ref_model and ref_input is not None:
            flat = ref_input.flatten(0, 1)
            reference = {"ref_hidden": flat, "ref_weight": ref_weight, "ref_bias": ref_bias}
        found = linear_preference_loss(
            _input.flatten(0, 1), lin_weight, label[scored], _offsets(counts.flatten()), self.loss,
            pair=pair, rows=place.transpose(0, 1)[scored], bias=bias, **reference,
            ignore_index=self.ignore_index,
        )  # fmt: skip
        nll = -found.logp[0::2].sum() * nll_share
        means = [_mean_logit(half, lin_weight, bias) for half in _input.detach().chunk(2)]
        return found.loss, (*self._logps(found, counts), *means, nll, *self._rewards(found, counts))

    def _logps(self, found: PreferenceLoss, counts: Tensor) -> tuple[Tensor, Tensor]:
        logp = found.logp.view(-1, 2)
        logp = logp / counts.clamp(min=1) if self.average_log_prob else logp
        return logp[:, 0], logp[:, 1]

    def _rewards(self, found: PreferenceLoss, counts: Tensor) -> tuple[Tensor, Tensor]:
        ratio = (found.logp - found.ref_logp).view(-1, 2)
        ratio = ratio / counts.clamp(min=1) if self.average_log_prob else ratio
        return self.beta * ratio[:, 0], self.beta * ratio[:, 1]


def replace_liger_loss(trainer: Any) -> bool:
    """Puts our class in the place of Liger's in a trainer that holds one, with its options.

    Trainers of TRL up to 1.12 do, as `liger_loss`, with `use_liger_kernel=True` (axolotl's
    `dpo_use_liger_kernel`). Returns whether this one does.
    """
    theirs = getattr(trainer, "liger_loss", None)
    if type(theirs).__name__ != LigerFusedLinearDPOLoss.__name__:
        return False
    if not isinstance(theirs, LigerFusedLinearDPOLoss):
        names = inspect.signature(LigerFusedLinearDPOLoss).parameters
        options = {name: getattr(theirs, name) for name in names if hasattr(theirs, name)}
        trainer.liger_loss = LigerFusedLinearDPOLoss(**options)
    return True


@dataclass(frozen=True)
class _OfMeans:
    """`loss` of log-probs per token where `average`, and the chosen NLL added where it is asked."""

    loss: Callable[..., Tensor]
    average: bool

    def __call__(self, s: PairLogps, *, nll_scale: Tensor | None = None) -> Tensor:
        per_token = s
        if self.average:
            chosen, rejected = (n.clamp(min=1) for n in (s.chosen_len, s.rejected_len))
            per_token = replace(
                s, chosen=s.chosen / chosen, rejected=s.rejected / rejected,
                ref_chosen=s.ref_chosen / chosen, ref_rejected=s.ref_rejected / rejected,
            )  # fmt: skip
        found = self.loss(per_token)
        return found if nll_scale is None else found - nll_scale * s.chosen


def _offsets(counts: Tensor) -> Tensor:
    """[n + 1] from lengths [n]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@torch.no_grad()
def _mean_logit(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Over all positions of `states` [P, S, D] and the whole vocabulary, padding included, as
    Liger's: a product is linear, so it is the product of the means."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    mean = states.mean((0, 1), dtype=wide) @ weight.mean(0, dtype=wide)
    return mean if bias is None else mean + bias.mean(dtype=wide)
