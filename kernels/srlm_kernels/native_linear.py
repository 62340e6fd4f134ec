"""`invariant_linear` in C++ for the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels.native import fp32, require


def invariant_linear_cpp(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype
) -> Tensor:
    """`invariant_linear_ref` for fp32 or bf16 on the CPU, rows bitwise independent.

    Raises:
        RuntimeError: no library (`native.why` says the reason), or tensors that do not fit.
    """
    require()
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], weight.shape[0], dtype=out_dtype)
    torch.ops.srlm_kernels_c.invariant_linear.default(out, rows, weight, fp32(bias))
    return out.view(*x.shape[:-1], weight.shape[0])
