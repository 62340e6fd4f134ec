"""What the C++ attention promises beyond the truth, which test_tree_attention.py holds it to."""

from bisect import bisect_left
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from srlm_kernels import native
from srlm_kernels.native_attention import tree_attention_cpp
from srlm_kernels.tree_attention import PAGE, TreePlan, tree_attention
from tests.srlm_kernels.forests import (
    HEADS,
    TILES,
    TREES,
    Forest,
    Heads,
    Work,
    assert_as_close_as_torch,
    decoding,
    prefill,
    queries,
)

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why())
DTYPES = [torch.float32, torch.bfloat16]
# Tiles of one row, of a few (bf16 pages are read where they lie) and of many (they are widened).
BUSY = [(600, [(1 + i % 3, []) for i in range(n)]) for n in (1, 2, 61)]


def attend(work: Work, query: Tensor, position: Tensor, **options) -> Tensor:
    pages = work.forest.stored(query.dtype, transposed=True)
    return on_pages(work, query, position, *pages, **options)


def on_pages(
    work: Work, query: Tensor, position: Tensor, keys: Tensor, values: Tensor, **options
) -> Tensor:
    padding = len(query) - len(work.node)
    return tree_attention(
        query, keys, values, work.plan(padding=padding), position, impl="cpp",
        **work.forest.heads.options() | options,
    )  # fmt: skip


