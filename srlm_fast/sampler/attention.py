"""Attention over pages for the model's own modules: one function, registered with transformers.

While a phase runs, the configuration names this function as the attention implementation; every
attention layer then hands over its queries, keys and values, positions already applied. There is no
mask: what a token sees is the plan's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from srlm_fast.sampler.pool import KVMemory
from srlm_kernels import kv_write, tree_attention
from srlm_kernels.tree_attention import TreePlan

PAGED = "srlm_paged"


@dataclass(frozen=True)
class Pass:
    """What one forward pass writes and reads: `slot` [T] int64 of each token (negative: not
    written), then the pages of `plan` up to `position` [T] int32. `impl`: of the ops."""

    memory: KVMemory
    plan: TreePlan
    position: Tensor
    slot: Tensor
    impl: str


# Not a keyword of the model's forward: some families do not pass those on. Of each thread its own.
_CURRENT: ContextVar[Pass] = ContextVar("current pass")


@contextmanager
def attending(current: Pass) -> Iterator[None]:
    """The forward pass inside runs under `current`."""
    token = _CURRENT.set(current)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, T, H, Dv] from query [1, H, T, Dk], key [1, Hkv, T, Dk] and value [1, Hkv, T, Dv]."""
    current = _CURRENT.get(None)
    if current is None:
        raise RuntimeError("the model's attention is set to the sampler's, but no sampler runs")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    keys, values = (x[module.layer_idx] for x in (current.memory.keys, current.memory.values))
    kv_write(key, value, keys, values, current.slot, impl=current.impl)
    mixed = tree_attention(
        query,
        keys,
        values,
        current.plan,
        current.position,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or None,
        softcap=softcap,
        sinks=s_aux,
        impl=current.impl,
    )
    return mixed[None], None


ALL_ATTENTION_FUNCTIONS.register(PAGED, _paged_attention)
