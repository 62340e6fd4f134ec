"""The Triton kernel of pair_grad against the losses themselves in float64."""

import math

import pytest
import torch
from torch import Tensor

from srlm_kernels.backends import refusal
from srlm_kernels.losses import dpo, ipo, spa
from srlm_kernels.pair_grad import PairGrad, pair_grad_ref
from srlm_kernels.pair_grad_triton import pair_grad_triton, takes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := refusal("triton", torch.empty(0, device=DEVICE)):
    pytest.skip(f"{reason}; test_interpreter.py runs this file", allow_module_level=True)

# Four pairs: empty sequences on either side, one longer than two blocks of the kernel.
OFFSETS = [0, 3, 10, 10, 17, 20, 20, 1300, 1340]
PAIRS, TOKENS = 4, OFFSETS[-1]


def tokens(seed: int, scale: float = 1.0) -> Tensor:
    values = torch.rand(TOKENS, generator=torch.Generator().manual_seed(seed))
    return (-scale * values).to(DEVICE)


def run(loss_fn: object, wide: bool = False, offsets: object = None, **options: object) -> PairGrad:
    logp = options.pop("logp", tokens(0))
    cu_seqlens = torch.tensor(OFFSETS if offsets is None else offsets, dtype=torch.int32)
    scored = torch.ones(len(logp), dtype=torch.bool, device=DEVICE)
    options = {"scale": 0.25, **options}
    if not wide:
        return pair_grad_triton(logp, scored, cu_seqlens.to(DEVICE), loss_fn, **options)
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    return pair_grad_ref(logp.double(), scored, cu_seqlens.to(DEVICE), loss_fn, **options)


def assert_same(ours: PairGrad, truth: PairGrad, rtol: float = 1e-6) -> None:
    for name in ("logp", "ref_logp", "extrapolated_logp", "losses", "slopes"):
        found, expected = getattr(ours, name), getattr(truth, name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("reference", ["tokens", "sums", "none"])
def test_dpo(smoothing: float, reference: str) -> None:
    options: dict[str, object] = {}
    if reference == "tokens":
        options["ref_logp"] = tokens(1)
    elif reference == "sums":
        options["ref_sums"] = tokens(1)[: 2 * PAIRS]
    loss_fn = dpo(0.1, label_smoothing=smoothing)
    assert_same(run(loss_fn, **options), run(loss_fn, wide=True, **options), rtol=1e-5)


def test_smoothing_per_pair() -> None:
    smoothing = torch.tensor([0.0, 1.0, 0.5, 0.3], device=DEVICE)
    options = {"ref_logp": tokens(1), "pair": {"label_smoothing": smoothing}}
    ours = run(dpo(0.3), **options)
    options["pair"] = {"label_smoothing": smoothing.double()}
    assert_same(ours, run(dpo(0.3), wide=True, **options), rtol=1e-5)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("flag_equal", [False, True])
def test_spa(as_tensor: bool, flag_equal: bool) -> None:
    options = {"ref_logp": tokens(1), "extrapolated_logp": tokens(2)}
    first = run(dpo(0.1), **options)
    scaled = 0.1 * first.ext_margins
    # Between the margins, and on one of them: fp32 against fp32, as torch compares.
    for threshold in (0.0, float(scaled[1])):
        value = torch.tensor(threshold, device=DEVICE) if as_tensor else threshold
        loss_fn = spa(0.1, alpha=0.2, threshold=value, flag_equal=flag_equal)
        ours = run(loss_fn, **options)
        assert_same(ours, pair_grad_ref_fp32(loss_fn, options), rtol=1e-5)
    assert bool(loss_fn.flagged(ours.ext_margins)[1]) == flag_equal


def pair_grad_ref_fp32(loss_fn: object, options: dict[str, Tensor]) -> PairGrad:
    cu_seqlens = torch.tensor(OFFSETS, device=DEVICE)
    return pair_grad_ref(tokens(0), tokens(0) < 0, cu_seqlens, loss_fn, scale=0.25, **options)


def test_flags_of_suspect_pairs_change_the_slopes() -> None:
    options = {"ref_logp": tokens(1), "extrapolated_logp": tokens(2)}
    every, none = (run(spa(0.1, 0.4, t), **options) for t in (math.inf, -math.inf))
    assert_same(every, run(dpo(0.1, 0.4), **options), rtol=0)
    assert_same(none, run(dpo(0.1), **options), rtol=0)


def test_scale_may_stay_on_the_device() -> None:
    number, tensor = (run(dpo(0.1), scale=s) for s in (0.125, torch.tensor(0.125, device=DEVICE)))
    assert number.slopes.equal(tensor.slopes)


def test_options_may_be_integers() -> None:
    assert_same(run(dpo(1, 1), scale=1), run(dpo(1.0, 1.0), scale=1.0), rtol=0)
    options = {"scale": 2, "extrapolated_logp": tokens(2)}
    assert_same(run(spa(1, 1, 0), **options), run(spa(1.0, 1.0, 0.0), **options), rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 1.0])