def alone(work: Work, token: int) -> Work:
    """The work of one token: its own items, in the order of the plan, without other queries."""
    group = work.forest.heads.group
    items = sorted(work.items, key=lambda item: bisect_left(TILES, len(item[1]) * group))
    own = [(entries, [0]) for entries, tokens in items if token in tokens]
    return Work(work.forest, [work.node[token]], [work.position[token]], own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("phase", [decoding, prefill])
def test_a_token_alone_has_the_same_bits(phase, heads, dtype) -> None:
    work = phase(Forest(BUSY, heads))
    query, position = queries(work, dtype, padding=0)
    keys, values = work.forest.stored(dtype, transposed=True)
    together = on_pages(work, query, position, keys, values)
    for token in range(0, len(query), 1 if phase is decoding else 97):
        own = slice(token, token + 1)
        out = on_pages(alone(work, token), query[own], position[own], keys, values)
        assert out.equal(together[own]), token


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_the_size_of_a_tile_changes_no_bit(heads, dtype, monkeypatch) -> None:
    """1000 queries are more than a tile of the C++ code takes; it makes several of them."""
    monkeypatch.setattr("tests.srlm_kernels.forests.TILES", (*TILES, 8192))
    forest = Forest(TREES["ragged"], heads)
    work = prefill(forest)
    query, position = queries(work, dtype)
    expected = attend(work, query, position)
    nodes = torch.tensor(work.node)
    for size in (1, 3, 50, 1000):
        items = []
        for node in range(len(forest.nodes)):
            entries = [e for n in forest.path(node) for e in forest.entries(n)]
            tokens = (nodes == node).nonzero()[:, 0].tolist()
            items += [(entries, tokens[i : i + size]) for i in range(0, len(tokens), size)]
        plan = Work(forest, work.node, work.position, items)
        assert attend(plan, query, position).equal(expected), size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("phase", [decoding, prefill])
def test_threads_change_no_bit(phase, dtype, thread_count: Callable[[int], None]) -> None:
    work = phase(Forest(BUSY, HEADS["sinks"]))
    query, position = queries(work, dtype)
    thread_count(1)
    expected = attend(work, query, position)
    thread_count(2)
    for _ in range(5):
        assert attend(work, query, position).equal(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [HEADS["one"], HEADS["sinks"]], ids=["vectors", "tails"])
@pytest.mark.parametrize("phase", [decoding, prefill])
def test_layouts_change_no_bit(phase, heads, dtype) -> None:
    work = phase(Forest(TREES["ragged"], heads))
    query, position = queries(work, dtype)
    keys, values = work.forest.stored(dtype, transposed=True)
    expected = on_pages(work, query, position, keys, values)
    plain = keys.contiguous()
    assert plain.stride(3) == 1 and keys.stride(2) == 1
    assert on_pages(work, query, position, plain, values).equal(expected)
    padded = torch.full((*values.shape[:3], heads.value + 1), torch.nan, dtype=dtype)
    padded[..., 1:] = values
    assert on_pages(work, query, position, keys, padded[..., 1:]).equal(expected)
    by_dim = values.transpose(2, 3).contiguous().transpose(2, 3)
    assert on_pages(work, query, position, keys, by_dim).equal(expected)


def test_a_later_nan_stays_with_those_who_see_it() -> None:
    """Rows of a tile are multiplied together, but not with what only their mates see."""
    work = prefill(Forest([(130, [])], Heads()))
    query, position = queries(work, torch.float32, padding=0)
    before = attend(work, query, position)
    for name, bad in (("key", 70), ("value", 71), ("value", 100)):
        tensor = getattr(work.forest.nodes[0], name)
        saved, tensor[bad] = tensor[bad].clone(), torch.nan
        out = attend(work, query, position)
        assert out[:bad].equal(before[:bad])
        assert out[bad:].isnan().all()
        tensor[bad] = saved


def test_nothing_is_left_over_from_the_last_call() -> None:
    """Memory is kept between calls; what NaN leaves in it does no harm."""
    works = [phase(Forest(TREES["ragged"], HEADS["narrow"])) for phase in (decoding, prefill)]
    cases = [(work, *queries(work, dtype)) for work in works for dtype in DTYPES]
    expected = [attend(*case) for case in cases]
    for work, query, position in cases:
        attend(work, torch.full_like(query, torch.nan), position)
    for case, out in zip(cases, expected, strict=True):
        assert attend(*case).equal(out)


@pytest.mark.parametrize("step", [-30.0, 0.05, 1.0, 30.0])
def test_scores_that_grow_along_the_sequence(step: float) -> None:
    """By `step` a page: largest scores that are often new, and seldom. What grows is added last, so
    that rounding says nothing of the order of the products."""
    heads = Heads()
    work = decoding(Forest([(700, [(90, []), (5, [])])], heads))
    for node in work.forest.nodes:
        node.key[..., -1] = torch.arange(node.start, node.end)[:, None] * step / PAGE
    query, position = queries(work, torch.float32)
    query[..., -1] = 1 / heads.options()["scale"]
    assert_as_close_as_torch(attend(work, query, position), work, query)


def test_a_sink_far_above_the_scores() -> None:
    work = decoding(Forest(TREES["three"], Heads()))
    query, position = queries(work, torch.float32)
    assert not attend(work, query, position, sinks=torch.full((2,), 200.0)).any()
    plain = attend(work, query, position)
    assert attend(work, query, position, sinks=torch.full((2,), -torch.inf)).equal(plain)


def test_empty_items_and_tokens_of_no_item() -> None:
    work = decoding(Forest(TREES["three"], Heads()))
    query, position = queries(work, torch.float32, padding=2)
    expected = attend(work, query, position)
    work.items.append(([], [0, 1]))  # no pages
    assert attend(work, query, position).equal(expected)
    assert not expected[3:].any()


def small_plan() -> TreePlan:
    """Two tokens that share a page; the second has one of its own."""
    parts = (
        [[0, 1, 0, 2], [1, 1, 2, 1]], [[0, 0, 0, 64], [1, 64, 0, 64]], [0, 1, 1], [0, 1, 3],
        [0, 1, 2],
    )  # fmt: skip
    return TreePlan(*(torch.tensor(part, dtype=torch.int32) for part in parts), ((2, 0, 2),))


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """Of the op itself, by name, in order."""
    g = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 1, 8, PAGE, generator=g).to(dtype) for _ in range(2))
    return {
        "out": torch.zeros(2, 2, 8, dtype=dtype),
        "query": torch.randn(2, 2, 8, generator=g).to(dtype),
        "key_pages": keys.transpose(2, 3),
        "value_pages": values.transpose(2, 3).contiguous(),
        **{name: getattr(small_plan(), name) for name in TreePlan._fields[:5]},
        "position": torch.tensor([40, 70], dtype=torch.int32),
        "sinks": torch.randn(2, generator=g),
        "scale": 0.5,
        "window": 50,
        "softcap": 3.0,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    op = torch.ops.srlm_kernels_c.tree_attention.default
    torch.library.opcheck(op, tuple(arguments(dtype).values()))
    plain = arguments(dtype) | {"sinks": None, "window": None, "softcap": None}
    torch.library.opcheck(op, tuple(plain.values()))


def test_fake_tensors_pass() -> None:
    with FakeTensorMode() as mode:
        values = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments().values()]
        assert torch.ops.srlm_kernels_c.tree_attention(*values) is None


