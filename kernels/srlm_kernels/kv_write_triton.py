"""`kv_write` as a Triton kernel: one program per some tokens and a head."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels.tree_attention import PAGE as SLOTS
from srlm_kernels.triton_support import EXACT, constant, dense, jit, tl, triton

PAGE = constant(SLOTS)
TOKENS = 8  # of a program: decoding has few


def kv_write_triton(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slot: Tensor
) -> None:
    """`kv_write` for fp32, bf16 or fp16; arguments are not checked."""
    tokens, heads, key_width = key.shape
    if tokens == 0:
        return
    with torch.cuda.device_of(key):
        _kv_write_kernel[(triton.cdiv(tokens, TOKENS), heads)](
            key, value, key_pages, value_pages, dense(slot), tokens, *key.stride()[:2],
            *value.stride()[:2], *key_pages.stride(), *value_pages.stride(), SOME=TOKENS,
            DK=key_width, DV=value.shape[2], BLOCK_DK=triton.next_power_of_2(key_width),
            BLOCK_DV=triton.next_power_of_2(value.shape[2]), num_warps=4, **EXACT,
        )  # fmt: skip


@jit
def _kv_write_kernel(
    key,
    value,
    key_pages,
    value_pages,
    slot,
    tokens,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    key_page_stride,
    key_pages_head_stride,
    key_slot_stride,
    key_stride,
    value_page_stride,
    value_pages_head_stride,
    value_slot_stride,
    value_stride,
    SOME: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    token = tl.program_id(0) * SOME + tl.arange(0, SOME)
    head = tl.program_id(1)
    where = tl.load(slot + token, mask=token < tokens, other=-1)
    written = (where >= 0)[:, None]
    page, offset = where // PAGE, where % PAGE
    token = token.to(tl.int64)
    d = tl.arange(0, BLOCK_DK)
    mask = written & (d < DK)[None, :]
    source = token * key_token_stride + head * key_head_stride
    target = page * key_page_stride + head * key_pages_head_stride + offset * key_slot_stride
    x = tl.load(key + source[:, None] + d[None, :], mask=mask)
    tl.store(key_pages + target[:, None] + d[None, :] * key_stride, x, mask=mask)
    d = tl.arange(0, BLOCK_DV)
    mask = written & (d < DV)[None, :]
    source = token * value_token_stride + head * value_head_stride
    target = page * value_page_stride + head * value_pages_head_stride
    target += offset * value_slot_stride
    x = tl.load(value + source[:, None] + d[None, :], mask=mask)
    tl.store(value_pages + target[:, None] + d[None, :] * value_stride, x, mask=mask)
