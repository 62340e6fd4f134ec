"""`prefix_attention` in C++ for CPUs with AVX-512.

A thread takes one query head of one group. Products are in fp32 whatever the dtype, and a result is
rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srlm_kernels import native
from srlm_kernels.native import fp32

if TYPE_CHECKING:
    from srlm_kernels.prefix_attention import PrefixPlan

_DTYPES = (torch.float32, torch.bfloat16)


def refusal(query: Tensor) -> str | None:
    """Why it cannot be computed here; None: it can."""
    if query.device.type != "cpu":
        return f"it runs on the CPU, not on {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"it takes float32 and bfloat16, not {query.dtype}"
    if not native.available():
        return native.why()
    if native.has("prefix_attention"):
        return None
    return "the C++ library is without it: built for a CPU without AVX-512, or before it was there"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PrefixPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`prefix_attention` where `refusal` is None; arguments are not checked."""
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    native.require()
    segments = plan.once("segments", lambda: _segments(plan))
    out: Tensor = _Attention.apply(q, k, v, sinks, segments, scale, window, softcap)  # type: ignore[no-untyped-call]
    return out


def _segments(plan: PrefixPlan) -> Tensor:
    """[S, 2] int32: length and first position of every prompt and response."""
    parts = [
        (length, g.prompt if response else 0)
        for g in plan.groups
        for response, length in enumerate((g.prompt, *g.responses))
    ]
    return torch.tensor(parts, dtype=torch.int32)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        segments: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        out = query.new_empty(*query.shape[:2], value.shape[2])
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        torch.ops.srlm_kernels_c.prefix_attention.default(
            out, lse, query, key, value, segments, fp32(sinks), scale, window, softcap
        )
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.segments, ctx.options = segments, (scale, window, softcap)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        grad = grad.contiguous()
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        # Of each query head: those that share a key head are added up here, in one order.
        grad_key, grad_value = (
            x.new_empty(*query.shape[:2], x.shape[2], dtype=torch.float32) for x in (key, value)
        )
        torch.ops.srlm_kernels_c.prefix_attention_backward.default(
            grad_query, grad_key, grad_value, grad, out, lse, query, key, value, ctx.segments,
            *ctx.options,
        )  # fmt: skip
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            row_sums = (grad.float() * out.float()).sum(2)
            grad_sinks = -((sinks.float() - lse).exp() * row_sums).sum(0).to(sinks.dtype)
        return grad_query, _added(grad_key, key), _added(grad_value, value), grad_sinks, *[None] * 4


def _added(grad: Tensor, like: Tensor) -> Tensor:
    """[T, H, D] fp32 as [T, Hkv, D] in the dtype of `like`."""
    heads = like.shape[1]
    if grad.shape[1] > heads:
        grad = grad.unflatten(1, (heads, -1)).sum(2)  # type: ignore[no-untyped-call]
    return grad.to(like.dtype)
