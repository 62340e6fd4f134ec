"""Matrix products in C++ for CPUs with AVX-512."""

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels import native


def gemm_takes(a: Tensor, b: Tensor, out: Tensor) -> bool:
    """Whether `gemm_cpp` can write a @ b to `out` here."""
    known = (torch.float32, torch.bfloat16)
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype
        and a.dtype in known
        and out.dtype in known
        and out.stride(1) == 1
        and native.has("gemm")
    )


def gemm_cpp(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, on the CPU, with fp32 sums that are rounded once, to `out`.

    Sums run over 256 words of four bytes at a time and are then added up, in an order that depends
    on neither the number of threads nor the sizes. Denormal numbers may count as 0 in bf16.

    Args:
        out: [M, N] fp32 or bf16, unit column stride; shares no memory with the operands.
        a, b: [M, K] and [K, N], both fp32 or both bf16. One without a unit stride is copied first.

    Returns:
        `out`.

    Raises:
        AttributeError: a library built without AVX-512 (`gemm_takes` tells).
        RuntimeError: no library, or tensors that do not fit together.
    """
    native.require()
    # A matrix of one number or none counts as contiguous whatever its strides are.
    plain = torch.contiguous_format
    a, b = (x if 1 in x.stride() else x.clone(memory_format=plain) for x in (a, b))
    torch.ops.srlm_kernels_c.gemm.default(out, a, b, add)
    return out
