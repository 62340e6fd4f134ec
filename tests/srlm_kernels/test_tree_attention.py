"""Attention over shared pages against dense attention over each token's own sequence."""

import pytest
import torch
from torch import Tensor

from srlm_kernels.backends import refusal
from srlm_kernels.kv_write import kv_write
from srlm_kernels.tree_attention import PAGE, TreePlan, tree_attention
from tests.srlm_kernels.forests import (
    HEADS,
    TREES,
    Forest,
    Heads,
    Work,
    assert_as_close_as_torch,
    decoding,
    dense,
    expected,
    prefill,
    queries,
)

KINDS = [("torch", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float16),
         ("cpp", torch.float32), ("cpp", torch.bfloat16)]  # fmt: skip


@pytest.fixture(params=["torch", "cpp"])
def impl(request: pytest.FixtureRequest) -> str:
    if reason := refusal(request.param, torch.zeros(0)):
        pytest.skip(reason)
    return request.param


def attend(
    work: Work, query: Tensor, position: Tensor, impl: str, transposed: bool = True, **options
) -> Tensor:
    keys, values = work.forest.stored(query.dtype, transposed=transposed)
    return tree_attention(
        query, keys, values, work.plan(), position, impl=impl,
        **work.forest.heads.options() | options,
    )  # fmt: skip


@pytest.mark.parametrize(("impl", "dtype"), KINDS, indirect=["impl"], ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("trees", TREES.values(), ids=TREES)
@pytest.mark.parametrize("phase", [decoding, prefill])
def test_every_token_sees_its_own_sequence(phase, trees, heads, dtype, impl) -> None:
    work = phase(Forest(trees, heads))
    query, position = queries(work, dtype)
    assert_as_close_as_torch(attend(work, query, position, impl), work, query)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("transposed", [False, True])
def test_float64_is_exact_in_either_layout(heads, transposed) -> None:
    for phase in (decoding, prefill):
        work = phase(Forest(TREES["ragged"], heads))
        query, position = queries(work, torch.float64)
        out = attend(work, query, position, "torch", transposed)
        truth = expected(work, query, torch.float64, torch.float64)
        torch.testing.assert_close(out[: len(truth)], truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 40])
def test_rows_grow_under_one_plan(impl, window) -> None:
    """The plan of a first step serves the next: only positions advance, across a page."""
    steps, heads = 10, Heads(group=2, window=window)
    forest = Forest([(100, [(24, []), (1, []), (20, [])])], heads, room=steps)
    keys, values = forest.stored(torch.float32, transposed=True)
    work = decoding(forest, growing=True)
    plan, options = work.plan(padding=0), heads.options()
    position = torch.tensor(work.position, dtype=torch.int32)
    for _ in range(steps):
        position += 1
        key, value = (forest.normal(3, heads.kv, 64).float() for _ in range(2))
        slot = []
        for row, leaf in enumerate(work.node):
            node = forest.nodes[leaf]
            page, offset = forest.place(node, node.end)
            slot.append(page * PAGE + offset)
            node.key = torch.cat([node.key, key[row : row + 1]])
            node.value = torch.cat([node.value, value[row : row + 1]])
        kv_write(key, value, keys, values, torch.tensor(slot), impl="torch")
        work.position = position.tolist()
        query, _ = queries(work, torch.float32, padding=0)
        out = tree_attention(query, keys, values, plan, position, impl=impl, **options)
        truth = expected(work, query, torch.float32, torch.float64)
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=2e-6)


def test_two_plans_of_one_forest_agree(impl) -> None:
    """However pages are cut into items, and in whatever order the items come."""
    forest = Forest(TREES["ragged"], HEADS["sinks"])
    shared, single = decoding(forest), Work(forest)
    single.node, single.position = shared.node, shared.position
    for token, leaf in enumerate(shared.node):
        for node in reversed(forest.path(leaf)):
            for entry in forest.entries(node):
                single.add([entry], [token])
    query, position = queries(shared, torch.float32)
    outs = [attend(work, query, position, impl) for work in (shared, single)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-6)


def test_views_of_transposed_tensors(impl) -> None:
    work = decoding(Forest(TREES["three"], HEADS["seven"]))
    query, position = queries(work, torch.float32)
    strided = query.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert attend(work, strided, position, impl).equal(attend(work, query, position, impl))


