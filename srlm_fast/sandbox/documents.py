"""The documents that M0 is pre-trained on: chats, reviews of responses, and lists of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from srlm_fast.data.records import prompt_text, user
from srlm_fast.judge.judge_prompt import load_judge_prompt
from srlm_fast.prompts.task_list import load_task_list
from srlm_fast.sandbox.oracle import Criteria, answer_items, judge_response
from srlm_fast.sandbox.responses import graded_response
from srlm_fast.sandbox.world import TaskPrompt, World, draw_prompt

CHAT_SHARE = 0.58
REVIEW_SHARE = 0.36
# M0 must judge imperfectly, or the rounds have nothing to average over: a quarter of the reviews
# have each verdict flipped with probability 0.4.
UNRELIABLE_SHARE = 0.25
FLIP_PROBABILITY = 0.4

TASKS_PER_LIST = 9
# The very texts that the loop sends to M0 when it judges and when it writes new prompts.
JUDGE_PROMPT = load_judge_prompt("sandbox")
TASK_LIST = load_task_list("sandbox")


class Document(NamedTuple):
    """One user turn and the assistant's answer to it."""

    user: str
    assistant: str


def draw_document(world: World, rng: Random) -> Document:
    """A document of the pre-training mix."""
    kind = rng.random()
    if kind < CHAT_SHARE:
        return draw_chat(world, rng)
    if kind < CHAT_SHARE + REVIEW_SHARE:
        return _draw_review(world, rng)
    return task_list([draw_prompt(rng) for _ in range(TASKS_PER_LIST)])


def draw_chat(world: World, rng: Random) -> Document:
    """A prompt and a graded response to it."""
    task = draw_prompt(rng)
    return Document(str(task), graded_response(task, world, world.document_quality, rng))


def review(task: TaskPrompt, response: str, verdicts: Criteria) -> Document:
    """The judge prompt for a response, answered by a verdict per criterion, the wanted and the
    given list side by side, and the score."""
    say = {name: "yes" if met else "no" for name, met in verdicts._asdict().items()}
    exact = say.pop("exact")
    words = [word for verdict in say.items() for word in verdict] + ["check"]
    wanted, given = task.solution, answer_items(response)
    for i in range(max(len(wanted), len(given))):
        want = wanted[i] if i < len(wanted) else "none"
        got = given[i] if i < len(given) else "none"
        words += [want, got, "ok" if want == got else "bad"]
    words += ["exact", exact, "Score:", str(verdicts.score)]
    return Document(prompt_text(JUDGE_PROMPT.fill(user(str(task)), response)), " ".join(words))


def task_list(tasks: Sequence[TaskPrompt]) -> Document:
    """A list of new tasks, as self-instruction starts it and has it continued."""
    *demos, last = map(str, tasks)
    request, start = TASK_LIST.start(demos)
    return Document(prompt_text(request), f"{start} {last}")


def _draw_review(world: World, rng: Random) -> Document:
    task = draw_prompt(rng)
    response = graded_response(task, world, world.review_quality, rng)
    verdicts = judge_response(task, response)
    if rng.random() < UNRELIABLE_SHARE:
        verdicts = Criteria(*(met != (rng.random() < FLIP_PROBABILITY) for met in verdicts))
    return review(task, response, verdicts)
