import dataclasses

import pytest

from srlm_fast.config import PairsConfig
from srlm_fast.data.records import Judgement, Vote
from srlm_fast.errors import UserError
from srlm_fast.judge.pairs import drop_unusable, select_pairs, select_positives


def judgements(*scores):
    return [Judgement(score, (), None if score is not None else "no score") for score in scores]


@pytest.fixture
def group(make_sample):
    return [make_sample(text, index) for index, text in enumerate(["one", "two", "three", "four"])]


def test_drop_unusable_counts_by_reason(make_sample):
    samples = [
        make_sample("cut off", 0, finish_reason="length"),
        make_sample(" \n", 1),
        make_sample("same", 2),
        make_sample("same", 3),
        make_sample("other", 4),
    ]
    kept, dropped = drop_unusable([samples, [], samples[2:3]])
    assert [[s.index for s in g] for g in kept] == [[2, 4], [], [2]]
    assert dropped == {"truncated": 1, "empty": 1, "duplicate": 1}


def test_keep_truncated(make_sample):
    samples = [make_sample(str(i % 2), i, finish_reason="length") for i in range(3)]
    kept, dropped = drop_unusable([samples], keep_truncated=True)
    assert [s.index for s in kept[0]] == [0, 1]
    assert dropped == {"duplicate": 1}


def test_best_against_worst_with_the_ids_as_sampled(group):
    [pair], dropped = select_pairs([group], [judgements(3, 1, 4, 2)], round=2)
    assert (pair.chosen, pair.chosen_ids, pair.chosen_score) == ("three", group[2].response_ids, 4)
    assert (pair.rejected, pair.rejected_ids, pair.rejected_score) == (
        "two",
        group[1].response_ids,
        1,
    )
    assert (pair.prompt, pair.prompt_ids, pair.round) == (group[0].prompt, (1, 2), 2)
    assert not dropped


def test_first_sampled_wins_among_equals(group):
    [pair], _ = select_pairs([group], [judgements(2, 4, 4, 2)], round=1)
    assert (pair.chosen, pair.rejected) == ("two", "one")


def test_tie_is_dropped(group):
    assert select_pairs([group], [judgements(3, 3, 3, None)], round=1) == ([], {"tie": 1})


def test_unparsable_never_becomes_rejected(group):
    """Regression: elsewhere an unparsable judgement scores -1 and is the rejected response."""
    [pair], _ = select_pairs([group], [judgements(3, None, 4, None)], round=1)
    assert (pair.chosen, pair.rejected) == ("three", "one")
    pairs, dropped = select_pairs([group], [judgements(None, None, 4, None)], round=1)
    assert (pairs, dropped) == ([], {"fewer than two judged": 1})


def test_means_that_differ_by_a_third_are_no_tie(group):
    """Regression: elsewhere the mean is floored, which makes ties of these."""
    means = [Judgement(sum(v) / 3, tuple(Vote("", s) for s in v)) for v in [(3, 4, 4), (3, 3, 4)]]
    [pair], _ = select_pairs([group[:2]], [means], round=1)
    assert pair.chosen == "one"


def test_every_prompt_is_a_pair_or_counted(group):
    verdicts = [judgements(1, 2, 3, 4), judgements(1, 1, 1, 1), judgements(1, None, None, None)]
    pairs, dropped = select_pairs([group] * 3 + [[]], [*verdicts, []], round=1)
    assert len(pairs) + dropped.total() == 4


def test_scores_that_are_not_finite_are_in_no_pair(group):
    verdicts = judgements(float("nan"), 3, float("-inf"), 2)
    for config in (PairsConfig(), PairsConfig(length_control=0.2), PairsConfig(selection="all")):
        [pair], _ = select_pairs([group], [verdicts], 1, config)
        assert (pair.chosen, pair.rejected) == ("two", "four")


def test_negative_rewards(group):
    [pair], _ = select_pairs([group[:2]], [judgements(-7.5, -7.25)], round=1)
    assert (pair.chosen, pair.rejected) == ("two", "one")


def texts(pairs):
    return [(pair.chosen, pair.rejected) for pair in pairs]


def test_all_pairs_are_those_whose_scores_differ(group):
    pairs, dropped = select_pairs(
        [group, group], [judgements(2, 1, 2, None), judgements(1, 1, 1, 1)], 1,
        PairsConfig(selection="all"),
    )  # fmt: skip
    assert texts(pairs) == [("one", "two"), ("three", "two")]
    assert dropped == {"tie": 1}


