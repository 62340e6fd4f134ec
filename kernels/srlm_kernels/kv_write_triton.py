"""`kv_write` as a Triton kernel: one program per some tokens and a head."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from functools import partial

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


# Prompts come in all lengths: no reason to compile anew.
@partial(jit, do_not_specialize=("tokens",))
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
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot + token, mask=token < tokens, other=-1)
    token = token.to(tl.int64)
    _copy(
        key + token * key_token_stride + head * key_head_stride,
        key_pages + slot // PAGE * key_page_stride + head * key_pages_head_stride,
        slot, key_slot_stride, key_stride, DK, BLOCK_DK,
    )  # fmt: skip
    _copy(
        value + token * value_token_stride + head * value_head_stride,
        value_pages + slot // PAGE * value_page_stride + head * value_pages_head_stride,
        slot, value_slot_stride, value_stride, DV, BLOCK_DV,
    )  # fmt: skip


@jit
def _copy(source, page, slot, slot_stride, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A vector from each of `source` into its slot, unless that is negative."""
    column = tl.arange(0, BLOCK)[None, :]
    mask = (slot >= 0)[:, None] & (column < WIDTH)
    target = page + slot % PAGE * slot_stride
    x = tl.load(source[:, None] + column, mask=mask)
    tl.store(target[:, None] + column * stride, x, mask=mask)
