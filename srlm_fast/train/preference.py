"""Preference training: DPO and its relatives, and SPA's self-refinement."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srlm_fast.config import PreferenceConfig
from srlm_fast.data.records import Pair
from srlm_fast.errors import UserError
from srlm_fast.model.forward import lm_head
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train.batches import Batch, Layout, collate, on_device
from srlm_fast.train.checkpoint import checkpoints_of
from srlm_fast.train.evaluation import held_out_items, held_out_means
from srlm_fast.train.fit import fit
from srlm_fast.train.layout import choose_layout
from srlm_fast.train.loss import pair_loss
from srlm_fast.train.metrics import LateMeans, Log, Micro
from srlm_fast.train.moving import MovingReference
from srlm_fast.train.noise import NoiseDetector, Refinement
from srlm_fast.train.plan import Item, MicroBatches, longest_row, plan_steps, usable_items
from srlm_fast.train.reference import Reference, choose_reference
from srlm_fast.train.sharded import placed
from srlm_kernels import linear_preference_loss, losses
from srlm_kernels.linear_preference_loss import PreferenceLoss

CUT = (
    "{} sorts the pairs of a forward, and this step has several forwards: its loss is another one"
    " than the whole step's; leave micro_batch_size and micro_batch_tokens at 0, in one process"
)
BROKEN = (
    "the model's first log-probabilities are not finite, before any training: its weights, or its"
    " attention in this dtype, are broken"
)
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
    eval_pairs: Sequence[Pair] = (),
    cache: Path | None = None,
    checkpoint: Path | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Trains `model` in place against the frozen `reference` on the token ids of `pairs`.

    Where `config.reference_cache` is not "none", `reference` runs once before the training and may
    be `model` itself; what it gave is kept in the folder `cache`, which may be removed afterwards
    ("logps" need none).

    The loss is `config.loss_type` with `config.beta` on summed log-probs, averaged over the pairs
    of an optimiser step, plus `config.rpo_alpha` times the chosen response's mean negative
    log-likelihood. With `refine` it is SPA's refined DPO loss instead. A pair's `label_smoothing`
    stands for the configuration's.
    With `config.sync_ref_model` the weights of `reference` change too, see `MovingReference`.
    reference_is_start: `reference` has the weights that `model` starts from. Then every margin of
    the first step must be exactly 0 (with a cache: below the noise measured when it was made);
    RuntimeError is raised, before any weight changes, if not.

    `log` gets TRL's metrics (`fit`'s, logps/*, rewards/*), rewards/displaced, and with `refine`
    spa/tau, spa/flagged_share and spa/extrapolated_margin (beta-scaled); with `config.eval_steps`
    also the means over the usable `eval_pairs` as eval_loss (without label refinement) and
    eval_rewards/*.
    checkpoint: the folder for `config.save_steps`; called again with the same arguments, the start
    weights of `model` and those of `reference` included, a training that was stopped goes on.
    Returns `fit`'s summary and: `pairs` trained on; `dropped` by reason, and `eval_dropped` where
    there is an evaluation; `margins` (beta-scaled), `accuracies`, `displaced` (the share of pairs
    whose chosen response is less likely than under the reference), and against the reference, in
    nats, `chosen_logp_change` and `rejected_logp_change`, each a mean over the last quarter of the
    steps; with `refine`, `flags` as long as `pairs`: whether the pair was flagged when last trained
    on, None if alpha was 0 then or it was dropped; with `sync_ref_model`, `reference_updates`.
    Raises UserError when no pair is left, the loss is unknown or cannot be smoothed for each pair
    where that is asked for, or training diverges.
    """
    _check_cache(config, refine, own=reference is model)
    smoothing = pair_smoothing((*pairs, *eval_pairs), config, refine)
    items = [
        ((p.prompt_ids, p.chosen_ids), (p.prompt_ids, p.rejected_ids))
        for p in (*pairs, *eval_pairs)
    ]
    max_length = longest_row(model, config)
    kept, dropped = usable_items(items[: len(pairs)], max_length)
    held_out, eval_dropped = held_out_items(items, len(pairs), config, max_length)
    plan, layout = plan_steps(kept, config, seed), choose_layout(model, config)
    loss = pair_loss(config)
    with placed(config, ranks, model, reference) as (ranks, (model, reference)):
        # Both are of the start weights: those of a checkpoint come only in `fit`.
        checkpoints = checkpoints_of(
            checkpoint, config, items, [model, reference], "preference", len(pairs), seed, refine,
            smoothing, ranks=ranks,
        )  # fmt: skip
        micro_batches = MicroBatches(items, config, layout, ranks, cache or checkpoint)
        lam = refine.lam if refine else None
        forward = PairForward(model, items, config, layout, pad_id, lam, smoothing)

        def compare(micros: Sequence[Sequence[int]]) -> Reference:
            folder = cache or checkpoint
            return choose_reference(reference, config, micros, forward.collate, folder, ranks)

        compared = micro_batches.in_passing(
            compare, kept, held_out, what="caching the reference", kept=True
        )
        like = torch.zeros((), device=model.device, dtype=wide(model.dtype))
        noise = NoiseDetector(
            refine, beta=config.beta, num_pairs=len(kept), steps=len(plan), like=like, ranks=ranks
        ) if refine else None  # fmt: skip
        moving = None
        if config.sync_ref_model:
            moving = MovingReference(reference, model, config, len(plan))
        late = LateMeans(3 * len(plan) // 4, ranks)
        steps = PreferenceSteps(
            forward, compared, loss, kept, micro_batches, noise, late, ranks, reference_is_start
        )

        def evaluate() -> dict[str, float]:
            return held_out_means(model, held_out, micro_batches, steps.eval_sums, ranks)

        summary = fit(
            model, config, plan, micro_batches, steps, log=log, name="preference", ranks=ranks,
            evaluate=evaluate if held_out else None, checkpoints=checkpoints,
            parts={"late": late, **({"noise": noise} if noise else {})},
            moving=moving, seed=seed,
        )  # fmt: skip
        late_means = late_summary(late.means(), config.beta)
        summary |= {"pairs": len(kept), "dropped": dict(dropped), **late_means}
        if held_out:
            summary["eval_dropped"] = eval_dropped
        if noise:
            summary["flags"] = noise.flags(len(pairs))
        if moving:
            summary["reference_updates"] = len(plan) // config.ref_model_sync_steps
    return summary


def _check_cache(config: PreferenceConfig, refine: Refinement | None, *, own: bool) -> None:
    if config.reference_cache == "none" and own:
        raise ValueError("a model that trains cannot be its own reference without reference_cache")
    if config.reference_cache == "logps" and refine:
        raise UserError(
            "SPA mixes the logits of policy and reference, and sums of log-probs have none: set "
            "preference.reference_cache to states or none"
        )


def pair_smoothing(
    pairs: Sequence[Pair], config: PreferenceConfig, refine: Refinement | None
) -> tuple[float, ...] | None:
    """The label smoothing of each of `pairs`; None where all have that of `config`.

    Raises UserError where one has its own and the loss takes none.
    """
    if all(pair.label_smoothing is None for pair in pairs):
        return None
    if refine or config.loss_type != "sigmoid":
        raise UserError(
            "pairs with a label_smoothing of their own need preference.loss_type sigmoid, without"
            " SPA's refinement"
        )
    own = [pair.label_smoothing for pair in pairs]
    found = tuple(config.label_smoothing if e is None else e for e in own)
    if not all(0 <= e <= 1 for e in found):
        raise UserError("the label_smoothing of a pair must lie in 0..1")
    return found


def check_start(
    result: PreferenceLoss,
    loss: Callable[..., Tensor],
    batch: Batch,
    rpo_alpha: float,
    floor: float = 0.0,
) -> bool:
    """Policy and reference are one model, so they must agree exactly, or to `floor` nats.

    Every margin must be 0, and the sigmoid family's loss ln 2 to 1e-6; else RuntimeError is raised.
    A pair that is not finite is left to the step, which is skipped for it. Returns whether one is.
    """
    finite = result.margins.isfinite()
    if not bool(finite.any()):
        return False
    worst = float(result.margins.where(finite, 0.0).abs().max())
    if worst > floor:
        raise RuntimeError(
            f"the reference is the model's own start, yet a margin of the first step is {worst:g} "
            "and not 0: policy and reference do not take the same code path, dtype or weights"
        )
    if isinstance(loss, SIGMOID_FAMILY) and floor == 0.0:
        nll = -(result.logp / batch.cu_seqlens.diff().to(result.logp.device))[::2]
        losses_of_finite = result.losses[finite]
        error = float((losses_of_finite - rpo_alpha * nll[finite] - math.log(2)).abs().max())
        if not error <= 1e-6 * max(1.0, float(losses_of_finite.max())):
            raise RuntimeError(
                f"the reference is the model's own start, yet the first loss differs from ln 2 by "
                f"{error:g}: the loss is not what its name says"
            )
    return True


@dataclass(frozen=True)
class PairForward:
    """The policy over one batch of pairs, and its loss against the reference."""

    model: Any
    items: Sequence[Item]
    config: PreferenceConfig
    layout: Layout
    pad_id: int
    extrapolation: float | None
    smoothing: Sequence[float] | None = None
    """Of each item's label; None: as the loss says."""

    def collate(self, indices: Sequence[int]) -> Batch:
        """The batch of the items `indices`."""
        return collate(
            [row for index in indices for row in self.items[index]],
            pad_id=self.pad_id,
            layout=self.layout,
            device=self.model.device,
        )

    def __call__(
        self,
        indices: Sequence[int],
        reference: Reference,
        loss: Callable[..., Tensor],
        scale: float,
    ) -> tuple[PreferenceLoss, Batch]:
        """The loss of the items `indices`, times `scale`, with the likelihood term if wanted."""
        batch = self.collate(indices)
        compared = reference.inputs(indices, batch)
        head = lm_head(self.model)
        rpo_alpha = self.config.rpo_alpha
        result = linear_preference_loss(
            batch.states(self.model),
            head.weight,
            batch.target,
            batch.cu_seqlens,
            losses.with_nll(loss, rpo_alpha) if rpo_alpha > 0 else loss,
            pair=self._of_each_pair(indices),
            scale=scale,
            rows=batch.rows,
            bias=head.bias,
            **compared,
            extrapolation=self.extrapolation,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
        return result, batch

    def _of_each_pair(self, indices: Sequence[int]) -> dict[str, Tensor]:
        if self.smoothing is None:
            return {}
        own = [self.smoothing[i] for i in indices]
        dtype = wide(self.model.dtype)
        return {"label_smoothing": on_device(own, device=self.model.device, dtype=dtype)}

    @torch.no_grad()
    def ext_margins(
        self,
        micros: Sequence[Sequence[int]],
        reference: Reference,
        loss: Callable[..., Tensor],
        ranks: Ranks = ALONE,
    ) -> Tensor:
        """The extrapolated margins (nats, no beta) of the items of all `micros`, which `ranks`
        share. Raises torch.OutOfMemoryError on every rank where it is raised on one."""
        sizes, dtype = [len(micro) for micro in micros], wide(self.model.dtype)
        margins = torch.zeros(sum(sizes), device=self.model.device, dtype=dtype)
        parts = list(zip(micros, torch.split(margins, sizes), strict=True))
        with ranks.running_out_together():
            for micro, part in ranks.share(parts, ([], margins[:0])):
                part.copy_(self(micro, reference, loss, scale=1.0)[0].ext_margins)
        ranks.sum_([margins])
        return margins


@dataclass(frozen=True)
class PreferenceSteps:
    """What a step computes, and an evaluation; `kept` are all that the training has of `items`."""

    forward: PairForward
    reference: Reference
    loss: Callable[..., Tensor]
    kept: Sequence[int]
    micro_batches: MicroBatches
    noise: NoiseDetector | None
    late: LateMeans
    ranks: Ranks
    reference_is_start: bool

    def __call__(
        self, step: int, items: Sequence[int], micros: Sequence[Sequence[int]]
    ) -> Iterator[Micro]:
        """See `fit.StepFunction`."""
        config, noise = self.forward.config, self.noise
        is_start, is_sound = step == 0 and self.reference_is_start and any(micros), False
        self.late.begin_step(step)
        if noise:
            noise.begin_step(step, self._score, self.micro_batches.in_order(items))
        for indices in micros:
            if len(indices) < len(items) and getattr(self.loss, "coupled", False):
                warnings.warn(CUT.format(config.loss_type), stacklevel=2)
            loss = noise.loss() if noise else self.loss
            result, batch = self.forward(indices, self.reference, loss, scale=1 / len(items))
            if is_start and indices:
                floor = self.reference.floor
                is_sound |= check_start(result, loss, batch, config.rpo_alpha, floor)
            sums = _pair_metrics(result, config.beta)
            self.late.add(len(indices), sums)
            if noise:
                sums |= noise.observe(indices, result.ext_margins)
            yield Micro(result.loss, len(indices), batch.num_tokens, sums)
        if is_start and not is_sound:
            raise RuntimeError(BROKEN)

    def _score(self) -> Tensor:
        def margins(micros: Sequence[Sequence[int]]) -> Tensor:
            return self.forward.ext_margins(micros, self.reference, self.loss, self.ranks)

        return self.micro_batches.in_passing(margins, self.kept, what="scoring the pairs for tau")

    def eval_sums(self, indices: Sequence[int]) -> tuple[int, dict[str, Tensor]]:
        """Of held-out pairs, whose labels are not refined."""
        result, _ = self.forward(indices, self.reference, self.loss, scale=1.0)
        metrics = _pair_metrics(result, self.forward.config.beta)
        return len(indices), {"loss": result.losses.sum(), **metrics}


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of statistics: not narrower than fp32."""
    return torch.promote_types(dtype, torch.float32)


def _pair_metrics(result: PreferenceLoss, beta: float) -> dict[str, Tensor]:
    """TRL's metrics, and the pairs whose chosen response is less likely than under the reference
    (likelihood displacement, arXiv 2410.08847), summed; rewards are beta times the log-ratio."""
    reward = beta * (result.logp - result.ref_logp)
    margin = reward[0::2] - reward[1::2]
    return {
        "logps/chosen": result.logp[0::2].sum(),
        "logps/rejected": result.logp[1::2].sum(),
        "rewards/chosen": reward[0::2].sum(),
        "rewards/rejected": reward[1::2].sum(),
        "rewards/accuracies": (margin > 0).to(margin.dtype).sum(),
        "rewards/margins": margin.sum(),
        "rewards/displaced": (reward[0::2] < 0).to(margin.dtype).sum(),
    }


def late_summary(means: dict[str, float], beta: float) -> dict[str, float]:
    """Of the summary: means over the last steps, changes of log-probs in nats."""
    return {
        "margins": means.get("rewards/margins", math.nan),
        "accuracies": means.get("rewards/accuracies", math.nan),
        "displaced": means.get("rewards/displaced", math.nan),
        "chosen_logp_change": means.get("rewards/chosen", math.nan) / beta,
        "rejected_logp_change": means.get("rewards/rejected", math.nan) / beta,
    }
