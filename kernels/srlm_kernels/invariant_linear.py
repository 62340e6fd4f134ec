"""A linear layer on the CPU whose rows do not depend on each other, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from srlm_kernels.backends import row_kernel


def invariant_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """x weight^T + bias. No gradients.

    A BLAS chooses its blocking by the number of rows, and with it the order of its sums: the same
    token has other bits in another batch. With "cpp" a row's result is one sum in one order,
    whatever is computed beside it and on how many threads. It is also the fastest for the few rows
    of a decoding step, where a BLAS is made for many (`benchmarks/bench_invariant_linear.py`).

    Args:
        x: [..., K] fp32 or bf16, unit last stride (any dtype with "torch").
        weight: [N, K] like `x`, unit column stride. bias: [N].
        out_dtype: fp32 or bf16, default that of `x`; sums are fp32.
        impl: "auto", "torch" (not invariant) or "cpp" (CPU).

    Returns:
        [..., N].

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, or an `impl` that cannot run here.
    """
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must be [..., K] and weight [N, K], got {list(x.shape)} and {list(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise TypeError(f"x and weight must share a dtype, got {x.dtype} and {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    run = row_kernel("invariant_linear", impl, x)
    out: Tensor = run(x, weight, bias, out_dtype=out_dtype or x.dtype)
    return out


def invariant_linear_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype
) -> Tensor:
    """`invariant_linear` in plain torch: the result, without the invariance."""
    return F.linear(x, weight, bias).to(out_dtype)
