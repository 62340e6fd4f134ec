import math
import random
from itertools import permutations

import pytest

from srlm_fast.evaluate.correlation import (
    average_ranks,
    kendall_tau,
    mean,
    pearson,
    spearman,
    standard_error,
)


def test_mean_and_standard_error():
    assert mean([]) is None
    assert mean([1.0, 2.0, 6.0]) == 3.0
    assert standard_error([4.0]) is None
    # Variance of 2, 4, 4, 4, 5, 5, 7, 9 is 32 / 7.
    assert standard_error([2, 4, 4, 4, 5, 5, 7, 9]) == pytest.approx(math.sqrt(32 / 7 / 8))


def test_average_ranks_share_the_ranks_of_ties():
    assert average_ranks([10.0, 20.0, 10.0, 5.0]) == [2.5, 4.0, 2.5, 1.0]
    assert average_ranks([7.0, 7.0, 7.0]) == [2.0, 2.0, 2.0]
    assert average_ranks([]) == []


def test_spearman_without_ties_is_the_textbook_formula():
    for y in permutations(range(4)):
        distance = sum((a - b) ** 2 for a, b in enumerate(y))
        assert spearman(range(4), y) == pytest.approx(1 - 6 * distance / (4 * 15))


def test_known_values_with_ties():
    # Of ten pairs two agree, six disagree, one ties in x and one in both.
    x, y = [12, 2, 1, 12, 2], [1, 4, 7, 1, 0]
    assert kendall_tau(x, y) == pytest.approx((2 - 6) / math.sqrt(8 * 9))
    # Average ranks 4.5 2.5 1 4.5 2.5 and 2.5 4 5 2.5 1.
    assert spearman(x, y) == pytest.approx(-5 / math.sqrt(9 * 9.5))


def test_kendall_is_one_minus_twice_the_share_of_inversions():
    rng = random.Random(0)
    for _ in range(20):
        y = rng.sample(range(30), 8)
        inversions = sum(y[i] > y[j] for i in range(8) for j in range(i + 1, 8))
        assert kendall_tau(range(8), y) == pytest.approx(1 - 2 * inversions / 28)


def test_tied_values_shrink_the_denominator_of_tau_b():
    # One tie in x of three pairs: the other two agree with y.
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))


@pytest.mark.parametrize("correlation", [pearson, spearman, kendall_tau])
def test_correlation_is_undefined_when_a_side_is_constant(correlation):
    assert correlation([1, 1, 1], [1, 2, 3]) is None
    assert correlation([1, 2, 3], [1, 1, 1]) is None
    assert correlation([], []) is None
    assert correlation([1], [2]) is None


@pytest.mark.parametrize("correlation", [pearson, spearman, kendall_tau])
def test_correlation_is_symmetric_and_odd(correlation):
    rng = random.Random(1)
    x = [rng.randint(0, 5) for _ in range(30)]
    y = [rng.randint(0, 5) for _ in range(30)]
    assert correlation(x, y) == pytest.approx(correlation(y, x))
    assert correlation(x, [-v for v in y]) == pytest.approx(-correlation(x, y))
    assert correlation(x, x) == pytest.approx(1.0)
