"""The slices of SPA's preference rows, against `datasets` itself and by hand."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from srlm_fast.config import Config, DataConfig, PromptsConfig, SPAConfig
from srlm_fast.data.files import task_from_files
from srlm_fast.data.jsonl import write_jsonl, write_text
from srlm_fast.data.records import prompt_text
from srlm_fast.data.slices import PreferenceRows
from srlm_fast.errors import UserError

ORDER_OF_12 = [0, 7, 6, 9, 11, 3, 5, 2, 4, 10, 1, 8]


def row(prompt, rejected="bad"):
    return {"prompt": prompt, "chosen": f"good {prompt}", "rejected": f"{rejected} {prompt}"}


@pytest.fixture
def config(tmp_path):
    """Two rounds of a list of three: 4 gold rows, slices of 6, 8 and 10, and 3 test pairs."""

    def make(rows, num_gold=4, sizes=(6, 8, 10), num_test_pairs=3, **data):
        path = tmp_path / "pairs.jsonl"
        write_jsonl(path, rows)
        return Config(
            method="spa",
            data=DataConfig(
                preferences=str(path), num_gold=num_gold, num_test_pairs=num_test_pairs, **data
            ),
            prompts=PromptsConfig(source="dataset", num_prompts_by_round=sizes),
        )

    return make


def texts(prompts):
    return [prompt_text(prompt) for prompt in prompts]


def test_the_shuffle_is_numpys_which_is_what_datasets_does():
    """Written out, since another numpy might draw otherwise and move every slice."""
    assert np.random.default_rng(42).permutation(12).tolist() == ORDER_OF_12
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    shuffled = datasets.Dataset.from_dict({"i": list(range(12))}).shuffle(seed=42)
    assert list(shuffled["i"]) == ORDER_OF_12


@pytest.mark.parametrize("slices", ["rows", "prompts"])
def test_slices_are_those_of_the_authors_code(config, slices):
    """make_data_split.py: shuffle(seed=42), then [:2000], [2000:10000] and so on, rest test."""
    rows = [row(f"question {i}") for i in range(40)]
    task = task_from_files(config(rows, slices=slices))
    order = [f"question {i}" for i in np.random.default_rng(42).permutation(40).tolist()]
    assert texts(pair.prompt for pair in task.gold) == order[:4]
    assert texts(task.prompts[:6]) == order[4:10]
    assert texts(task.prompts[6:]) == order[10:18], "two rounds, though the list has three"
    assert list(task.round_sizes) == [6, 8]
    assert texts(pair.prompt for pair in task.test_pairs) == order[37:]
    assert texts(task.test_prompts) == [*order[37:], *reversed(order[28:37])]
    assert not task.dropped


def test_the_run_s_seed_moves_no_row_and_shuffle_seed_does(config):
    rows = [row(f"question {i}") for i in range(40)]
    one, other = (config(rows, shuffle_seed=s) for s in (42, 43))
    assert task_from_files(one) == task_from_files(replace(one, seed=5))
    assert task_from_files(one).gold != task_from_files(other).gold


def test_rows_that_cannot_be_used_take_their_place_in_a_slice_of_rows(config):
    """The authors cut the dataset, whatever its rows hold; else the next usable row steps in."""
    order = np.random.default_rng(42).permutation(40).tolist()
    rows = [row(f"question {i}") for i in range(40)]
    broken, repeated = order[1], order[5]
    rows[broken]["rejected"] = rows[broken]["chosen"]
    rows[repeated] = row(f"QUESTION  {order[0]}", "worse")
    by_rows = task_from_files(config(rows, slices="rows"))
    assert (len(by_rows.gold), list(by_rows.round_sizes)) == (3, [5, 8])
    assert texts(by_rows.prompts[:5]) == [f"question {order[i]}" for i in (4, 6, 7, 8, 9)]
    by_prompts = task_from_files(config(rows))
    assert (len(by_prompts.gold), list(by_prompts.round_sizes)) == (4, [6, 8])
    assert texts(by_prompts.prompts[:6]) == [f"question {i}" for i in order[6:12]]
    lost = {"pair: equal replies": 1, "pair: prompt seen before": 1}
    assert by_rows.dropped == by_prompts.dropped == lost


def test_a_round_asks_nothing_twice_and_gold_may(config):
    rows = [row(f"question {i // 2}", f"bad {i}") for i in range(80)]
    task = task_from_files(config(rows, num_gold=16, sizes=(6, 8)))
    gold, prompts = texts(pair.prompt for pair in task.gold), texts(task.prompts)
    assert len(gold) == 16 > len(set(gold))
    assert len(prompts) == len(set(prompts)) == 14
    assert not {*gold, *prompts} & set(texts(p.prompt for p in task.test_pairs))


def test_test_pairs_stay_the_same_whatever_is_dealt_before(config):
    rows = [row(f"question {i}") for i in range(40)]
    one, other = (task_from_files(config(rows, **c)) for c in ({}, {"num_gold": 9, "sizes": (2,)}))
    assert one.test_pairs == other.test_pairs


@pytest.mark.parametrize(
    ("count", "data", "complaint"),
    [
        (3, {}, "has 3 usable pairs, too few: data.num_gold asks for 4, 1 more than are left"),
        (9, {}, "prompts.num_prompts asks for 6, 1 more than are left on prompts that no other"),
        (30, {"slices": "rows"}, "data.num_test_pairs asks for 3, 1 more than are left"),
    ],
)
def test_too_few_rows_say_what_they_were_for(config, count, data, complaint):
    with pytest.raises(UserError, match=complaint):
        task_from_files(config([row(f"question {i}") for i in range(count)], **data))


def test_no_seed_takes_no_gold_and_needs_no_pairs(config, tmp_path):
    changed = replace(
        config([row(f"question {i}") for i in range(30)]), spa=SPAConfig(no_seed=True)
    )
    task = task_from_files(changed)
    assert not task.gold and len(task.test_pairs) == 3 and list(task.round_sizes) == [6, 8]
    prompts = tmp_path / "prompts.txt"
    write_text(prompts, "\n".join(f"other {i}" for i in range(40)))
    data = DataConfig(prompts=str(prompts), num_test_prompts=5)
    task = task_from_files(replace(changed, data=data))
    assert not task.test_pairs and len(task.test_prompts) == 5 and len(task.prompts) == 35
    assert task.name == "prompts.txt"


def test_nothing_to_test_on_is_said(config):
    rows = [row(f"question {i}") for i in range(28)]
    with pytest.raises(UserError, match="no prompt is left to test on"):
        task_from_files(config(rows, num_test_pairs=0))


def test_num_prompts_and_a_list_of_them_exclude_each_other():
    with pytest.raises(UserError, match="leave num_prompts out"):
        PromptsConfig(num_prompts=80, num_prompts_by_round=(8, 9))
    sizes = PromptsConfig(num_prompts_by_round=(8, 9))
    assert [sizes.of_round(t) for t in (1, 2, 3)] == [8, 9, 9] and sizes.of_rounds(3) == 26
    assert sizes.for_round(2) == PromptsConfig(num_prompts=9)


def test_rows_left_out_are_counted_once(config):
    settings = config([row("same", f"bad {i}") for i in range(9)], num_gold=1)
    dropped: Counter[str] = Counter()
    rows = PreferenceRows(settings.data, dropped)
    assert len(rows.deal(1, "data.num_gold")) == 1
    with pytest.raises(UserError):
        rows.deal(1, "prompts.num_prompts")
    assert dropped == {"pair: prompt seen before": 8}