def test_margins_beyond_every_exponential(smoothing: float) -> None:
    """The coefficient keeps its digits where sigmoid(x) - 1 has none left."""
    margins = torch.tensor([-200.0, -85.0, -30.0, -1e-4, 0.0, 1e-4, 12.0, 30.0, 85.0, 200.0])
    logp = torch.stack([margins, torch.zeros_like(margins)], 1).flatten().to(DEVICE)
    options = {"logp": logp, "offsets": list(range(len(logp) + 1)), "scale": 1.0}
    loss_fn = dpo(1.0, label_smoothing=smoothing)
    ours, truth = run(loss_fn, **options), run(loss_fn, wide=True, **options)
    seen = truth.slopes.abs() > 1e-37  # below, fp32 has no normal numbers
    assert not ours.slopes.isnan().any() and not ours.losses.isnan().any()
    torch.testing.assert_close(ours.losses.double(), truth.losses, rtol=1e-6, atol=1e-38)
    torch.testing.assert_close(
        ours.slopes.double()[seen], truth.slopes[seen], rtol=1e-6, atol=1e-7 * (smoothing == 0.5)
    )


def test_an_impossible_response() -> None:
    """A log-probability of -inf: the loss is finite on one side and infinite on the other."""
    logp = torch.tensor([-1.0, -math.inf, -math.inf, -1.0, -math.inf, -math.inf], device=DEVICE)
    ours = run(dpo(0.1), logp=logp, offsets=list(range(7)), scale=1.0)
    assert ours.losses[0] == 0 and ours.losses[1] == math.inf and ours.losses[2].isnan()
    slopes = torch.tensor([0.0, 0.0, -0.1, 0.1], device=DEVICE)
    torch.testing.assert_close(ours.slopes[:4], slopes, rtol=1e-6, atol=0)


def test_equal_models_have_margins_of_exactly_zero() -> None:
    ours = run(spa(0.1, 0.1, -1.0), ref_logp=tokens(0), extrapolated_logp=tokens(0))
    assert ours.margins.eq(0).all() and ours.ext_margins.eq(0).all()
    torch.testing.assert_close(
        ours.losses, torch.full_like(ours.losses, math.log(2)), rtol=1.2e-7, atol=0
    )
    assert ours.slopes[0::2].eq(-ours.slopes[1::2]).all()


def test_nan_stays_in_its_pair() -> None:
    logp = tokens(0)
    logp[12] = torch.nan  # pair 1
    ours = run(dpo(0.1), logp=logp)
    assert ours.losses.isnan().tolist() == [False, True, False, False]
    assert ours.slopes.isnan().tolist() == [False] * 2 + [True] * 2 + [False] * 4


def test_sums_keep_what_fp32_would_lose() -> None:
    logp = torch.full((66,), -1.0)
    logp[0], logp[1] = -(2.0**25), 2.0**25
    ours = run(dpo(0.1), logp=logp.to(DEVICE), offsets=[0, 66, 66])
    assert ours.logp.tolist() == [-64.0, 0.0]


def test_no_pairs() -> None:
    ours = run(dpo(0.1), logp=torch.empty(0, device=DEVICE), offsets=[0])
    assert ours.losses.shape == (0,) and ours.slopes.shape == ours.logp.shape == (0,)


def test_it_says_what_it_does_not_know() -> None:
    logp, weights = tokens(0), torch.ones(PAIRS, device=DEVICE)

    class own(dpo):
        pass

    assert takes(logp, dpo(0.1), None) and takes(logp, spa(0.1, 0.1, weights[0]), {})
    assert not takes(logp, ipo(0.1), None) and not takes(logp, own(0.1), None)
    assert not takes(logp.double(), dpo(0.1), None)
    assert not takes(logp, spa(0.1, 0.1, 0.0), {"label_smoothing": weights})
    assert not takes(logp, dpo(0.1), {"label_smoothing": weights.double()})
    assert not takes(logp, dpo(0.1), {"weight": weights})
    with pytest.raises(ValueError, match="ipo"):
        run(ipo(0.1))
