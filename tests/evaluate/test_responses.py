import pytest

from srlm_fast.evaluate.responses import (
    length_metrics,
    mean_scores,
    oracle_metrics,
    outcome_rates,
    win_rate,
)


def oracle(prompt, response):
    return {"long": int(len(response) > 3), "polite": int("please" in response)}


def test_oracle_score_is_a_mean_over_prompts_with_its_error(make_sample):
    groups = [[make_sample("yes please"), make_sample("no")], [make_sample("long one")] * 2]
    metrics, per_prompt = oracle_metrics(oracle, groups)
    assert per_prompt == [1.0, 1.0]
    assert metrics == {
        "oracle_score": 1.0,
        "oracle_se": 0.0,
        "criteria": {"long": 0.75, "polite": 0.25},
    }


def test_standard_error_is_over_prompts_and_not_over_samples(make_sample):
    groups = [[make_sample("yes please")] * 50, [make_sample("no")] * 50]
    metrics, _ = oracle_metrics(oracle, groups)
    assert metrics["oracle_score"] == 1.0
    assert metrics["oracle_se"] == pytest.approx(1.0)  # sd sqrt(2) over sqrt(2) prompts


def test_no_responses_have_no_score():
    metrics, per_prompt = oracle_metrics(oracle, [])
    assert (metrics, per_prompt) == ({"oracle_score": None, "oracle_se": None, "criteria": {}}, [])


def test_mean_scores_skip_what_has_no_score():
    assert mean_scores([[1.0, None, 2.0], [None, None]]) == [1.5, None]


def test_lengths_finished_and_distinct_shares(make_sample):
    groups = [
        [make_sample("abcd"), make_sample("abcd")],
        [make_sample("ab"), make_sample("abcdef", finish_reason="length")],
    ]
    assert length_metrics(groups) == {
        "mean_length": 4.0,
        "mean_length_chars": 4.0,
        "finished_share": 0.75,
        "distinct_share": 0.75,
    }


def test_win_rate_counts_prompts_and_leaves_out_unscored_ones():
    scores, others = [3.0, 2.0, 1.0, 5.0, None], [2.0, 2.0, 2.0, 4.0, 1.0]
    assert win_rate(scores, others) == {
        "win": 0.5,
        "tie": 0.25,
        "lose": 0.25,
        "prompts": 4,
        "unscored": 1,
    }


def test_rounding_of_a_mean_is_not_a_win():
    assert win_rate([(0.1 + 0.2) + 0.3], [0.1 + (0.2 + 0.3)])["tie"] == 1.0


def test_win_rate_refuses_to_compare_different_prompts():
    with pytest.raises(ValueError):
        win_rate([1.0], [1.0, 2.0])


def test_outcomes_of_comparisons_become_shares():
    assert outcome_rates([1.0, 0.5, 0.0, 0.0, None]) == {
        "win": 0.25, "tie": 0.25, "lose": 0.5, "prompts": 4, "unscored": 1,
    }  # fmt: skip
    assert outcome_rates([None]) == {
        "win": None, "tie": None, "lose": None, "prompts": 0, "unscored": 1,
    }  # fmt: skip
