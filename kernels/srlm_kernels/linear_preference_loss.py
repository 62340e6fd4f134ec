"""A preference loss of packed response pairs straight from hidden states and the LM head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srlm_kernels.checks import check_pairs, check_projection, check_reference, stats_dtype
from srlm_kernels.dispatch import Need, choose
from srlm_kernels.linear_logp import linear_logp_ref
from srlm_kernels.operands import ready_operands, without_autocast
from srlm_kernels.pair_grad import pair_grad_ref


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of P pairs and what was learnt on the way; only `loss` carries gradients.

    fp32 (fp64 when the logits are fp64), nats. Margins are unscaled differences of log-ratios (no
    beta). Without a reference `ref_logp` is 0; without extrapolation `extrapolated_logp` is `logp`.
    """

    loss: Tensor
    """0-d: scale * sum(losses)."""
    losses: Tensor
    """[P], unscaled."""
    margins: Tensor
    """[P]: (chosen - ref_chosen) - (rejected - ref_rejected)."""
    ext_margins: Tensor
    """[P]: `margins` with the extrapolated sums in the policy's place."""
    logp: Tensor
    """[2P]: per sequence, the sum over its non-ignored rows."""
    ref_logp: Tensor
    """[2P]"""
    extrapolated_logp: Tensor
    """[2P]"""
    token_logp: Tensor
    """[N]: the policy's, 0 in ignored rows."""
    entropy: Tensor | None = None
    """[N], like the three below, when `outputs` asks for it; see `LinearLogp`."""
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    loss_fn: Callable[..., Tensor],
    *,
    pair: Mapping[str, Tensor] | None = None,
    scale: float | Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logp: Tensor | None = None,
    extrapolation: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    grad_weight_out: Tensor | None = None,
    outputs: Collection[str] = (),
    logits_dtype: torch.dtype | None = None,
    process_group: Any = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> PreferenceLoss:
    """scale * sum of `loss_fn` over P pairs of packed responses.

    Sequence i owns rows `cu_seqlens[i]:cu_seqlens[i+1]`, which may be none; sequences 2p and 2p+1
    are the chosen and the rejected response of pair p. Log-probabilities are summed over the
    non-ignored rows. Arguments not listed are those of `linear_logp`. The gradients of `hidden`,
    `weight` and `bias`, and of nothing else, are computed with the loss; a second backward raises
    RuntimeError, and there is no second derivative. A compiled graph checks neither that nor the
    upstream gradient that `grad_weight_out` asks for.

    Args:
        cu_seqlens: [2P+1] int, rising from 0 to N.
        loss_fn: `loss_fn(s: PairLogps, **pair) -> [P]`, see `losses`.
        pair: extra arguments of `loss_fn`, tensors [P].
        scale: factor of the summed losses; None: 1/P. To accumulate micro-batches pass 1 / (pairs
            of the whole optimiser step).
        ref_logp: [2P] known reference sums, in the place of `ref_hidden`. Sums cannot be
            extrapolated: an error together with `extrapolation`.
        grad_weight_out: [V, D] fp32 (fp64 for fp64 logits); dW is added to it during this call
            (not under `no_grad`), complete on return, and `weight` gets no gradient from backward.
            The upstream gradient must then be 1; another one is an error where it can be read
            without waiting for a device. Not inside a checkpointed region, which runs twice.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options that do not fit together.
        IndexError: a target outside the vocabulary, on a CPU; elsewhere its results are NaN.
    """
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = ready_operands(  # type: ignore[assignment]
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, process_group=process_group,
        grad_weight_out=grad_weight_out,
    )  # fmt: skip
    check_projection(
        hidden, weight, target, rows=rows, bias=bias, softcap=softcap, temperature=1.0,
        ignore_index=ignore_index, outputs=outputs, logits_dtype=logits_dtype,
        process_group=process_group, chunk_rows=chunk_rows,
    )  # fmt: skip
    check_pairs(
        hidden, weight, target, cu_seqlens, pair=pair, scale=scale, ref_hidden=ref_hidden,
        ref_weight=ref_weight, ref_logp=ref_logp, extrapolation=extrapolation,
        grad_weight_out=grad_weight_out, logits_dtype=logits_dtype,
    )  # fmt: skip
    check_reference(
        hidden, weight, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias,
        extrapolation=extrapolation,
    )  # fmt: skip
    need = Need(
        hidden, weight, bias, ref_hidden, ref_weight, outputs, logits_dtype,
        process_group is not None,
    )  # fmt: skip
    name = choose("linear_preference_loss", impl, need)
    only_chunked = {"process_group": process_group, "chunk_rows": chunk_rows}
    with without_autocast(hidden):
        return _implementation(name)(
            hidden, weight, target, cu_seqlens, loss_fn, pair=pair, scale=scale, rows=rows,
            bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias,
            ref_logp=ref_logp, extrapolation=extrapolation, softcap=softcap,
            logit_scale=logit_scale, ignore_index=ignore_index, grad_weight_out=grad_weight_out,
            outputs=outputs, logits_dtype=logits_dtype,
            **(only_chunked if name == "chunked" else {}),
        )  # fmt: skip


