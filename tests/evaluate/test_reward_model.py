import random
from itertools import combinations

import pytest

from srlm_fast.evaluate.reward_model import length_bias, reward_model_metrics


def random_groups(seed, missing=0.15):
    """Scores 0 to 5 (or None) and ranks with ties, for 40 prompts of 1 to 5 responses."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, 5) for _ in range(40)]
    scores = [
        [None if rng.random() < missing else float(rng.randint(0, 5)) for _ in range(n)]
        for n in sizes
    ]
    ranks = [[float(rng.randint(0, 3)) for _ in range(n)] for n in sizes]
    return scores, ranks


def brute_force_accuracy(scores, ranks, tie_credit):
    """Pairwise accuracy straight from its definition; `tie_credit` None drops the judge's ties."""
    credits = []
    for row, order in zip(scores, ranks, strict=True):
        for i, j in combinations(range(len(row)), 2):
            if order[i] == order[j]:
                continue
            if row[i] is None or row[j] is None:
                credits += [] if tie_credit is None else [0.0]
            elif row[i] == row[j]:
                credits += [] if tie_credit is None else [tie_credit]
            else:
                credits.append(float((row[i] > row[j]) == (order[i] < order[j])))
    return sum(credits) / len(credits)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("policy", "credit"), [("wrong", 0.0), ("half", 0.5), ("right", 1.0), ("drop", None)]
)
def test_pairwise_accuracy_is_brute_force_over_all_pairs(seed, policy, credit):
    scores, ranks = random_groups(seed)
    metrics = reward_model_metrics(scores, ranks)
    expected = brute_force_accuracy(scores, ranks, credit)
    assert metrics["pairwise_accuracy"][policy] == pytest.approx(expected)


def test_tie_policies_of_one_right_one_tied_one_wrong_pair():
    # Ranks 0, 1, 2; the judge sees 0 above 1, ties 0 with 2, and puts 2 above 1.
    metrics = reward_model_metrics([[3.0, 1.0, 3.0]], [[0, 1, 2]])
    assert metrics["pairwise_accuracy"] == {
        "wrong": pytest.approx(1 / 3),
        "half": pytest.approx(1 / 2),
        "drop": pytest.approx(1 / 2),
        "right": pytest.approx(2 / 3),
    }
    assert (metrics["pairs"], metrics["tied_pairs"]) == (3, 1)


def test_per_prompt_accuracy_weighs_prompts_and_pooled_weighs_pairs():
    scores = [[5.0, 4.0, 3.0], [1.0, 2.0]]  # three right pairs, then one wrong
    metrics = reward_model_metrics(scores, [[0, 1, 2], [0, 1]])
    assert metrics["pairwise_accuracy"]["wrong"] == 0.75
    assert metrics["pairwise_accuracy_per_prompt"]["wrong"] == 0.5


def test_a_judge_that_repeats_the_human_order_is_perfect():
    ranks = [[0, 1, 2], [2, 0, 1], [1, 1, 0]]
    metrics = reward_model_metrics([[-float(r) for r in row] for row in ranks], ranks)
    for key in ("exact_match", "spearman", "kendall_tau", "spearman_pooled", "kendall_tau_pooled"):
        assert metrics[key] == pytest.approx(1.0), key
    assert set(metrics["pairwise_accuracy"].values()) == {1.0}


def test_exact_match_wants_every_pair_and_every_tie_as_the_human_has_it():
    ranks = [[0, 1, 1]] * 4
    scores = [[5.0, 2.0, 2.0], [5.0, 3.0, 2.0], [2.0, 2.0, 2.0], [1.0, 2.0, 2.0]]
    assert reward_model_metrics(scores, ranks)["exact_match"] == 0.25


def test_exact_match_is_missed_where_a_response_is_unscored():
    metrics = reward_model_metrics([[5.0, None, 1.0], [2.0, 1.0]], [[0, 1, 2], [0, 1]])
    assert metrics["exact_match"] == 0.5


