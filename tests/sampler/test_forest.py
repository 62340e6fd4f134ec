"""Prompts that begin alike share pages."""

import random

import pytest

from srlm_fast.sampler.forest import Node, PrefixForest
from srlm_fast.sampler.pool import OutOfPages, PagePool


def forest(pages: int) -> PrefixForest:
    return PrefixForest(PagePool(pages))


def check(trees: PrefixForest, private: list[int] | None = None) -> None:
    nodes = list(trees.nodes())
    trees.pool.check([node.page for node in nodes] + (private or []))
    assert trees.unused == sum(node.users == 0 for node in nodes)
    assert all(node.parent is None or node.parent.users >= node.users for node in nodes)


def pages(path: list[Node]) -> list[int]:
    return [node.page for node in path]


@pytest.mark.parametrize(
    ("common", "shared"),
    [(0, 0), (1, 0), (63, 0), (64, 1), (65, 1), (127, 1), (128, 2), (200, 3)],
)
def test_whole_pages_are_shared(common: int, shared: int) -> None:
    trees = forest(20)
    first = [7] * common + list(range(100, 300 - common))
    second = [7] * common + list(range(500, 700 - common))
    a, b = trees.take(first), trees.take(second)
    assert [len(node.tokens) for node in a] == [64, 64, 64, 8]
    assert sum(x is y for x, y in zip(a, b, strict=True)) == (4 if common == 200 else shared)
    check(trees)


def test_equal_prompts_are_one_path_and_a_part_shares_its_whole_pages() -> None:
    trees = forest(10)
    prompt = list(range(150))
    path = trees.take(prompt)
    assert trees.take(prompt) == path
    assert trees.take(prompt[:128]) == path[:2]
    longer = trees.take([*prompt, 1])
    assert longer[:2] == path[:2] and longer[2] is not path[2]
    assert trees.claim(prompt) == 0 and trees.claim([*prompt[:128], 9]) == 1
    check(trees)


def test_unused_prompts_stay_until_their_pages_are_wanted() -> None:
    trees = forest(6)
    old, young = trees.take([1] * 128), trees.take([2] * 128)
    trees.release(old)
    trees.release(young)
    assert trees.available == 6
    assert trees.take([2] * 128) == young, "still there"
    trees.take([3] * 190)
    check(trees)
    assert not any(node is old[1] for node in trees.nodes()), "the longest unused one went"


def test_a_page_in_use_is_never_evicted() -> None:
    trees = forest(4)
    path = trees.take([1] * 200)
    with pytest.raises(OutOfPages):
        trees.take([2])
    trees.release(path)
    trees.take([1] * 64)
    trees.take([2] * 192)
    check(trees)
    assert trees.claim([1] * 64) == 0


def test_a_prompt_that_finds_no_room_leaves_nothing_behind() -> None:
    trees = forest(3)
    path = trees.take([1] * 70)
    with pytest.raises(OutOfPages):
        trees.take([1] * 64 + [2] * 128)
    check(trees)
    assert trees.pool.free == 1
    assert [node.users for node in path] == [1, 1]


def test_clearing_forgets_prompts_in_use_too() -> None:
    trees = forest(5)
    trees.take([1] * 200)
    trees.clear()
    assert trees.pool.free == 5 and not list(trees.nodes())
    check(trees)


def test_random_use_keeps_every_page_with_one_owner() -> None:
    draw, trees = random.Random(0), forest(24)
    paths: list[list[Node]] = []
    private: list[int] = []
    for _ in range(2000):
        action = draw.random()
        try:
            if action < 0.5:
                paths.append(
                    trees.take([draw.randint(0, 1) for _ in range(draw.randint(1, 3))] * 64)
                )
            elif action < 0.8 and paths:
                trees.release(paths.pop(draw.randrange(len(paths))))
            elif action < 0.9:
                private += trees.take_pages(draw.randint(0, 4))
            elif private:
                trees.pool.give([private.pop()])
        except OutOfPages:
            assert trees.available < 24
        check(trees, private)
