"""`invariant_linear` in C++ for CPUs with AVX-512."""

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels.native import fp32


def invariant_linear_cpp(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype
) -> Tensor:
    """`invariant_linear_ref` for fp32 or bf16 on the CPU, rows bitwise independent.

    Weights are read from memory once. Denormal numbers may count as 0 in bf16.

    Raises:
        AttributeError: no library, or one built without AVX-512 (`native.has` tells).
        RuntimeError: tensors that do not fit together.
    """
    if x.ndim != 2 or x.stride(1) != 1:
        x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)
    torch.ops.srlm_kernels_c.invariant_linear.default(out, x, weight, fp32(bias))
    return out
