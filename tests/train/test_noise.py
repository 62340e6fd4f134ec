import pytest
import torch

from srlm_fast.errors import UserError
from srlm_fast.train.noise import NoiseDetector, Refinement, quantile

BETA = 0.1


def _no_scoring():
    raise AssertionError("only dataset mode scores")


def _detector(steps, num_pairs, **settings):
    like = torch.zeros((), dtype=torch.float64)
    refine = Refinement(warmup_fraction=0.0, **settings)
    return NoiseDetector(refine, beta=BETA, num_pairs=num_pairs, steps=steps, like=like)


def _margins(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator, dtype=torch.float64) * 20


@pytest.mark.parametrize(
    ("count", "k", "below"), [(64, 10, 6), (10, 30, 3), (7, 0, 0), (5, 100, 4)]
)
def test_quantile_has_exactly_that_share_strictly_below(count, k, below):
    margins = _margins(count)
    assert int((margins < quantile(margins, k)).sum()) == below


@pytest.mark.parametrize("micro", [8, 3])
def test_window_is_the_quantile_of_the_last_pairs_before_the_step(micro):
    margins, window = _margins(160), 20
    detector = _detector(20, 160, tau="window", window=window)
    for step in range(20):
        detector.begin_step(step, _no_scoring)
        seen = margins[: step * 8].tolist()
        tau = sorted(BETA * m for m in seen[-window:])[2] if len(seen) >= window else 0.0
        batch = margins[step * 8 : step * 8 + 8]
        for start in range(0, 8, micro):
            part = batch[start : start + micro]
            assert detector.tau.item() == pytest.approx(tau, abs=1e-14)
            flagged = detector.loss().flagged(part)
            assert flagged.tolist() == [BETA * m < tau for m in part.tolist()]
            detector.observe(range(len(part)), part)
    assert detector.tau.item() != 0.0


def test_default_window_is_a_quarter_of_the_pairs_and_at_most_512():
    sizes = [_detector(9, n).window for n in (2, 40, 4000)]
    assert sizes == [1, 10, 512]
    assert _detector(9, 4000, window=64).window == 64
    assert _detector(9, 40, window=64).window == 20, "a window that never fills has no tau"


def test_dataset_scores_when_alpha_switches_on_and_every_interval():
    rounds = [_margins(30, seed) for seed in range(9)]
    scored = []
    like = torch.zeros((), dtype=torch.float64)

    def taus(interval):
        scored.clear()
        refine = Refinement(tau="dataset", interval=interval, warmup_fraction=0.2)
        detector = NoiseDetector(refine, beta=BETA, num_pairs=30, steps=10, like=like)
        for step in range(10):
            detector.begin_step(
                step, lambda step=step: scored.append(step) or rounds[len(scored) - 1]
            )
            assert detector.alpha == (0.0 if step < 2 else 0.1)
            detector.observe(range(3), _margins(3, 99))
            yield detector.tau.item()

    expected = [sorted((BETA * m).tolist())[3] for m in rounds]
    assert list(taus(0)) == [0.0] * 2 + [expected[0]] * 8
    assert scored == [2]
    assert list(taus(3)) == [0.0] * 2 + [expected[i] for i in (0, 0, 0, 1, 1, 1, 2, 2)]
    assert scored == [2, 5, 8]


def test_official_is_the_mean_of_two_order_statistics_of_fifty_micro_batch_means():
    """The authors' rule: int(50 * K) = 5, so sorted[5] and sorted[6], over micro-batch means."""
    margins = _margins(240).view(60, 4)
    detector = _detector(60, 240, tau="official")
    means = [BETA * sum(row) / 4 for row in margins.tolist()]
    for step, batch in enumerate(margins):
        ordered = sorted(means[max(0, step - 50) : step])
        gap = (ordered[5] + ordered[6]) / 2 if step >= 50 else 0.0
        assert detector.tau.item() == pytest.approx(gap, abs=1e-14)
        detector.begin_step(step, _no_scoring)
        detector.observe(range(4), batch)
        detector.observe((), batch[:0])  # a forward of nothing has no mean


def test_official_flags_a_margin_that_equals_tau_and_the_paper_rule_does_not():
    zero = torch.zeros(3, dtype=torch.float64)
    assert _detector(9, 40, tau="official").loss().flagged(zero).all()
    assert not _detector(9, 40, tau="window").loss().flagged(zero).any()


def test_flags_are_those_of_the_last_time_and_none_while_alpha_is_off():
    like = torch.zeros((), dtype=torch.float64)
    detector = NoiseDetector(
        Refinement(warmup_fraction=0.25), beta=BETA, num_pairs=40, steps=4, like=like
    )
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    for step, (indices, margins) in enumerate(
        [((0, 1), signs), ((2, 4), signs), ((1, 5), signs), ((2, 6), -signs)]
    ):
        detector.begin_step(step, _no_scoring)
        detector.observe(indices, margins)
    assert detector.flags(8) == [None, True, False, None, False, False, True, None]


def test_metrics_are_sums_over_the_pairs():
    detector = _detector(9, 40)
    detector.tau = detector.tau + 0.5
    margins = torch.tensor([4.0, 6.0, -10.0], dtype=torch.float64)
    assert detector.observe(range(3), margins)["spa/flagged_share"] == 0, "alpha is still 0"
    detector.alpha = 0.1
    sums = {name: value.item() for name, value in detector.observe(range(3), margins).items()}
    assert sums == pytest.approx(
        {"spa/tau": 1.5, "spa/flagged_share": 2.0, "spa/extrapolated_margin": 0.0}
    )


@pytest.mark.parametrize("bad", [{"alpha": 1.5}, {"k_percent": 101}, {"lam": -0.1}])
def test_impossible_settings_are_user_errors(bad):
    with pytest.raises(UserError, match=r"spa\."):
        Refinement(**bad)
