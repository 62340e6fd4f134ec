"""Attention over pages in C++ for the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels.native import fp32, require
from srlm_kernels.tree_attention import TreePlan


def kv_write_cpp(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slot: Tensor
) -> None:
    """`kv_write_ref` for fp32 or bf16 on the CPU.

    Raises:
        RuntimeError: no library (`native.why` says the reason), or a slot past the last page.
    """
    require()
    torch.ops.srlm_kernels_c.kv_write.default(key, value, key_pages, value_pages, slot)


def tree_attention_cpp(
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
    """`tree_attention_ref` for fp32 or bf16 on the CPU; key pages that lie transposed, with unit
    stride over the slots, are read where they are.

    A token's result has the same bits on any number of threads and in any company.

    Raises:
        RuntimeError: no library (`native.why` says the reason), or a plan that reaches beyond the
            pages.
    """
    require()
    out = query.new_empty(*query.shape[:2], value_pages.shape[3])
    torch.ops.srlm_kernels_c.tree_attention.default(
        out, query, key_pages, value_pages, *plan[:5], position, fp32(sinks), scale, window,
        softcap,
    )  # fmt: skip
    return out
