"""`tree_attention` as a Triton kernel: one program per item and key head."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from srlm_kernels.merge_states_triton import merge_states_triton
from srlm_kernels.tree_attention import PAGE as SLOTS
from srlm_kernels.tree_attention import TreePlan
from srlm_kernels.triton_support import (
    EXACT,
    constant,
    final_logit,
    jit,
    target_arch,
    tl,
    transform_factors,
    triton,
)

PAGE = constant(SLOTS)
ENTRIES = constant(128)  # page entries looked at together
NOWHERE = constant(2**30)  # behind every position, and a sum with a page stays in 32 bits
LN2 = constant(math.log(2))
LOWEST = constant(torch.finfo(torch.float32).min)  # nothing seen: minus itself it is 0, not NaN


def tree_attention_triton(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    plan: TreePlan,
    position: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`tree_attention` for fp32, bf16 or fp16 and heads of up to 256; the rest is not checked.

    Raises ValueError for wider heads.
    """
    o, lse = partial_states(
        query, key_pages, value_pages, plan, position, scale=scale, window=window, softcap=softcap
    )
    return merge_states_triton(
        o, lse, plan.token_ptr, plan.token_entries, sinks=sinks, dtype=query.dtype
    )


def partial_states(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    plan: TreePlan,
    position: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """What `merge_states` takes: of each query entry o [Q, H, Dv] and log-sum-exp [Q, H], fp32."""
    (heads, key_width), (kv_heads, _, value_width) = query.shape[1:], value_pages.shape[1:]
    o = query.new_empty(len(plan.queries), heads, value_width, dtype=torch.float32)
    lse = query.new_empty(o.shape[:2], dtype=torch.float32)
    inner, outer = transform_factors(softcap, scale, 1.0)
    if softcap is None:  # powers of 2 are what the hardware has
        inner *= math.log2(math.e)
    else:
        outer *= math.log2(math.e)
    for entries, first, end in plan.launches:
        rows = entries * (heads // kv_heads)
        if end == first:
            continue
        tile, options = launch_options(rows, block(max(key_width, value_width)), query.dtype)
        with torch.cuda.device_of(query):
            _tree_attention_kernel[(end - first, kv_heads, triton.cdiv(rows, tile))](
                query, key_pages, value_pages, plan.items, plan.pages, plan.queries, position,
                o, lse, first, *query.stride()[:2], *key_pages.stride(), *value_pages.stride(),
                inner, outer, window, HEADS=heads, GROUP=heads // kv_heads, DK=key_width,
                DV=value_width, BLOCK_DK=block(key_width), BLOCK_DV=block(value_width), TILE=tile,
                CAPPED=softcap is not None, **options, **EXACT,
            )  # fmt: skip
    return o, lse


def block(width: int) -> int:
    """Width of the tile for heads of that width."""
    return int(max(16, triton.next_power_of_2(width)))


def launch_options(rows: int, width: int, dtype: torch.dtype) -> tuple[int, dict[str, int]]:
    """Rows of a program's tile for items of `rows` and tiles of `width`; warps, pipeline stages.

    The largest that leave all of it in registers, see tests/srlm_kernels/aot.py.
    """
    if width > 256:
        raise ValueError(f"impl='triton' takes heads of up to 256, not {width}; 'torch' takes any")
    rows, arch = max(16, triton.next_power_of_2(rows)), target_arch()
    if dtype == torch.float32:  # no tensor cores: each thread holds whole rows of both factors
        most = 8 if width <= 64 else 256 // width
        return min(rows, most), {"num_warps": 8, "num_stages": 2, "maxnreg": 255}
    most = 64 if width <= (64 if arch < 90 else 128) else 32
    tile = min(rows, most)
    if arch == 90 and width <= 128:  # with 2 stages, two programs of a processor take turns
        return tile, {"num_warps": 4, "num_stages": 3 if tile * width <= 4096 else 2}
    stages = 3 if width <= 128 or arch // 10 in (9, 10) else 2  # the others have less memory
    return tile, {"num_warps": 8 if tile == most else 4, "num_stages": stages}


# Where the parts of a plan begin in memory, and where a class of items does, is chance: no reason
# to compile anew.
_unspecialised = partial(
    jit,
    do_not_specialize=("first_item",),
    do_not_specialize_on_alignment=("items", "pages", "queries", "position"),
)


@_unspecialised
def _tree_attention_kernel(
    query,
    key_pages,
    value_pages,
    items,
    pages,
    queries,
    position,
    o,
    lse,
    first_item,
    query_token_stride,
    query_head_stride,
    key_page_stride,
    key_head_stride,
    key_slot_stride: tl.constexpr,
    key_stride: tl.constexpr,
    value_page_stride,
    value_head_stride,
    value_slot_stride: tl.constexpr,
    value_stride: tl.constexpr,
    inner,
    outer,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TILE: tl.constexpr,
    CAPPED: tl.constexpr,
):
    # Keys are the rows of the products and queries the columns, not the other way round: so tiles
    # of all sizes are computed by the same instructions, those of the tensor cores that read
    # shared memory and want 64 rows included, and the size of a tile cannot show in the result.
    item = items + 4 * (first_item + tl.program_id(0))
    rows = tl.load(item + 3) * GROUP
    if tl.program_id(2) * TILE >= rows:
        return
    kv_head = tl.program_id(1)
    row = tl.program_id(2) * TILE + tl.arange(0, TILE)
    inside = row < rows
    first_entry = tl.load(item + 2)
    token = tl.load(queries + first_entry + row // GROUP, mask=inside, other=0).to(tl.int64)
    at = tl.load(position + token, mask=inside, other=-1)
    first, last = tl.min(tl.where(inside, at, NOWHERE), 0), tl.max(at, 0)
    lowest = -NOWHERE if window is None else first - window + 1
    pages += 4 * tl.load(item)
    begin, end = _pages_in_sight(pages, tl.load(item + 1), lowest, last)

    dk, dv, slot = tl.arange(0, BLOCK_DK), tl.arange(0, BLOCK_DV), tl.arange(0, PAGE)
    head = (kv_head * GROUP + row % GROUP).to(tl.int64)
    start = token * query_token_stride + head * query_head_stride
    within = inside[None, :] & (dk < DK)[:, None]
    q = tl.load(query + start[None, :] + dk[:, None], mask=within, other=0.0)
    key_pages += kv_head.to(tl.int64) * key_head_stride
    value_pages += kv_head.to(tl.int64) * value_head_stride
    top = tl.full([TILE], LOWEST, tl.float32)
    # Every slot keeps the sum of its own keys, so that the loop holds one reduction only.
    total = tl.zeros([PAGE, TILE], tl.float32)
    acc = tl.zeros([BLOCK_DV, TILE], tl.float32)
    # Known one page ahead, or the loads of keys would wait for those of page numbers.
    page, base, start, stop = _page_entry(pages, begin, end, lowest, last)
    for i in range(begin, end):
        valid = (slot >= start) & (slot < stop)
        # What nobody sees is not read: 0 times NaN is NaN.
        k = _read(
            key_pages + page.to(tl.int64) * key_page_stride, slot[:, None], key_slot_stride,
            dk[None, :], key_stride, DK, valid[:, None],
        )  # fmt: skip
        v = _read(
            value_pages + page.to(tl.int64) * value_page_stride, slot[None, :], value_slot_stride,
            dv[:, None], value_stride, DV, valid[None, :],
        )  # fmt: skip
        seen = valid[:, None] & _sees(at[None, :], base + slot[:, None], window)
        page, base, start, stop = _page_entry(pages, i + 1, end, lowest, last)
        s = final_logit(tl.dot(k, q, input_precision="ieee"), inner, outer, CAPPED)
        s = tl.where(seen, s, -float("inf"))
        before, top = top, tl.maximum(top, tl.max(s, 0))
        fall = tl.exp2(before - top)[None, :]
        p = tl.exp2(s - top[None, :])
        total = total * fall + p
        acc = tl.dot(v, p.to(v.dtype), acc * fall, input_precision="ieee")

    out = first_entry.to(tl.int64) * HEADS
    out_row = row // GROUP * HEADS + kv_head * GROUP + row % GROUP
    total = _sum_of_slots(total, TILE)
    natural = (top + tl.log2(total)) * LN2
    tl.store(lse + out + out_row, tl.where(total == 0, -float("inf"), natural), mask=inside)
    acc = acc / tl.where(total == 0, 1.0, total)[None, :]
    within = inside[None, :] & (dv < DV)[:, None]
    tl.store(o + out * DV + (out_row[None, :] * DV + dv[:, None]), acc, mask=within)


@jit
def _sees(position, key_position, window):
    """Whether causality and the window, if any, let a query see a key."""
    seen = key_position <= position
    if window is not None:
        seen &= position - key_position < window
    return seen


@jit
def _read(
    page,
    slot,
    slot_stride: tl.constexpr,
    column,
    stride: tl.constexpr,
    WIDTH: tl.constexpr,
    valid,
):
    """Keys or values of the valid slots of a page, 0 in the others."""
    where = page + (slot * slot_stride + column * stride)
    return tl.load(where, mask=valid & (column < WIDTH), other=0.0)


@jit
def _page_entry(pages, i, end, lowest, last):
    """Page, position of its slot 0, and first and end of the slots that some query may see."""
    entry, inside = pages + 4 * i, i < end
    page = tl.load(entry, mask=inside, other=0)
    base = tl.load(entry + 1, mask=inside, other=0)
    start = tl.load(entry + 2, mask=inside, other=0)
    stop = tl.load(entry + 3, mask=inside, other=0)
    return page, base, tl.maximum(start, lowest - base), tl.minimum(stop, last + 1 - base)


@jit
def _pages_in_sight(pages, count, lowest, last):
    """Begin and end of the page entries that have a valid slot in positions lowest to last."""
    # Entries ascend: those behind all windows come first, those ahead of all queries last.
    begin, end = 0, 0
    for start in range(0, count, ENTRIES):
        i = start + tl.arange(0, ENTRIES)
        here = i < count
        base = tl.load(pages + 4 * i + 1, mask=here, other=NOWHERE)
        first = base + tl.load(pages + 4 * i + 2, mask=here, other=0)
        stop = base + tl.load(pages + 4 * i + 3, mask=here, other=0)
        begin += tl.sum((stop <= lowest).to(tl.int32))
        end += tl.sum((first <= last).to(tl.int32))
    return begin, end


@jit
def _sum_of_slots(x, TILE: tl.constexpr):
    """Sums over the 64 slots, neighbours first: a sum of two does not depend on who forms it."""
    for _ in tl.static_range(6):
        x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2, TILE]), 1)
    return tl.reshape(x, [TILE])
