"""What lies between the matrix products of a transformer, on the CPU, each in one pass over memory.

In C++ alone: on a GPU Liger has such kernels, and plain torch is what models do already. Sums are
in fp32 and results are rounded once. A row's result depends on nothing beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from srlm_kernels import native

_BLOCK = 64  # rows to one part of a norm's gradient in its weight, as in csrc/layers.cpp
_DTYPES = (torch.float32, torch.bfloat16)
_TYPES = (Tensor, torch.nn.Parameter)


def available() -> bool:
    """Whether the C++ library is there and has these ops."""
    return native.has("rms_norm")


def takes(*tensors: Tensor) -> bool:
    """Whether they are plain tensors of one dtype, fp32 or bf16, on the CPU."""
    dtype = tensors[0].dtype
    for x in tensors:
        if type(x) not in _TYPES or x.dtype is not dtype or not x.is_cpu:
            return False
    return dtype in _DTYPES


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension.

    Args:
        x: [..., D]; weight: [D]; tensors that `takes` accepts.
        offset: 0, or 1 as in Gemma.

    Raises RuntimeError for sizes that do not fit, AttributeError where it is not `available`.
    """
    if not torch.is_grad_enabled():  # a decoding step is short: what autograd.Function takes counts
        return _normed(x.contiguous(), weight.contiguous(), eps, offset)[0]
    out: Tensor = _RMSNorm.apply(x, weight, eps, offset)  # type: ignore[no-untyped-call]
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up, of two tensors of one shape; raises as `rms_norm`."""
    if not torch.is_grad_enabled():
        return _gated(gate.contiguous(), up.contiguous())
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, as in Llama: rotate_half of halves (a, b) is (-b, a).

    Args:
        x: [B, H, T, D] of even D, laid out like [B, T, H, D]; cos, sin: [B, T, D].

    Returns [B, H, T, D], laid out like [B, T, H, D]; raises as `rms_norm`.
    """
    if not torch.is_grad_enabled():
        return _rotated(x, cos.contiguous(), sin.contiguous(), transposed=False)
    out: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        out, rstd = _normed(x, weight, eps, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        grad_x, blocks = torch.empty_like(x), -(-len(rstd) // _BLOCK)
        parts = rstd.new_empty(blocks, len(weight))
        torch.ops.srlm_kernels_c.rms_norm_backward.default(
            grad_x, parts, grad.contiguous(), x, weight, rstd, ctx.offset
        )
        return grad_x, parts.sum(0).to(weight.dtype), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = _gated(gate, up)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grads = torch.empty_like(gate), torch.empty_like(up)
        torch.ops.srlm_kernels_c.swiglu_backward.default(*grads, grad.contiguous(), gate, up)
        return grads


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _rotated(grad, *ctx.saved_tensors, transposed=True), None, None


def _normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The result, and 1 / sqrt(mean(x^2) + eps) [N] of its rows."""
    out = torch.empty_like(x)
    rstd = x.new_empty(x.numel() // len(weight), dtype=torch.float32)
    torch.ops.srlm_kernels_c.rms_norm.default(out, rstd, x, weight, offset, eps)
    return out, rstd


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    torch.ops.srlm_kernels_c.swiglu.default(out, gate, up)
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, transposed: bool) -> Tensor:
    """`x` [B, H, T, D] with the tokens of all rows in a line for the op."""
    tokens = x.transpose(1, 2).flatten(0, 1)
    tokens = tokens if tokens.stride(2) == 1 else tokens.contiguous()
    out = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    torch.ops.srlm_kernels_c.rotary.default(out, tokens, cos, sin, transposed)
    return out.view(x.shape[0], x.shape[2], *out.shape[1:]).transpose(1, 2)
