"""`logits_grad` as a Triton kernel: one program per row, each logit is read and written once."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels.logits_grad import narrowed
from srlm_kernels.triton_support import EXACT, dense, jit, tanh, tl, transform_factors


def logits_grad_triton(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    upstream: Tensor,
    *,
    bias: Tensor | None = None,
    first_column: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """`logits_grad` for fp32 lse and upstream, fp32, bf16 or fp16 logits; nothing is checked."""
    rows, columns = logits.shape
    grad = narrowed(logits, grad_dtype or logits.dtype)
    if rows == 0:
        return grad
    inner, outer = transform_factors(softcap, logit_scale, temperature)
    with torch.cuda.device_of(logits):
        _logits_grad_kernel[(rows,)](
            grad, logits, dense(target), dense(lse), dense(upstream), dense(bias),
            columns, first_column, grad.stride(0), logits.stride(0), inner, outer,
            logit_scale / temperature, CAPPED=softcap is not None, BLOCK=2048, num_warps=8, **EXACT,
        )  # fmt: skip
    return grad


@jit
def _logits_grad_kernel(
    grad,
    logits,
    target,
    lse,
    upstream,
    bias,
    columns,
    first_column,
    grad_stride,
    logits_stride,
    inner,
    outer,
    slope,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Row offsets are 64-bit: rows * columns passes 2^31.
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    grad += row * grad_stride
    lse = tl.load(lse + row)
    factor = tl.load(upstream + row)
    hit = tl.load(target + row) - first_column
    read = tl.where(factor == 0, 0, columns)  # nothing of a row that nobody asks for
    factor *= slope
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        z = tl.load(logits + column, mask=column < read, other=0.0).to(tl.float32)
        # `grad` lies over `logits`. Where it is half as wide, block b is written over logits of
        # block b // 2 and no other: with B elements in a block it covers bytes 2bB to 2(b+1)B of
        # the row, and logits of block k bytes 4kB to 4(k+1)B. As b // 2 <= b, this program, which
        # alone owns the row, has loaded them in this iteration or before. All of its warps have
        # only once they met here; and they must meet in every iteration, or a fast warp would
        # write blocks that a slow one has yet to load.
        tl.debug_barrier()
        if bias is not None:
            z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        z *= inner
        if CAPPED:
            capped = tanh(z)
            z = outer * capped
        p = tl.where(z == -float("inf"), 0.0, tl.exp(z - lse))
        d = (tl.where(column == hit, 1.0, 0.0) - p) * factor
        if CAPPED:
            d *= 1.0 - capped * capped
        d = tl.where(column < read, d, 0.0)
        tl.store(grad + column, d.to(grad.dtype.element_ty), mask=inside)
