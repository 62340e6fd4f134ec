"""On the CPU a row's results are its own to the last bit, whatever runs beside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from srlm_fast.sampler import Output, Sampler, SamplingParams
from srlm_fast.sampler.linears import has_amx, linear
from srlm_kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason=f"C++ ops: {native.why()}")


WITH_AMX = "with AMX the products of many bf16 rows are oneDNN's"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> Any:
    if request.param == torch.bfloat16 and has_amx():
        pytest.skip(WITH_AMX)
    # Multiples of a vector: torch computes the last elements of a tensor by other instructions.
    return make_model(
        hidden_size=96, intermediate_size=192, num_attention_heads=6, head_dim=16,
        vocab_size=1000, max_position_embeddings=1024,
    ).to(request.param)  # fmt: skip


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = (5, 64, 130, 700, 33, 90, 1)
    prompts = [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in lengths]
    return [*prompts, prompts[3][:650], prompts[3][:130]]


def numbers(outputs: list[Output]) -> list[Any]:
    return [(c.token_ids, c.logprobs, c.sample_logprobs) for o in outputs for c in o.outputs]


def test_rows_are_equal_to_the_last_bit(model: Any, prompts: list[list[int]]) -> None:
    params = SamplingParams(n=3, max_tokens=40, ignore_eos=True, top_p=0.95)
    together = numbers(Sampler(model).generate(prompts, params))
    alone = [numbers(Sampler(model).generate([p], params)) for p in prompts]
    assert [row for rows in alone for row in rows] == together
    small = Sampler(model, batch_tokens=64 * 24)
    assert numbers(small.generate(prompts[::-1], params)[::-1]) == together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_a_linear_layer_is_the_same_in_any_number_of_rows(dtype: torch.dtype) -> None:
    """Regression: in bf16 a row's bits were others where less than 129 rows met the layer."""
    if dtype == torch.bfloat16 and has_amx():
        pytest.skip(WITH_AMX)
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 2000, generator=draw).to(dtype) for n in (300, 64))
    whole = linear(weight, None, x)
    for rows in (1, 16, 96, 128, 129, 200):
        assert torch.equal(linear(weight, None, x[:rows]), whole[:rows])


def test_threads_change_no_bit(model: Any, prompts: list[list[int]]) -> None:
    before = torch.get_num_threads()
    params = SamplingParams(n=3, max_tokens=3, ignore_eos=True)
    expected = numbers(Sampler(model).generate(prompts[:3], params))
    torch.set_num_threads(3 - before)  # 2 where the tests use 1
    try:
        assert numbers(Sampler(model).generate(prompts[:3], params)) == expected
    finally:
        torch.set_num_threads(before)


def test_scores_are_those_of_sampling_to_rounding(model: Any, prompts: list[list[int]]) -> None:
    if model.dtype != torch.float32:
        pytest.skip("bf16 is held to float64 in test_precision.py")
    sampler = Sampler(model)
    outputs = sampler.generate(prompts, SamplingParams(n=2, max_tokens=20))
    scores = sampler.score(prompts, [[c.token_ids for c in o.outputs] for o in outputs])
    for output, group in zip(outputs, scores, strict=True):
        for row, logps in zip(output.outputs, group, strict=True):
            torch.testing.assert_close(torch.tensor(row.logprobs), logps, atol=2e-5, rtol=1e-5)
