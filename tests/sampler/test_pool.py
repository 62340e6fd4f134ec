"""Pages: taken, given back, never twice."""

import pytest
import torch

from srlm_fast.model.probe import LayerShape
from srlm_fast.sampler.pool import KVMemory, OutOfPages, PagePool


def test_pages_are_taken_once_and_come_back() -> None:
    pool = PagePool(5)
    some, others = pool.take(2), pool.take(3)
    assert sorted(some + others) == list(range(5)) and pool.free == 0
    pool.give(some)
    assert sorted(pool.take(2)) == sorted(some)


def test_too_few_pages_take_none() -> None:
    pool = PagePool(3)
    with pytest.raises(OutOfPages, match="4 pages asked for, 3 free"):
        pool.take(4)
    assert pool.free == 3


def test_freeing_twice_raises() -> None:
    pool = PagePool(3)
    pages = pool.take(1)
    pool.give(pages)
    with pytest.raises(RuntimeError, match=f"page {pages[0]} is freed twice"):
        pool.give(pages)


@pytest.mark.parametrize("owned", [[0], [0, 1, 2], [0, 0]], ids=str)
def test_a_check_sees_pages_lost_or_owned_twice(owned: list[int]) -> None:
    pool = PagePool(4)
    taken = pool.take(2)
    pool.check(taken)
    with pytest.raises(RuntimeError, match="lost or have two owners"):
        pool.check(owned)


def test_growing_keeps_what_is_taken() -> None:
    pool = PagePool(2)
    taken = pool.take(2)
    pool.grow(6)
    pool.check(taken)
    taken += pool.take(4)
    assert sorted(taken) == list(range(6))


def test_memory_keeps_its_pages_when_it_grows() -> None:
    memory = KVMemory(
        [LayerShape(2, 8, 4), LayerShape(1, 6, 6)], dtype=torch.float32, device=torch.device("cpu")
    )
    memory.resize(3)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*memory.keys, *memory.values):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    before = [tensor.clone() for tensor in (*memory.keys, *memory.values)]
    memory.resize(7)
    for old, new in zip(before, (*memory.keys, *memory.values), strict=True):
        assert new.shape == (7, *old.shape[1:])
        assert new[:3].equal(old)
    assert memory.page_bytes == (2 * 64 * 12 + 64 * 12) * 4
