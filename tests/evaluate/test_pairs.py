import random
import statistics

import pytest

from srlm_fast.data.records import Pair, user
from srlm_fast.evaluate.pairs import pair_metrics


def pair(chosen_length, rejected_length, chosen_score=None, rejected_score=None):
    return Pair(
        user("q"), (1,), "a", (2,) * chosen_length, "b", (3,) * rejected_length, chosen_score,
        rejected_score, 1,
    )  # fmt: skip


def test_gap_and_lengths_by_hand():
    pairs = [pair(4, 2, 5.0, 1.0), pair(2, 4, 3.0, 2.0), pair(3, 3), pair(6, 3, 4.0, None)]
    assert pair_metrics(pairs) == {
        "score_gap": 2.5,
        "score_gap_se": 1.5,  # of 4 and 1: sd 3 / sqrt(2), over sqrt(2)
        "chosen_length": 3.75,
        "rejected_length": 3.0,
        "chosen_longer": 2.5 / 4,
    }


def test_the_gap_is_that_of_the_statistics_module():
    rng = random.Random(0)
    scores = [(rng.gauss(2, 1), rng.gauss(0, 1)) for _ in range(50)]
    metrics = pair_metrics([pair(1, 1, *s) for s in scores])
    gaps = [a - b for a, b in scores]
    assert metrics["score_gap"] == pytest.approx(statistics.fmean(gaps), rel=1e-12)
    error = statistics.stdev(gaps) / 50**0.5
    assert metrics["score_gap_se"] == pytest.approx(error, rel=1e-12)


def test_nothing_is_known_of_no_pairs():
    assert set(pair_metrics([]).values()) == {None}
