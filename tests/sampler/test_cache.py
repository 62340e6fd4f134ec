"""The slabs."""

import torch
from torch import Tensor

from srlm_fast.sampler.cache import SlabCache


def states(rows: int, length: int, start: int = 0) -> Tensor:
    """[rows, 2, length, 3], every value different."""
    count = rows * 2 * length * 3
    return torch.arange(start, start + count, dtype=torch.float32).view(rows, 2, length, 3)


def filled(rows: int, length: int, start: int = 0, capacity: int = 8) -> SlabCache:
    cache = SlabCache(1, capacity)
    cache.update(states(rows, length, start), -states(rows, length, start), 0)
    return cache


def test_update_appends_in_place() -> None:
    cache = filled(2, 3)
    slab = cache.layers[0].keys.data_ptr()
    keys, values = cache.update(states(2, 1, 900), -states(2, 1, 900), 0)
    assert keys.data_ptr() == slab
    assert cache.get_seq_length() == 4
    assert torch.equal(keys, torch.cat([states(2, 3), states(2, 1, 900)], 2))
    assert torch.equal(values, -keys)


def test_a_full_slab_grows_and_keeps_its_content() -> None:
    cache = filled(2, 3, capacity=3)
    keys, _ = cache.update(states(2, 2, 900), states(2, 2, 900), 0)
    assert torch.equal(keys, torch.cat([states(2, 3), states(2, 2, 900)], 2))
    assert cache.layers[0].capacity == 6


def test_keep_moves_the_last_rows_into_the_holes() -> None:
    cache = filled(5, 3)
    cache.keep(torch.tensor([0, 4, 2]))
    cache.update(states(3, 1), states(3, 1), 0)
    assert torch.equal(cache.layers[0].keys[:, :, :3], states(5, 3)[[0, 4, 2]])
    assert torch.equal(cache.layers[0].values[:, :, :3], -states(5, 3)[[0, 4, 2]])


def test_expanded_repeats_rows_and_aligns_shorter_parts_right() -> None:
    parts = [filled(2, 4), filled(1, 2, 500)]
    cache = SlabCache.expanded(parts, repeats=3, capacity=6)
    keys = cache.layers[0].keys
    assert keys.shape == (9, 2, 6, 3)
    assert torch.equal(keys[:6, :, :4], states(2, 4).repeat_interleave(3, 0))
    assert torch.equal(keys[6:, :, 2:4], states(1, 2, 500).repeat_interleave(3, 0))
    assert (keys[6:, :, :2] == 0).all()
    assert parts[0].layers[0].keys is None
