"""Padding to the sizes of a graph changes nothing; on a GPU, nor does the graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from srlm_fast.sampler import Sampler, SamplingParams
from srlm_fast.sampler.decode import STEPS, decode_step
from srlm_fast.sampler.graphs import StepGraphs, bucket, round_up
from srlm_fast.sampler.paged import PagedEngine
from tests.pretended_gpu import Device, on_gpu


def test_sizes() -> None:
    assert [bucket(n) for n in (1, 3, 9, 33, 64, 65, 512, 513)] == [1, 4, 16, 48, 64, 96, 512, 1024]
    assert [round_up(n) for n in (0, 1, 2, 3, 64, 65)] == [0, 1, 2, 4, 64, 128]


def generate(sampler: Sampler, rows: int) -> list[list[int]]:
    """That many rows, all but one of a long prompt; some end early."""
    prompts = [[5, 6, 7] * 30, [9]][-min(rows, 2) :]
    params = [
        SamplingParams(n=n, max_tokens=21, top_p=0.9, repetition_penalty=1.1)
        for n in ([rows - 1, 1] if rows > 1 else [1])
    ]
    outputs = sampler.generate(prompts, params)
    found = [row.token_ids for output in outputs for row in output.outputs]
    assert len(found) == rows
    return found


# One below a bucket, in it, and one above.
@pytest.mark.parametrize("rows", [7, 8, 9])
def test_padded_steps_draw_the_same_tokens(
    rows: int, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(Sampler(make_model(), impl="reference"), rows)
    bursts = []

    def padded(self: StepGraphs, state: Any, plan: Any, rules: Any, steps: int) -> Any:
        bursts.append(len(state.token))
        assert len(plan.pages) == round_up(len(plan.pages))
        for _ in range(steps):
            decode_step(self._runner, state, plan, rules)
        return state

    monkeypatch.setattr(StepGraphs, "run", padded)
    monkeypatch.setattr(PagedEngine, "_plain_steps", PagedEngine._recorded_steps)
    assert generate(Sampler(make_model(), impl="reference"), rows) == expected
    assert bursts[0] == bucket(rows)
    assert all(size == bucket(size) for size in bursts)


@pytest.mark.parametrize("rows", [1, 7, 8, 9])
def test_replays_on_a_pretended_gpu_draw_the_same_tokens(
    rows: int, gpu: Device, make_model: Callable[..., Any]
) -> None:
    """Of what changes between steps nothing is left outside of the graph, or replaced in it."""
    expected = generate(Sampler(make_model(), impl="reference"), rows)
    sampler = Sampler(on_gpu(make_model()))
    assert generate(sampler, rows) == expected
    assert max(graph.replays for graph in gpu.graphs) >= STEPS
    changed = make_model()
    with torch.no_grad():
        for model in (sampler.model, changed):
            for parameter in model.parameters():
                parameter.mul_(0.5)
    expected = generate(Sampler(changed, impl="reference"), rows)
    # There are more pages from the second call on, beside what is cached; then nothing moves.
    assert [generate(sampler, rows) for _ in range(2)] == [expected] * 2
    recorded = len(gpu.graphs)
    assert generate(sampler, rows) == expected
    assert len(gpu.graphs) == recorded


def test_nothing_waits_within_a_burst_of_a_pretended_gpu(
    gpu: Device, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, run, bursts = Sampler(on_gpu(make_model())), StepGraphs.run, []

    def watched(self: StepGraphs, *arguments: Any) -> Any:
        bursts.append(arguments[-1])
        with gpu.nothing_waits():
            return run(self, *arguments)

    monkeypatch.setattr(StepGraphs, "run", watched)
    generate(sampler, 9)
    assert max(bursts) == STEPS


def test_a_model_that_waits_decodes_without_graphs_on_its_own_stream(
    gpu: Device, make_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A recording that fails leaves nothing behind: neither its stream nor its memory."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    options = {"rope_parameters": rope, "max_position_embeddings": 256}
    expected = generate(Sampler(make_model(**options), impl="reference"), 4)
    sampler = Sampler(on_gpu(make_model(**options)))
    assert generate(sampler, 4) == expected
    assert [r.getMessage()[:28] for r in caplog.records] == ["decoding without CUDA graphs"]
    assert gpu.stream == "default"
    assert not sampler._engine.graphs._graphs
    assert sampler._engine.graphs._pool is None


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 31, 32, 33])
def test_graphs_draw_the_same_tokens(
    rows: int, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model().cuda()
    sampler = Sampler(model)
    with_graphs = generate(sampler, rows)
    assert sampler._engine.graphs._graphs, "nothing was recorded"
    again = generate(sampler, rows)
    monkeypatch.setattr(StepGraphs, "_find", lambda *_: None)
    assert generate(Sampler(model), rows) == with_graphs == again


@pytest.mark.gpu
def test_nothing_waits_for_the_device_within_a_burst(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a graph is recorded: steps follow each other without the host."""
    sampler, run, bursts = Sampler(make_model().cuda()), StepGraphs.run, []
    expected = generate(sampler, 9)
    generate(sampler, 9)  # there are pages more for what is cached now, and graphs are anew

    def watched(self: StepGraphs, *arguments: Any) -> Any:
        bursts.append(arguments[-1])
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(StepGraphs, "run", watched)
    assert generate(sampler, 9) == expected
    assert max(bursts) == STEPS


@pytest.mark.gpu
def test_rows_that_are_preempted_draw_the_same_tokens_through_graphs(
    make_model: Callable[..., Any],
) -> None:
    model = make_model(max_position_embeddings=1024).cuda()
    params = SamplingParams(n=4, max_tokens=300, ignore_eos=True, seed=1)
    prompts = [[5, 6, 7] * 30, [5, 6, 7] * 22, [9]]
    roomy, small = Sampler(model, batch_tokens=64 * 400), Sampler(model, batch_tokens=64 * 19)
    expected, found = (sampler.generate(prompts, params) for sampler in (roomy, small))
    assert small._engine.preemptions > 0
    small._engine.check()
    for ours, theirs in zip(found, expected, strict=True):
        assert [c.token_ids for c in ours.outputs] == [c.token_ids for c in theirs.outputs]


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
