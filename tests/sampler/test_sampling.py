"""The draw itself, on given logits."""

from typing import Any

import pytest
import torch

from srlm_fast.sampler import SamplingParams
from srlm_fast.sampler.sampling import process, row_seed, sample, uniforms

DRAWS = 200_000


def draw(logits: torch.Tensor, seed: int = 0, step: int = 0, **options: Any) -> Any:
    params = SamplingParams(**options)
    seeds = torch.arange(len(logits)) + seed * 1_000_003
    return sample(logits, process(logits, params), params, uniforms(seeds, step))


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """The p-value of Pearson's test."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def truth(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Renormalised probabilities by the textbook: sort, cut, renormalise (float64)."""
    probs = (logits.double() / params.temperature).softmax(-1)
    order = probs.argsort(descending=True)
    keep = torch.ones(len(probs), dtype=torch.bool)
    if params.top_k > 0:
        keep[order[params.top_k :]] = False
    if params.top_p < 1:
        kept = probs * keep / (probs * keep).sum()
        before = kept[order].cumsum(0) - kept[order]
        keep[order[before >= params.top_p]] = False
    keep &= probs >= params.min_p * probs.max()
    return probs * keep / (probs * keep).sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_frequencies_are_the_renormalised_probabilities(options: dict[str, Any]) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    expected = truth(logits, SamplingParams(**options))
    got = draw(logits.expand(DRAWS, -1).contiguous(), **options)
    counts = got.token.bincount(minlength=40).double()
    assert (counts[expected == 0] == 0).all()
    bins = expected * DRAWS >= 5
    observed = torch.cat([counts[bins], counts[~bins].sum()[None]])
    wanted = torch.cat([expected[bins], expected[~bins].sum()[None]]) * DRAWS
    present = wanted > 0
    assert chi_square(observed[present], wanted[present]) > 1e-4
    torch.testing.assert_close(
        got.sample_logprob, expected.log()[got.token].float(), atol=1e-5, rtol=1e-5
    )


def test_two_steps_of_a_row_are_independent() -> None:
    seeds = torch.arange(DRAWS)
    cells = (uniforms(seeds, 0) * 8).long() * 8 + (uniforms(seeds, 1) * 8).long()
    observed = cells.bincount(minlength=64).double()
    assert chi_square(observed, torch.full_like(observed, DRAWS / 64)) > 1e-4


def test_uniforms_lie_below_one_and_differ() -> None:
    values = uniforms(torch.arange(DRAWS) - DRAWS // 2, 7)
    assert values.min() >= 0
    assert values.max() < 1
    assert len(values.unique()) == DRAWS


def test_row_seed_is_a_fixed_function() -> None:
    """Runs on other machines and later versions must draw the same."""
    assert row_seed(0, [1, 2, 3], 0) == row_seed(0, (1, 2, 3), 0)
    others = {row_seed(*key) for key in ((0, [1, 2, 3], 0), (1, [1, 2, 3], 0), (0, [1, 2, 3], 1))}
    assert len(others) == 3
    assert row_seed(0, [1, 2, 3], 0) == -1904877767052379095


def test_row_seed_does_not_run_fields_together() -> None:
    assert row_seed(1, [2], 11) != row_seed(11, [2], 1)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-48])
def test_ends_of_the_cdf_hit_possible_tokens(uniform: float) -> None:
    logits = torch.full((1, 6), -torch.inf)
    logits[0, [2, 4]] = torch.tensor([0.0, 1.0])
    got = sample(logits, logits, SamplingParams(), torch.tensor([uniform], dtype=torch.float64))
    assert got.token.tolist() == [2 if uniform == 0 else 4]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_all_impossible_but_one(options: dict[str, Any]) -> None:
    logits = torch.full((50, 9), -torch.inf)
    logits[:, 5] = 1.0
    got = draw(logits, **options)
    assert set(got.token.tolist()) == {5}
    assert got.sample_logprob.abs().max() == 0


def test_ties_at_the_cut_are_all_kept() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, -3.0]).repeat(2000, 1)
    assert set(draw(logits, top_k=2).token.tolist()) == {0, 1, 2, 3}


def test_top_k_1_is_greedy_even_among_ties() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 0.0]).repeat(100, 1)
    greedy = draw(logits, temperature=0.0)
    for other in (draw(logits, top_k=1), draw(logits, top_k=1, temperature=2.0)):
        assert torch.equal(greedy.token, other.token)
    assert (greedy.sample_logprob == 0).all()


def test_low_temperature_becomes_greedy() -> None:
    logits = torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits, temperature=1e-4).token, logits.argmax(-1))


def test_kept_mass_joins_the_two_logprobs() -> None:
    logits = torch.randn(500, 30, generator=torch.Generator().manual_seed(0)) * 2
    for options in ({}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.0}):
        got = draw(logits, **options)
        torch.testing.assert_close(
            got.sample_logprob - got.logprob, -got.kept_mass.log(), atol=2e-6, rtol=1e-5
        )


def test_logprob_ignores_processing() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    got = draw(logits, temperature=0.5, top_k=4)
    raw = logits.log_softmax(-1).gather(-1, got.token[:, None])[:, 0]
    torch.testing.assert_close(got.logprob, raw)


def test_repetition_penalty_equals_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    history = torch.tensor([[1, 2, 2, 5], [0, 0, 0, 0], [11, 3, 4, 3]])
    seen = torch.zeros(3, 12, dtype=torch.bool).scatter_(1, history, True)
    ours = process(logits, SamplingParams(repetition_penalty=1.3), seen_RV=seen)
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(history, logits.clone())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("top_k,top_p", [(0, 0.9), (7, 1.0), (7, 0.6)])
def test_kept_sets_equal_transformers(top_k: int, top_p: float) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(64, 40, generator=torch.Generator().manual_seed(4)) * 2
    theirs = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    theirs = TopPLogitsWarper(top_p)(None, theirs) if top_p < 1 else theirs
    got = draw(logits, top_k=top_k, top_p=top_p)
    mass = theirs.sub(logits.logsumexp(-1, keepdim=True)).exp().sum(-1)
    torch.testing.assert_close(got.kept_mass, mass)


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -2},
        {"min_p": 2.0},
        {"max_tokens": 0},
        {"min_tokens": 20},
        {"repetition_penalty": 0.0},
        {"stop": ("",)},
        {"temperature": float("nan")},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_impossible_parameters_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SamplingParams(**options)


def test_a_single_stop_string_is_not_taken_letter_by_letter() -> None:
    assert SamplingParams(stop="ab").stop == ("ab",)  # type: ignore[arg-type]
