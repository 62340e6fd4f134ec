import pytest

from srlm_fast.data.records import Judgement, Vote
from srlm_fast.judge.pairs import drop_unusable, select_pairs


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


def test_negative_rewards(group):
    [pair], _ = select_pairs([group[:2]], [judgements(-7.5, -7.25)], round=1)
    assert (pair.chosen, pair.rejected) == ("two", "one")
