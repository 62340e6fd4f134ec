"""Padding to the sizes of a graph changes nothing; on a GPU, nor does the graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from srlm_fast.sampler import Sampler, SamplingParams
from srlm_fast.sampler.decode import decode_step
from srlm_fast.sampler.graphs import StepGraphs, bucket, round_up
from srlm_fast.sampler.paged import PagedEngine


def test_sizes() -> None:
    assert [bucket(n) for n in (1, 3, 9, 33, 64, 65, 512, 513)] == [1, 4, 16, 48, 64, 96, 512, 1024]
    assert [round_up(n) for n in (0, 1, 2, 3, 64, 65)] == [0, 1, 2, 4, 64, 128]


def generate(sampler: Sampler, count: int) -> list[list[int]]:
    params = SamplingParams(n=count, max_tokens=21, top_p=0.9, repetition_penalty=1.1)
    prompts = [[5, 6, 7] * 30, [9]]
    return [row.token_ids for out in sampler.generate(prompts, params) for row in out.outputs]


# Two prompts: rows one below a bucket, in it, and one above.
@pytest.mark.parametrize("count", [4, 8, 9])
def test_padded_steps_draw_the_same_tokens(
    count: int, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(Sampler(make_model(), impl="reference"), count)

    def padded(self: StepGraphs, state: Any, plan: Any, rules: Any, steps: int) -> Any:
        assert len(state.token) == bucket(len(state.token))
        assert len(plan.pages) == round_up(len(plan.pages))
        for _ in range(steps):
            decode_step(self._runner, state, plan, rules)
        return state

    monkeypatch.setattr(StepGraphs, "run", padded)
    monkeypatch.setattr(PagedEngine, "_plain_steps", PagedEngine._recorded_steps)
    assert generate(Sampler(make_model(), impl="reference"), count) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("count", [3, 4, 5, 16, 17])
def test_graphs_draw_the_same_tokens(
    count: int, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model().cuda()
    sampler = Sampler(model)
    with_graphs = generate(sampler, count)
    assert sampler._engine.graphs._graphs, "nothing was recorded"
    again = generate(sampler, count)
    monkeypatch.setattr(StepGraphs, "_find", lambda *_: None)
    assert generate(Sampler(model), count) == with_graphs == again


@pytest.mark.gpu
def test_graphs_follow_weights_and_memory(make_model: Callable[..., Any]) -> None:
    model, other = make_model().cuda(), make_model(seed=1).cuda()
    sampler = Sampler(model)
    generate(sampler, 4)
    with torch.no_grad():
        for mine, new in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(new)
    assert generate(sampler, 4) == generate(Sampler(other), 4)
    sampler.sleep()
    assert generate(sampler, 4) == generate(Sampler(other), 4)
