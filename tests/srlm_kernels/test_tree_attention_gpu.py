"""What only a GPU can show of attention over pages: tensor cores, graphs, offsets beyond 32 bits.

The arithmetic is tested by test_tree_attention_triton.py and its neighbours, on a GPU too.
"""

import pytest
import torch
from torch import Tensor

from srlm_kernels.kv_write import kv_write
from srlm_kernels.tree_attention import PAGE, TreePlan, tree_attention
from srlm_kernels.tree_attention_triton import partial_states
from tests.srlm_kernels.forests import (
    Forest,
    Heads,
    Work,
    assert_as_close_as_torch,
    decoding,
    prefill,
    queries,
)

pytestmark = pytest.mark.gpu

# As in Qwen2.5-0.5B, Llama-3.1-8B, Gemma 2 and gpt-oss.
MODELS = {
    "qwen": Heads(group=7, kv=2, key=64, value=64),
    "llama": Heads(group=4, kv=8, key=128, value=128),
    "gemma": Heads(group=2, kv=4, key=256, value=256, window=1000, softcap=50.0),
    "gpt-oss": Heads(group=8, kv=8, key=64, value=64, window=128, sinks=True),
}
TREES = [(2100, [(1 + 37 * i, []) for i in range(16)]), (100, [(600, []), (3, [])])]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def attend(work: Work, query: Tensor, position: Tensor) -> Tensor:
    keys, values = work.forest.stored(query.dtype, "cuda")
    return tree_attention(
        query.cuda(), keys, values, work.plan("cuda"), position.cuda(),
        **work.forest.heads.options("cuda"), impl="triton",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("phase", [decoding, prefill])
def test_sizes_of_real_models(phase, heads, dtype) -> None:
    work = phase(Forest(TREES, heads))
    query, position = queries(work, dtype)
    assert_as_close_as_torch(attend(work, query, position), work, query)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", MODELS.values(), ids=MODELS)
def test_the_size_of_a_tile_does_not_show(heads, dtype) -> None:
    """As launched: with all warps and stages that belong to a tile."""
    work = decoding(Forest([(1000, [(1, [])] * 6)], heads))
    work.items = [(entries, [token]) for entries, tokens in work.items for token in tokens]
    query, position = queries(work, dtype)
    keys, values = work.forest.stored(dtype, "cuda")
    plan = work.plan("cuda")
    (_, first, end), options = plan.launches[0], heads.options()
    del options["sinks"]

    def states(rows: int) -> Tensor:
        launched = plan._replace(launches=((max(1, rows // heads.group), first, end),))
        o, lse = partial_states(query.cuda(), keys, values, launched, position.cuda(), **options)
        return torch.cat([o, lse[..., None]], 2)[: len(work.items)]

    small = states(16)
    assert not small.isnan().any()  # a window may hide all of an item, which is -inf
    assert all(states(rows).equal(small) for rows in (32, 64, 128))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tile_mates_do_not_show(dtype) -> None:
    for phase in (decoding, prefill):
        work = phase(Forest(TREES, MODELS["llama"]))
        query, position = queries(work, dtype)
        together = attend(work, query, position)
        for token in range(0, len(work.node), len(work.node) // 9 + 1):
            alone = Work(work.forest, work.node, work.position)
            alone.items = [(entries, [token]) for entries, mates in work.items if token in mates]
            assert attend(alone, query, position)[token].equal(together[token])


def test_torch_sdpa_agrees() -> None:
    work = prefill(Forest([(1500, [])], MODELS["llama"]))
    query, position = queries(work, torch.bfloat16, padding=0)
    forest = work.forest
    key, value = (getattr(forest.nodes[0], x).bfloat16().cuda().transpose(0, 1)[None]
                  for x in ("key", "value"))  # fmt: skip
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query.cuda().transpose(0, 1)[None], key, value, is_causal=True, enable_gqa=True,
        scale=forest.heads.options()["scale"],
    )[0].transpose(0, 1)  # fmt: skip
    ours = attend(work, query, position)[: len(work.node)]
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("heads", MODELS.values(), ids=MODELS)
def test_a_graph_replays_while_rows_grow(heads) -> None:
    """A captured step writes, attends and advances on the device, across a page."""
    steps = 12
    forest = Forest([(700, [(10, []), (60, []), (1, [])])], heads, room=steps)
    keys, values = forest.stored(torch.bfloat16, "cuda")
    work = decoding(forest, growing=True)
    plan, rows = work.plan("cuda", padding=0), len(work.node)
    position = torch.tensor(work.position, dtype=torch.int32, device="cuda")
    pages = torch.tensor([forest.nodes[n].pages[0] for n in work.node], device="cuda")
    following = torch.tensor([forest.nodes[n].pages[-1] for n in work.node], device="cuda")
    first = torch.tensor([forest.nodes[n].start // PAGE for n in work.node], device="cuda")
    query, key, value = (
        torch.randn(rows, h, w, device="cuda", dtype=torch.bfloat16)
        for h, w in ((heads.query, heads.key), (heads.kv, heads.key), (heads.kv, heads.value))
    )

    def step() -> Tensor:
        position.add_(1)
        page = torch.where(position // PAGE > first, following, pages)
        kv_write(key, value, keys, values, page * PAGE + position % PAGE, impl="triton")
        return tree_attention(
            query, keys, values, plan, position, **heads.options("cuda"), impl="triton"
        )

    def run(call) -> list[Tensor]:
        position.copy_(torch.tensor(work.position))
        found = []
        for seed in range(steps):
            torch.manual_seed(seed)
            for x in (query, key, value):
                x.normal_()
            found.append(call().clone())
        return found

    eager = run(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    replayed = run(lambda: (graph.replay(), out)[1])
    assert all(a.equal(b) and a.isfinite().all() for a, b in zip(eager, replayed, strict=True))


def test_pools_beyond_32_bits() -> None:
    heads, count = Heads(group=4, kv=8, key=128, value=128), 33000  # 2^31 numbers and more
    pages = torch.full((count, 8, PAGE, 128), torch.nan, dtype=torch.bfloat16, device="cuda")
    key, query = (torch.randn(PAGE, h, 128, dtype=torch.bfloat16, device="cuda") for h in (8, 32))
    last = count - 1
    slot = torch.arange(PAGE, device="cuda") + last * PAGE
    kv_write(key, key, pages, pages, slot, impl="triton")
    assert pages[last].transpose(0, 1).equal(key)
    assert pages[:last].isnan().all()
    position = torch.arange(PAGE, dtype=torch.int32, device="cuda")

    def int32(*rows: object) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32, device="cuda")

    plan = TreePlan(
        int32((0, 1, 0, 32), (0, 1, 32, 32)), int32((last, 0, 0, PAGE)), position,
        int32(*range(PAGE + 1)), position, ((32, 0, 2),),
    )  # fmt: skip
    out = tree_attention(query, pages, pages, plan, position, **heads.options(), impl="triton")
    small = pages[last:].contiguous()
    plan = plan._replace(pages=int32((0, 0, 0, PAGE)))
    assert out.isfinite().all()
    assert out.equal(
        tree_attention(query, small, small, plan, position, **heads.options(), impl="triton")
    )


def test_ten_runs_give_equal_bits() -> None:
    work = decoding(Forest(TREES, MODELS["llama"]))
    query, position = queries(work, torch.bfloat16)
    first = attend(work, query, position)
    assert all(attend(work, query, position).equal(first) for _ in range(9))
