import statistics
from random import Random

import pytest

from srlm_fast.sandbox.oracle import Criteria, judge_response
from srlm_fast.sandbox.responses import graded_response
from srlm_fast.sandbox.world import CHATTER, WORLDS, Quality, World, draw_prompt, perfect_response

W4 = WORLDS["W4"]
PERFECT = (1.0, 1.0, 1.0, 1.0, 1.0)


def grade(world: World, quality: Quality, count: int) -> list[tuple[Criteria, str]]:
    rng = Random(0)
    tasks = [draw_prompt(rng) for _ in range(count)]
    responses = [graded_response(task, world, quality, rng) for task in tasks]
    return [(judge_response(t, r), r) for t, r in zip(tasks, responses, strict=True)]


def test_nothing_broken_is_the_perfect_response() -> None:
    rng = Random(0)
    for _ in range(50):
        task = draw_prompt(rng)
        assert graded_response(task, W4, PERFECT, rng) == perfect_response(task)


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("broken", range(5), ids=Criteria._fields)
def test_each_corruption_breaks_exactly_its_criterion(world: World, broken: int) -> None:
    wanted = [i != broken for i in range(5)]
    if Criteria._fields[broken] == "answers":
        wanted[4] = False
    first, second, third, fourth, fifth = (float(i != broken) for i in range(5))
    for criteria, response in grade(world, (first, second, third, fourth, fifth), 400):
        assert list(criteria) == wanted, response


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
@pytest.mark.parametrize("pool", ["document", "review", "tree"])
def test_criteria_are_met_with_the_worlds_probabilities(world: World, pool: str) -> None:
    quality = getattr(world, f"{pool}_quality")
    count = 3000
    criteria = [c for c, _ in grade(world, quality, count)]
    expected = [*quality[:4], quality[4] * quality[2]]
    for i, q in enumerate(expected):
        share = sum(c[i] for c in criteria) / count
        assert abs(share - q) < 4 * (q * (1 - q) / count) ** 0.5, Criteria._fields[i]


@pytest.mark.parametrize(
    ("name", "low", "high"), [("W4", -0.15, 0.15), ("W2", 0.4, 1.0)], ids=["W4", "W2"]
)
def test_length_is_no_proxy_for_the_score_in_w4(name: str, low: float, high: float) -> None:
    world = WORLDS[name]
    graded = grade(world, world.review_quality, 3000)
    scores = [criteria.score for criteria, _ in graded]
    lengths = [len(response.split()) for _, response in graded]
    assert low < statistics.correlation(scores, lengths) < high


def test_w4_fails_relevance_by_chatter_and_form_by_the_closing_twice() -> None:
    graded = [text for _, text in grade(W4, (0.0, 1.0, 1.0, 0.0, 1.0), 1000)]
    chatter = sum(text.startswith(CHATTER) for text in graded) / 1000
    double = sum(text.count("hope this helps") == 2 for text in graded) / 1000
    assert 0.7 < chatter < 0.8
    assert 0.2 < double < 0.3
    without = [text for _, text in grade(WORLDS["W2"], (0.0, 1.0, 1.0, 0.0, 1.0), 1000)]
    assert not any(text.startswith(CHATTER) or text.count("hope this") == 2 for text in without)
