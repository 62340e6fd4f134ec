"""The losses against formulas written with math, one pair at a time."""

import dataclasses
import math

import pytest
import torch

from srlm_kernels import PairLogps, losses

BETA = 0.3


def ls(x: float) -> float:
    """ln sigmoid(x)"""
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(ls(x))


def sigmoids(x: float) -> tuple[float, float]:
    return sigmoid(x), sigmoid(-x)


def smoothed(x: float, e: float) -> float:
    return -(1 - e) * ls(x) - e * ls(-x)


# (c, r, rc, rr, nc, nr): chosen and rejected sums, the reference's, and the token counts.
FORMULAS = {
    losses.dpo(BETA): lambda c, r, rc, rr, nc, nr: -ls(BETA * (c - rc - r + rr)),
    losses.dpo(BETA, 0.2): lambda c, r, rc, rr, nc, nr: smoothed(BETA * (c - rc - r + rr), 0.2),
    losses.robust(BETA, 0.1): lambda c, r, rc, rr, nc, nr: (
        (0.9 * -ls(BETA * (c - rc - r + rr)) - 0.1 * -ls(-BETA * (c - rc - r + rr))) / 0.8
    ),
    losses.hinge(BETA): lambda c, r, rc, rr, nc, nr: max(0.0, 1 - BETA * (c - rc - r + rr)),
    losses.ipo(BETA): lambda c, r, rc, rr, nc, nr: (
        ((c - rc) / nc - (r - rr) / nr - 1 / (2 * BETA)) ** 2
    ),
    losses.sigmoid_norm(BETA): lambda c, r, rc, rr, nc, nr: (
        -ls(BETA * ((c - rc) / nc - (r - rr) / nr))
    ),
    losses.simpo(BETA, 0.7): lambda c, r, rc, rr, nc, nr: -ls(BETA * (c / nc - r / nr) - 0.7),
    losses.sppo_hard(BETA): lambda c, r, rc, rr, nc, nr: (
        (c - rc - 1 / (2 * BETA)) ** 2 + (r - rr + 1 / (2 * BETA)) ** 2
    ),
    losses.nca_pair(BETA): lambda c, r, rc, rr, nc, nr: (
        -ls(BETA * (c - rc)) - 0.5 * ls(-BETA * (c - rc)) - 0.5 * ls(-BETA * (r - rr))
    ),
    losses.apo_zero(BETA): lambda c, r, rc, rr, nc, nr: (
        1 - sigmoid(BETA * (c - rc)) + sigmoid(BETA * (r - rr))
    ),
    losses.apo_down(BETA): lambda c, r, rc, rr, nc, nr: (
        sigmoid(BETA * (c - rc)) + 1 - sigmoid(BETA * (c - rc - r + rr))
    ),
    losses.bco_pair(BETA): lambda c, r, rc, rr, nc, nr: -ls(BETA * (c - rc)) - ls(-BETA * (r - rr)),
    losses.exo_pair(BETA, 0.1): lambda c, r, rc, rr, nc, nr: sum(
        p * math.log(p / q)
        for p, q in zip(sigmoids(BETA * (c - rc - r + rr)), (0.9, 0.1), strict=True)
    ),
    losses.discopop(BETA, 0.5): lambda c, r, rc, rr, nc, nr: (
        (1 - sigmoid(BETA * (c - rc - r + rr) / 0.5)) * -ls(BETA * (c - rc - r + rr))
        + sigmoid(BETA * (c - rc - r + rr) / 0.5) * math.exp(-BETA * (c - rc - r + rr))
    ),
    losses.r_dpo(BETA, 0.03): lambda c, r, rc, rr, nc, nr: (
        -ls(BETA * (c - rc - r + rr) + 0.03 * (nc - nr))
    ),
    losses.with_nll(losses.dpo(BETA), 0.5): lambda c, r, rc, rr, nc, nr: (
        -ls(BETA * (c - rc - r + rr)) - 0.5 * c / nc
    ),
}
ALL = [
    *FORMULAS,
    *[make(beta=BETA) for make in losses.LOSSES.values()],
    losses.spa(BETA, 0.1, 0.2),
    losses.aot(BETA, 0.2),
    losses.aot_unpaired(BETA, 0.2),
    *[
        losses.with_nll(loss, 0.5)
        for loss in (losses.spa(BETA, 0.1, 0.2), losses.ipo(BETA), losses.aot(BETA))
    ],
]


