"""Forests of sequences in pages, plans over them, and what attention over them must give.

The truth comes from the plain sequences, never from a plan or a page.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from srlm_kernels.tree_attention import PAGE, TreePlan

RUN = 512  # positions of an item in decoding
TILES = (16, 32, 64, 128)
Tree = tuple[int, list]  # tokens, children
Entry = tuple[int, int, int, int]

# Lengths around pages, depths 1 to 4, sequences that end inside, at and after a page.
TREES: dict[str, list[Tree]] = {
    "chain": [(1, [(63, [(64, [(65, [])])])])],
    "three": [(63, [(1, []), (2, []), (64, [])])],
    "sixteen": [(600, [(1 + i % 3, []) for i in range(16)])],
    "ragged": [
        (129, [(65, [(1, []), (7, []), (130, [])]), (3, [])]),
        (64, [(64, [(1, [(1, []), (64, [])])])]),
        (1, []),
    ],
}


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer and its options."""

    group: int = 1
    kv: int = 2
    key: int = 64
    value: int = 64
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def query(self) -> int:
        return self.group * self.kv

    def options(self, device: str = "cpu") -> dict[str, object]:
        """Keyword arguments of `tree_attention`."""
        generator = torch.Generator().manual_seed(9)
        sinks = torch.randn(self.query, generator=generator).to(device) if self.sinks else None
        return {
            "scale": 1.5 * self.key**-0.5,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": sinks,
        }


HEADS = {
    "one": Heads(),
    "seven": Heads(group=7, kv=1, key=24, value=24, softcap=2.0),
    "window": Heads(group=2, key=80, value=80, window=70),
    "narrow": Heads(group=2, key=128, value=128, window=1, sinks=True),
    "sinks": Heads(group=4, key=24, value=40, sinks=True, softcap=5.0, window=130),
}


@dataclass
class Node:
    parent: int | None
    start: int
    key: Tensor
    value: Tensor
    pages: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + len(self.key)


