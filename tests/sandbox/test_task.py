import dataclasses
import itertools
import statistics

import pytest

from srlm_fast.config import Config, EvaluateConfig, PromptsConfig
from srlm_fast.data.records import Message, prompt_text, user
from srlm_fast.data.task import Task
from srlm_fast.errors import UserError
from srlm_fast.sandbox.task import annotate, make_task, oracle
from srlm_fast.sandbox.world import parse_prompt, perfect_response

CONFIG = Config(prompts=PromptsConfig(num_prompts=200))


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task(CONFIG)


def pools(task: Task) -> dict[str, list[str]]:
    return {
        "ift": [prompt_text(e.prompt) for e in task.ift],
        "eft": [prompt_text(g.prompt) for g in task.eft],
        "judge_test": [prompt_text(g.prompt) for g in task.judge_test],
        "test": [prompt_text(p) for p in task.test_prompts],
        "prompts": [prompt_text(p) for p in task.prompts],
    }


def test_pools_are_disjoint_and_of_the_configured_size(task: Task) -> None:
    texts = pools(task)
    assert {name: len(pool) for name, pool in texts.items()} == {
        "ift": CONFIG.sandbox.num_ift,
        "eft": CONFIG.sandbox.num_eft,
        "judge_test": 60,
        "test": 200,
        "prompts": 2 * 48 + 2 * 200,
    }
    everything = list(itertools.chain.from_iterable(texts.values()))
    assert len(set(everything)) == len(everything)
    assert all(parse_prompt(text) for text in everything)


def test_deterministic_in_the_seed(task: Task) -> None:
    again = make_task(CONFIG)
    other = make_task(dataclasses.replace(CONFIG, seed=1))
    for name in ("ift", "eft", "judge_test", "prompts", "test_prompts"):
        assert getattr(task, name) == getattr(again, name)
        assert getattr(task, name) != getattr(other, name)


def test_sizes_of_later_pools_do_not_change_the_seed_data(task: Task) -> None:
    more = make_task(dataclasses.replace(CONFIG, prompts=PromptsConfig(num_prompts=500)))
    assert more.ift == task.ift
    assert more.eft == task.eft
    assert more.prompts[: len(task.prompts)] == task.prompts


def test_ranked_groups_are_the_oracles_order(task: Task) -> None:
    for group in [*task.eft, *task.judge_test]:
        scores = annotate(group.prompt, group.responses)
        assert tuple(scores) == group.scores
        assert list(scores) == sorted(scores, reverse=True)
        for (a, rank_a), (b, rank_b) in itertools.combinations(
            zip(scores, group.ranks, strict=True), 2
        ):
            assert (a == b) == (rank_a == rank_b)
            assert (a > b) == (rank_a < rank_b)
        assert group.ranks[0] == 0.0


def test_seed_data_leaves_head_room_and_strict_rankings(task: Task) -> None:
    """The best of three is far from perfect on average, and enough groups have no tie."""
    best = statistics.mean(sum(oracle(e.prompt, e.response).values()) for e in task.ift)
    assert 3.2 < best < 3.7
    assert sum(len(set(g.ranks)) == 3 for g in task.eft) > 0.27 * len(task.eft)


def test_oracle_reads_the_last_user_turn() -> None:
    text = "swap these words : fig tea jam kiwi"
    perfect = perfect_response(parse_prompt(text))
    all_met = {"relevant": 1, "substantial": 1, "answers": 1, "form": 1, "exact": 1}
    assert oracle(user(text), perfect) == all_met
    talk = (*user("sort these words : a"), Message("assistant", "no"), *user(text))
    assert oracle(talk, perfect) == all_met
    assert annotate(user(text), [perfect, "", perfect.removesuffix(" !")]) == [5.0, 0.0, 4.0]


def test_oracle_gives_nothing_for_a_prompt_outside_the_world() -> None:
    assert set(oracle(user("who are you ?"), "sorted : we get tea").values()) == {0}


def test_prompts_validity(task: Task) -> None:
    assert task.is_valid_prompt("sort these words : fig tea jam kiwi")
    assert not task.is_valid_prompt("sort these words : fig tea jam fig")


def test_evaluation_sizes_follow_the_config() -> None:
    small = make_task(Config(evaluate=EvaluateConfig(num_prompts=30, num_judge_groups=10)))
    assert (len(small.test_prompts), len(small.judge_test)) == (30, 10)


def test_unknown_world() -> None:
    sandbox = dataclasses.replace(CONFIG.sandbox, world="W9")
    with pytest.raises(UserError, match="W2, W4"):
        make_task(dataclasses.replace(CONFIG, sandbox=sandbox))
