"""`linear_preference_loss` in chunks of whole pairs, for eager calls and as one node of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from srlm_kernels.distributed import group_of
from srlm_kernels.head import Grads, Head, shared_or_own
from srlm_kernels.linear_preference_loss import GradsInForward, PreferenceLoss
from srlm_kernels.loss_spec import from_spec, is_builtin, spec
from srlm_kernels.preference_pass import PreferencePass
from srlm_kernels.problem import Options, Problem
from srlm_kernels.products import default_logits_dtype

# Fields of `PreferenceLoss` that every call has, in the order in which the op returns them.
PER_PAIR = ("losses", "margins", "ext_margins", "logp", "ref_logp", "extrapolated_logp")
FIELDS = ("loss", *PER_PAIR, "token_logp")


def linear_preference_loss_chunked(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    loss_fn: Callable[..., Tensor],
    *,
    bias: Tensor | None = None,
    ref_weight: Tensor | None = None,
    grad_weight_out: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    scale: float | Tensor | None = None,
    **others: Any,
) -> PreferenceLoss:
    """See `linear_preference_loss`; arguments are not checked."""
    logits_dtype = logits_dtype or default_logits_dtype(hidden, weight, ref_weight)
    scale = 1 / max(cu_seqlens.shape[0] // 2, 1) if scale is None else scale
    folded, enabled = grad_weight_out is not None, torch.is_grad_enabled()
    wants = [enabled and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    wants[1] = wants[1] or (enabled and folded)
    run: Callable[..., PreferenceLoss] = eager
    if torch.compiler.is_compiling():
        run = _traced
        if not is_builtin(loss_fn):
            # Imported here: it imports the compiler, which takes longer than all else here.
            from srlm_kernels._outside_of_graphs import outside_of_graphs as run
    return run(
        hidden, weight, target, cu_seqlens, loss_fn, wants=wants, bias=bias, scale=scale,
        ref_weight=ref_weight, grad_weight_out=grad_weight_out, logits_dtype=logits_dtype, **others,
    )  # fmt: skip


def eager(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    loss_fn: Callable[..., Tensor],
    *,
    wants: list[bool],
    bias: Tensor | None,
    grad_weight_out: Tensor | None,
    **others: Any,
) -> PreferenceLoss:
    """`wants`: whether hidden, weight and bias get gradients. Nothing is checked."""
    values, grads = _forward(
        hidden, weight, target, cu_seqlens, loss_fn, wants=wants, bias=bias,
        grad_weight_out=grad_weight_out, **others,
    )  # fmt: skip
    if any(wants):
        folded = grad_weight_out is not None
        values["loss"] = GradsInForward.apply(  # type: ignore[no-untyped-call]
            values["loss"], grads, folded, hidden, weight, bias
        )
    return PreferenceLoss(**values)


@torch.no_grad()
def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    loss_fn: Callable[..., Tensor],
    *,
    wants: Sequence[bool],
    pair: Mapping[str, Tensor] | None,
    scale: float | Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_logp: Tensor | None,
    grad_weight_out: Tensor | None,
    **options: Any,
) -> tuple[dict[str, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Fields of `PreferenceLoss`, and gradients of hidden states, weight and bias for upstream 1.

    `options`: fields of `Options`. With `grad_weight_out` the weight's gradient goes there alone.
    """
    policy = Head(weight, bias)
    reference = None if ref_hidden is None else shared_or_own(policy, ref_weight, ref_bias)
    problem = Problem(
        hidden, policy, target, rows, Options(**options), ref_hidden=ref_hidden,
        reference=reference,
    )  # fmt: skip
    if isinstance(scale, Tensor):  # two 0-d tensors meet in the wider dtype
        scale = scale.to(problem.stats_dtype)
    grads = None
    if any(wants):
        own = wants[1] and grad_weight_out is None
        grads = Grads.of(policy, problem.stats_dtype, weight=own, bias=wants[2])
        if grad_weight_out is not None:
            grads.weight, grads.empty = grad_weight_out, False
    work = PreferencePass(
        problem, cu_seqlens, loss_fn, pair=pair or {}, scale=scale,
        ref_sums=None if ref_logp is None else ref_logp.detach(),
        grad_x=problem.new_grad_x() if wants[0] else None, grads=grads,
    )  # fmt: skip
    work.run()
    tokens = work.per_row()
    values = {name: work.per_pair(name) for name in PER_PAIR}
    values = {"loss": scale * values["losses"].sum(), **values, "token_logp": tokens["logp"]}
    values |= {name: tokens[name] for name in problem.options.outputs}
    return values, work.gradients(folded=grad_weight_out is not None)