def test_five_best_counts_perfect_scores_on_the_top_response():
    scores = [[5.0, 5.0, 1.0], [4.9, 5.0], [3.0, 2.0]]
    metrics = reward_model_metrics(scores, [[0, 1, 2], [0, 1], [0, 1]])
    assert metrics["fives"] == 3
    assert metrics["five_best"] == pytest.approx(1 / 3)
    assert metrics["five_best_per_prompt"] == pytest.approx((0.5 + 0.0) / 2)


def test_five_best_is_not_earned_because_the_true_best_could_not_be_scored():
    assert reward_model_metrics([[None, 5.0]], [[0, 1]])["five_best"] == 0.0


def test_a_judge_that_says_the_same_of_everything_earns_no_correlation():
    metrics = reward_model_metrics([[4.0, 4.0], [3.0, 2.0]], [[0, 1], [0, 1]])
    assert metrics["constant_prompts"] == 1
    assert metrics["spearman"] == metrics["kendall_tau"] == 0.5


def test_pooled_correlation_sees_offsets_between_prompts_that_per_prompt_does_not():
    scores = [[2.0, 1.0], [5.0, 4.0]]
    metrics = reward_model_metrics(scores, [[0, 1], [0, 1]])
    assert metrics["spearman"] == 1.0
    assert 0.0 < metrics["spearman_pooled"] < 1.0


def test_unscored_responses_are_left_out_and_counted():
    scores, ranks = random_groups(3, missing=0.4)
    metrics = reward_model_metrics(scores, ranks)
    missing = sum(s is None for row in scores for s in row)
    assert metrics["unscored"] == missing > 0
    assert metrics["responses"] == sum(map(len, scores)) - missing


def test_a_judge_that_fails_to_answer_earns_nothing():
    """Half of the responses unscored must not look like a perfect judge of the other half."""
    metrics = reward_model_metrics([[None, None], [3.0, 1.0]], [[0, 1], [0, 1]])
    assert metrics["pairwise_accuracy"] == {"wrong": 0.5, "half": 0.5, "drop": 1.0, "right": 0.5}
    assert metrics["exact_match"] == metrics["spearman"] == metrics["kendall_tau"] == 0.5


def test_a_judge_without_a_perfect_score_has_no_fives():
    """Five tokens of a length judge are no five points."""
    metrics = reward_model_metrics([[5.0, 3.0]], [[0, 1]], perfect=None)
    assert metrics["fives"] == 0 and metrics["five_best"] is None


def test_nothing_to_measure_is_none_and_not_zero():
    metrics = reward_model_metrics([[None, None], [3.0]], [[0, 0], [0]])
    assert metrics["pairs"] == metrics["prompts"] == 0
    for key in ("exact_match", "five_best", "five_best_per_prompt", "spearman", "kendall_tau"):
        assert metrics[key] is None, key
    assert set(metrics["pairwise_accuracy"].values()) == {None}
    assert set(reward_model_metrics([], [])["pairwise_accuracy_per_prompt"].values()) == {None}


def test_length_bias_is_spearmans_rho_of_each_prompt():
    scores = [[1.0, 3.0, 2.0, 4.0], [2.0, 1.0], [5.0, 4.0], [3.0, 3.0], [None, 2.0, 1.0]]
    lengths = [[10, 20, 40, 30], [7, 9], [8, 8], [1, 2], [1, 3, 2]]
    # The textbook formula, of ranks 1 3 2 4 and 1 2 4 3.
    first = 1 - 6 * (0 + 1 + 4 + 1) / (4 * 15)
    assert length_bias(scores, lengths) == pytest.approx((first - 1 + 0 + 1) / 4)
    assert length_bias([[1.0, 2.0]], [[3, 3]]) is None, "no lengths to prefer"


def test_rows_of_different_lengths_are_an_error():
    with pytest.raises(ValueError):
        reward_model_metrics([[1.0, 2.0]], [[0]])
