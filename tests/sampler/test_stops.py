"""Stop strings, stop tokens and the minimum length."""

from collections.abc import Callable
from typing import Any

import pytest

from srlm_fast.errors import UserError
from srlm_fast.sampler import Completion, Sampler, SamplingParams
from srlm_fast.sampler.stops import Stops

LENGTH = 30


@pytest.fixture(scope="module")
def sampler(make_model: Callable[..., Any], tokenizer: Any) -> Sampler:
    return Sampler(make_model(), tokenizer)


def run(sampler: Sampler, prompts: list[list[int]], **options: Any) -> list[Completion]:
    params = SamplingParams(**({"max_tokens": LENGTH, "ignore_eos": True, "n": 2} | options))
    return [row for output in sampler.generate(prompts, params) for row in output.outputs]


@pytest.fixture(scope="module")
def free(sampler: Sampler, prompts: list[list[int]]) -> list[Completion]:
    """The rows when nothing stops them; ids and characters are one to one but for specials."""
    return run(sampler, prompts)


@pytest.mark.parametrize("at", [0, 6, 7, 20], ids=lambda at: f"at{at}")
def test_string_across_tokens_cuts_everything_together(
    at: int, sampler: Sampler, prompts: list[list[int]], free: list[Completion]
) -> None:
    """Where `at` falls in a stretch of steps between two looks must not matter."""
    string = free[0].text[at : at + 3]
    rows = run(sampler, prompts, stop=(string,))
    row, whole = rows[0], free[0]
    assert (row.finish_reason, row.stop_reason) == ("stop", string)
    assert row.text == whole.text[: whole.text.index(string)]
    kept = len(row.token_ids)
    assert row.token_ids == whole.token_ids[:kept]
    decode = sampler.tokenizer.decode
    assert decode(row.token_ids, skip_special_tokens=True) == row.text + string
    assert decode(row.token_ids[:-1], skip_special_tokens=True) != row.text + string
    assert row.logprobs == pytest.approx(whole.logprobs[:kept], abs=1e-5)
    assert len(row.sample_logprobs) == len(row.kept_mass) == kept
    for other, unstopped in zip(rows[1:], free[1:], strict=True):
        if string not in unstopped.text:
            assert other.token_ids == unstopped.token_ids


def test_the_string_that_is_complete_first_wins(
    sampler: Sampler, prompts: list[list[int]], free: list[Completion]
) -> None:
    early, late = free[0].text[4:6], free[0].text[9:13]
    row = run(sampler, prompts, stop=(late, early))[0]
    assert row.stop_reason == early


@pytest.mark.parametrize("margin", [-1, 0, 1, 5])
def test_a_string_inside_the_minimum_does_not_stop(
    margin: int, sampler: Sampler, prompts: list[list[int]], free: list[Completion]
) -> None:
    """Only a minimum below the token that completes the string lets it end the row."""
    string = free[0].text[5:7]
    stopped = run(sampler, prompts, stop=string)[0]
    minimum = len(stopped.token_ids) + margin
    held, whole = (
        run(sampler, prompts, min_tokens=minimum, **options)[0]
        for options in ({"stop": string}, {})
    )
    if margin < 0:
        assert held == stopped
    else:
        again = whole.text.find(string, whole.text.index(string) + 1)
        assert held.text == (whole.text if again < 0 else whole.text[:again])
        assert held.token_ids == whole.token_ids[: len(held.token_ids)]
        assert len(held.token_ids) > minimum


def test_stop_token_is_kept_in_the_ids_and_not_in_the_text(
    sampler: Sampler, prompts: list[list[int]], free: list[Completion]
) -> None:
    token = next(i for i in free[0].token_ids[2:] if i > 2)
    row = run(sampler, prompts, stop_token_ids=(token,))[0]
    assert row.token_ids == free[0].token_ids[: free[0].token_ids.index(token) + 1]
    assert (row.finish_reason, row.stop_reason) == ("stop", token)
    assert row.text == sampler.tokenizer.decode(row.token_ids[:-1], skip_special_tokens=True)


def test_min_tokens_bans_eos_until_then(sampler: Sampler, prompts: list[list[int]]) -> None:
    rows = run(
        sampler, prompts, n=4, ignore_eos=False, min_tokens=9, logit_bias={2: 50.0}, max_tokens=20
    )
    assert [len(row.token_ids) for row in rows] == [10] * len(rows)
    assert all(row.finish_reason == "stop" for row in rows)


def test_ignore_eos_runs_to_the_limit(sampler: Sampler, prompts: list[list[int]]) -> None:
    rows = run(sampler, prompts, logit_bias={2: 50.0})
    assert all(row.token_ids == [2] * LENGTH and row.finish_reason == "length" for row in rows)
    assert all(row.text == "" for row in rows)


def test_stop_token_outside_the_vocabulary(sampler: Sampler, prompts: list[list[int]]) -> None:
    with pytest.raises(UserError, match="stop_token_ids has token id 96"):
        run(sampler, prompts, stop_token_ids=(96,))


def test_special_tokens_within_a_string_do_not_hide_it(sampler: Sampler) -> None:
    stops = Stops(SamplingParams(stop=("ab",), max_tokens=20), (), sampler.tokenizer)
    a, b = (ord(letter) - 29 for letter in "ab")
    ids = [a, *[1] * 9, b]
    assert stops.found(ids, fresh=1) and stops.ending(ids).stop_reason == "ab"