def _traced(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    loss_fn: Callable[..., Tensor],
    *,
    wants: list[bool],
    pair: Mapping[str, Tensor] | None,
    scale: float | Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_logp: Tensor | None,
    grad_weight_out: Tensor | None,
    extrapolation: float | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    outputs: Sequence[str],
    logits_dtype: torch.dtype,
    process_group: Any,
    chunk_rows: int | None,
) -> PreferenceLoss:
    pair = pair or {}
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float64)
    text, tensors = spec(loss_fn)

    def constant(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach()

    folded = grad_weight_out is not None
    found = preference_forward(
        hidden.detach(), weight.detach(), constant(bias), target, cu_seqlens, text,
        [t.detach() for t in tensors], " ".join(pair), [t.detach() for t in pair.values()],
        scale.detach(), rows, constant(ref_hidden), constant(ref_weight), constant(ref_bias),
        constant(ref_logp), extrapolation, softcap, logit_scale, ignore_index, " ".join(outputs),
        logits_dtype, "" if process_group is None else process_group.group_name, chunk_rows, wants,
        folded,
    )  # fmt: skip
    names = (*FIELDS, *outputs)
    values = dict(zip(names, found, strict=False))
    left = iter(found[len(names) :])
    grads = [next(left) if want else None for want in wants]
    if grad_weight_out is not None and grads[1] is not None:
        grad_weight_out.add_(grads[1])
        grads[1] = None
    if any(wants):
        values["loss"] = _Connect.apply(  # type: ignore[no-untyped-call]
            values["loss"], *grads, hidden, weight, bias
        )
    return PreferenceLoss(**values)


@torch.library.custom_op("srlm_kernels::linear_preference_loss", mutates_args=())
def preference_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    cu_seqlens: Tensor,
    loss: str,
    loss_tensors: Sequence[Tensor],
    pair_names: str,
    pair_tensors: Sequence[Tensor],
    scale: Tensor,
    rows: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_logp: Tensor | None,
    extrapolation: float | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    outputs: str,
    logits_dtype: torch.dtype,
    group: str,
    chunk_rows: int | None,
    wants: Sequence[bool],
    wide: bool,
) -> list[Tensor]:
    """`FIELDS`, the `outputs`, then the gradients of hidden, weight and bias that are wanted.

    `wide`: the weight's in the dtype of statistics, to be added to a buffer of the caller.
    """
    values, grads = _forward(
        hidden, weight, target, cu_seqlens, from_spec(loss, list(loss_tensors)), wants=wants,
        pair=dict(zip(pair_names.split(), pair_tensors, strict=True)), scale=scale, rows=rows,
        bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias,
        ref_logp=ref_logp, grad_weight_out=None, extrapolation=extrapolation,
        softcap=softcap, logit_scale=logit_scale, ignore_index=ignore_index,
        outputs=outputs.split(), logits_dtype=logits_dtype, process_group=group_of(group),
        chunk_rows=chunk_rows,
    )  # fmt: skip
    rounded = [
        g if wide and t is weight else g.to(t.dtype)
        for g, t in zip(grads, (hidden, weight, bias), strict=True)
        if g is not None and t is not None
    ]
    return [*values.values(), *rounded]


@preference_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    cu_seqlens: Tensor,
    loss: str,
    loss_tensors: Sequence[Tensor],
    pair_names: str,
    pair_tensors: Sequence[Tensor],
    scale: Tensor,
    rows: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_logp: Tensor | None,
    extrapolation: float | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    outputs: str,
    logits_dtype: torch.dtype,
    group: str,
    chunk_rows: int | None,
    wants: Sequence[bool],
    wide: bool,
) -> list[Tensor]:
    dtype = torch.promote_types(logits_dtype, torch.float32)
    pairs, rows_given = cu_seqlens.shape[0] // 2, target.shape[0]
    shapes = {"loss": (), "losses": (pairs,), "margins": (pairs,), "ext_margins": (pairs,)}
    shapes |= dict.fromkeys(("logp", "ref_logp", "extrapolated_logp"), (2 * pairs,))
    shapes |= dict.fromkeys(("token_logp", *outputs.split()), (rows_given,))
    fields = [
        hidden.new_empty(shapes[name], dtype=torch.bool if name == "is_top1" else dtype)
        for name in (*FIELDS, *outputs.split())
    ]
    grads = [
        t.new_empty(t.shape, dtype=dtype if wide and t is weight else t.dtype)
        for t, want in zip((hidden, weight, bias), wants, strict=True)
        if want and t is not None
    ]
    return fields + grads


class _Connect(torch.autograd.Function):
    """`GradsInForward` for compiled graphs, whose own saved tensors no offloading hook sees."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        *inputs: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors)
        return None, None, None, None, *grads
