"""Graded responses: each criterion is met with a given probability, and broken on purpose if not.

`exact` cannot hold without `answers`; the criteria are independent otherwise.
"""

from __future__ import annotations

from random import Random

from srlm_fast.sandbox.oracle import Criteria
from srlm_fast.sandbox.world import (
    CHATTER,
    CLOSING,
    ITEMS,
    OPERATIONS,
    Quality,
    TaskPrompt,
    World,
    render_response,
)


def graded_response(task: TaskPrompt, world: World, quality: Quality, rng: Random) -> str:
    """A response that meets each criterion with the probability that `quality` gives."""
    met = Criteria(*(rng.random() < q for q in quality))
    answer = task.solution if met.exact else _wrong_answer(task, rng)
    if not met.answers:
        answer = _wrong_length(answer, world, rng)
    return render_response(
        task,
        answer,
        opening=f"{task.noun} :" if met.relevant else _off_topic_opening(task, world, rng),
        substantial=met.substantial,
        closing=CLOSING if met.form else _bad_closing(world, rng),
    )


def _off_topic_opening(task: TaskPrompt, world: World, rng: Random) -> str:
    if rng.random() < world.chatter:
        return f"{rng.choice(CHATTER)} {task.noun} :"
    return rng.choice([op.noun for op in OPERATIONS.values() if op.noun != task.noun]) + " :"


def _wrong_answer(task: TaskPrompt, rng: Random) -> list[str]:
    """The solution with two neighbours exchanged, an item replaced, or of another operation."""
    answer = task.solution
    kind = rng.random()
    if kind < 0.4:
        i = rng.randrange(len(answer) - 1)
        answer[i], answer[i + 1] = answer[i + 1], answer[i]
    elif kind < 0.7:
        unused = [item for item in ITEMS if item not in answer]
        answer[rng.randrange(len(answer))] = rng.choice(unused)
    else:
        # Two operations can agree on an input (sorting a sorted list repeats it).
        others = [op.solve(task.items) for op in OPERATIONS.values()]
        answer = rng.choice([other for other in others if other != answer])
    return answer


def _wrong_length(answer: list[str], world: World, rng: Random) -> list[str]:
    """`answer` with one or two items missing or added."""
    answer = list(answer)
    drop = rng.random() < world.drop_items
    for _ in range(rng.randint(1, 2)):
        if drop:
            answer.pop(rng.randrange(len(answer)))
        else:
            answer.insert(rng.randint(0, len(answer)), rng.choice(ITEMS))
    return answer


def _bad_closing(world: World, rng: Random) -> tuple[str, ...]:
    kinds: list[tuple[str, ...]] = [(), (".",), ("hope", "helps")]
    if world.double_closing:
        kinds.append(CLOSING + CLOSING)
    return rng.choice(kinds)
