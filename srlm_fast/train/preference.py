"""Preference training: DPO and its relatives, and SPA's self-refinement."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from srlm_fast.config import PreferenceConfig
from srlm_fast.data.records import Pair
from srlm_fast.errors import UserError
from srlm_fast.model.forward import hidden_states, lm_head
from srlm_fast.model.load import context_length
from srlm_fast.train.batches import Batch, Item, collate, plan_steps, usable_items
from srlm_fast.train.fit import fit
from srlm_fast.train.metrics import Log, Micro
from srlm_fast.train.noise import NoiseDetector, Refinement
from srlm_kernels import linear_preference_loss, losses
from srlm_kernels.linear_preference_loss import PreferenceLoss

# These are -log sigmoid(0) where policy and reference are equal, whatever their settings.
SIGMOID_FAMILY = (losses.dpo, losses.spa, losses.robust, losses.sigmoid_norm)


def train_preference(
    model: Any,
    reference: Any,
    pairs: Sequence[Pair],
    config: PreferenceConfig,
    *,
    refine: Refinement | None = None,
    seed: int,
    pad_id: int,
    log: Log,
    reference_is_start: bool = True,
) -> dict[str, Any]:
    """Trains `model` in place against the frozen `reference` on the token ids of `pairs`.

    The loss is `config.loss_type` with `config.beta` on summed log-probs, averaged over the pairs
    of an optimiser step, plus `config.rpo_alpha` times the chosen response's mean negative
    log-likelihood. With `refine` it is SPA's refined DPO loss instead.
    reference_is_start: `reference` has the weights that `model` starts from. Then every margin of
    the first step must be exactly 0; RuntimeError is raised, before any weight changes, if not.

    `log` gets TRL's metrics (`fit`'s, logps/*, rewards/*) and with `refine` spa/tau,
    spa/flagged_share and spa/extrapolated_margin (beta-scaled).
    Returns `fit`'s summary and: `pairs` trained on; `dropped` by reason; `margins` (beta-scaled),
    `accuracies`, and against the reference, in nats, `chosen_logp_change` and
    `rejected_logp_change`, each a mean over the last quarter of the steps; with `refine`, `flags`
    as long as `pairs`: whether the pair was flagged when last trained on, None if alpha was 0 then
    or it was dropped.
    Raises UserError when no pair is left, the loss is unknown or training diverges.
    """
    items = [((p.prompt_ids, p.chosen_ids), (p.prompt_ids, p.rejected_ids)) for p in pairs]
    kept, dropped = usable_items(items, config.max_length or context_length(model))
    plan = plan_steps(items, kept, config, seed)
    extrapolation = refine.lam if refine else None
    forward = _PairForward(model, reference, items, config, pad_id, extrapolation)
    loss = pair_loss(config)
    reference.eval()
    dtype = torch.promote_types(model.dtype, torch.float32)
    noise = refine and NoiseDetector(
        refine,
        beta=config.beta,
        num_pairs=len(kept),
        steps=len(plan),
        like=torch.zeros((), device=model.device, dtype=dtype),
    )
    late: list[tuple[int, Tensor]] = []

    def step_function(step: int, micros: Sequence[Sequence[int]]) -> Iterator[Micro]:
        num_pairs = sum(map(len, micros))
        if noise:
            noise.begin_step(step, lambda: forward.ext_margins(kept, loss))
        for indices in micros:
            loss_fn = noise.loss() if noise else loss
            result, batch = forward(indices, loss_fn, scale=1 / num_pairs)
            if step == 0 and reference_is_start:
                check_start(result, loss_fn, batch, config.rpo_alpha)
            sums = _pair_metrics(result, config.beta)
            if step >= 3 * len(plan) // 4:
                late.append((len(indices), torch.stack([*sums.values()])))
            if noise:
                sums |= noise.observe(indices, result.ext_margins)
            yield Micro(result.loss, len(indices), batch.num_tokens, sums)
        if noise:
            noise.end_step()

    summary = fit(model, config, plan, step_function, log=log, name="preference")
    summary |= {"pairs": len(kept), "dropped": dict(dropped), **_late_means(late, config.beta)}
    if noise:
        summary["flags"] = noise.flags(len(pairs))
    return summary


def pair_loss(config: PreferenceConfig) -> Callable[..., Tensor]:
    """The loss that `config.loss_type` names, without the likelihood term.

    Raises UserError when there is no such loss, or when it refuses its options.
    """
    if config.loss_type not in losses.LOSSES:
        known = ", ".join(losses.LOSSES)
        raise UserError(f"unknown preference.loss_type {config.loss_type!r}; use one of {known}")
    options = {"label_smoothing": config.label_smoothing, "gamma": config.simpo_gamma}
    kind: Any = losses.LOSSES[config.loss_type]
    taken = {field.name for field in dataclasses.fields(kind)}
    try:
        loss = kind(beta=config.beta, **{k: v for k, v in options.items() if k in taken})
    except ValueError as refusal:
        raise UserError(f"preference.loss_type {config.loss_type}: {refusal}") from None
    return cast(Callable[..., Tensor], loss)


def check_start(
    result: PreferenceLoss, loss: Callable[..., Tensor], batch: Batch, rpo_alpha: float
) -> None:
    """Policy and reference are one model, so they must agree exactly.

    Every margin must be 0, and the sigmoid family's loss ln 2 to 1e-6. Raises RuntimeError.
    """
    worst = float(result.margins.abs().max())
    if math.isnan(worst):
        raise RuntimeError(
            "the model's first log-probabilities are not finite, before any training: its weights, "
            "or its attention in this dtype, are broken"
        )
    if worst != 0.0:
        raise RuntimeError(
            f"the reference is the model's own start, yet a margin of the first step is {worst:g} "
            "and not 0: policy and reference do not take the same code path, dtype or weights"
        )
    if isinstance(loss, SIGMOID_FAMILY):
        nll = -(result.logp / batch.cu_seqlens.diff())[::2]
        error = float((result.losses - rpo_alpha * nll - math.log(2)).abs().max())
        if not error <= 1e-6 * max(1.0, float(result.losses.max())):
            raise RuntimeError(
                f"the reference is the model's own start, yet the first loss differs from ln 2 by "
                f"{error:g}: the loss is not what its name says"
            )


@dataclass(frozen=True)
class _PairForward:
    """Policy and reference over one batch of pairs, along the same path."""

    model: Any
    reference: Any
    items: Sequence[Item]
    config: PreferenceConfig
    pad_id: int
    extrapolation: float | None

    def __call__(
        self, indices: Sequence[int], loss: Callable[..., Tensor], scale: float
    ) -> tuple[PreferenceLoss, Batch]:
        """The loss of the items `indices`, times `scale`, with the likelihood term if wanted."""
        batch = collate(
            [row for index in indices for row in self.items[index]],
            pad_id=self.pad_id,
            layout=self.config.layout,
            device=self.model.device,
        )
        ids, positions = batch.input_ids, batch.position_ids
        with torch.no_grad():
            ref_hidden = hidden_states(self.reference, ids, position_ids=positions)
        hidden = hidden_states(self.model, ids, position_ids=positions)
        head, ref_head = lm_head(self.model), lm_head(self.reference)
        rpo_alpha = self.config.rpo_alpha
        result = linear_preference_loss(
            hidden.flatten(0, 1),
            head.weight,
            batch.target,
            batch.cu_seqlens,
            losses.with_nll(loss, rpo_alpha) if rpo_alpha > 0 else loss,
            scale=scale,
            rows=batch.rows,
            bias=head.bias,
            ref_hidden=ref_hidden.flatten(0, 1),
            ref_weight=ref_head.weight,
            ref_bias=ref_head.bias,
            extrapolation=self.extrapolation,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
        return result, batch

    @torch.no_grad()
    def ext_margins(self, indices: Sequence[int], loss: Callable[..., Tensor]) -> Tensor:
        """The extrapolated margins (nats, no beta) of all `indices`, in batches."""
        size = self.config.micro_batch_size or self.config.per_device_train_batch_size
        chunks = [indices[i : i + size] for i in range(0, len(indices), size)]
        return torch.cat([self(chunk, loss, scale=1.0)[0].ext_margins for chunk in chunks])


def _pair_metrics(result: PreferenceLoss, beta: float) -> dict[str, Tensor]:
    """TRL's metrics, summed over the pairs; rewards are beta times the log-ratio."""
    reward = beta * (result.logp - result.ref_logp)
    margin = reward[0::2] - reward[1::2]
    return {
        "logps/chosen": result.logp[0::2].sum(),
        "logps/rejected": result.logp[1::2].sum(),
        "rewards/chosen": reward[0::2].sum(),
        "rewards/rejected": reward[1::2].sum(),
        "rewards/accuracies": (margin > 0).to(margin.dtype).sum(),
        "rewards/margins": margin.sum(),
    }


def _late_means(late: Sequence[tuple[int, Tensor]], beta: float) -> dict[str, float]:
    """Means over micro-batches of (pairs, `_pair_metrics` sums); non-finite ones are left out."""
    finite = [(count, sums.tolist()) for count, sums in late if sums.isfinite().all()]
    count = sum(count for count, _ in finite) or math.nan
    means = [sum(sums[i] for _, sums in finite) / count for i in range(2, 6)]
    return {
        "margins": means[3],
        "accuracies": means[2],
        "chosen_logp_change": means[0] / beta,
        "rejected_logp_change": means[1] / beta,
    }
