"""Both ways to keep length out of pairs, against their papers' words on random groups."""

import dataclasses
import random
from fractions import Fraction

import pytest

from srlm_fast.config import PairsConfig
from srlm_fast.data.records import Judgement
from srlm_fast.judge.length import Judged, balancing_penalty, length_controlled
from srlm_fast.judge.pairs import select_pairs


@pytest.fixture
def draw_group(make_sample):
    def draw(rng, n=6):
        """Candidates whose scores and lengths go together, more or less; no two are alike."""
        found = []
        for i, length in enumerate(rng.sample(range(1, 200), n)):
            sample = dataclasses.replace(make_sample(f"{i}", i), response_ids=(7,) * length)
            score = rng.gauss(length / 40, 2)
            found.append(Judged(score, sample, score))
        return found

    return draw


@pytest.mark.parametrize("rho", [0.1, 0.32, 0.4])
def test_length_control_is_meta_rewardings(draw_group, rho):
    """Chosen: the shortest with a score in [(1 - rho) Smax + rho Smin, Smax]; rejected: the longest
    in [Smin, (1 - rho) Smin + rho Smax] (arXiv 2407.19594, section 2.2)."""
    rng, moved = random.Random(f"{rho}"), 0
    share = Fraction(rho)
    for _ in range(50):
        group = draw_group(rng)
        scores = [Fraction(item.score) for item in group]
        high, low = max(scores), min(scores)
        top = [g for g, s in zip(group, scores, strict=True)
               if (1 - share) * high + share * low <= s <= high]  # fmt: skip
        bottom = [g for g, s in zip(group, scores, strict=True)
                  if low <= s <= (1 - share) * low + share * high]  # fmt: skip
        chosen, rejected = length_controlled(group, rho)
        assert chosen is min(top, key=lambda item: item.length)
        assert rejected is max(bottom, key=lambda item: item.length)
        moved += chosen.score != high or rejected.score != low
    assert moved > 5, "it matters"


def test_the_penalty_is_dices(draw_group):
    """The smallest alpha of 0, 0.001, ..., 0.999 for which best and worst by r - alpha len(y)
    differ least in mean length (arXiv 2406.09760, section 3.2); the pairs are those of this alpha.
    """
    rng = random.Random(0)
    for _ in range(5):
        groups = [draw_group(rng) for _ in range(12)]

        def pair(group, alpha):
            values = [item.score - alpha * item.length for item in group]
            return group[values.index(max(values))], group[values.index(min(values))]

        def gap(alpha, groups=groups):
            pairs = [pair(group, alpha) for group in groups]
            return abs(sum(best.length - worst.length for best, worst in pairs))

        alphas = [i / 1000 for i in range(1000)]
        alpha = min(alphas, key=gap)
        assert balancing_penalty(groups) == alpha > 0
        assert gap(alpha) < gap(0)
        found, _ = select_pairs(
            [[item.sample for item in group] for group in groups],
            [[Judgement(item.score) for item in group] for group in groups],
            1, PairsConfig(balance_length=True),
        )  # fmt: skip
        expected = [pair(group, alpha) for group in groups]
        assert [
            (p.chosen_ids, p.chosen_score, p.rejected_ids, p.rejected_score) for p in found
        ] == [(b.sample.response_ids, b.score, w.sample.response_ids, w.score) for b, w in expected]