def test_the_best_against_any_other_by_seed_and_prompt(group):
    config = PairsConfig(selection="max_chosen")
    found = {
        texts(select_pairs([group], [judgements(1, 4, 2, 4)], 1, config, seed=seed)[0])[0]
        for seed in range(40)
    }
    assert found == {("two", "one"), ("two", "three")}  # never the other best one
    one = [select_pairs([group], [judgements(1, 4, 2, 3)], 1, config, seed=7) for _ in range(2)]
    assert one[0] == one[1]


def of_lengths(make_sample, *lengths):
    return [
        dataclasses.replace(make_sample(str(i), i), response_ids=tuple(range(n)))
        for i, n in enumerate(lengths)
    ]


def test_length_control_takes_short_winners_and_long_losers(make_sample):
    """Meta-Rewarding: within rho of the range, rho = 0.3 of 0..4 being 1.2."""
    group = of_lengths(make_sample, 50, 10, 30, 5, 40)
    verdicts = judgements(4, 3, 2.5, 1, 0)
    plain, _ = select_pairs([group], [verdicts], 1)
    controlled, _ = select_pairs([group], [verdicts], 1, PairsConfig(length_control=0.3))
    assert texts(plain) == [("0", "4")] and texts(controlled) == [("1", "4")]
    assert controlled[0].chosen_score == 3


def test_a_penalty_on_length_changes_the_choice_and_not_the_scores(make_sample):
    group = of_lengths(make_sample, 100, 10)
    config = PairsConfig(length_penalty=0.1)
    [pair], _ = select_pairs([group], [judgements(5.0, 4.0)], 1, config)
    assert (pair.chosen, pair.chosen_score, pair.rejected_score) == ("1", 4.0, 5.0)


def test_the_penalty_that_balances_lengths_is_found(make_sample):
    """Two prompts whose longer answers are better by 1 and by 9: from 1 / 90 on the first turns."""
    groups = [of_lengths(make_sample, 100, 10), of_lengths(make_sample, 100, 10)]
    verdicts = [judgements(5.0, 4.0), judgements(9.0, 0.0)]
    pairs, _ = select_pairs(groups, verdicts, 1, PairsConfig(balance_length=True))
    assert texts(pairs) == [("1", "0"), ("0", "1")]


def test_anchored_rejection_takes_the_best_of_this_round(group):
    """And the worst of any; the others are the first model's, of round 0."""
    config = PairsConfig(anchored_rejection=True)
    rounds = [dataclasses.replace(s, round=r) for s, r in zip(group, (2, 2, 0, 0), strict=True)]
    for scores, expected in (
        ((3, 2, 5, 1), ("one", "four")),
        ((3, 2, 5, 4), ("one", "two")),
        ((3, 3, 3, 5), None),
        ((None, 2, 5, 1), ("two", "four")),
        ((2, None, 5, 2), None),
    ):
        pairs, dropped = select_pairs([rounds], [judgements(*scores)], 2, config)
        assert texts(pairs) == ([expected] if expected else [])
        assert dropped == ({} if expected else {"tie": 1})
    for scores, reason in (
        ((None, None, 5, 1), "none of this round judged"),
        ((4, None, None, None), "fewer than two judged"),
    ):
        assert select_pairs([rounds], [judgements(*scores)], 2, config) == ([], {reason: 1})


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"length_control": 0.5}, "below 0.5"),
        ({"length_control": 0.1, "selection": "all"}, "min_max"),
        ({"length_penalty": -1.0}, "negative"),
        ({"length_penalty": float("inf")}, "negative"),
        ({"selection": "best"}, "one of"),
        ({"length_penalty": 0.1, "balance_length": True}, "balance_length"),
        ({"anchored_rejection": True, "selection": "all"}, "anchored_rejection needs"),
        ({"anchored_rejection": True, "length_control": 0.1}, "anchored_rejection needs"),
        ({"anchored_rejection": True, "balance_length": True}, "anchored_rejection needs"),
    ],
)
def test_senseless_settings_are_refused(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        PairsConfig(**settings)


def test_positives_are_the_judged_ones_that_score_enough(group):
    verdicts = [
        dataclasses.replace(verdict, sample=row)
        for row, verdict in zip(
            (0, 2, 3, 1, 0), judgements(5, None, 4.9, 5, float("nan")), strict=True
        )
    ]
    kept, dropped = select_positives(group, verdicts, 5.0)
    assert kept == [group[0], group[1]]
    assert dropped == {"no score": 2, "score too low": 1}
