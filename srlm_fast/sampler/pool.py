"""Pages of KV memory: who owns which, and the tensors behind them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from srlm_fast.model.probe import LayerShape
from srlm_kernels.tree_attention import PAGE


class OutOfPages(Exception):
    """The pool has fewer free pages than were asked for; nothing was taken."""


class PagePool:
    """The free list of `size` pages. Every page is free or has exactly one owner.

    Raises RuntimeError when a page is freed twice: two sequences would write to one page.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size - 1, -1, -1))
        self._taken = bytearray(size)

    @property
    def free(self) -> int:
        """How many pages nobody owns."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` pages. Raises OutOfPages when there are not so many."""
        if count > len(self._free):
            raise OutOfPages(f"{count} pages asked for, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._taken[page] = 1
        return pages

    def give(self, pages: Sequence[int]) -> None:
        """Takes `pages` back."""
        for page in pages:
            if not self._taken[page]:
                raise RuntimeError(f"page {page} is freed twice")
            self._taken[page] = 0
            self._free.append(page)

    def grow(self, size: int) -> None:
        """Adds pages up to `size` of them."""
        self._free = [*range(size - 1, self.size - 1, -1), *self._free]
        self._taken.extend(bytes(size - self.size))
        self.size = size

    def check(self, owned: Sequence[int]) -> None:
        """Raises RuntimeError unless `owned` and the free pages are all pages, each once."""
        if sorted([*owned, *self._free]) != list(range(self.size)):
            raise RuntimeError(
                f"{len(owned)} pages are owned and {self.free} free, of {self.size}:"
                " some are lost or have two owners"
            )


class KVMemory:
    """Per layer `keys` [pages, heads, 64, Dk] and `values` [pages, heads, 64, Dv].

    On the CPU a page's keys lie transposed in memory, so that the scores of sixteen keys are one
    vector operation. New memory is not cleared: the ops never read what was not written.
    """

    def __init__(
        self, layers: Sequence[LayerShape], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._layers, self._dtype, self._device = tuple(layers), dtype, device
        self.pages = 0
        self.keys = [self._keys(layer, 0) for layer in layers]
        self.values = [self._values(layer, 0) for layer in layers]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        elements = sum(layer.heads * (layer.key_dim + layer.value_dim) for layer in self._layers)
        return PAGE * elements * self._dtype.itemsize

    def resize(self, pages: int) -> None:
        """Makes room for `pages`; what the first ones hold stays. Layer by layer, so that no more
        than one layer is in memory twice."""
        kept = min(pages, self.pages)
        for i, layer in enumerate(self._layers):
            for tensors, make in ((self.keys, self._keys), (self.values, self._values)):
                new = make(layer, pages)
                new[:kept] = tensors[i][:kept]
                tensors[i] = new
        self.pages = pages

    def _keys(self, layer: LayerShape, pages: int) -> Tensor:
        shape = (pages, layer.heads, PAGE, layer.key_dim)
        if self._device.type != "cpu":
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        return torch.empty(*shape[:2], layer.key_dim, PAGE, dtype=self._dtype).transpose(2, 3)

    def _values(self, layer: LayerShape, pages: int) -> Tensor:
        shape = (pages, layer.heads, PAGE, layer.value_dim)
        return torch.empty(shape, dtype=self._dtype, device=self._device)
