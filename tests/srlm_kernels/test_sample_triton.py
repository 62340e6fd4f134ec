"""The Triton kernel of sample draws what the reference draws."""

import pytest
import torch
from torch.testing import assert_close

from srlm_kernels.sample_triton import _first_above
from srlm_kernels.triton_support import INTERPRETED, jit, tl
from tests.srlm_kernels.draws import DEVICES, REFUSALS, assert_same_draws, draw, normal

if REFUSALS["triton"]:
    pytest.skip(f"{REFUSALS['triton']}; test_interpreter.py runs this", allow_module_level=True)

ROWS = 24 if INTERPRETED else 20_000


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 50},
        {"top_p": 0.9},
        {"min_p": 0.01},
        {"temperature": 1.5, "top_k": 500, "top_p": 0.95},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("columns", [5021, 8192])
def test_same_draws(columns: int, options: dict[str, float]) -> None:
    assert_same_draws("triton", ROWS, columns, **options)


def test_more_groups_than_a_block_holds() -> None:
    """The list of groups itself is searched and written in several blocks."""
    logits = normal(2, 32 * 2100, scale=1.0)
    for options in ({"top_p": 0.9}, {"top_k": 1500}, {"top_p": 0.9, "top_k": 1500}):
        ours, theirs = (draw(name, logits, **options) for name in ("triton", "torch"))
        assert ours.token.equal(theirs.token)
        assert_close(ours.kept_mass, theirs.kept_mass, atol=1e-6, rtol=1e-5)


def test_scores_far_apart() -> None:
    """Bisection must not depend on the distance of scores, nor on their number."""
    logits = -torch.logspace(-30, 37, 200).flip(0).repeat(3, 1)
    logits[1] *= -1
    logits[2, :150] = -torch.inf
    for options in ({"top_k": 20}, {"top_p": 0.999}, {"top_k": 190, "top_p": 0.9}):
        ours, theirs = (draw(name, logits, **options) for name in ("triton", "torch"))
        assert ours.token.equal(theirs.token)
        assert_close(ours.kept_mass, theirs.kept_mass)


@jit
def _first_above_kernel(found, weight, cdf, level):
    lane = tl.arange(0, 8)
    tl.store(found, _first_above(tl.load(weight + lane), tl.load(cdf + lane), level, lane))


@pytest.mark.parametrize(("level", "expected"), [(0.0, 1), (0.75, 3), (1.05, 5), (1.5, 5)])
def test_prefix_sums_that_are_not_monotone(level: float, expected: int) -> None:
    """Parallel sums round so: in front of, between and behind what weighs anything."""
    weight = torch.tensor([0.0, 0.5, 0.0, 0.25, 0.0, 0.25, 0.0, 0.0])
    cdf = torch.tensor([0.1, 0.5, 0.9, 0.8, 0.9, 1.1, 1.2, 1.3])
    found = torch.zeros(1, dtype=torch.int32, device=DEVICES["triton"])
    _first_above_kernel[(1,)](found, weight.to(found.device), cdf.to(found.device), level)
    assert found.item() == expected
