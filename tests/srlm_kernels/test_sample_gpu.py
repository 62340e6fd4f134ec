"""What only a GPU can show of sample: no waiting for the host, graphs, offsets beyond 32 bits.

Its arithmetic is tested by test_sample.py and its neighbours, which run on a GPU too.
"""

import pytest
import torch

from srlm_kernels import SampleParams, sample
from tests.srlm_kernels.draws import normal, parameters

pytestmark = pytest.mark.gpu

KINDS = {"plain": {}, "cut": {"top_k": [50, 0] * 8, "top_p": [0.9, 1.0, 0.5, 0.99] * 4}}


def on_gpu(rows: int, **values: object) -> tuple[torch.Tensor, torch.Tensor, SampleParams]:
    params = parameters(rows, **values)
    seed = torch.arange(rows, device="cuda")
    return (
        seed,
        torch.zeros_like(seed),
        type(params)(*(x if x is None else x.cuda() for x in params)),
    )


@pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)
def test_nothing_waits_for_the_host_and_a_graph_holds_it(values: dict[str, object]) -> None:
    logits = normal(16, 50_257).cuda()
    seed, step, params = on_gpu(16, **values)
    sample(logits, seed, step, params)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = [sample(logits, seed, step + i, params) for i in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample(logits, seed, step, params)
        step += 1
    for expected in eager:
        graph.replay()
        assert all(x.equal(y) for x, y in zip(drawn, expected, strict=True))


@pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)
def test_rows_beyond_two_to_the_31(values: dict[str, object]) -> None:
    rows, columns, apart = 16, 152_064, 946
    memory = torch.empty(((rows - 1) * apart + 1) * columns, dtype=torch.bfloat16, device="cuda")
    assert memory.numel() > 2**31
    spread = memory.as_strided((rows, columns), (apart * columns, 1))
    spread.copy_(normal(rows, columns))
    seed, step, params = on_gpu(rows, **values)
    far, near = (sample(x, seed, step, params) for x in (spread, spread.contiguous()))
    assert all(x.equal(y) for x, y in zip(far, near, strict=True))
