"""`linear_logp` by GEMMs over tiles of the vocabulary; no more than two tiles of logits exist.

Forward: policy and reference logits, 2 units of 2 N D V FLOP. Backward computes the policy's logits
again, which any upstream gradient can then scale: 3 units. Both are custom ops, so that a compiled
graph takes each as one node.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from srlm_kernels.distributed import group_of
from srlm_kernels.head import Grads, Head, shared_or_own
from srlm_kernels.linear_logp import LinearLogp
from srlm_kernels.operands import without_autocast
from srlm_kernels.problem import Options, Problem, log_sum_exp
from srlm_kernels.products import default_logits_dtype


def field_names(has_reference: bool, extrapolation: float | None, outputs: str) -> list[str]:
    """Fields of `LinearLogp` in the order in which the op returns them."""
    names = ["logp"]
    if has_reference:
        names.append("ref_logp")
        if extrapolation is not None:
            names.append("extrapolated_logp")
    return names + outputs.split()


@torch.library.custom_op("srlm_kernels::linear_logp", mutates_args=())
def linear_logp_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    extrapolation: float | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    outputs: str,
    logits_dtype: torch.dtype,
    group: str,
    chunk_rows: int | None,
) -> list[Tensor]:
    """The fields of `field_names` and the policy's log-sum-exp (0 in ignored rows), [N] each."""
    options = Options(
        extrapolation, softcap, logit_scale, temperature, ignore_index, outputs.split(),
        logits_dtype, group_of(group), chunk_rows,
    )  # fmt: skip
    policy = Head(weight, bias)
    reference = None if ref_hidden is None else shared_or_own(policy, ref_weight, ref_bias)
    problem = Problem(
        hidden, policy, target, rows, options, ref_hidden=ref_hidden, reference=reference
    )
    problem.allocate(rows=problem.size, keep=False)
    state = problem.score_all()
    fields = [problem.scored.spread(values) for values in problem.results(state).values()]
    return [*fields, problem.scored.spread(log_sum_exp(state))]


@linear_logp_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    extrapolation: float | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    outputs: str,
    logits_dtype: torch.dtype,
    group: str,
    chunk_rows: int | None,
) -> list[Tensor]:
    dtype = torch.promote_types(logits_dtype, torch.float32)
    names = field_names(ref_hidden is not None, extrapolation, outputs)
    return [
        hidden.new_empty(target.shape, dtype=torch.bool if name == "is_top1" else dtype)
        for name in [*names, "lse"]
    ]


@torch.library.custom_op("srlm_kernels::linear_logp_backward", mutates_args=())
def linear_logp_backward(
    upstream: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    logits_dtype: torch.dtype,
    group: str,
    chunk_rows: int | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of hidden, weight and bias, in that order those that are `wanted`."""
    options = Options(
        None, softcap, logit_scale, temperature, ignore_index, (), logits_dtype, group_of(group),
        chunk_rows,
    )  # fmt: skip
    policy = Head(weight, bias)
    problem = Problem(hidden, policy, target, rows, options)
    problem.allocate(rows=problem.size, keep=False)
    want_x, want_w, want_b = wanted
    grads = Grads.of(policy, lse.dtype, weight=want_w, bias=want_b)
    grad_x = problem.new_grad_x() if want_x else None
    slopes = problem.scored.collect(upstream.to(lse.dtype))
    problem.backward_all(problem.scored.collect(lse), slopes, grad_x, grads)
    found = [] if grad_x is None else [problem.grad_hidden(grad_x)]
    if (total := grads.total()) is not None:
        found.append(total.to(weight.dtype))
    if grads.bias is not None and bias is not None:
        found.append(grads.bias.to(bias.dtype))
    return found


@linear_logp_backward.register_fake
def _(
    upstream: Tensor,
    lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    logits_dtype: torch.dtype,
    group: str,
    chunk_rows: int | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    tensors = (hidden, weight, bias)
    return [
        t.new_empty(t.shape)
        for t, want in zip(tensors, wanted, strict=True)
        if want and t is not None
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, weight, bias, target, rows = inputs[:5]
    ctx.save_for_backward(hidden, weight, bias, target, rows, output[-1])
    softcap, logit_scale, temperature, ignore_index = inputs[9:13]
    ctx.options = (softcap, logit_scale, temperature, ignore_index, *inputs[14:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, target, rows, lse = ctx.saved_tensors
    wanted = [*ctx.needs_input_grad[:3]]
    none: tuple[Tensor | None, ...] = (None,) * 14
    if upstream[0] is None or not any(wanted):
        return (None, None, None, *none)
    with without_autocast(hidden):
        grads = linear_logp_backward(
            upstream[0], lse, hidden, weight, bias, target, rows, *ctx.options, wanted
        )
    found = iter(grads)
    return (*(next(found) if want else None for want in wanted), *none)


torch.library.register_autograd(
    "srlm_kernels::linear_logp", _backward, setup_context=_setup_context
)


def linear_logp_chunked(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    extrapolation: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: Collection[str] = (),
    logits_dtype: torch.dtype | None = None,
    process_group: Any = None,
    chunk_rows: int | None = None,
) -> LinearLogp:
    """See `linear_logp`; arguments are not checked."""
    names = " ".join(outputs)
    values = linear_logp_forward(
        hidden, weight, bias, target, rows, ref_hidden, ref_weight, ref_bias, extrapolation,
        softcap, logit_scale, temperature, ignore_index, names,
        logits_dtype or default_logits_dtype(hidden, weight, ref_weight),
        "" if process_group is None else process_group.group_name, chunk_rows,
    )  # fmt: skip
    fields = field_names(ref_hidden is not None, extrapolation, names)
    return LinearLogp(**dict(zip(fields, values[:-1], strict=True)))
