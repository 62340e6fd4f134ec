"""The Triton kernel of tree_attention against dense attention over each token's own sequence."""

import numpy as np
import pytest
import torch
from torch import Tensor

from srlm_kernels import tree_attention_triton as kernel
from srlm_kernels.backends import refusal
from srlm_kernels.tree_attention import TreePlan
from srlm_kernels.tree_attention_triton import partial_states, tree_attention_triton
from srlm_kernels.triton_support import INTERPRETED
from tests.srlm_kernels.forests import (
    HEADS,
    TREES,
    Forest,
    Heads,
    Work,
    assert_as_close_as_torch,
    decoding,
    expected,
    prefill,
    queries,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := refusal("triton", torch.empty(0, device=DEVICE)):
    pytest.skip(f"{reason}; test_interpreter.py runs this file", allow_module_level=True)

# Dtypes in turn. Under the interpreter, which is slow, not all forests, and fp32, whose tiles are
# small, only where there are few queries.
CASES = [
    pytest.param(phase, trees, heads, dtypes[(i + j) % len(dtypes)], id=f"{name}-{tree}-{head}")
    for name, phase, dtypes in (
        ("decoding", decoding, [torch.bfloat16, torch.float16, torch.float32]),
        ("prefill", prefill, [torch.bfloat16, torch.float16]),
    )
    for i, (tree, trees) in enumerate(TREES.items())
    for j, (head, heads) in enumerate(HEADS.items())
    if phase is decoding or tree in ("chain", "three") or not INTERPRETED
]


@pytest.fixture
def steady(monkeypatch) -> None:
    """Products whose rounding does not depend on their shape.

    A GPU has no others. The interpreter's come from BLAS, which adds up in an order of its own for
    every shape; sums in float64 hide that.
    """
    matmul = np.matmul
    monkeypatch.setattr(
        np, "matmul", lambda *factors, dtype: matmul(*factors, dtype=np.float64).astype(dtype)
    )


def attend(
    work: Work, query: Tensor, position: Tensor, plan: TreePlan | None = None, transposed=False
) -> Tensor:
    keys, values = work.forest.stored(query.dtype, DEVICE, transposed)
    return tree_attention_triton(
        query.to(DEVICE), keys, values, plan or work.plan(DEVICE), position.to(DEVICE),
        **work.forest.heads.options(DEVICE),
    ).cpu()  # fmt: skip


@pytest.mark.parametrize(("phase", "trees", "heads", "dtype"), CASES)
def test_every_token_sees_its_own_sequence(phase, trees, heads, dtype) -> None:
    work = phase(Forest(trees, heads))
    query, position = queries(work, dtype)
    assert_as_close_as_torch(attend(work, query, position), work, query)


def states(
    work: Work, query: Tensor, position: Tensor, tile: int | None, monkeypatch
) -> tuple[Tensor, Tensor]:
    """Partial states of all query entries, every program with a tile of that many rows."""
    if tile is not None:
        monkeypatch.setattr(
            kernel, "launch_options", lambda *_: (tile, {"num_warps": 4, "num_stages": 2})
        )
    options = {k: v for k, v in work.forest.heads.options().items() if k != "sinks"}
    keys, values = work.forest.stored(query.dtype, DEVICE)
    used = sum(len(tokens) for _, tokens in work.items)
    o, lse = partial_states(
        query.to(DEVICE), keys, values, work.plan(DEVICE), position.to(DEVICE), **options
    )
    return o[:used], lse[:used]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [HEADS["seven"], HEADS["window"]], ids=["seven", "window"])
@pytest.mark.usefixtures("steady")
def test_the_size_of_a_tile_does_not_show(heads, dtype, monkeypatch) -> None:
    work = prefill(Forest(TREES["three"], heads))
    query, position = queries(work, dtype)
    small, large = (states(work, query, position, tile, monkeypatch) for tile in (16, 64))
    assert small[0].isfinite().all() and small[0].equal(large[0]) and small[1].equal(large[1])