class Forest:
    """Nodes of a forest with random keys and values, each in pages of its own."""

    def __init__(self, trees: list[Tree], heads: Heads, room: int = 0) -> None:
        """`room`: slots to have pages for beyond the end of each node."""
        self.heads, self.nodes = heads, []
        self.generator = torch.Generator().manual_seed(len(trees))
        for tree in trees:
            self._add(tree, None)
        wanted = [range(n.start // PAGE, (n.end + room - 1) // PAGE + 1) for n in self.nodes]
        # Three pages belong to nobody.
        self.page_count = sum(map(len, wanted)) + 3
        pages = iter(torch.randperm(self.page_count, generator=self.generator).tolist())
        for node, indices in zip(self.nodes, wanted, strict=True):
            node.pages = [next(pages) for _ in indices]

    def _add(self, tree: Tree, parent: int | None) -> None:
        length, children = tree
        start = 0 if parent is None else self.nodes[parent].end
        key, value = (self.normal(length, self.heads.kv, w) for w in
                      (self.heads.key, self.heads.value))  # fmt: skip
        self.nodes.append(Node(parent, start, key, value))
        own = len(self.nodes) - 1
        for child in children:
            self._add(child, own)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def path(self, node: int | None) -> list[int]:
        return [] if node is None else [*self.path(self.nodes[node].parent), node]

    def leaves(self) -> list[int]:
        return sorted(set(range(len(self.nodes))) - {n.parent for n in self.nodes})

    def stored(
        self, dtype: torch.dtype, device: str = "cpu", transposed: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Key and value pages; NaN wherever no token is."""
        h, count = self.heads, self.page_count
        shape = (count, h.kv, h.key, PAGE) if transposed else (count, h.kv, PAGE, h.key)
        keys = torch.full(shape, torch.nan, dtype=dtype, device=device)
        keys = keys.transpose(2, 3) if transposed else keys
        values = torch.full((count, h.kv, PAGE, h.value), torch.nan, dtype=dtype, device=device)
        for node in self.nodes:
            for i in range(len(node.key)):
                page, slot = self.place(node, node.start + i)
                keys[page, :, slot] = node.key[i].to(dtype).to(device)
                values[page, :, slot] = node.value[i].to(dtype).to(device)
        return keys, values

    @staticmethod
    def place(node: Node, position: int) -> tuple[int, int]:
        """Page and slot of a position."""
        return node.pages[position // PAGE - node.start // PAGE], position % PAGE

    def entries(self, node: int, *, growing: bool = False) -> list[Entry]:
        """The page entries of a node; all slots that it may grow into are valid."""
        n = self.nodes[node]
        found = []
        for i, page in enumerate(n.pages):
            base = (n.start // PAGE + i) * PAGE
            end = PAGE if growing else min(PAGE, n.end - base)
            if end > 0:
                found.append((page, base, max(0, n.start - base), end))
        return found


@dataclass
class Work:
    """Tokens of a forward pass, and the items that attend for them."""

    forest: Forest
    node: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    items: list[tuple[list[Entry], list[int]]] = field(default_factory=list)

    @property
    def most(self) -> int:
        """Query entries that fit one item."""
        return TILES[-1] // self.forest.heads.group

    def add(self, entries: list[Entry], tokens: list[int]) -> None:
        self.items += [
            (entries, tokens[i : i + self.most]) for i in range(0, len(tokens), self.most)
        ]

    def plan(self, device: str = "cpu", padding: int = 3) -> TreePlan:
        """The plan, with `padding` tokens, query entries and items per class that do nothing."""

        def rows(item: tuple[list[Entry], list[int]]) -> int:
            wanted = len(item[1]) * self.forest.heads.group
            return next((tile for tile in TILES if tile >= wanted), TILES[-1])

        items, pages, queries, launches = [], [], [], []
        for tile in TILES:
            first = len(items)
            for entries, tokens in filter(lambda item: rows(item) == tile, self.items):
                items.append((len(pages), len(entries), len(queries), len(tokens)))
                pages += entries
                queries += tokens
            if len(items) > first:
                items += [(0, 0, 0, 0)] * padding
                launches.append((tile // self.forest.heads.group, first, len(items)))
        used = torch.tensor(queries)
        ends = used.bincount(minlength=len(self.node)).cumsum(0).tolist()
        order = used.argsort(stable=True).tolist()

        def int32(values: list, *shape: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device).reshape(*shape)

        return TreePlan(
            int32(items, -1, 4), int32(pages, -1, 4), int32(queries + [0] * padding, -1),
            int32([0, *ends, *ends[-1:] * padding], -1), int32(order + [0] * padding, -1),
            tuple(launches),
        )  # fmt: skip


def runs(entries: list[Entry]) -> Iterator[list[Entry]]:
    for run in sorted({base // RUN for _, base, _, _ in entries}):
        yield [entry for entry in entries if entry[1] // RUN == run]


def decoding(forest: Forest, growing: bool = False) -> Work:
    """The last token of every leaf: nodes above are read once for all leaves below."""
    leaves = forest.leaves()
    work = Work(forest, leaves, [forest.nodes[leaf].end - 1 for leaf in leaves])
    for node in range(len(forest.nodes)):
        below = [t for t, leaf in enumerate(leaves) if node in forest.path(leaf)]
        for entries in runs(forest.entries(node, growing=growing and node in leaves)):
            work.add(entries, below)
    return work


def prefill(forest: Forest) -> Work:
    """Every token of every node, runs of them with all pages up to them."""
    work = Work(forest)
    for index, node in enumerate(forest.nodes):
        above = [e for n in forest.path(node.parent) for e in forest.entries(n)]
        for start in range(node.start, node.end, work.most):
            end = min(start + work.most, node.end)
            tokens = list(range(len(work.node), len(work.node) + end - start))
            work.node += [index] * (end - start)
            work.position += range(start, end)
            own = [entry for entry in forest.entries(index) if entry[1] < end]
            work.add(above + own, tokens)
    return work


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of tokens [n, H, D] over one sequence [L, Hkv, D], in the tensors' dtype."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    s = torch.einsum("qhd,khd->hqk", query, key) * scale
    if softcap is not None:
        s = torch.tanh(s / softcap) * softcap
    distance = position[:, None] - torch.arange(len(key), device=key.device)
    seen = (distance >= 0) & (distance < (len(key) if window is None else window))
    s = s.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype)[:, None, None].expand(-1, len(query), 1)], 2)
    p = s.softmax(2)[..., : len(key)]
    return torch.einsum("hqk,khd->qhd", p, value)


def expected(work: Work, query: Tensor, dtype: torch.dtype, compute: torch.dtype) -> Tensor:
    """What attention must give for tensors of `dtype`, computed in `compute`."""
    forest = work.forest
    node, position = torch.tensor(work.node), torch.tensor(work.position)
    out = query.new_zeros(len(node), forest.heads.query, forest.heads.value, dtype=compute)
    for n in set(work.node):
        path = [forest.nodes[i] for i in forest.path(n)]
        sequence = (torch.cat([getattr(x, name) for x in path]).to(dtype).to(compute)
                    for name in ("key", "value"))  # fmt: skip
        mine = node == n
        out[mine] = dense(
            query[: len(node)][mine].to(compute), *sequence, position[mine],
            **forest.heads.options(),
        )  # fmt: skip
    return out


def queries(work: Work, dtype: torch.dtype, padding: int = 3) -> tuple[Tensor, Tensor]:
    """Random queries and the positions of all tokens, `padding` meaningless ones at the end."""
    heads = work.forest.heads
    query = work.forest.normal(len(work.node) + padding, heads.query, heads.key).to(dtype)
    query[len(work.node) :] = torch.nan
    return query, torch.tensor(work.position + [0] * padding, dtype=torch.int32)


def assert_as_close_as_torch(ours: Tensor, work: Work, query: Tensor) -> None:
    """At most twice the error of plain torch in the same dtype, and a few bits of fp32."""
    truth = expected(work, query, query.dtype, torch.float64)
    plain = expected(work, query, query.dtype, query.dtype)
    tokens = len(work.node)
    assert ours.dtype == query.dtype and not ours[tokens:].any()
    bound = 2 * (plain.double() - truth).abs().max() + 2**-21
    assert (ours[:tokens].cpu().double() - truth).abs().max() <= bound
