"""The work lists: every query reads its past, each slot once, shared pages together."""

import random

import pytest
import torch

from srlm_fast.sampler.forest import PrefixForest
from srlm_fast.sampler.plan import SPLIT, PlanBuilder, decode_items, own_runs, prompt_runs
from srlm_fast.sampler.pool import PagePool
from srlm_fast.sampler.rows import own_pages
from srlm_kernels.tree_attention import TreePlan

CPU = torch.device("cpu")


def visible(plan: TreePlan, token: int, position: int) -> list[tuple[int, int]]:
    """(position, slot) of every key that a token at `position` may see, in the order of reading."""
    found = []
    for entry in plan.token_entries[plan.token_ptr[token] : plan.token_ptr[token + 1]].tolist():
        assert plan.queries[entry] == token
        (item,) = [row for row in plan.items.tolist() if row[2] <= entry < row[2] + row[3]]
        for page, start, first, end in plan.pages[item[0] : item[0] + item[1]].tolist():
            for slot in range(first, end):
                if start + slot <= position:
                    found.append((start + slot, page * 64 + slot))
    return found


@pytest.mark.parametrize("length", [1, 63, 64, 65, 511, 512, 513, 700, 1024])
@pytest.mark.parametrize("drawn", [1, 2, 64, 130, 600])
def test_a_decoding_row_sees_each_position_once(length: int, drawn: int) -> None:
    trees = PrefixForest(PagePool(64))
    path = trees.take(range(length))
    own = trees.take_pages(own_pages(length, drawn))
    builder = PlanBuilder(group=4)
    decode_items(builder, [(path, own, length)])
    plan = builder.build(1, CPU)
    last = length + drawn - 1
    seen = visible(plan, 0, last)
    assert [position for position, _ in seen] == list(range(last + 1))
    slots = [node.page * 64 + i for node in path for i in range(len(node.tokens))]
    first = length // 64
    slots += [own[p // 64 - first] * 64 + p % 64 for p in range(length, last + 1)]
    assert [slot for _, slot in seen] == slots
    # Parts end at multiples of SPLIT, wherever the prompt ends.
    for first_entry, count, *_ in plan.items.tolist():
        starts = plan.pages[first_entry : first_entry + count, 1].tolist()
        assert starts[0] // SPLIT == starts[-1] // SPLIT


def test_candidates_read_their_prompt_together() -> None:
    trees = PrefixForest(PagePool(100))
    shared = list(range(1000))
    prompts = [shared, shared, shared + [1] * 100, [5] * 30]
    rows = [(trees.take(p), trees.take_pages(1), len(p)) for p in prompts]
    builder = PlanBuilder(group=2)
    decode_items(builder, rows)
    readers = sorted(
        tuple(builder.queries[first : first + count]) for _, _, first, count in builder.items
    )
    # The first 512 positions together; behind them the longer prompt's pages are other ones.
    assert readers == sorted([(0, 1, 2), (0, 1), (2,), (2,), (3,), *((i,) for i in range(4))])


def test_parts_do_not_depend_on_who_shares_them() -> None:
    trees = PrefixForest(PagePool(200))
    prompts = [list(range(900)), list(range(900)), list(range(600)) + [7] * 300]
    rows = [(trees.take(p), trees.take_pages(2), len(p)) for p in prompts]

    def parts(row: int, together: list[int]) -> list[list[list[int]]]:
        builder = PlanBuilder(group=1)
        decode_items(builder, [rows[i] for i in together])
        plan = builder.build(len(together), CPU)
        at = together.index(row)
        found = []
        for entry in plan.token_entries[plan.token_ptr[at] : plan.token_ptr[at + 1]].tolist():
            (item,) = [x for x in plan.items.tolist() if x[2] <= entry < x[2] + x[3]]
            found.append(plan.pages[item[0] : item[0] + item[1]].tolist())
        return found

    for row in range(3):
        assert parts(row, [row]) == parts(row, [2, 1, 0]) == parts(row, [0, 1, 2])


@pytest.mark.parametrize("group", [1, 3, 7])
def test_prefill_reads_every_page_up_to_each_token(group: int) -> None:
    trees = PrefixForest(PagePool(20))
    path = trees.take(range(300))
    own = trees.take_pages(3)
    runs = prompt_runs(path) + own_runs(own, 300)
    builder = PlanBuilder(group)
    builder.prefill(runs, position=290, query=5, count=100)
    plan = builder.build(105, CPU)
    for i in (0, 1, 50, 99):
        assert [p for p, _ in visible(plan, 5 + i, 290 + i)] == list(range(291 + i))
    assert plan.token_ptr[5] == 0, "other tokens read nothing"
    tile = 128 // group
    assert max(count for *_, count in builder.items) <= tile


def test_launches_hold_every_item_once_in_tiles_that_fit() -> None:
    draw = random.Random(0)
    builder = PlanBuilder(group=3)
    for item in range(50):
        builder.read([(item, 0, 0, 64)], range(draw.randint(1, 42)))
    items, launches = builder.classes()
    assert launches[0][1] == 0 and launches[-1][2] == len(items) == 50
    for (most, first, end), after in zip(launches, [*launches[1:], None], strict=True):
        assert (items[first:end, 3] <= most).all()
        assert after is None or (after[1] == end and items[after[1], 3] > most)
    assert sorted(items[:, 0].tolist()) == list(range(50))
