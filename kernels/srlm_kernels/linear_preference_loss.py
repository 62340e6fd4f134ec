"""A preference loss of packed response pairs straight from hidden states and the LM head."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srlm_kernels.checks import check_pairs, check_projection, check_reference, stats_dtype
from srlm_kernels.dispatch import choose
from srlm_kernels.linear_logp import LinearLogp, linear_logp_ref
from srlm_kernels.losses import PairLogps


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
    process_group: object = None,
    impl: str = "auto",
) -> PreferenceLoss:
    """scale * sum of `loss_fn` over P pairs of packed responses.

    Sequence i owns rows `cu_seqlens[i]:cu_seqlens[i+1]`, which may be none; sequences 2p and 2p+1
    are the chosen and the rejected response of pair p. Log-probabilities are summed over the
    non-ignored rows. Arguments not listed are those of `linear_logp`. The gradients of `hidden`,
    `weight` and `bias` are computed with the loss; a second backward raises RuntimeError.

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
            without waiting for a device.

    Raises:
        TypeError, ValueError: shapes, dtypes or options that do not fit together.
    """
    arguments = locals().copy()  # nothing is assigned yet: the parameters and no more
    check_projection(temperature=1.0, **arguments)
    check_pairs(**arguments)
    check_reference(**arguments)
    choice = choose("linear_preference_loss", arguments.pop("impl"))
    del arguments["process_group"]
    return {"reference": linear_preference_loss_ref}[choice](**arguments)


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
    dtype = stats_dtype(hidden, logits_dtype)
    # Leaves in the wide dtype: gradients of bf16 inputs are summed in fp32 and rounded once.
    x = _leaf(hidden, dtype)
    w = _leaf(weight, dtype, always=grad_weight_out is not None)
    b = None if bias is None else _leaf(bias, dtype)
    token = linear_logp_ref(
        x, w, target, bias=b, ignore_index=ignore_index, logits_dtype=logits_dtype, **projection
    )
    offsets = cu_seqlens.to(target.device, torch.int64)
    logp, ref, ext, count = _sequence_sums(token, ref_logp, target != ignore_index, offsets)
    s = PairLogps(*(half for sums in (logp, ref, ext, count) for half in (sums[0::2], sums[1::2])))

    scale = 1 / max(s.chosen.shape[0], 1) if scale is None else scale
    losses, slopes = pair_step(loss_fn, s, pair or {}, scale)
    loss = scale * losses.sum()
    if token.logp.requires_grad:
        upstream = slopes.repeat_interleave(offsets.diff(), output_size=target.shape[0])
        torch.autograd.backward(token.logp, upstream)
        if grad_weight_out is not None and w.grad is not None:
            grad_weight_out += w.grad
            w.grad = None
        grads = (x.grad, w.grad, None if b is None else b.grad)
        folded = grad_weight_out is not None
        loss = _GradsInForward.apply(loss, grads, folded, hidden, weight, bias)  # type: ignore[no-untyped-call]
    return PreferenceLoss(
        loss,
        losses=losses,
        margins=s.margin,
        ext_margins=s.ext_margin,
        logp=logp,
        ref_logp=ref,
        extrapolated_logp=ext,
        token_logp=token.logp.detach(),
        entropy=token.entropy,
        mean_logit=token.mean_logit,
        is_top1=token.is_top1,
        log_sum_sq_probs=token.log_sum_sq_probs,
    )


def _leaf(t: Tensor, dtype: torch.dtype, always: bool = False) -> Tensor:
    return t.detach().to(dtype).requires_grad_(t.requires_grad or always)


def _sequence_sums(
    token: LinearLogp, ref_logp: Tensor | None, scored: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Policy, reference and extrapolated log-probabilities and scored rows per sequence, [2P]."""

    def per_sequence(values: Tensor) -> Tensor:
        # In fp32 the running sum of a long response loses more than its terms ever lost.
        wide = torch.segment_reduce(values.detach().double(), "sum", offsets=offsets)
        return wide.to(token.logp.dtype)

    logp = per_sequence(token.logp)
    if ref_logp is not None:
        ref = ref_logp.detach().to(logp.dtype)
    else:
        ref = torch.zeros_like(logp) if token.ref_logp is None else per_sequence(token.ref_logp)
    ext = logp if token.extrapolated_logp is None else per_sequence(token.extrapolated_logp)
    return logp, ref, ext, per_sequence(scored)


def pair_step(
    loss_fn: Callable[..., Tensor],
    s: PairLogps,
    pair: Mapping[str, Tensor],
    scale: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """The losses [P], and d(scale * sum) / d(summed log-probability) of each sequence [2P]."""
    chosen, rejected = s.chosen.clone().requires_grad_(), s.rejected.clone().requires_grad_()
    with torch.enable_grad():
        losses = loss_fn(replace(s, chosen=chosen, rejected=rejected), **pair)
        if losses.shape != chosen.shape:
            raise ValueError(
                f"loss_fn must return one loss per pair, shape {list(chosen.shape)}, "
                f"got {list(losses.shape)}"
            )
        slopes = torch.autograd.grad(
            scale * losses.sum(), (chosen, rejected), allow_unused=True, materialize_grads=True
        )
    return losses.detach(), torch.stack(slopes, dim=1).flatten()


class _GradsInForward(torch.autograd.Function):
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
