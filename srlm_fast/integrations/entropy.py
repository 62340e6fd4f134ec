"""`linear_logp` whose entropy has a gradient, for trainers that reward it.

The op's own backward knows log-probabilities only. Entropy bonuses are rare, so theirs is a second
pass over the logits, in plain torch and a few rows at a time, which runs if a gradient arrives.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from srlm_fast.errors import UserError
from srlm_fast.model.forward import Head
from srlm_kernels import LinearLogp, linear_logp
from srlm_kernels.distributed import is_sharded

CHUNK_ROWS = 512  # of logits in fp32 at a time, three or four copies of them


def linear_logp_with_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    outputs: Collection[str] = (),
) -> LinearLogp:
    """`linear_logp`, and d entropy / d logit_v = -p_v (ln p_v + entropy) where it is asked for.

    Raises UserError in backward if the entropy's gradient is wanted of a head that FSDP2 shards.
    """
    found = linear_logp(
        hidden, weight, target, rows=rows, bias=bias, softcap=softcap, logit_scale=logit_scale,
        temperature=temperature, outputs=outputs,
    )  # fmt: skip
    if found.entropy is None or not torch.is_grad_enabled():
        return found
    head = Head(weight, bias, softcap, logit_scale)
    entropy: Tensor = _Entropy.apply(  # type: ignore[no-untyped-call]
        found.entropy, hidden, weight, bias, target, rows, head, temperature
    )
    return replace(found, entropy=entropy)


class _Entropy(torch.autograd.Function):
    """Passes the entropy through; its backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        entropy: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rows: Tensor | None,
        head: Head,
        temperature: float,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, target, rows)
        ctx.head, ctx.temperature = head, temperature
        return entropy.view_as(entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 8
        if upstream is None:
            return nothing
        hidden, weight, bias, target, rows = ctx.saved_tensors
        if is_sharded(weight):
            raise UserError(
                "the entropy has no gradient where FSDP2 shards the head: set entropy_coef to 0"
            )
        wide = torch.promote_types(hidden.dtype, torch.float32)
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(t, dtype=wide) if t is not None and needed else None
            for t, needed in zip((hidden, weight, bias), ctx.needs_input_grad[1:4], strict=True)
        )
        scored = (target != -100).nonzero().squeeze(1)
        places = scored if rows is None else rows[scored]
        for part, place in zip(scored.split(CHUNK_ROWS), places.split(CHUNK_ROWS), strict=True):
            states = hidden[place]
            matrix = weight.to(states.dtype)
            products = F.linear(states, matrix, None if bias is None else bias.to(states.dtype))
            slope = _slope(products, upstream[part], ctx.head, ctx.temperature).to(states.dtype)
            if of_hidden is not None:  # a state may predict more than one row
                of_hidden.index_add_(0, place, (slope @ matrix).to(wide))
            if of_weight is not None:
                of_weight += slope.T @ states
            if of_bias is not None:
                of_bias += slope.sum(0, dtype=wide)
        grads = [
            None if grad is None else grad.to(t.dtype)
            for grad, t in zip((of_hidden, of_weight, of_bias), (hidden, weight, bias), strict=True)
        ]
        return None, *grads, *nothing[4:]


def _slope(products: Tensor, upstream: Tensor, head: Head, temperature: float) -> Tensor:
    """d (upstream . entropy) / d products [n, V]."""
    with torch.enable_grad():
        leaf = products.detach().requires_grad_()
        logits = head.finish(leaf) / temperature
    p = logits.detach().softmax(-1)
    terms: Tensor = torch.special.entr(p)  # -p ln p, and 0 where p is
    slope = upstream[:, None] * (terms - p * terms.sum(-1, keepdim=True))
    return torch.autograd.grad(logits, leaf, slope.to(logits.dtype))[0]