@pytest.fixture
def s() -> PairLogps:
    g = torch.Generator().manual_seed(3)
    size, wide = (9,), {"generator": g, "dtype": torch.float64}
    sums = [-20 - 8 * torch.randn(*size, **wide) for _ in range(6)]
    lens = [torch.randint(1, 9, size, generator=g).double() for _ in range(2)]
    return PairLogps(*sums, *lens)


@pytest.fixture
def trainable(s: PairLogps) -> PairLogps:
    ends = {n: getattr(s, n).clone().requires_grad_() for n in ("chosen", "rejected")}
    return dataclasses.replace(s, **ends)


@pytest.mark.parametrize("loss", FORMULAS, ids=str)
def test_loss_equals_its_formula(loss, s):
    fields = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_len", "rejected_len")
    pairs = zip(*(getattr(s, field).tolist() for field in fields), strict=True)
    truth = torch.tensor([FORMULAS[loss](*pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(loss(s), truth, atol=1e-12, rtol=1e-12)


def test_spa_equals_the_authors_formula(s):
    alpha, threshold = 0.1, -0.4
    ext = [(s.ext_chosen - s.ref_chosen).tolist(), (s.ext_rejected - s.ref_rejected).tolist()]
    margin = ((s.chosen - s.ref_chosen) - (s.rejected - s.ref_rejected)).tolist()
    truth, clean = [], 0
    for m, ext_c, ext_r in zip(margin, *ext, strict=True):
        s_clean = float(BETA * (ext_c - ext_r) > threshold)
        clean += s_clean
        weight = 1 - alpha + alpha * s_clean
        truth.append(-weight * ls(BETA * m) - (1 - weight) * ls(-BETA * m))
    assert 0 < clean < len(truth)
    ours = losses.spa(BETA, alpha, torch.tensor(threshold))(s)
    torch.testing.assert_close(ours, torch.tensor(truth, dtype=torch.float64))


def test_spa_flags_strictly_below_unless_told_to_follow_the_authors():
    margin = torch.tensor([-1.0, 0.0, 1.0])
    assert losses.spa(0.1, 0.1, 0.0).flagged(margin).tolist() == [True, False, False]
    official = losses.spa(0.1, 0.1, 0.0, flag_equal=True)
    assert official.flagged(margin).tolist() == [True, True, False]
    # The threshold is beta-scaled: 0.1 * 1.0 lies below 0.5.
    assert losses.spa(0.1, 0.1, torch.tensor(0.5)).flagged(margin).all()


def test_spa_flag_carries_no_gradient(s):
    ext = s.ext_chosen.clone().requires_grad_()
    assert not losses.spa(BETA, 0.1, 0.0)(dataclasses.replace(s, ext_chosen=ext)).requires_grad


def test_spa_without_alpha_is_dpo_bit_for_bit(trainable):
    results = []
    for loss in (losses.spa(BETA, 0.0, 1e9), losses.dpo(BETA)):
        values = loss(trainable)
        results.append((*torch.autograd.grad(values.sum(), trainable.chosen), values.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_label_smoothing_of_each_pair(s):
    e = torch.linspace(0, 1, len(s.chosen), dtype=torch.float64)
    margin = ((s.chosen - s.ref_chosen) - (s.rejected - s.ref_rejected)).tolist()
    truth = [smoothed(BETA * m, x) for m, x in zip(margin, e.tolist(), strict=True)]
    # The pair's own value replaces the loss's.
    ours = losses.dpo(BETA, 0.4)(s, label_smoothing=e)
    torch.testing.assert_close(ours, torch.tensor(truth, dtype=torch.float64))


def test_swapping_the_pair_swaps_the_label_weight(s):
    swapped = PairLogps(
        s.rejected,
        s.chosen,
        s.ref_rejected,
        s.ref_chosen,
        s.ext_rejected,
        s.ext_chosen,
        s.rejected_len,
        s.chosen_len,
    )
    for w in (0.0, 0.25, 0.5, 1.0):
        e = torch.full_like(s.chosen, 1 - w)
        straight = losses.dpo(BETA)(s, label_smoothing=e)
        assert torch.equal(straight, losses.dpo(BETA)(swapped, label_smoothing=1 - e))


def slopes_of(loss, s: PairLogps) -> tuple[torch.Tensor, torch.Tensor]:
    """d(sum of losses)/d(chosen, rejected)."""
    chosen, rejected = (x.clone().requires_grad_() for x in (s.chosen, s.rejected))
    total = loss(dataclasses.replace(s, chosen=chosen, rejected=rejected)).sum()
    return torch.autograd.grad(total, (chosen, rejected), allow_unused=True, materialize_grads=True)


def taken(s: PairLogps, index: torch.Tensor) -> PairLogps:
    """The pairs of that index, in that order."""
    return PairLogps(*(values[index] for values in vars(s).values()))


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_antisymmetric_means_opposite_slopes(loss, s):
    chosen, rejected = slopes_of(loss, s)
    assert chosen.any()
    assert torch.allclose(chosen, -rejected, rtol=1e-12, atol=0) is loss.antisymmetric


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_coupled_means_that_a_pair_alone_has_other_slopes(loss, s):
    together = torch.stack(slopes_of(loss, s))
    one_by_one = [slopes_of(loss, taken(s, torch.tensor([p]))) for p in range(len(s.chosen))]
    alone = torch.cat([torch.stack(slopes) for slopes in one_by_one], dim=1)
    assert torch.allclose(together, alone, rtol=1e-12, atol=0) is not loss.coupled


@pytest.mark.parametrize("loss", ALL, ids=str)
def test_losses_and_slopes_move_with_their_pairs(loss, s):
    """Regression: sorted losses stand at the wrong pairs, and chunks come in another order."""
    order = torch.tensor([4, 0, 8, 2, 7, 5, 1, 6, 3])
    moved = taken(s, order)
    assert torch.equal(loss(moved), loss(s)[order])
    for ours, truth in zip(slopes_of(loss, moved), slopes_of(loss, s), strict=True):
        assert torch.equal(ours, truth[order])


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_aot_compares_quantiles(s, e):
    """Sorted policy margins less sorted reference margins; unpaired: sorted r_w less sorted r_l."""
    policy = sorted((s.chosen - s.rejected).tolist())
    reference = sorted((s.ref_chosen - s.ref_rejected).tolist())
    chosen = sorted((s.chosen - s.ref_chosen).tolist())
    rejected = sorted((s.rejected - s.ref_rejected).tolist())
    for loss, left, right, place in (
        (losses.aot(BETA, e), policy, reference, s.chosen - s.rejected),
        (losses.aot_unpaired(BETA, e), chosen, rejected, s.chosen_ratio),
    ):
        truth = [smoothed(BETA * (a - b), e) for a, b in zip(left, right, strict=True)]
        ours = loss(s)[place.argsort()]
        torch.testing.assert_close(ours, torch.tensor(truth, dtype=torch.float64))


def test_aot_of_one_pair_is_dpo(s):
    one = taken(s, torch.tensor([3]))
    for make in (losses.aot, losses.aot_unpaired):
        torch.testing.assert_close(make(BETA, 0.1)(one), losses.dpo(BETA, 0.1)(one))


@pytest.mark.parametrize("margin", [-1e4, -300.0, -90.0, 90.0, 300.0, 1e4])
@pytest.mark.parametrize("loss", [losses.exo_pair(1.0), losses.discopop(1.0)], ids=str)
def test_products_of_exponentials_stay_finite_far_out(loss, margin):
    """Regression: discopop's sigmoid(x / tau) * exp(-x) is 0 * inf in fp32 from x = -89 on."""
    zero = torch.zeros(1)
    chosen = torch.tensor([margin], requires_grad=True)
    values = loss(PairLogps(chosen, *[zero] * 5, zero + 1, zero + 1))
    (slope,) = torch.autograd.grad(values.sum(), chosen)
    limits = {
        losses.exo_pair: (-math.log(1e-3), -math.log(1 - 1e-3)),
        losses.discopop: (-margin, 0.0),
    }
    below, above = limits[type(loss)]
    truth = below if margin < 0 else above
    torch.testing.assert_close(values, torch.tensor([truth]), rtol=1e-6, atol=1e-6)
    flat = type(loss) is losses.exo_pair or margin > 0
    torch.testing.assert_close(slope, torch.tensor([0.0 if flat else -1.0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("e", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("x", [-1e4, -200.0, -90.0, 90.0, 200.0, 1e4])
def test_sigmoid_losses_are_stable_and_do_not_cancel_far_out(x, e):
    """fp32: the value is |x| or about 0; the slope is -(1-e) sigmoid(-x) + e sigmoid(x)."""
    zero = torch.zeros(1)
    chosen = torch.tensor([x], requires_grad=True)
    s = PairLogps(chosen, *[zero] * 5, zero + 1, zero + 1)
    loss = losses.dpo(1.0)(s, label_smoothing=torch.tensor([e]))
    loss.sum().backward()
    assert loss.item() == pytest.approx((1 - e) * max(-x, 0.0) + e * max(x, 0.0), rel=1e-6)
    slope = -(1 - e) * sigmoid(-x) + e * sigmoid(x)
    # Below fp32's smallest normal number, about 1e-38, zero is right too.
    assert chosen.grad.item() == pytest.approx(slope, rel=1e-5, abs=2e-38)


@pytest.mark.parametrize("per_pair", [False, True])
@pytest.mark.parametrize(("label_smoothing", "which"), [(0.0, "rejected"), (1.0, "chosen")])
def test_an_infinite_loss_of_weight_zero_is_no_loss(label_smoothing, which, per_pair):
    """Regression: 0 * inf, where the response that should be unlikely is impossible."""
    zero, impossible = torch.zeros(1), torch.tensor([-math.inf])
    sums = {name: zero.clone().requires_grad_() for name in ("chosen", "rejected")}
    sums[which] = impossible.clone().requires_grad_()
    s = PairLogps(*sums.values(), *[zero] * 4, zero + 1, zero + 1)
    if per_pair:
        values = losses.dpo(BETA)(s, label_smoothing=torch.tensor([label_smoothing]))
    else:
        values = losses.dpo(BETA, label_smoothing)(s)
    assert values.tolist() == [0.0]
    assert not any(x.any() for x in torch.autograd.grad(values.sum(), list(sums.values())))
    if which == "rejected":
        assert losses.spa(BETA, 0.0, math.inf)(s).tolist() == [0.0]
        assert losses.spa(BETA, 0.3, -1.0)(s).tolist() == [0.0]


def test_empty_responses_do_not_divide_by_zero(trainable):
    none = torch.zeros_like(trainable.chosen)
    empty = dataclasses.replace(
        trainable, chosen=none.clone().requires_grad_(), ref_chosen=none, chosen_len=none
    )
    for loss in ALL:
        values = loss(empty)
        assert values.isfinite().all()
        assert torch.autograd.grad(values.sum(), empty.chosen)[0].isfinite().all()


def test_names_are_trls_and_take_beta():
    names = "sigmoid ipo hinge robust exo_pair nca_pair bco_pair sppo_hard aot aot_unpaired"
    names += " apo_zero apo_down discopop sigmoid_norm simpo r_dpo"
    assert set(losses.LOSSES) == set(names.split())
    assert losses.LOSSES["sigmoid"](beta=0.2) == losses.dpo(0.2)
    assert all(make(beta=0.2).beta == 0.2 for make in losses.LOSSES.values())


def test_losses_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        losses.dpo(0.1).beta = 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.dpo(0.0), "beta must be positive"),
        (lambda: losses.hinge(float("nan")), "beta must be positive"),
        (lambda: losses.dpo(0.1, 1.5), r"label_smoothing must lie in \[0, 1\]"),
        (lambda: losses.aot(0.1, -0.1), r"label_smoothing must lie in \[0, 1\]"),
        (lambda: losses.exo_pair(0.1, 0.0), r"label_smoothing must lie in \(0, 1\)"),
        (lambda: losses.discopop(0.1, 0.0), "tau must be positive"),
        (lambda: losses.robust(0.1, 0.5), r"label_smoothing must lie in \[0, 0.5\)"),
        (lambda: losses.spa(0.1, -0.1, 0.0), r"alpha must lie in \[0, 1\]"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
