"""`merge_states` as a Triton kernel: one program per token and some heads."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels.triton_support import EXACT, dense, jit, tl, triton


def merge_states_triton(
    o: Tensor,
    lse: Tensor,
    token_ptr: Tensor,
    token_entries: Tensor,
    *,
    sinks: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """`merge_states` for fp32 `o` and `lse`; arguments are not checked."""
    tokens, (heads, width) = len(token_ptr) - 1, o.shape[1:]
    out = torch.empty(tokens, heads, width, dtype=dtype, device=o.device)
    if out.numel() == 0:
        return out
    block = triton.next_power_of_2(width)
    some = min(triton.next_power_of_2(heads), max(1, 1024 // block))
    with torch.cuda.device_of(o):
        _merge_states_kernel[(tokens, triton.cdiv(heads, some))](
            o, lse, token_ptr, token_entries, dense(sinks), out, HEADS=heads, SOME=some, DV=width,
            BLOCK=block, num_warps=4, **EXACT,
        )  # fmt: skip
    return out


@jit
def _merge_states_kernel(
    o,
    lse,
    token_ptr,
    token_entries,
    sinks,
    out,
    HEADS: tl.constexpr,
    SOME: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    head = tl.program_id(1) * SOME + tl.arange(0, SOME)
    column = tl.arange(0, BLOCK)[None, :]
    inside = head < HEADS
    whole = inside[:, None] & (column < DV)
    begin, end = tl.load(token_ptr + token), tl.load(token_ptr + token + 1)
    top = tl.full([SOME], -float("inf"), tl.float32)
    for i in range(begin, end):
        row = tl.load(token_entries + i).to(tl.int64) * HEADS + head
        top = tl.maximum(top, tl.load(lse + row, mask=inside, other=0.0))
    top = tl.where(top == -float("inf"), 0.0, top)  # -inf minus -inf is NaN
    total = tl.zeros([SOME], tl.float32)
    acc = tl.zeros([SOME, BLOCK], tl.float32)
    for i in range(begin, end):
        row = tl.load(token_entries + i).to(tl.int64) * HEADS + head
        x = tl.load(lse + row, mask=inside, other=0.0)
        weight = tl.exp(x - top)
        total += weight
        part = tl.load(o + row[:, None] * DV + column, mask=whole, other=0.0)
        acc += tl.where((x == -float("inf"))[:, None], 0.0, weight[:, None] * part)
    if sinks is not None:
        total += tl.exp(tl.load(sinks + head, mask=inside, other=0.0).to(tl.float32) - top)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    row = token.to(tl.int64) * HEADS + head
    tl.store(out + row[:, None] * DV + column, acc.to(out.dtype.element_ty), mask=whole)
