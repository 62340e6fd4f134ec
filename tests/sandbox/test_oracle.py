import itertools
from random import Random

import pytest

from srlm_fast.sandbox.oracle import Criteria, judge_response
from srlm_fast.sandbox.world import (
    CLOSING,
    TaskPrompt,
    draw_prompt,
    perfect_response,
    render_response,
)

TASK = TaskPrompt("sort", ("fig", "apple", "jam", "kiwi"))
SOURCE = "from fig apple jam kiwi ,"
ANSWER = "we get apple fig jam kiwi"
END = ". hope this helps !"


@pytest.mark.parametrize(
    ("response", "criteria"),
    [
        (f"sorted : {SOURCE} {ANSWER} {END}", (1, 1, 1, 1, 1)),
        (f"oh , what ! sorted : {SOURCE} {ANSWER} {END}", (0, 1, 1, 1, 1)),
        (f"swapped : {SOURCE} {ANSWER} {END}", (0, 1, 1, 1, 1)),
        (f"sorted {SOURCE} {ANSWER} {END}", (0, 0, 1, 1, 1)),
        (f"sorted : {ANSWER} {END}", (1, 0, 1, 1, 1)),
        (f"sorted : from fig apple jam , {ANSWER} {END}", (1, 0, 1, 1, 1)),
        (f"sorted : from apple fig jam kiwi , {ANSWER} {END}", (1, 0, 1, 1, 1)),
        (f"sorted : well {SOURCE} {ANSWER} {END}", (1, 0, 1, 1, 1)),
        (f"sorted : {SOURCE} we get apple fig jam {END}", (1, 1, 0, 1, 0)),
        (f"sorted : {SOURCE} we get apple fig jam kiwi kiwi {END}", (1, 1, 0, 1, 0)),
        (f"sorted : {SOURCE} we get fig apple jam kiwi {END}", (1, 1, 1, 1, 0)),
        (f"sorted : {SOURCE} {ANSWER}", (1, 1, 1, 0, 1)),
        (f"sorted : {SOURCE} {ANSWER} .", (1, 1, 1, 0, 1)),
        (f"sorted : {SOURCE} {ANSWER} {END} {END}", (1, 1, 1, 0, 1)),
        (f"sorted : {SOURCE} {ANSWER} {END} {ANSWER}", (1, 1, 1, 0, 1)),
        (f"sorted : {SOURCE} we get apple fig ; jam kiwi {END}", (1, 1, 0, 0, 0)),
        (f"sorted : {SOURCE} {END}", (1, 0, 0, 0, 0)),
        (f"sorted : {SOURCE}", (1, 1, 0, 0, 0)),
        ("we get", (0, 0, 0, 0, 0)),
        ("", (0, 0, 0, 0, 0)),
        ("Score: 5 <|end|> \n\t we we get", (0, 0, 0, 0, 0)),
    ],
)
def test_criteria(response: str, criteria: tuple[int, ...]) -> None:
    assert tuple(map(int, judge_response(TASK, response))) == criteria


def test_white_space_does_not_matter() -> None:
    assert judge_response(TASK, "\n  ".join(perfect_response(TASK).split())).score == 5


def test_perfect_responses_score_5_and_no_other_task_does() -> None:
    rng = Random(0)
    tasks = [draw_prompt(rng) for _ in range(50)]
    for task, other in itertools.product(tasks, tasks):
        assert (judge_response(task, perfect_response(other)).score == 5) == (task == other)


@pytest.mark.parametrize("met", list(itertools.product([True, False], repeat=5)))
def test_every_combination_is_told_apart(met: tuple[bool, ...]) -> None:
    """The criteria are independent, except that an exact answer has the right length."""
    wanted = Criteria(*met)
    answer = list(TASK.solution)
    if not wanted.exact:
        answer[0] = "tea"
    if not wanted.answers:
        answer.append("rice")
    response = render_response(
        TASK,
        answer,
        opening="" if wanted.relevant else "rotated :",
        substantial=wanted.substantial,
        closing=CLOSING if wanted.form else (".",),
    )
    found = judge_response(TASK, response)
    assert found == wanted._replace(exact=wanted.exact and wanted.answers)
    assert found.score == sum(found)


def test_any_one_word_edit_of_the_perfect_response_loses_points() -> None:
    words = perfect_response(TASK).split()
    for i in range(len(words)):
        assert judge_response(TASK, " ".join(words[:i] + words[i + 1 :])).score < 5
        assert judge_response(TASK, " ".join([*words[:i], "tea", *words[i:]])).score < 5
