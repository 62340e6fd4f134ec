from __future__ import annotations

from dataclasses import replace

import pytest

from srlm_fast.config import Config, DataConfig, EFTConfig, PromptsConfig
from srlm_fast.data.files import task_from_files
from srlm_fast.data.jsonl import write_jsonl, write_text
from srlm_fast.data.records import prompt_text
from srlm_fast.errors import UserError


def trees(count, replies=3):
    return [
        {"prompt": {"text": f"question {i}", "replies": [
            {"text": f"reply {i} {rank}", "rank": rank} for rank in range(replies)]}}
        for i in range(count)
    ]  # fmt: skip


def pairs(prompts, each=1):
    return [
        {"prompt": f"question {i}", "chosen": f"good {i} {j}", "rejected": f"bad {i} {j}"}
        for j in range(each)
        for i in range(prompts)
    ]


def others(count):
    return [f"other {i}" for i in range(count)]


def texts(prompts):
    return [" ".join(prompt_text(p).split()).casefold() for p in prompts]


@pytest.fixture
def srlm(tmp_path):
    """A configuration for the given tree rows (and prompt lines)."""

    def make(rows, lines=(), **data):
        write_jsonl(tmp_path / "trees.jsonl", rows)
        write_text(tmp_path / "prompts.txt", "\n".join(lines))
        prompts = str(tmp_path / "prompts.txt") if lines else ""
        data = DataConfig(trees=str(tmp_path / "trees.jsonl"), prompts=prompts, **data)
        return Config(data=data)

    return make


@pytest.fixture
def spa(tmp_path):
    """A configuration for the given pairs: 8 gold, 6 test, 2 rounds of 5 prompts."""

    def make(rows, num_gold=8, num_test_pairs=6, num_prompts=5, **data):
        write_jsonl(tmp_path / "pairs.jsonl", rows)
        return Config(
            method="spa",
            data=DataConfig(
                preferences=str(tmp_path / "pairs.jsonl"),
                num_gold=num_gold, num_test_pairs=num_test_pairs, **data,
            ),
            prompts=PromptsConfig(source="dataset", num_prompts=num_prompts),
        )  # fmt: skip

    return make


def test_trees_split_into_disjoint_parts_of_the_given_shares(srlm):
    task = task_from_files(srlm(trees(40), split=(0.5, 0.3, 0.2)))
    assert (len(task.ift), len(task.eft), len(task.judge_test)) == (20, 12, 8)
    parts = [texts(r.prompt for r in part) for part in (task.ift, task.eft, task.judge_test)]
    assert len(set().union(*parts)) == 40
    assert parts[0] != sorted(parts[0])
    assert texts(task.test_prompts) == parts[2]
    assert all(e.response == f"reply {prompt_text(e.prompt).split()[1]} 0" for e in task.ift)


def test_split_is_the_seeds(srlm):
    config = srlm(trees(40))
    assert task_from_files(config) == task_from_files(config)
    assert task_from_files(config).ift != task_from_files(replace(config, seed=1)).ift


