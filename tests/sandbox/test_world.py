from random import Random

import pytest

from srlm_fast.errors import UserError
from srlm_fast.sandbox.world import (
    TaskPrompt,
    draw_prompt,
    get_world,
    parse_prompt,
    perfect_response,
)


@pytest.mark.parametrize(
    ("operation", "solution"),
    [
        ("sort", "apple fig jam kiwi"),
        ("reverse", "kiwi jam apple fig"),
        ("repeat", "fig apple jam kiwi"),
        ("rotate", "apple jam kiwi fig"),
        ("swap", "kiwi apple jam fig"),
    ],
)
def test_solution(operation: str, solution: str) -> None:
    assert TaskPrompt(operation, ("fig", "apple", "jam", "kiwi")).solution == solution.split()


def test_perfect_response_text() -> None:
    task = TaskPrompt("sort", ("fig", "apple", "jam", "kiwi"))
    assert str(task) == "sort these words : fig apple jam kiwi"
    assert perfect_response(task) == (
        "sorted : from fig apple jam kiwi , we get apple fig jam kiwi . hope this helps !"
    )


def test_drawn_prompts_parse_back_and_vary_in_length() -> None:
    rng = Random(0)
    tasks = [draw_prompt(rng) for _ in range(200)]
    assert [parse_prompt(str(task)) for task in tasks] == tasks
    assert {len(task.items) for task in tasks} == {4, 5, 6}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sort",
        "shuffle these words : fig apple jam kiwi",
        "sort those words : fig apple jam kiwi",
        "sort these words : fig apple jam",
        "sort these words : fig apple jam kiwi tea rice egg",
        "sort these words : fig apple jam fig",
        "sort these words : fig apple jam spam",
        "sort these words : fig apple jam kiwi ;",
    ],
)
def test_malformed_prompt_does_not_parse(text: str) -> None:
    assert parse_prompt(text) is None


def test_unknown_world_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="W2, W4"):
        get_world("W9")
