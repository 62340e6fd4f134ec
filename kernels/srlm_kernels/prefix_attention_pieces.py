"""`prefix_attention` on the CPU: torch's flash attention of every part, merged by log-sum-exps.

A group is one causal call of the prompt on itself, one call of all responses on the prompt, and one
causal call of each response on itself. With the result and the log-sum-exp over all keys in place
of its own, the backward of a part gives this part's exact share of the gradients: the probabilities
e^(score - lse) and the row sums of grad * out are those of the whole softmax.

A query whose scores in one call are all NaN counts for 0 there, as everywhere in torch on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from srlm_kernels.prefix_attention import PrefixPlan

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def refusal(query: Tensor, value: Tensor, options: Mapping[str, object]) -> str | None:
    """Why the parts cannot be computed here; None: they can. `options`: set if true."""
    if query.device.type != "cpu":
        return f"it runs on the CPU, not on {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float64, not {query.dtype}"
    if query.shape[2] != value.shape[2]:
        return f"keys are {query.shape[2]} wide and values {value.shape[2]}"
    asked = [name for name, given in options.items() if given]
    return f"it does not do {' and '.join(asked)}" if asked else None


class Piece(NamedTuple):
    """One call: these queries on these keys. `joins`: on what earlier pieces have found."""

    queries: slice
    keys: slice
    causal: bool
    joins: bool


def pieces(plan: PrefixPlan) -> Iterator[Piece]:
    """The calls of all groups, in the order in which they are merged."""
    for group in plan.groups:
        start = group.start + group.prompt
        prompt = slice(group.start, start)
        yield Piece(prompt, prompt, causal=True, joins=False)
        if group.responses:
            yield Piece(slice(start, group.end), prompt, causal=False, joins=False)
        for length in group.responses:
            response = slice(start, start + length)
            yield Piece(response, response, causal=True, joins=True)
            start += length


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PrefixPlan,
    *,
    scale: float,
    window: None = None,
    softcap: None = None,
    sinks: None = None,
) -> Tensor:
    """`prefix_attention` where `refusal` is None; arguments are not checked."""
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    out: Tensor = _Pieces.apply(q, k, v, plan, scale)  # type: ignore[no-untyped-call]
    return out


class _Pieces(torch.autograd.Function):
    """Heads go as [Hkv, H / Hkv, T, D]: a key head as one of the batch, which its query heads share
    by a stride of 0. So nothing is copied for grouped heads, in any layout."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: PrefixPlan, scale: float
    ) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        q, o = (_grouped(x, key.shape[1]) for x in (query, out))
        k, v = (_shared(x, q.shape[1]) for x in (key, value))
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, keys, causal, joins in pieces(plan):
            part, part_lse = _flash(
                q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale
            )
            if joins:
                share = torch.sigmoid(part_lse - lse[:, :, rows])[..., None]
                part = torch.lerp(o[:, :, rows].to(lse.dtype), part.to(lse.dtype), share)
                part_lse = torch.logaddexp(lse[:, :, rows], part_lse)
            o[:, :, rows], lse[:, :, rows] = part, part_lse
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        q, o, g = (_grouped(x, key.shape[1]) for x in (query, out, grad.contiguous()))
        k, v = (_shared(x, q.shape[1]) for x in (key, value))
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format)
                 for x in (query, key, value)]  # fmt: skip
        grad_q, grad_k, grad_v = (_grouped(x, key.shape[1]) for x in grads)
        for rows, keys, causal, joins in pieces(ctx.plan):
            dq, dk, dv = _flash_backward(
                g[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], o[:, :, rows],
                lse[:, :, rows], 0.0, causal, scale=ctx.scale,
            )  # fmt: skip
            _put(grad_q[:, :, rows], dq, add=joins)
            for total, part in ((grad_k, dk), (grad_v, dv)):
                if part.shape[1] > 1:
                    part = part.sum(1, keepdim=True, dtype=lse.dtype)
                _put(total[:, :, keys], part, add=not causal)  # its own queries were there before
        return *grads, None, None


def _put(total: Tensor, part: Tensor, *, add: bool) -> None:
    if add:
        total += part
    else:
        total.copy_(part)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[T, H, D] as [Hkv, H / Hkv, T, D]."""
    grouped: Tensor = x.unflatten(1, (kv_heads, -1))  # type: ignore[no-untyped-call]
    return grouped.permute(1, 2, 0, 3)


def _shared(x: Tensor, group: int) -> Tensor:
    """[T, Hkv, D] as [Hkv, group, T, D]."""
    return _grouped(x, x.shape[1]).expand(-1, group, -1, -1)
