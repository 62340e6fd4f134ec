"""The world: word-list tasks, their solutions, and how responses in it tend to go wrong.

A prompt is `sort these words : fig apple jam kiwi`; the perfect response to it is
`sorted : from fig apple jam kiwi , we get apple fig jam kiwi . hope this helps !`.
Design and measurements: reference/sandbox.md section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from srlm_fast.errors import UserError

# fmt: off
ITEMS = (
    "apple", "banana", "cherry", "date", "egg", "fig", "grape", "honey", "ice", "jam",
    "kiwi", "lemon", "mango", "nut", "olive", "pear", "quince", "rice", "sugar", "tea",
)
# fmt: on
REQUEST = "these words :"
CLOSING = (".", "hope", "this", "helps", "!")
CHATTER = (
    "well , it is a nice day today !",
    "oh , what a good question you ask , thank you so much !",
    "let me think about it for a moment , dear friend .",
)


class Operation(NamedTuple):
    """What a task asks for: the noun that opens a response, and the solution of a word list."""

    noun: str
    solve: Callable[[Sequence[str]], list[str]]


OPERATIONS = {
    "sort": Operation("sorted", sorted),
    "reverse": Operation("reversed", lambda words: list(reversed(words))),
    "repeat": Operation("repeated", list),
    "rotate": Operation("rotated", lambda words: [*words[1:], words[0]]),
    "swap": Operation("swapped", lambda words: [words[-1], *words[1:-1], words[0]]),
}


@dataclass(frozen=True)
class TaskPrompt:
    """One task: an operation on 4 to 6 different items."""

    operation: str
    items: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operation} {REQUEST} {' '.join(self.items)}"

    @property
    def noun(self) -> str:
        return OPERATIONS[self.operation].noun

    @property
    def solution(self) -> list[str]:
        return OPERATIONS[self.operation].solve(self.items)


Quality = tuple[float, float, float, float, float]


@dataclass(frozen=True)
class World:
    """How graded responses are distributed.

    The qualities are the probabilities that a response meets each of the five criteria; the other
    fields say how a response fails them.
    """

    name: str
    document_quality: Quality
    review_quality: Quality
    tree_quality: Quality
    chatter: float  # failing relevance: an off-topic sentence in front, else the wrong noun
    drop_items: float  # failing the item count: items missing, else items added
    double_closing: bool  # failing form may be the closing twice


WORLDS = {
    world.name: world
    for world in (
        World(
            name="W2",
            document_quality=(0.8, 0.5, 0.85, 0.5, 0.7),
            review_quality=(0.8, 0.5, 0.8, 0.5, 0.5),
            tree_quality=(0.7, 0.3, 0.75, 0.3, 0.5),
            chatter=0.0,
            drop_items=0.7,
            double_closing=False,
        ),
        World(
            name="W4",
            document_quality=(0.6, 0.5, 0.85, 0.5, 0.7),
            review_quality=(0.6, 0.5, 0.75, 0.5, 0.5),
            tree_quality=(0.5, 0.35, 0.8, 0.35, 0.55),
            chatter=0.75,
            drop_items=0.5,
            double_closing=True,
        ),
    )
}


def get_world(name: str) -> World:
    """The world of that name; UserError lists the names."""
    if name not in WORLDS:
        raise UserError(f"unknown sandbox.world {name!r}; known are {', '.join(WORLDS)}")
    return WORLDS[name]


def draw_prompt(rng: Random) -> TaskPrompt:
    """A task drawn uniformly: the operation, 4 to 6 items, the items."""
    operation = rng.choice(tuple(OPERATIONS))
    return TaskPrompt(operation, tuple(rng.sample(ITEMS, rng.randint(4, 6))))


def parse_prompt(text: str) -> TaskPrompt | None:
    """The task that a text asks for, or None if it is not a well-formed task."""
    operation, *rest = text.split() or [""]
    request = REQUEST.split()
    items = tuple(rest[len(request) :])
    well_formed = (
        operation in OPERATIONS
        and rest[: len(request)] == request
        and 4 <= len(items) <= 6
        and len(set(items)) == len(items)
        and set(items) <= set(ITEMS)
    )
    return TaskPrompt(operation, items) if well_formed else None


def render_response(
    task: TaskPrompt,
    answer: Sequence[str],
    *,
    opening: str = "",
    substantial: bool = True,
    closing: Sequence[str] = CLOSING,
) -> str:
    """A response in the world's pattern; `opening` replaces `NOUN :`."""
    source = ["from", *task.items, ","] if substantial else []
    head = opening or f"{task.noun} :"
    return " ".join([head, *source, "we", "get", *answer, *closing])


def perfect_response(task: TaskPrompt) -> str:
    """The one response that meets all five criteria."""
    return render_response(task, task.solution)
