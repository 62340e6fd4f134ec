"""A function of the user's says, token by token, what a row may draw."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.sampler import Completion, Output, Sampler, SamplingParams
from srlm_fast.sampler.decode import decode_step
from srlm_fast.sampler.graphs import StepGraphs
from srlm_fast.sampler.paged import PagedEngine

VOCAB, EOS = 96, 2


def steps_of_two(tokens: Sequence[int]) -> Tensor:
    """Tokens of the other parity than the one before; after five of them the end."""
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    if len(tokens) == 5:
        allowed[EOS] = True
    else:
        allowed[(3 + (tokens[-1] if tokens else 0)) % 2 + 4 :: 2] = True
    return allowed


@pytest.fixture(params=["auto", "reference", "fallback", "padded"])
def sampler(
    request: pytest.FixtureRequest, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Sampler:
    """Padded: as on a GPU, where steps are recorded for a fixed number of rows."""

    def steps(self: StepGraphs, state: Any, plan: Any, rules: Any, steps: int) -> Any:
        for _ in range(steps):
            decode_step(self._runner, state, plan, rules)
        return state

    if request.param == "padded":
        monkeypatch.setattr(StepGraphs, "run", steps)
        monkeypatch.setattr(PagedEngine, "_plain_steps", PagedEngine._recorded_steps)
    return Sampler(make_model(), impl="auto" if request.param == "padded" else request.param)


def rows(outputs: list[Output]) -> list[Completion]:
    return [row for output in outputs for row in output.outputs]


def test_rows_draw_what_is_allowed(sampler: Sampler, prompts: list[list[int]]) -> None:
    params = SamplingParams(n=3, max_tokens=20, allowed=steps_of_two)
    found = rows(sampler.generate(prompts, params))
    assert len({tuple(row.token_ids) for row in found}) > len(prompts)
    for row in found:
        assert len(row.token_ids) == 6 and row.token_ids[-1] == EOS
        assert row.finish_reason == "stop"
        for i, token in enumerate(row.token_ids):
            assert steps_of_two(row.token_ids[:i])[token]


def test_numbers_are_those_of_the_model_and_of_what_was_drawn_from(
    sampler: Sampler, prompts: list[list[int]]
) -> None:
    params = SamplingParams(n=2, max_tokens=4, allowed=steps_of_two)
    for output in sampler.generate(prompts[:3], params):
        prompt = output.prompt_token_ids
        for row in output.outputs:
            with torch.no_grad():
                logits = sampler.model(torch.tensor([prompt + row.token_ids])).logits[0]
            for i, (token, raw, drawn) in enumerate(
                zip(row.token_ids, row.logprobs, row.sample_logprobs, strict=True)
            ):
                z = logits[len(prompt) - 1 + i].double()
                left = z.masked_fill(~steps_of_two(row.token_ids[:i]), -torch.inf)
                assert raw == pytest.approx(float(z.log_softmax(0)[token]), abs=1e-4)
                assert drawn == pytest.approx(float(left.log_softmax(0)[token]), abs=1e-4)


def test_other_rows_of_the_call_do_not_notice(sampler: Sampler, prompts: list[list[int]]) -> None:
    free = SamplingParams(n=2, max_tokens=9)
    bound = SamplingParams(n=2, max_tokens=9, allowed=steps_of_two)
    mixed = sampler.generate(prompts[:2], [free, bound])
    for prompt, params, output in zip(prompts, (free, bound), mixed, strict=False):
        (alone,) = sampler.generate([prompt], params)
        assert [row.token_ids for row in output.outputs] == [row.token_ids for row in alone.outputs]


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        (lambda tokens: torch.ones(5, dtype=torch.bool), r"bool \[96\], got torch.bool \[5\]"),
        (lambda tokens: torch.ones(VOCAB), r"bool \[96\], got torch.float32 \[96\]"),
        (lambda tokens: torch.zeros(VOCAB, dtype=torch.bool), "a row had no token to draw"),
    ],
    ids=["shape", "dtype", "nothing"],
)
def test_what_cannot_be_followed_is_named(
    allowed: Any, message: str, sampler: Sampler, prompts: list[list[int]]
) -> None:
    with pytest.raises(UserError, match=message):
        sampler.generate(prompts, SamplingParams(allowed=allowed))
    if isinstance(sampler._engine, PagedEngine):
        sampler._engine.check()