def test_duplicated_prompts_stay_in_one_part(srlm):
    rows = trees(20) + trees(20)
    for row in rows[20:]:
        row["prompt"]["text"] = row["prompt"]["text"].upper().replace(" ", "  ")
    for seed in range(5):
        task = task_from_files(replace(srlm(rows), seed=seed))
        parts = [set(texts(r.prompt for r in p)) for p in (task.ift, task.eft, task.judge_test)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 20
        assert len(task.ift) == 2 * len(parts[0])
        assert len(task.test_prompts) == len(parts[2])


def test_trees_unfit_for_their_part_are_counted(srlm):
    rows = trees(20, replies=1) + trees(40)[20:]
    for row in rows[10:30]:
        row["prompt"]["replies"] = [
            {"text": "second best", "rank": 1},
            {"text": "third", "rank": 2},
        ]
    task = task_from_files(srlm(rows, split=(0.4, 0.3, 0.3)))
    assert 0 < len(task.ift) < 16 and "second best" not in {e.response for e in task.ift}
    assert all(len(g.responses) > 1 for g in (*task.eft, *task.judge_test))
    assert task.dropped == {
        "IFT tree: no reply of rank 0": 16 - len(task.ift),
        "EFT tree: a single reply": 12 - len(task.eft),
        "test tree: a single reply": 12 - len(task.judge_test),
    }


def test_pool_shares_no_prompt_with_the_trees_and_feeds_the_test_prompts(srlm):
    lines = ["Question  3", "other 0", *(f"other {i}" for i in range(30))]
    config = srlm(trees(20), lines, num_test_prompts=8)
    config = replace(config, prompts=PromptsConfig(source="dataset", num_prompts=12))
    task = task_from_files(config)
    assert len(task.judge_test) == 3
    assert len(task.test_prompts) == 8, "three of the trees, five that no round needs"
    assert len(task.prompts) == 25
    assert sorted(texts((*task.prompts, *task.test_prompts[3:]))) == sorted(others(30))
    assert task.dropped == {"prompt: seen before": 2}


def test_rounds_come_before_test_prompts(srlm):
    config = srlm(trees(20), others(26), num_test_prompts=8)
    config = replace(config, prompts=PromptsConfig(source="dataset", num_prompts=12))
    task = task_from_files(config)
    assert (len(task.prompts), len(task.test_prompts)) == (24, 5)


def test_too_few_trees_or_prompts_say_the_counts(srlm):
    with pytest.raises(UserError, match=r"\(3\): data.split leaves 2 for IFT, 1 for EFT, 0 for"):
        task_from_files(srlm(trees(3)))
    with pytest.raises(UserError, match="0 for EFT, 0 for the judge"):
        task_from_files(srlm(trees(20, replies=1)))
    config = replace(srlm(trees(20), others(9)), prompts=PromptsConfig("dataset", num_prompts=5))
    with pytest.raises(UserError, match="2 rounds of prompts need 10, but 9 are left"):
        task_from_files(config)


def test_eft_groups_are_not_asked_for_when_eft_is_off(srlm):
    rows = trees(3, replies=2)
    config = srlm(rows, split=(0.4, 0.01, 0.59))
    with pytest.raises(UserError, match="0 for EFT, 2 for the judge"):
        task_from_files(config)
    assert not task_from_files(replace(config, eft=EFTConfig(enabled=False))).eft


def test_missing_input_names_the_flag():
    with pytest.raises(UserError, match=r"--data\.trees"):
        task_from_files(Config())
    with pytest.raises(UserError, match=r"--data\.preferences"):
        task_from_files(Config(method="spa"))


def test_preferences_are_sliced_without_sharing_prompts(spa):
    rows = pairs(40, each=2)
    for row in rows[40:]:
        row["prompt"] = row["prompt"].upper() + " "
    for seed in range(5):
        task = task_from_files(spa(rows, num_test_prompts=6, shuffle_seed=seed))
        assert (len(task.gold), len(task.test_pairs)) == (8, 6)
        gold, test, pool, held_out = (
            texts(p) for p in (
                [r.prompt for r in task.gold], [r.prompt for r in task.test_pairs],
                task.prompts, task.test_prompts,
            )
        )  # fmt: skip
        assert not set(gold) & {*test, *pool, *held_out}
        assert not set(pool) & {*test, *held_out}
        assert set(test) <= set(held_out)
        assert len(held_out) == len(set(held_out)) == 6
        assert len(pool) == len(set(pool))
        assert len(pool) == 10


def test_prompt_list_replaces_the_unlabelled_rows(spa, tmp_path):
    write_text(
        tmp_path / "own.txt", "\n".join([*others(10), *(f"question {i}" for i in range(14))])
    )
    config = spa(pairs(14), prompts=str(tmp_path / "own.txt"))
    task = task_from_files(config)
    assert sorted(texts(task.prompts)) == sorted(others(10))
    assert task.dropped == {"prompt: seen before": 14}
    assert texts(task.prompts) != others(10), "a file sorted by topic must not give rounds of one"


@pytest.mark.parametrize(
    ("rows", "numbers", "message"),
    [
        (pairs(5), {}, "has 5 usable pairs, too few: data.num_gold asks for 8, 3 more than are"),
        (pairs(1, each=40), {}, "has 40 usable pairs, too few: prompts.num_prompts asks for 5, 5"),
        (pairs(17), {}, "has 17 usable pairs, too few: prompts.num_prompts asks for 5, 1 more"),
        (pairs(23), {}, "data.num_test_pairs asks for 6, 1 more than are left"),
    ],
    ids=["gold", "one-prompt", "rounds", "test"],
)
def test_too_few_preferences_say_the_counts(spa, rows, numbers, message):
    with pytest.raises(UserError, match=message):
        task_from_files(spa(rows, **numbers))


def test_real_files(shared):
    data = DataConfig(trees=str(shared / "data" / "oasst_sample.trees.jsonl"))
    task = task_from_files(Config(data=data))
    assert (len(task.ift), len(task.eft), len(task.judge_test)) == (59, 25, 15)
    data = DataConfig(
        preferences=str(shared / "data" / "preferences.jsonl"), num_gold=200, num_test_pairs=100
    )
    prompts = PromptsConfig(source="dataset", num_prompts=100)
    task = task_from_files(Config(method="spa", data=data, prompts=prompts))
    assert len(task.gold) == 200 and len(task.test_pairs) == 100 and len(task.prompts) >= 200
    assert task.name == "preferences.jsonl"
