"""Frequencies of drawn tokens are the renormalised probabilities."""

from typing import Any

import pytest
import torch

from srlm_kernels.sample import uniforms
from srlm_kernels.triton_support import INTERPRETED
from tests.srlm_kernels.draws import IMPLEMENTATIONS, chi_square, draw, normal, textbook

DRAWS = 400 if INTERPRETED else 200_000
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    {},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.95},
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options", OPTIONS[:2] if INTERPRETED else OPTIONS, ids=lambda o: "-".join(o) or "plain"
)
def test_frequencies_are_the_renormalised_probabilities(impl: str, options: dict[str, Any]) -> None:
    logits = normal(40, seed=3)
    expected, _ = textbook(logits, **options)
    drawn = draw(impl, logits.expand(DRAWS, -1), **options)
    counts = drawn.token.bincount(minlength=40).double()
    assert (counts[expected == 0] == 0).all()
    bins = expected * DRAWS >= 5
    observed = torch.cat([counts[bins], counts[~bins].sum()[None]])
    wanted = torch.cat([expected[bins], expected[~bins].sum()[None]]) * DRAWS
    present = wanted >= 5
    assert present.sum() >= 5
    assert chi_square(observed[present], wanted[present]) > 1e-4


def test_steps_and_seeds_are_independent() -> None:
    """Of a row two steps in a row, and of neighbouring seeds one step."""
    draws = 200_000
    seed = torch.arange(draws + 1) - draws // 2
    first, second = (uniforms(seed, torch.tensor(step)) for step in (0, 1))
    for x, y in ((first, second), (first[1:], first[:-1]), (first[1:], second[:-1])):
        observed = ((x * 8).long() * 8 + (y * 8).long()).bincount(minlength=64).double()
        assert chi_square(observed, torch.full_like(observed, len(x) / 64)) > 1e-4


def test_uniforms_lie_below_one_and_differ() -> None:
    values = uniforms(torch.arange(200_000) - 100_000, torch.tensor(7))
    assert values.min() >= 0 and values.max() < 1
    assert len(values.unique()) == 200_000