def test_a_query_that_sees_nothing_is_zero(impl) -> None:
    heads = Heads(sinks=True)
    work = decoding(Forest(TREES["three"], heads))
    query, position = queries(work, torch.float32)
    position[1] = -1
    out = attend(work, query, position, impl)
    truth = expected(work, query, torch.float32, torch.float64)
    assert not out[1].any()
    torch.testing.assert_close(out[[0, 2]].double(), truth[[0, 2]], rtol=0, atol=2e-6)


def test_a_visible_nan_shows(impl) -> None:
    """What hides garbage must not hide an overflow of the model."""
    forest = Forest(TREES["three"], HEADS["one"])
    forest.nodes[1].key[0, 0, 0] = torch.nan  # of the first leaf, head 0
    forest.nodes[2].value[0, 1, 0] = torch.inf  # of the second, head 1
    work = decoding(forest)
    query, position = queries(work, torch.float32)
    finite = attend(work, query, position, impl)[:3].isfinite()
    assert finite.all(2).tolist() == [[False, True], [True, False], [True, True]]
    assert finite[1, 1, 1:].all()


def test_no_tokens(impl) -> None:
    int32 = torch.zeros(0, dtype=torch.int32)
    plan = TreePlan(
        int32.view(0, 4), int32.view(0, 4), int32, torch.zeros(1, dtype=torch.int32), int32, ()
    )
    pages = torch.zeros(1, 2, PAGE, 8)
    keys = torch.zeros(1, 2, 8, PAGE).transpose(2, 3)
    out = tree_attention(torch.zeros(0, 4, 8), keys, pages, plan, int32, scale=1.0, impl=impl)
    assert out.shape == (0, 4, 8)


def test_dense_attention_is_attention() -> None:
    """The truth of these tests against torch's own attention."""
    q, k, v = (torch.randn(9, h, 16, dtype=torch.float64) for h in (4, 2, 2))
    out = dense(q, k, v, torch.arange(9), scale=0.3, window=None, softcap=None, sinks=None)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, theirs.transpose(0, 1), rtol=1e-12, atol=1e-12)


WRONG = {
    "query of two dimensions": ({"query": torch.zeros(3, 8)}, "query must be"),
    "query without unit stride": ({"query": torch.zeros(3, 8, 4).mT}, "unit last stride"),
    "other width": ({"query": torch.zeros(3, 4, 9)}, r"key_pages must be \[P, Hkv, 64, 9\]"),
    "other pages": ({"key_pages": torch.zeros(2, 2, 32, 8)}, "key_pages must be"),
    "other dtype": ({"key_pages": torch.zeros(2, 2, 64, 8).half()}, "pages must be torch.float32"),
    "heads": ({"query": torch.zeros(3, 3, 8)}, "3 query heads cannot share 2 key heads"),
    "position": ({"position": torch.zeros(3, dtype=torch.int64)}, r"position must be int32 \[3\]"),
    "tokens": ({"query": torch.zeros(2, 4, 8), "position": torch.zeros(2, dtype=torch.int32)},
               "plan is for 3 tokens, query has 2"),
    "sinks": ({"sinks": torch.zeros(2)}, r"sinks must have shape \[4\]"),
    "window": ({"window": 0}, "window must be at least 1"),
    "softcap": ({"softcap": 0.0}, "softcap must be positive"),
    "impl": ({"impl": "cuda"}, "no kernels with impl='cuda'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit_are_named(change, message) -> None:
    def int32(*shape):
        return torch.zeros(shape, dtype=torch.int32)

    arguments = {
        "query": torch.zeros(3, 4, 8),
        "key_pages": torch.zeros(2, 2, 64, 8),
        "value_pages": torch.zeros(2, 2, 64, 8),
        "plan": TreePlan(int32(1, 4), int32(1, 4), int32(1), int32(4), int32(1), ((1, 0, 1),)),
        "position": int32(3),
        "scale": 1.0,
    }
    tree_attention(**arguments, impl="torch")
    with pytest.raises((TypeError, ValueError), match=message):
        tree_attention(**arguments | change)


def test_a_plan_of_int64_is_refused() -> None:
    plan = TreePlan(*(torch.zeros(2, 4, dtype=torch.int64) for _ in range(5)), ())
    pages, position = torch.zeros(1, 1, 64, 8), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(TypeError, match="plan must be int32"):
        tree_attention(torch.zeros(1, 1, 8), pages, pages, plan, position, scale=1.0)
