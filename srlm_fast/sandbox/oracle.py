"""The oracle: the five additive criteria of a response, read from its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from srlm_fast.sandbox.world import CLOSING, ITEMS, TaskPrompt


class Criteria(NamedTuple):
    """One point each; together they hold only for the perfect response.

    relevant: it starts with the task's noun and a colon.
    substantial: `from`, the exact input and a comma stand between the colon and `we get`.
    answers: the list after `we get` has as many items as the task.
    form: what follows the list is exactly `. hope this helps !`.
    exact: the list is the solution.
    """

    relevant: bool
    substantial: bool
    answers: bool
    form: bool
    exact: bool

    @property
    def score(self) -> int:
        return sum(self)


def judge_response(task: TaskPrompt, response: str) -> Criteria:
    """The criteria that any text meets as a response to `task`."""
    words = response.split()
    colon = words.index(":") if ":" in words else -1
    get = _find(words, ["we", "get"])
    answer = answer_items(response)
    return Criteria(
        relevant=words[:2] == [task.noun, ":"],
        substantial=words[colon + 1 : get] == ["from", *task.items, ","],
        answers=len(answer) == len(task.items),
        form=words[get + 2 + len(answer) :] == list(CLOSING),
        exact=answer == task.solution,
    )


def answer_items(response: str) -> list[str]:
    """The items that directly follow the first `we get` of a response."""
    words = response.split()
    items = []
    for word in words[_find(words, ["we", "get"]) + 2 :]:
        if word not in ITEMS:
            break
        items.append(word)
    return items


def _find(words: Sequence[str], phrase: Sequence[str]) -> int:
    """The first position of `phrase`, or the length of `words` if it does not occur."""
    starts = range(len(words) - len(phrase) + 1)
    hits = (i for i in starts if list(words[i : i + len(phrase)]) == list(phrase))
    return next(hits, len(words))