def int32(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


WRONG = {
    "page past the pool": ({"pages": int32([0, 0, 0, 64], [2, 64, 0, 64])}, "page entry 1"),
    "negative page": ({"pages": int32([0, 0, 0, 64], [-1, 64, 0, 64])}, "page entry 1"),
    "slots past the page": ({"pages": int32([0, 0, 0, 65], [1, 64, 0, 64])}, "page entry 0"),
    "negative slot": ({"pages": int32([0, 0, -1, 64], [1, 64, 0, 64])}, "page entry 0"),
    "pages of an item": ({"items": int32([0, 1, 0, 2], [1, 2, 2, 1])}, "item 1 reaches"),
    "negative count": ({"items": int32([0, 1, 0, 2], [1, -1, 2, 1])}, "item 1 reaches"),
    "queries of an item": ({"items": int32([0, 1, 0, 2], [1, 1, 2, 2])}, "item 1 reaches"),
    "token of a query": ({"queries": int32(0, 1, 2)}, "query entry 2 has no token"),
    "first token": ({"token_ptr": int32(1, 1, 3)}, "token_ptr must start at 0"),
    "descending tokens": ({"token_ptr": int32(0, 2, 1)}, "token_ptr must ascend"),
    "too many entries": ({"token_ptr": int32(0, 1, 4)}, "token_ptr must ascend up to Q"),
    "entry of a token": ({"token_entries": int32(0, 1, 3)}, "token 1: no such entry"),
    "number of entries": ({"token_entries": int32(0, 1)}, "token_entries must be"),
    "number of tokens": ({"token_ptr": int32(0, 1, 2, 3)}, "token_ptr must be"),
    "no tokens at all": ({"token_ptr": int32()}, "token_ptr must be"),
    "items in gaps": ({"items": torch.zeros(2, 8, dtype=torch.int32)[:, ::2]}, "items must be"),
    "wide items": ({"items": torch.zeros(2, 5, dtype=torch.int32)}, "items must be"),
    "int64": ({"queries": torch.zeros(3, dtype=torch.int64)}, "queries must be"),
    "position": ({"position": int32(0)}, "position must be"),
    "sinks": ({"sinks": torch.zeros(2, dtype=torch.float64)}, "sinks must be"),
    "query": ({"query": torch.zeros(2, 2, 9)}, "query must be"),
    "strides": ({"query": torch.zeros(2, 8, 2).mT}, "query must be .* unit last stride"),
    "heads": ({"key_pages": torch.zeros(2, 3, 64, 8), "value_pages": torch.zeros(2, 3, 64, 8)},
              "H must be a multiple"),
    "out": ({"out": torch.zeros(2, 2, 9)}, "out must be"),
    "values": ({"value_pages": torch.zeros(1, 1, 64, 8)}, "value_pages must be"),
    "page of 32": ({"key_pages": torch.zeros(2, 1, 32, 8)}, "key_pages must be"),
    "fp16": ({"key_pages": torch.zeros(2, 1, 64, 8).half(),
              "value_pages": torch.zeros(2, 1, 64, 8).half()}, "pages must be fp32 or bf16"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_no_memory_is_touched_that_is_not_there(change, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.srlm_kernels_c.tree_attention(*(arguments() | change).values())


def test_the_op_of_these_arguments_is_attention() -> None:
    """So that each refusal above is for its one change."""
    a = arguments()
    torch.ops.srlm_kernels_c.tree_attention(*a.values())
    options = {name: a[name] for name in ("scale", "window", "softcap", "sinks")}
    where = (a["query"], a["key_pages"], a["value_pages"], small_plan(), a["position"])
    truth = tree_attention(*where, **options, impl="torch")
    torch.testing.assert_close(a["out"], truth)
    assert tree_attention_cpp(*where, **options).equal(a["out"])
