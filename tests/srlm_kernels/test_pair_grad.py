"""From token log-probabilities to losses and slopes, by formulas written out."""

import math

import pytest
import torch

from srlm_kernels import losses
from srlm_kernels.pair_grad import pair_grad

LOGP = torch.tensor([-1.0, -2.0, 0.0, -0.5, -4.0, -0.25, -8.0])
REF = torch.tensor([-1.5, -2.0, 0.0, -1.0, -2.0, -0.5, -4.0])
SCORED = torch.tensor([True, True, False, True, True, True, True])
CU = torch.tensor([0, 3, 5, 5, 7], dtype=torch.int32)
SUMS, REF_SUMS = [-3.0, -4.5, 0.0, -8.25], [-3.5, -3.0, 0.0, -4.5]
BETA = 0.5


def run(loss_fn=None, logp=LOGP, **options):
    options = {"scale": 1.0, "ref_logp": REF, "impl": "torch", **options}
    return pair_grad(logp, SCORED, CU, loss_fn or losses.dpo(BETA), **options)


def test_sums_margins_losses_and_slopes():
    found = run(scale=0.25)
    assert found.logp.tolist() == found.extrapolated_logp.tolist() == SUMS
    assert found.ref_logp.tolist() == REF_SUMS
    margins = torch.tensor([0.5 - -1.5, 0.0 - -3.75])
    assert torch.equal(found.margins, margins)
    assert torch.equal(found.ext_margins, margins)
    torch.testing.assert_close(found.losses, (1 + (-BETA * margins).exp()).log())
    c = -0.25 * BETA / (1 + (BETA * margins).exp())
    torch.testing.assert_close(found.slopes, torch.stack([c, -c], 1).flatten())


def test_lengths_count_scored_tokens():
    def lengths(s):
        return s.chosen * 0 + 10 * s.chosen_len + s.rejected_len

    assert run(lengths).losses.tolist() == [22, 2]


def test_known_sums_stand_in_for_the_reference():
    found = run(ref_logp=None, ref_sums=torch.tensor(REF_SUMS).double())
    assert torch.equal(found.losses, run().losses)
    assert found.ref_logp.dtype == torch.float32
    assert not run(ref_logp=None).ref_logp.any()


def test_extrapolated_sums_have_no_slope():
    found = run(losses.spa(BETA, 0.3, 0.0), extrapolated_logp=-LOGP)
    assert found.extrapolated_logp.tolist() == [-s for s in SUMS]
    assert found.ext_margins.tolist() == [6.5 - 7.5, 0.0 - 12.75]
    smoothed = run(losses.dpo(BETA, label_smoothing=0.3))  # both are suspect
    assert torch.equal(found.slopes, smoothed.slopes)


def test_long_sums_are_exact_to_the_last_bit_of_fp32():
    """Regression: a running sum in fp32 drifts by more than its terms' own errors."""
    logp = -torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    cu = torch.tensor([0, 150_000, 200_000])
    found = pair_grad(
        logp, torch.ones_like(logp).bool(), cu, losses.dpo(BETA), scale=1.0, impl="torch"
    )
    exact = torch.stack([logp[:150_000].double().sum(), logp[150_000:].double().sum()])
    assert torch.equal(found.logp, exact.float())


def test_nan_stays_in_its_pair():
    logp = LOGP.clone()
    logp[3] = math.nan
    found = run(logp=logp)
    assert found.losses.isnan().tolist() == [True, False]
    assert torch.equal(found.slopes[2:], run().slopes[2:])


@pytest.mark.parametrize("region", ["no_grad", "inference_mode", "below autograd", "checkpoint"])
def test_slopes_are_found_wherever_the_call_stands(region):
    expected = run(pair={"label_smoothing": torch.tensor([0.1, 0.4])})
    seen = []
    regions = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "below autograd": torch._C._AutoDispatchBelowAutograd(),
        "checkpoint": torch.autograd.graph.saved_tensors_hooks(seen.append, seen.append),
    }
    with regions[region]:
        found = run(pair={"label_smoothing": torch.tensor([0.1, 0.4])})
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.slopes, expected.slopes)
    assert not seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_have_the_dtype_of_the_sums_whatever_the_loss_returns(dtype):
    other = torch.float64 if dtype == torch.float32 else torch.float32
    found = run(
        lambda s: (-s.margin).to(other),
        logp=LOGP.to(dtype),
        ref_logp=REF.to(dtype),
        scale=torch.tensor(0.5, dtype=other),
    )
    assert found.losses.dtype == found.slopes.dtype == dtype
    assert found.slopes.tolist() == [-0.5, 0.5] * 2


def test_a_loss_that_depends_on_nothing_has_slopes_of_zero():
    assert run(lambda s: torch.ones_like(s.ref_chosen)).slopes.tolist() == [0.0] * 4
    assert run(lambda s: -s.chosen).slopes.tolist() == [-1.0, 0.0] * 2


@pytest.mark.parametrize("loss_fn", [lambda s: s.margin.sum(), lambda s: None])
def test_anything_but_one_loss_per_pair_is_refused(loss_fn):
    with pytest.raises(ValueError, match=r"one loss per pair, shape \[2\]"):
        run(loss_fn)


def test_an_unknown_implementation_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"impl='cpp'; known: auto, torch, triton"):
        run(impl="cpp")