@pytest.mark.parametrize(
    ("phase", "tree", "stride"), [(decoding, "ragged", 1), (prefill, "three", 13)]
)
@pytest.mark.parametrize("heads", [HEADS["window"], HEADS["sinks"]], ids=["window", "sinks"])
@pytest.mark.usefixtures("steady")
def test_tile_mates_do_not_show(heads, phase, tree, stride) -> None:
    """A token alone has the bits that it has among all others."""
    work = phase(Forest(TREES[tree], heads))
    query, position = queries(work, torch.float16)
    together = attend(work, query, position)
    for token in range(0, len(work.node), stride):
        alone = Work(work.forest, work.node, work.position)
        alone.items = [(entries, [token]) for entries, tokens in work.items if token in tokens]
        assert attend(alone, query, position)[token].equal(together[token])


@pytest.mark.usefixtures("steady")
def test_the_order_of_mates_does_not_show() -> None:
    work = decoding(Forest(TREES["sixteen"], HEADS["one"]))
    query, position = queries(work, torch.float32)
    turned = Work(work.forest, work.node, work.position, [(e, t[::-1]) for e, t in work.items])
    assert attend(turned, query, position).equal(attend(work, query, position))


@pytest.mark.parametrize("transposed", [False, True])
def test_strides(transposed) -> None:
    """Pages in either layout, and queries as they come out of a model."""
    work = decoding(Forest(TREES["three"], HEADS["sinks"]))
    query, position = queries(work, torch.float32)
    strided = query.transpose(0, 1).contiguous().transpose(0, 1)
    assert_as_close_as_torch(attend(work, strided, position, transposed=transposed), work, query)


def test_one_plan_serves_while_positions_advance() -> None:
    """Keys are there for 5 more tokens than the queries at first may see."""
    forest = Forest([(100, [(30, []), (70, [])])], Heads(group=2, window=40), room=9)
    work = decoding(forest, growing=True)
    plan, ends = work.plan(DEVICE), work.position
    for back in (5, 1, 0):
        work.position = [end - back for end in ends]
        query, position = queries(work, torch.float32)
        assert_as_close_as_torch(attend(work, query, position, plan), work, query)


def test_more_pages_than_are_looked_at_together() -> None:
    """10000 tokens, of which windows hide the first 128 pages; and without one."""
    for window in (None, 300):
        work = prefill(Forest([(10000, [(3, [])])], Heads(kv=1, key=16, value=16, window=window)))
        work.node, work.position = work.node[-3:], work.position[-3:]
        work.items = [(work.items[-1][0], [0, 1, 2])]
        query, position = queries(work, torch.float32)
        assert_as_close_as_torch(attend(work, query, position), work, query)


def test_items_of_more_rows_than_a_tile() -> None:
    """No plan has them, but they are served: a program per tile of rows."""
    work = decoding(Forest([(70, [(1, [])] * 50)], Heads(group=4)))
    assert [len(tokens) for _, tokens in work.items[:2]] == [32, 18]
    (entries, some), (_, others), *own = work.items
    work.items = [(entries, some + others), *own]
    query, position = queries(work, torch.float16)
    plan = work.plan(DEVICE)
    rest, (_, first, end) = plan.launches[:-1], plan.launches[-1]
    plan = plan._replace(launches=(*rest, (50, first, end)))
    assert_as_close_as_torch(attend(work, query, position, plan), work, query)


def test_wide_heads_are_refused() -> None:
    work = decoding(Forest(TREES["chain"], Heads(key=257, value=16)))
    with pytest.raises(ValueError, match="heads of up to 256, not 512"):
        attend(work, *queries(work, torch.float32))


@pytest.mark.skipif(not INTERPRETED, reason="takes a minute to compile")
@pytest.mark.parametrize("width", [1, 16, 17, 192, 256])
def test_widths(width) -> None:
    work = decoding(Forest(TREES["three"], Heads(kv=1, key=width, value=16)))
    query, position = queries(work, torch.float16)
    truth = expected(work, query, torch.float16, torch.float64)
    out = attend(work, query, position)[: len(truth)]
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=2e-3)
