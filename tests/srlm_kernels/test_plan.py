"""Chunks of whole pairs, slices, and the rows that count."""

import pytest
import torch

from srlm_kernels.plan import Chunk, chunk_rows, plan_pairs, scored_rows, slices

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_pairs_are_packed_in_order_up_to_the_limit():
    offsets = [0, 2, 4, 6, 8, 13, 13, 13, 13, 20, 21]  # pairs of 4, 4, 5, 0 and 8 rows
    assert list(plan_pairs(offsets, 9)) == [
        Chunk(0, 8, 0, 2),
        Chunk(8, 13, 2, 4),
        Chunk(13, 21, 4, 5),
    ]


@pytest.mark.parametrize("limit", [1, 3, 7, 8, 100])
def test_every_pair_is_in_one_chunk_and_only_a_single_pair_is_too_long(limit):
    generator = torch.Generator().manual_seed(limit)
    lengths = torch.randint(0, 6, (2 * 17,), generator=generator)
    offsets = [0, *lengths.cumsum(0).tolist()]
    chunks = list(plan_pairs(offsets, limit))
    assert [p for c in chunks for p in range(c.first, c.last)] == list(range(17))
    for c in chunks:
        assert (c.lo, c.hi) == (offsets[2 * c.first], offsets[2 * c.last])
        assert c.hi - c.lo <= limit or c.last == c.first + 1


def test_no_pairs_are_no_chunks():
    assert list(plan_pairs([0], 8)) == []
    assert list(slices(5, 5, 8)) == []


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 65])
def test_slices_cover_the_range_in_pieces_of_nearly_one_size(count):
    pieces = list(slices(3, 3 + count, 8))
    assert [i for lo, hi in pieces for i in range(lo, hi)] == list(range(3, 3 + count))
    sizes = {hi - lo for lo, hi in pieces}
    assert max(sizes) <= 8 and max(sizes) - min(sizes) <= 1


def test_a_gpu_gets_chunks_that_hide_the_heads_traffic():
    assert chunk_rows(128256, CPU) == 512
    assert chunk_rows(262144, CUDA) == 4096
    assert chunk_rows(32000, CUDA) * 32000 * 4 <= 2**32


TARGET = torch.tensor([4, -100, 2, -100, 0], dtype=torch.int32)
HIDDEN = torch.arange(12.0).view(6, 2)


@pytest.mark.parametrize("rows", [None, torch.tensor([5, 0, 5, 1, 1], dtype=torch.int32)])
def test_ignored_rows_are_dropped_on_the_cpu(rows):
    scored = scored_rows(TARGET, rows, -100)
    source = torch.arange(6) if rows is None else rows.long()
    assert scored.target.tolist() == [4, 2, 0]
    assert torch.equal(scored.gather(HIDDEN, 1, 3), HIDDEN[source[[2, 4]]])
    assert scored.counts.tolist() == [True] * 3
    assert scored.spread(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1, 0, 2, 0, 3]
    assert scored.collect(torch.arange(5.0)).tolist() == [0, 2, 4]
    assert scored.offsets(torch.tensor([0, 2, 5])).tolist() == [0, 1, 3]


def test_nothing_ignored_is_nothing_copied():
    scored = scored_rows(TARGET.abs() % 6, None, -100)
    assert scored.gather(HIDDEN, 1, 3).data_ptr() == HIDDEN[1].data_ptr()
    assert scored.offsets(torch.tensor([0, 2, 5])).tolist() == [0, 2, 5]


def test_where_dropping_would_wait_for_a_device_ignored_rows_are_emptied():
    meta = scored_rows(TARGET.to("meta"), None, -100)
    assert meta.target.shape == (5,) and meta.kept is None and meta.ignored is not None
    ignored = TARGET == -100
    scored = type(meta)(TARGET.long(), None, None, ignored, 5)
    hidden = HIDDEN.clone()
    hidden[1] = torch.nan
    assert scored.gather(hidden, 0, 5).tolist() == [[0, 1], [0, 0], [4, 5], [0, 0], [8, 9]]
    assert scored.counts.tolist() == [True, False, True, False, True]
    assert scored.spread(torch.ones(5)).tolist() == [1, 0, 1, 0, 1]
    assert scored.collect(torch.ones(5)).tolist() == [1, 0, 1, 0, 1]


def test_duplicate_rows_are_summed():
    scored = scored_rows(torch.tensor([1, 1, 1]), torch.tensor([4, 0, 4]), -100)
    grad = scored.scatter(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), HIDDEN)
    assert grad.tolist() == [[3, 4], [0, 0], [0, 0], [0, 0], [6, 8], [0, 0]]
