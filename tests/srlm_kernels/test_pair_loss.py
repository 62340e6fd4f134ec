"""The sums that losses are given, and the base that losses share."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch

from srlm_kernels.pair_loss import PairLogps, PairLoss


@pytest.fixture
def s() -> PairLogps:
    # Powers of two: every field shows in the result.
    return PairLogps(*(torch.tensor([2.0**k, -(2.0**k)]) for k in range(6)), *torch.ones(2, 2) * 4)


def test_margins_are_differences_of_log_ratios(s):
    assert s.chosen_ratio.tolist() == [1 - 4, -1 + 4]
    assert s.rejected_ratio.tolist() == [2 - 8, -2 + 8]
    assert s.margin.tolist() == [3, -3]
    assert s.ext_margin.tolist() == [(16 - 4) - (32 - 8), -(16 - 4) + (32 - 8)]


def test_mean_margin_divides_each_response_by_its_own_length(s):
    s = dataclasses.replace(s, chosen_len=torch.tensor([2.0, 0.0]))
    assert s.mean_margin.tolist() == [-3 / 2 + 6 / 4, 3 / 1 - 6 / 4]


@dataclass(frozen=True)
class Odd(PairLoss):
    weight: float | torch.Tensor
    on: bool
    names: tuple[str, ...]
    inner: PairLoss | None = None


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (PairLoss(1), '["PairLoss", 1.0]'),
        (Odd(1e-30, math.inf, True, ()), '["Odd", 1e-30, Infinity, true, null, null]'),
        (
            Odd(0.1, torch.tensor(0.5), False, ("a",), PairLoss(0.25)),
            '["Odd", 0.1, "tensor", false, null, ["PairLoss", 0.25]]',
        ),
    ],
)
def test_a_loss_is_written_when_it_is_made(loss, text):
    assert loss.text == text
    assert "text" not in {field.name for field in dataclasses.fields(loss)}


def test_beta_must_be_positive():
    for beta in (0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="beta must be positive"):
            PairLoss(beta)
