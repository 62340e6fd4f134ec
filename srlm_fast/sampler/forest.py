"""Prompts as a forest of pages: equal beginnings are one path, computed once and stored once.

A node is one page of a prompt, 64 tokens or what is left of them, found by its tokens below its
parent. So two prompts share every page up to the first in which they differ, and a page always
holds the absolute positions 64 i .. 64 i + 63: what attention computes for a row does not depend on
who else shares its pages.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from srlm_fast.sampler.pool import OutOfPages, PagePool
from srlm_kernels.tree_attention import PAGE


@dataclass(eq=False)
class Node:
    """One page of a prompt. `filled`: its keys and values are in memory.

    `users` counts the paths in use that go through it; without users or children it may be evicted.
    """

    tokens: tuple[int, ...]
    start: int
    page: int
    parent: Node | None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    users: int = 0
    filled: bool = False
    last_use: int = 0


class PrefixForest:
    """The prompts whose pages are in `pool`, in use or kept for a later call."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.unused = 0  # nodes without users
        self._roots: dict[tuple[int, ...], Node] = {}
        self._clock = 0

    def take(self, prompt: Sequence[int]) -> list[Node]:
        """The path of `prompt`, whose nodes stay until `release`.

        Evicts unused nodes where pages are short. Raises OutOfPages, and takes nothing, when that
        is not enough.
        """
        self._clock += 1
        path: list[Node] = []
        children, parent = self._roots, None
        for start in range(0, len(prompt), PAGE):
            tokens = tuple(prompt[start : start + PAGE])
            node = children.get(tokens)
            if node is None:
                try:
                    page = self.take_pages(1)[0]
                except OutOfPages:
                    self.release(path)
                    self._drop_unfilled(path)
                    raise
                node = children[tokens] = Node(tokens, start, page, parent)
                self.unused += 1
            self.unused -= node.users == 0
            node.users += 1
            node.last_use = self._clock
            path.append(node)
            children, parent = node.children, node
        return path

    def claim(self, prompt: Sequence[int]) -> int:
        """By how many pages `take` of `prompt` lessens what is `available`."""
        children, in_use = self._roots, 0
        for start in range(0, len(prompt), PAGE):
            node = children.get(tuple(prompt[start : start + PAGE]))
            if node is None:
                break
            children, in_use = node.children, in_use + (node.users > 0)
        return -(-len(prompt) // PAGE) - in_use

    def release(self, path: Sequence[Node]) -> None:
        """Ends one use of `path`; its nodes stay until their pages are wanted."""
        for node in path:
            node.users -= 1
            self.unused += node.users == 0

    def take_pages(self, count: int) -> list[int]:
        """`count` pages for a private use, evicting unused nodes, the longest unused first."""
        if self.pool.free < count:
            # Some more than asked for: to look for the oldest is to look at all of them.
            self._evict(max(count, self.pool.size // 16))
        return self.pool.take(count)

    @property
    def available(self) -> int:
        """Pages that are free or could be evicted."""
        return self.pool.free + self.unused

    def clear(self) -> None:
        """Forgets every prompt, also those in use: after weights changed, or a call was broken."""
        self.pool.give([node.page for node in self.nodes()])
        self._roots.clear()
        self.unused = 0

    def nodes(self) -> Iterator[Node]:
        """Every node, parents before their children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _evict(self, count: int) -> None:
        # A path in use pins its ancestors, so unused nodes are whole subtrees, taken from below.
        leaves = [
            (n.last_use, -n.start, i, n)
            for i, n in enumerate(self.nodes())
            if not n.users and not n.children
        ]
        heapq.heapify(leaves)
        while leaves and self.pool.free < count:
            _, _, order, node = heapq.heappop(leaves)
            self._remove(node)
            parent = node.parent
            if parent is not None and not parent.users and not parent.children:
                heapq.heappush(leaves, (parent.last_use, -parent.start, order, parent))

    def _drop_unfilled(self, path: Sequence[Node]) -> None:
        for node in reversed(path):
            if not (node.users or node.filled or node.children):
                self._remove(node)

    def _remove(self, node: Node) -> None:
        siblings = self._roots if node.parent is None else node.parent.children
        del siblings[node.tokens]
        self.unused -= 1
        self.pool.give([node.page])
