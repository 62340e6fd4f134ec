"""A transformers cache whose keys and values live in preallocated slabs.

`DynamicCache` copies every key and value at every step; here a step writes its own tokens only.
Sliding-window layers keep their full length: the window is the mask's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class SlabLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The slabs `keys` and `values` [rows, kv heads, capacity, head dim] of one layer.

    `length` tokens are filled; beyond them lies whatever was in that memory.
    """

    keys: Any
    values: Any

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._slab(key_states, len(key_states))
        self.values = self._slab(value_states, len(value_states))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends [rows, kv heads, new, head dim] in place; returns views of all that is filled."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        if end > self.capacity:
            self.capacity = max(end, 2 * self.capacity)
            self._grow()
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length

    def keep(self, count: int, holes: Tensor, movers: Tensor) -> None:
        """Keeps the first `count` rows after copying rows `movers` into rows `holes`."""
        for name in ("keys", "values"):
            slab = getattr(self, name)
            slab[holes, :, : self.length] = slab[movers, :, : self.length]
            setattr(self, name, slab[:count])

    def _grow(self) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)[:, :, : self.length]
            new = self._slab(old, len(old))
            new[:, :, : self.length] = old
            setattr(self, name, new)

    def fill(self, parts: Sequence[SlabLayer], repeats: int) -> None:
        """Takes over the rows of `parts`, each `repeats` times, right-aligned; empties `parts`.

        What lies left of a shorter part is zero, not garbage: masked attention still multiplies
        those values by zero, and zero times NaN is NaN.
        """
        self.length = max(part.length for part in parts)
        self.is_initialized = True
        rows = [len(part.keys) * repeats for part in parts]
        for name in ("keys", "values"):
            slab = self._slab(getattr(parts[0], name), sum(rows))
            for part, block in zip(parts, torch.split(slab, rows), strict=True):
                source = getattr(part, name)[:, :, : part.length]
                target = block.view(-1, repeats, *block.shape[1:])
                start = self.length - part.length
                target[:, :, :, :start] = 0
                target[:, :, :, start : self.length] = source[:, None]
                setattr(part, name, None)
            setattr(self, name, slab)
        self.dtype, self.device = self.keys.dtype, self.keys.device

    def _slab(self, like: Tensor, rows: int) -> Tensor:
        return like.new_empty(rows, like.shape[1], self.capacity, like.shape[-1])


class SlabCache(Cache):
    """The slabs of all layers; `capacity` is the first number of tokens, doubled when exceeded."""

    layers: list[Any]

    def __init__(self, num_layers: int, capacity: int) -> None:
        super().__init__(layers=[SlabLayer(capacity) for _ in range(num_layers)])

    def keep(self, rows: Tensor) -> None:
        """Keeps `rows` [R'] of the batch, in that order; row i must be i itself or beyond R'.

        Only the rows that take another's place are copied.
        """
        holes = (rows >= len(rows)).nonzero()[:, 0]
        for layer in self.layers:
            layer.keep(len(rows), holes, rows[holes])

    @classmethod
    def expanded(cls, parts: Sequence[SlabCache], repeats: int, capacity: int) -> SlabCache:
        """One cache of the rows of `parts` (prefilled prompts), each `repeats` times; the parts are
        emptied layer by layer, so that prompt and candidates never lie in memory twice."""
        cache = cls(len(parts[0].layers), capacity)
        for index, layer in enumerate(cache.layers):
            layer.fill([part.layers[index] for part in parts], repeats)
        return cache
