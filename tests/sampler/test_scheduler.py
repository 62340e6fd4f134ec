"""Rows come in while pages last, leave when they end, and give way when pages run out."""

from collections.abc import Sequence

from srlm_fast.sampler.forest import PrefixForest
from srlm_fast.sampler.params import SamplingParams
from srlm_fast.sampler.pool import PagePool
from srlm_fast.sampler.rows import Row
from srlm_fast.sampler.scheduler import Scheduler
from srlm_fast.sampler.stops import Stops


def rows(prompt: Sequence[int], n: int, max_tokens: int) -> list[Row]:
    params = SamplingParams(n=n, max_tokens=max_tokens)
    stops = Stops(params, (), None)
    return [Row(tuple(prompt), index, index, params, stops) for index in range(n)]


def owned(scheduler: Scheduler) -> list[int]:
    own = [page for row in scheduler.running for page in row.pages]
    return own + [node.page for node in scheduler.forest.nodes()]


def scheduler(pages: int, waiting: list[Row], most: int = 99) -> Scheduler:
    return Scheduler(PrefixForest(PagePool(pages)), waiting, most)


def draw(some: Sequence[Row], count: int) -> None:
    for row in some:
        row.tokens += [1] * count


def test_rows_are_admitted_in_order_up_to_the_limit() -> None:
    waiting = rows(range(100), 3, 10) + rows(range(50), 2, 10)
    plan = scheduler(100, list(waiting), most=4)
    assert plan.admit() == waiting[:4] == plan.running
    assert plan.admit() == []
    waiting[1].ended = True
    assert plan.retire() == [waiting[1]]
    assert plan.admit() == [waiting[4]]
    assert plan.running == [waiting[0], waiting[2], waiting[3], waiting[4]]


def test_admission_leaves_room_for_what_running_rows_will_draw() -> None:
    # 2 pages of prompt; each row can come to need 5 of its own, of which 256 tokens are promised.
    waiting = rows(range(128), 9, 320)
    plan = scheduler(2 + 4 * 3, list(waiting))
    assert plan.admit() == waiting[:3]
    plan.forest.pool.check(owned(plan))


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    waiting = rows(range(128), 3, 700)
    plan = scheduler(2 + 12, list(waiting))
    plan.admit()
    for _ in range(4):
        plan.reserve(64)
        draw(plan.running, 64)
    assert plan.running == waiting and plan.preemptions == 0
    plan.reserve(64)
    assert plan.running == waiting[:2] and list(plan.waiting) == waiting[2:]
    assert waiting[2].pages == [] and len(waiting[2].tokens) == 256, "the tokens stay"
    plan.forest.pool.check(owned(plan))
    draw(plan.running, 64)
    assert plan.admit() == [], "no room yet"
    waiting[0].ended = waiting[1].ended = True
    plan.retire()
    assert plan.admit() == [waiting[2]]
    assert len(waiting[2].pages) == 4, "for the keys of 255 tokens and the next"
    plan.forest.pool.check(owned(plan))


def test_a_row_alone_always_gets_what_it_needs() -> None:
    (row,) = rows(range(100), 1, 200)
    plan = scheduler(2 + 4, [row])
    plan.forest.release(plan.forest.take([7] * 64))  # a cached prompt in the way
    plan.admit()
    while len(row.tokens) < 200:
        plan.reserve(16)
        assert plan.running == [row]
        draw([row], min(16, 200 - len(row.tokens)))
    row.ended = True
    plan.retire()
    plan.forest.pool.check(owned(plan))
