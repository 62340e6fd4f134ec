"""Which queries of a forward pass read which pages: the work lists of `tree_attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from srlm_fast.sampler.forest import Node
from srlm_kernels.tree_attention import PAGE, TreePlan

# Positions of one partial result in decoding. Fixed, and counted from position 0, never chosen by
# the size of the batch: a row's partials and their order are its own.
SPLIT = 512
_TILES = (16, 32, 64, 128)  # rows of a tile: queries x query heads of a KV head

PageEntry = tuple[int, int, int, int]  # page, position of its slot 0, first valid slot, their end


def prompt_entries(path: Sequence[Node]) -> list[PageEntry]:
    """The pages of a prompt."""
    return [(node.page, node.start, 0, len(node.tokens)) for node in path]


def prompt_runs(path: Sequence[Node]) -> list[list[PageEntry]]:
    """The pages of a prompt as a decoding row reads them."""
    entries, run = prompt_entries(path), SPLIT // PAGE
    return [entries[i : i + run] for i in range(0, len(entries), run)]


def own_runs(pages: Sequence[int], length: int) -> list[list[PageEntry]]:
    """The pages of what follows a prompt of `length` tokens, as a decoding row reads them. Their
    unwritten slots count as valid: they lie in the future of every query that reads them."""
    first, run = length // PAGE, SPLIT // PAGE
    entries = [
        (page, (first + i) * PAGE, length % PAGE if i == 0 else 0, PAGE)
        for i, page in enumerate(pages)
    ]
    cuts = [0, *range(run - first % run, len(entries), run), len(entries)]
    return [entries[i:j] for i, j in pairwise(cuts) if i < j]


def slot_of(pages: Sequence[int], first_page: int, position: int) -> int:
    """Where the token at `position` is written: `pages` begin with page `first_page` of its row."""
    return pages[position // PAGE - first_page] * PAGE + position % PAGE


@dataclass
class PlanBuilder:
    """Collects items for one forward pass. `group`: most query heads that share a KV head."""

    group: int
    items: list[tuple[int, int, int, int]] = field(default_factory=list)
    pages: list[PageEntry] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)

    @property
    def tile(self) -> int:
        """Most queries of an item."""
        return max(1, _TILES[-1] // self.group)

    def read(self, entries: Sequence[PageEntry], queries: Sequence[int]) -> None:
        """All of `queries` read the pages `entries`."""
        first = self._entries(entries)
        for start in range(0, len(queries), self.tile):
            part = queries[start : start + self.tile]
            self.items.append((first, len(entries), len(self.queries), len(part)))
            self.queries.extend(part)

    def prefill(
        self, runs: Sequence[Sequence[PageEntry]], position: int, query: int, count: int
    ) -> None:
        """`count` consecutive tokens from `position` on, queries `query` on, read their past: every
        run of pages gives a partial result."""
        for entries in runs:
            first = self._entries(entries)
            for start in range(0, count, self.tile):
                size = min(self.tile, count - start)
                last_page = (position + start + size - 1) // PAGE
                used = sum(entry[1] // PAGE <= last_page for entry in entries)
                if used:
                    self.items.append((first, used, len(self.queries), size))
                    self.queries.extend(range(query + start, query + start + size))

    def build(
        self, tokens: int, device: torch.device, size: Callable[[int], int] = int
    ) -> TreePlan:
        """The plan of a pass of `tokens` tokens. `size` of a count is what lists of so many are
        padded to, so that plans of about equal size have equal shapes."""
        items, launches = self.classes(size)
        pages = np.array(self.pages, np.int32).reshape(-1, 4)
        queries, ptr, entries = self.by_token(tokens)
        parts = (items, _padded(pages, size), _padded(queries, size), ptr, _padded(entries, size))
        # One copy to the device, cut there: a small copy takes as long as a large one.
        flat = torch.from_numpy(np.concatenate([part.ravel() for part in parts])).to(device)
        cut = torch.split(flat, [part.size for part in parts])
        return TreePlan(cut[0].view(-1, 4), cut[1].view(-1, 4), cut[2], cut[3], cut[4], launches)

    def classes(
        self, size: Callable[[int], int] = int
    ) -> tuple[np.ndarray, tuple[tuple[int, int, int], ...]]:
        """The items by size of tile, and for each size its launch."""
        items = np.array(self.items, np.int32).reshape(-1, 4)
        tiles = np.searchsorted(_TILES, items[:, 3] * self.group)
        parts: list[np.ndarray] = []
        launches: list[tuple[int, int, int]] = []
        start = 0
        for i in np.unique(tiles):
            parts.append(_padded(items[tiles == i], size))
            end = start + len(parts[-1])
            launches.append((max(1, _TILES[i] // self.group), start, end))
            start = end
        return np.concatenate([items[:0], *parts]), tuple(launches)

    def by_token(self, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`queries`, `token_ptr` and `token_entries` of the plan."""
        queries = np.array(self.queries, np.int32)
        entries = np.argsort(queries, kind="stable").astype(np.int32)
        ptr = np.zeros(tokens + 1, np.int32)
        np.cumsum(np.bincount(queries, minlength=tokens), out=ptr[1:])
        return queries, ptr, entries

    def _entries(self, entries: Sequence[PageEntry]) -> int:
        first = len(self.pages)
        self.pages.extend(entries)
        return first


def _padded(array: np.ndarray, size: Callable[[int], int]) -> np.ndarray:
    """Zeros behind the last row, up to `size` of the number of rows."""
    more = size(len(array)) - len(array)
    return np.concatenate([array, np.zeros((more, *array.shape[1:]), array.dtype)])


def decode_items(
    builder: PlanBuilder, rows: Iterable[tuple[Sequence[Node], Sequence[int], int]]
) -> None:
    """One new token a row, query i of row i. A row is its prompt's path, its own pages, and the
    prompt's length. Rows that share a run of a prompt's pages read it together, once."""
    shared: dict[PageEntry, tuple[list[PageEntry], list[int]]] = {}
    alone: list[tuple[list[PageEntry], int]] = []
    for query, (path, pages, length) in enumerate(rows):
        for run in prompt_runs(path):
            # The last page of a run says which pages lie before it: a page has one place in the
            # forest. A row whose prompt ends inside the run has a run of its own.
            shared.setdefault(run[-1], (run, []))[1].append(query)
        alone += [(run, query) for run in own_runs(pages, length)]
    for run, queries in shared.values():
        builder.read(run, queries)
    for run, query in alone:
        builder.read(run, [query])
