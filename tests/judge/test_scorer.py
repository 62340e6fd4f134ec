import math

import numpy as np
import pytest

from srlm_fast.data.records import Message, user
from srlm_fast.errors import UserError
from srlm_fast.judge.scorer import ScorerJudge, load_scorer, scorer_file
from srlm_fast.parallel import Ranks

PROMPTS = [user("first"), (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))]


@pytest.fixture
def candidates(make_sample):
    return [[make_sample(text, prompt=PROMPTS[i]) for text in ("x", "yy")] for i in range(2)]


def scores(judged):
    return [[j.score for j in group] for group in judged]


def test_the_function_gets_conversations_and_texts(candidates):
    seen = []

    def longest(prompts, texts):
        seen.append((prompts, texts))
        return [[len(text) for text in group] for group in texts]

    assert scores(ScorerJudge(longest).score(PROMPTS, candidates)) == [[1.0, 2.0], [1.0, 2.0]]
    [(prompts, texts)] = seen
    assert prompts[0] == [{"role": "user", "content": "first"}]
    assert [turn["content"] for turn in prompts[1]] == ["a", "b", "c"]
    assert texts == [["x", "yy"], ["x", "yy"]]


def test_arrays_will_do(candidates):
    judged = ScorerJudge(lambda prompts, texts: np.ones((2, 2))).score(PROMPTS, candidates)
    assert scores(judged) == [[1.0, 1.0], [1.0, 1.0]]


def test_what_has_no_score_is_invalid(candidates):
    [group, _] = ScorerJudge(lambda p, t: [[None, math.nan], [1, 2]]).score(PROMPTS, candidates)
    assert [(j.score, j.invalid) for j in group] == [(None, "no score"), (None, "not finite")]


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ([[1, 2]], "of 2 x 2 it made 1 x 2"),
        ([[1, 2], [1]], "of 2 x 2 it made 1 x 1, 1 x 2"),
        ([1, 2], "must return numbers in lists"),
        (None, "must return numbers in lists"),
        ([["good", "bad"], [1, 2]], "must return numbers in lists"),
    ],
)
def test_other_things_than_scores_are_refused(found, complaint, candidates):
    with pytest.raises(UserError, match=complaint):
        ScorerJudge(lambda prompts, texts: found).score(PROMPTS, candidates)


def test_each_rank_asks_for_its_share(candidates, monkeypatch):
    """Two ranks, one after the other; what they gather is put together here."""
    asked, gathered = [], []

    def function(prompts, texts):
        asked.append(len(prompts))
        return [[float(len(asked))] * len(group) for group in texts]

    monkeypatch.setattr(Ranks, "gather", lambda self, mine: gathered.append(mine) or mine)
    for rank in range(3):
        ScorerJudge(function, Ranks(rank, 3)).score(PROMPTS, candidates)
    assert asked == [1, 1], "the third has no prompt, and calls nothing"
    assert [scores(part) for part in gathered] == [[[1.0, 1.0]], [[2.0, 2.0]], []]


def test_functions_are_found_by_their_path(tmp_path, monkeypatch):
    (tmp_path / "my_judges.py").write_text("class Best:\n    def of(p, c): return c\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_scorer("my_judges:Best.of")([], [[1]]) == [[1]]
    assert scorer_file("my_judges:Best.of") == tmp_path / "my_judges.py"
    assert scorer_file("") is None
    for path, complaint in {
        "my_judges:number": "is no function but a int",
        "my_judges:missing": "has no attribute 'missing'",
        "no_such_module:f": "No module named 'no_such_module'",
    }.items():
        with pytest.raises(UserError, match=complaint):
            load_scorer(path)
