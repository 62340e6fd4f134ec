"""The Triton kernel of sample draws what the reference draws."""

import pytest
import torch
from torch.testing import assert_close

from srlm_kernels.triton_support import INTERPRETED
from tests.srlm_kernels.draws import REFUSALS, assert_same_draws, draw, normal

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
