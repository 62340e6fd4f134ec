"""Attention of many sequences over pages of keys and values that they share as a tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from srlm_kernels.backends import row_kernel
from srlm_kernels.merge_states import merge_states_ref

PAGE = 64
"""Positions of a page: page i of a sequence holds 64 i to 64 i + 63, position p in slot p % 64."""

_PAGES_AT_ONCE = 1024  # that the reference gathers: a gigabyte would be soon reached


class TreePlan(NamedTuple):
    """Which queries read which pages: int32 tensors on the device of the pages.

    An item is a run of pages that several queries share; a query entry is one query in one item.
    The key at position k, in a slot of an item's page, is seen by the item's query at position q if
    the slot is valid, k <= q and, with a window, q - k < window. So slots of a growing page that
    nobody has written yet may be valid: no query is that far.
    """

    items: Tensor
    """[W, 4] first page entry, number of them, first query entry, number of them; the last is 0 in
    an item that pads."""
    pages: Tensor
    """[E, 4] page, position of its slot 0, first valid slot, end of the valid slots; ascending
    within an item."""
    queries: Tensor
    """[Q] the token of each query entry."""
    token_ptr: Tensor
    """[T + 1] where each token begins in `token_entries`."""
    token_entries: Tensor
    """[Q] the query entries of each token, in the order in which they are merged."""
    launches: tuple[tuple[int, int, int], ...]
    """(most query entries of an item, first item, end item) of classes of items of like size."""


def tree_attention(
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
    impl: str = "auto",
) -> Tensor:
    """Attention of T tokens over the pages that `plan` gives them.

    softmax(softcap(scale * q k)) v over all keys that a token sees, per item and then merged by the
    log-sum-exps of the items. What other queries share its items, or how items are launched, does
    not change a bit of a token's result with "cpp" and "triton"; "torch" may round differently.
    Slots that no query of an item sees may hold anything, NaN included.

    Args:
        query: [T, H, Dk] fp32, bf16 or fp16 (fp64 with "torch"), unit last stride.
        key_pages: [P, Hkv, 64, Dk] like `query`, any strides. Query head h reads h // (H // Hkv).
        value_pages: [P, Hkv, 64, Dv].
        position: [T] int32.
        scale: of the products, before `softcap` * tanh(. / softcap).
        window: a query sees that many positions, its own included; None: all.
        sinks: [H] float, one more logit per head without a value, once per token.
        impl: "auto", "torch", "cpp" (CPU) or "triton" (CUDA, or under its interpreter).

    Returns:
        [T, H, Dv] in the dtype of `query`; 0 for a token that sees nothing.

    Raises:
        TypeError, ValueError: shapes, dtypes or options that do not fit, or an `impl` that cannot
            run here.
    """
    _check(query, key_pages, value_pages, plan, position, sinks)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, or None, got {softcap}")
    out: Tensor = row_kernel("tree_attention", impl, query)(
        query, key_pages, value_pages, plan, position, scale=scale, window=window,
        softcap=softcap, sinks=sinks,
    )  # fmt: skip
    return out


def _check(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    plan: TreePlan,
    position: Tensor,
    sinks: Tensor | None,
) -> None:
    if query.ndim != 3 or (query.shape[2] > 1 and query.stride(2) != 1):
        raise ValueError(
            f"query must be [T, H, Dk] with unit last stride, got {list(query.shape)} with strides "
            f"{query.stride()}"
        )
    tokens, heads, width = query.shape
    check_pages(key_pages, value_pages, width=width, dtype=query.dtype)
    if heads % key_pages.shape[1]:
        raise ValueError(f"{heads} query heads cannot share {key_pages.shape[1]} key heads evenly")
    if position.shape != (tokens,) or position.dtype != torch.int32:
        raise ValueError(
            f"position must be int32 [{tokens}], got {position.dtype} {list(position.shape)}"
        )
    if any(part.dtype != torch.int32 for part in plan[:5]):
        raise TypeError("the tensors of plan must be int32")
    if plan.token_ptr.shape != (tokens + 1,):
        raise ValueError(f"plan is for {plan.token_ptr.shape[0] - 1} tokens, query has {tokens}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must have shape [{heads}], got {list(sinks.shape)}")


def check_pages(key_pages: Tensor, value_pages: Tensor, *, width: int, dtype: torch.dtype) -> None:
    """Raises TypeError or ValueError unless the pages are [P, Hkv, 64, width] and [P, Hkv, 64, Dv]
    of `dtype`."""
    shape = key_pages.shape
    if key_pages.ndim != 4 or shape[2:] != (PAGE, width) or value_pages.shape[:3] != shape[:3]:
        raise ValueError(
            f"key_pages must be [P, Hkv, {PAGE}, {width}] and value_pages [P, Hkv, {PAGE}, Dv], "
            f"got {list(shape)} and {list(value_pages.shape)}"
        )
    if key_pages.dtype != dtype or value_pages.dtype != dtype:
        raise TypeError(f"pages must be {dtype}, got {key_pages.dtype} and {value_pages.dtype}")


def tree_attention_ref(
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
    """`tree_attention` in plain torch; arguments are not checked."""
    heads, (kv_heads, _, value_width) = query.shape[1], value_pages.shape[1:]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    o = torch.zeros(len(plan.queries), heads, value_width, dtype=wide, device=query.device)
    lse = torch.full(o.shape[:2], -torch.inf, dtype=wide, device=query.device)
    for entry, pages in _items_of_one_shape(plan):
        token = plan.queries[entry].long()  # [n, queries]
        q = query[token].to(wide)
        q = q.view(*token.shape, kv_heads, heads // kv_heads, -1)
        k, v = (x[pages[..., 0]].to(wide).transpose(2, 3).flatten(1, 2) for x in
                (key_pages, value_pages))  # fmt: skip
        slot = torch.arange(PAGE, device=query.device)
        valid = (slot >= pages[..., 2:3]) & (slot < pages[..., 3:4])
        ahead = position[token].long()[..., None] - (pages[..., 1:2] + slot).flatten(1)[:, None]
        seen = valid.flatten(1)[:, None] & (ahead >= 0)  # [n, queries, keys]
        if window is not None:
            seen &= ahead < window
        s = torch.einsum("nqhgd,nkhd->nhgqk", q, k) * scale
        s = s if softcap is None else torch.tanh(s / softcap) * softcap
        s = s.masked_fill(~seen[:, None, None], -torch.inf)
        v = v.masked_fill(~seen.any(1)[..., None, None], 0)  # 0 times NaN is NaN
        item_lse = s.logsumexp(-1)
        p = (s - item_lse.masked_fill(item_lse == -torch.inf, 0)[..., None]).exp()
        o[entry] = torch.einsum("nhgqk,nkhd->nqhgd", p, v).flatten(2, 3)
        lse[entry] = item_lse.permute(0, 3, 1, 2).flatten(2)
    return merge_states_ref(
        o, lse, plan.token_ptr, plan.token_entries, sinks=sinks, dtype=query.dtype
    )


def _items_of_one_shape(plan: TreePlan) -> Iterator[tuple[Tensor, Tensor]]:
    """Query entries [n, queries] and pages [n, pages, 4] of n items, until all items were given."""
    items = plan.items[(plan.items[:, 1] > 0) & (plan.items[:, 3] > 0)].long()
    for pages, queries in sorted(set(map(tuple, items[:, 1::2].tolist()))):
        alike = items[(items[:, 1] == pages) & (items[:, 3] == queries)]
        page = torch.arange(pages, device=items.device)
        entry = torch.arange(queries, device=items.device)
        for some in torch.split(alike, max(1, _PAGES_AT_ONCE // pages)):
            yield some[:, 2:3] + entry, plan.pages[some[:, 0:1] + page].long()
