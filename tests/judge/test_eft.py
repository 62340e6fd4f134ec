import json
from collections import Counter

import pytest

from srlm_fast.config import EFTConfig, JudgeConfig
from srlm_fast.data.records import RankedGroup, user
from srlm_fast.errors import UserError
from srlm_fast.judge.eft import build_eft
from srlm_fast.judge.judge_prompt import load_judge_prompt
from srlm_fast.judge.prompted import PromptedJudge

PROMPT = load_judge_prompt("sandbox")
RANKED = RankedGroup(user("q"), ("great", "fine", "bad"), (0, 1, 2))
TIED = RankedGroup(user("t"), ("great", "fine", "bad"), (0, 1, 1))
FLAT = RankedGroup(user("f"), ("great", "fine"), (0, 0))


@pytest.fixture
def build(scripted, char_template):
    def run(groups, answer, config=None, seed=0, context=10_000):
        judge = PromptedJudge(
            scripted(answer), char_template, JudgeConfig(prompt="sandbox"), seed=9, context=context
        )
        config = config or EFTConfig(modal_cap=0)
        rows, report = build_eft(judge, groups, config, PROMPT, seed=seed)
        assert json.loads(json.dumps(report)) == report
        return rows, report, judge.sampler.calls

    return run


def by_response(scores, justification="because"):
    """A judge that gives each response its score, whatever the task."""

    def answer(prompt, index, seed):
        response = prompt.partition("; response : ")[2].partition(" ;")[0]
        return f"{justification} Score: {scores[response]}"

    return answer


def test_row_is_the_judge_prompt_and_the_generated_judgement(build):
    rows, report, calls = build([RANKED], by_response({"great": 5, "fine": 3, "bad": 0}))
    assert [(r.prompt, r.response) for r in rows] == [
        (PROMPT.fill(user("q"), "great"), "because Score: 5"),
        (PROMPT.fill(user("q"), "fine"), "because Score: 3"),
        (PROMPT.fill(user("q"), "bad"), "because Score: 0"),
    ]
    assert (report["groups"], report["groups_kept"], report["rows"]) == (1, 1, 3)
    [(_, params, _)] = calls
    assert params.n == 1, "one vote per response and try"


def test_rambling_after_the_verdict_is_not_taught(build):
    def answer(prompt, index, seed):
        return by_response({"great": 5, "fine": 3, "bad": 0})(prompt, index, seed) + "\nUser: more"

    rows, _, _ = build([RANKED], answer)
    assert rows[0].response == "because Score: 5"


def test_reasons_behind_the_score_are_taught_where_they_come_last(scripted, char_template):
    prompt = load_judge_prompt("score_first")

    def answer(text, index, seed):
        score = next(s for r, s in {"great": 5, "bad": 0}.items() if f"<response>{r}<" in text)
        return f"Score: {score}\nIt is what Score: 3 is not."

    judge = PromptedJudge(
        scripted(answer), char_template, JudgeConfig(prompt="score_first"), seed=9, context=10_000
    )
    group = RankedGroup(user("q"), ("great", "bad"), (0, 1))
    rows, report = build_eft(judge, [group], EFTConfig(), prompt, seed=0)
    assert [r.response for r in rows] == [
        f"Score: {n}\nIt is what Score: 3 is not." for n in (5, 0)
    ]
    assert report["scores_after"] == {"0": 1, "5": 1}


@pytest.mark.parametrize(
    ("group", "scores", "kept"),
    [
        (RANKED, {"great": 4, "fine": 3, "bad": 2}, True),
        (RANKED, {"great": 4, "fine": 4, "bad": 2}, False),
        (RANKED, {"great": 2, "fine": 3, "bad": 4}, False),
        (RANKED, {"great": 5, "fine": 2, "bad": 3}, False),
        (TIED, {"great": 4, "fine": 2, "bad": 3}, True),
        (TIED, {"great": 4, "fine": 2, "bad": 2}, True),
        (TIED, {"great": 3, "fine": 2, "bad": 3}, False),
    ],
)
def test_scores_must_be_strictly_in_the_human_order(build, group, scores, kept):
    rows, report, _ = build([group], by_response(scores))
    assert len(rows) == (3 if kept else 0)
    assert report["groups_dropped"] == ({} if kept else {"order disagrees": 1})


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ({"great": 4, "fine": 4, "bad": 2}, True),
        ({"great": 4, "fine": 2, "bad": 2}, True),
        ({"great": 3, "fine": 3, "bad": 3}, False),
        ({"great": 3, "fine": 4, "bad": 3}, False),
    ],
)
def test_equal_scores_may_be_allowed_but_not_alone(build, scores, kept):
    config = EFTConfig(allow_ties=True, modal_cap=0)
    rows, report, _ = build([RANKED], by_response(scores), config)
    assert len(rows) == (3 if kept else 0)
    assert report["groups_dropped"] == ({} if kept else {"order disagrees": 1})