def _implementation(name: str) -> Callable[..., PreferenceLoss]:
    if name == "chunked":
        from srlm_kernels.linear_preference_loss_chunked import linear_preference_loss_chunked

        return linear_preference_loss_chunked
    return linear_preference_loss_ref


def linear_preference_loss_ref(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    loss_fn: Callable[..., Tensor],
    *,
    pair: Mapping[str, Tensor] | None = None,
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    ref_logp: Tensor | None = None,
    ignore_index: int = -100,
    grad_weight_out: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    **projection: Any,
) -> PreferenceLoss:
    """`linear_preference_loss` in plain torch, [N, V] logits in memory; nothing is checked.

    `projection`: the keywords passed on to `linear_logp_ref` unchanged.
    """
    dtype = stats_dtype(logits_dtype, hidden, weight, projection.get("ref_weight"))
    # Leaves in the wide dtype: gradients of bf16 inputs are summed in fp32 and rounded once.
    x = _leaf(hidden, dtype)
    w = _leaf(weight, dtype, always=grad_weight_out is not None)
    b = None if bias is None else _leaf(bias, dtype)
    token = linear_logp_ref(
        x, w, target, bias=b, ignore_index=ignore_index, logits_dtype=logits_dtype, **projection
    )
    scale = 1 / max(cu_seqlens.shape[0] // 2, 1) if scale is None else scale
    found = pair_grad_ref(
        token.logp.detach(), target != ignore_index, cu_seqlens, loss_fn, scale=scale, pair=pair,
        ref_logp=token.ref_logp, extrapolated_logp=token.extrapolated_logp,
        ref_sums=None if ref_logp is None else ref_logp.detach(),
    )  # fmt: skip
    loss = scale * found.losses.sum()
    if token.logp.requires_grad:
        lengths = cu_seqlens.to(target.device, torch.int64).diff()
        upstream = found.slopes.repeat_interleave(lengths, output_size=target.shape[0])
        torch.autograd.backward(token.logp, upstream)
        if grad_weight_out is not None and w.grad is not None:
            grad_weight_out += w.grad
            w.grad = None
        grads = (x.grad, w.grad, None if b is None else b.grad)
        folded = grad_weight_out is not None
        loss = GradsInForward.apply(loss, grads, folded, hidden, weight, bias)  # type: ignore[no-untyped-call]
    return PreferenceLoss(
        loss,
        losses=found.losses,
        margins=found.margins,
        ext_margins=found.ext_margins,
        logp=found.logp,
        ref_logp=found.ref_logp,
        extrapolated_logp=found.extrapolated_logp,
        token_logp=token.logp.detach(),
        entropy=token.entropy,
        mean_logit=token.mean_logit,
        is_top1=token.is_top1,
        log_sum_sq_probs=token.log_sum_sq_probs,
    )


def _leaf(t: Tensor, dtype: torch.dtype, always: bool = False) -> Tensor:
    return t.detach().to(dtype).requires_grad_(t.requires_grad or always)


class GradsInForward(torch.autograd.Function):
    """Passes the loss through; its backward hands out gradients that are known already."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        grads: tuple[Tensor | None, ...],
        folded: bool,
        *inputs: Tensor | None,
    ) -> Tensor:
        # On ctx rather than saved for backward: offloading hooks would move them to the host.
        ctx.grads = [
            None if grad is None or t is None else grad.to(t.dtype)
            for grad, t in zip(grads, inputs, strict=True)
        ]
        ctx.folded = folded
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "an earlier backward took the gradients of this linear_preference_loss; "
                "call the op again for a second one"
            )
        if ctx.folded and upstream.device.type == "cpu" and upstream.item() != 1:
            raise RuntimeError(
                "grad_weight_out holds dW for an upstream gradient of 1, "
                f"got {upstream.item()}; put the factor into scale"
            )
        grads, ctx.grads = ctx.grads, None
        return None, None, None, *(None if grad is None else grad.mul_(upstream) for grad in grads)