def test_ties_of_ranks_are_no_ties_of_scores():
    with pytest.raises(UserError, match="allow_ties needs target: judge"):
        EFTConfig(target="rank", allow_ties=True)


def test_flat_groups_teach_nothing(build):
    rows, report, calls = build([FLAT], by_response({"great": 5, "fine": 3}))
    assert rows == [] and report["groups_dropped"] == {"no strict order": 1}
    assert calls == []


def test_unreadable_judgements_are_counted_by_reason(build):
    groups = [RANKED, TIED, RankedGroup(user("q"), ("x" * 400, "y"), (0, 1))]
    answer = {"q": "Score: 7", "t": "I say nothing"}
    rows, report, _ = build(
        groups,
        lambda prompt, *_: answer[prompt.partition("task : ")[2][0]],
        context=900,
    )
    assert rows == []
    assert report["scores_judged"] == report["scores_before"] == {}
    assert report["groups_dropped"] == {
        "out of range": 1,
        "no score": 1,
        "judge prompt too long": 1,
    }


def test_only_open_groups_are_tried_again_with_new_seeds(build):
    """A judge that gets the second group right on its second try."""
    seen = []

    def answer(prompt, index, seed):
        if seed not in seen:
            seen.append(seed)
        good = {"great": 5, "fine": 3, "bad": 0}
        upside_down = {"great": 0, "fine": 3, "bad": 5}
        second = "task : t" in prompt
        return by_response(upside_down if second and len(seen) == 1 else good)(prompt, index, seed)

    config = EFTConfig(max_tries=4, modal_cap=0)
    rows, report, calls = build([TIED, RANKED], answer, config)
    assert [r.prompt for r in rows[:3]] == [PROMPT.fill(user("t"), r) for r in TIED.responses]
    assert report["groups_kept_by_try"] == [1, 1]
    assert report["scores_judged"] == {"0": 3, "3": 3, "5": 3}, "of both tries"
    assert report["scores_before"] == report["scores_after"] == {"0": 2, "3": 2, "5": 2}
    assert [len(asked) for asked, _, _ in calls] == [6, 3]
    assert len(seen) == 2
    assert report["groups_dropped"] == {}


def test_modal_score_is_capped_at_random_but_seeded(build):
    def groups(n, names):
        return [RankedGroup(user(f"q{i}"), names, (0, 1)) for i in range(n)]

    many = groups(20, ("great", "fine")) + groups(8, ("fine", "bad"))
    answer = by_response({"great": 4, "fine": 3, "bad": 1})
    for cap, kept in [(1.0, {"1": 8, "3": 20, "4": 20}), (0.5, {"1": 8, "3": 10, "4": 20})]:
        rows, report, _ = build(many, answer, EFTConfig(modal_cap=cap))
        assert report["scores_before"] == {"1": 8, "3": 28, "4": 20}
        assert report["scores_after"] == kept
        assert report["rows_dropped"] == {"modal score": 56 - len(rows)}
        assert Counter(r.response[-1] for r in rows) == kept
    again, _, _ = build(many, answer, EFTConfig(modal_cap=0.5))
    other, _, _ = build(many, answer, EFTConfig(modal_cap=0.5), seed=1)
    assert rows == again != other
    assert build(many, answer, EFTConfig(modal_cap=0))[1]["rows"] == 56


def test_rank_target_needs_no_judge():
    four = RankedGroup(user("q"), ("a", "b", "c", "d"), (0, 2, 1, 2))
    rows, report = build_eft(
        None, [RANKED, four, FLAT], EFTConfig(target="rank", modal_cap=0), PROMPT, seed=0
    )
    assert [r.response for r in rows] == [
        *("Score: 5", "Score: 3", "Score: 0"),
        *("Score: 5", "Score: 0", "Score: 3", "Score: 0"),
    ]
    assert rows[4].prompt == PROMPT.fill(user("q"), "b")
    assert report["groups_dropped"] == {"no strict order": 1}
    assert report["scores_after"] == {"0": 3, "3": 2, "5": 2}


def test_rank_target_spreads_evenly():
    six = RankedGroup(user("q"), tuple("abcdef"), (5, 4, 3, 2, 1, 0))
    rows, _ = build_eft(None, [six], EFTConfig(target="rank"), PROMPT, seed=0)
    assert [r.response for r in rows] == [f"Score: {n}" for n in range(6)]
