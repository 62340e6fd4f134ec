"""How rows are cut into chunks: whole pairs together, so that their slopes are known at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Rows lo..hi, which are those of pairs first..last."""

    lo: int
    hi: int
    first: int
    last: int


def chunk_rows(columns: int, device: torch.device) -> int:
    """Rows per chunk.

    Every chunk reads the head twice and reads and writes its gradient once, so it needs enough rows
    to hide that behind its GEMMs: 512 on a CPU, 4096 on a GPU, or as many as 4 GiB of fp32 logits.
    """
    if device.type == "cpu":
        return 512
    return max(4096, 2**30 // max(columns, 1))


def plan_pairs(offsets: list[int], limit: int) -> Iterator[Chunk]:
    """Chunks of consecutive whole pairs with at most `limit` rows; a longer pair stands alone."""
    first = 0
    pairs = len(offsets) // 2
    while first < pairs:
        last = first + 1
        while last < pairs and offsets[2 * last + 2] - offsets[2 * first] <= limit:
            last += 1
        yield Chunk(offsets[2 * first], offsets[2 * last], first, last)
        first = last


def slices(lo: int, hi: int, limit: int) -> Iterator[tuple[int, int]]:
    """lo..hi in nearly equal pieces of at most `limit`."""
    count = -(-(hi - lo) // limit)
    for i in range(count):
        yield lo + (hi - lo) * i // count, lo + (hi - lo) * (i + 1) // count


@dataclass(frozen=True)
class Scored:
    """The rows that are worked on, M of the N that were given."""

    target: Tensor
    """[M] int64"""
    source: Tensor | None
    """[M] rows of the hidden states; None: row m itself."""
    kept: Tensor | None
    """[M] positions among the N; None: all."""
    ignored: Tensor | None
    """[M] bool, rows among the M that do not count after all; None: all count."""
    given: int
    """N"""

    @property
    def counts(self) -> Tensor:
        """[M] bool."""
        if self.ignored is None:
            return torch.ones_like(self.target, dtype=torch.bool)
        return ~self.ignored

    def offsets(self, cu_seqlens: Tensor) -> Tensor:
        """Sequence offsets among the M rows from those among the N, int64; on the host if possible.

        Reading them from a device waits for it: pass `cu_seqlens` on the CPU.
        """
        offsets = cu_seqlens.long().cpu()
        if self.kept is None:
            return offsets
        counted = torch.zeros(self.given + 1, dtype=torch.int64)
        counted[self.kept + 1] = 1
        return counted.cumsum(0)[offsets]

    def gather(self, hidden: Tensor, lo: int, hi: int) -> Tensor:
        """Hidden states of rows lo..hi, [n, D]."""
        x = hidden[lo:hi] if self.source is None else hidden.index_select(0, self.source[lo:hi])
        # A NaN in an ignored row would reach dW as 0 * NaN.
        return x if self.ignored is None else x.masked_fill(self.ignored[lo:hi, None], 0)

    def spread(self, values: Tensor) -> Tensor:
        """[M] to [N], 0 in rows that do not count."""
        if self.ignored is not None:
            values = values.masked_fill(self.ignored, 0)
        if self.kept is None:
            return values
        return values.new_zeros(self.given).index_copy(0, self.kept, values)

    def collect(self, values: Tensor) -> Tensor:
        """[N] to [M], 0 in rows that do not count."""
        values = values if self.kept is None else values.index_select(0, self.kept)
        return values if self.ignored is None else values.masked_fill(self.ignored, 0)

    def scatter(self, grad: Tensor, like: Tensor) -> Tensor:
        """Gradients [M, D] of the rows, summed into the hidden states' [T, D] in a fixed order."""
        if self.source is None:
            return grad.to(like.dtype)
        total = grad.new_zeros(like.shape)
        if grad.is_cuda:  # sorts the indices first; index_add_ would race on duplicates
            total.index_put_((self.source,), grad, accumulate=True)
        else:
            total.index_add_(0, self.source, grad)
        return total.to(like.dtype)


def scored_rows(target: Tensor, rows: Tensor | None, ignore_index: int) -> Scored:
    """Drops ignored rows where that waits for no device, marks them elsewhere."""
    ignored = target == ignore_index
    target = target.long()
    rows = None if rows is None else rows.long()
    given = target.shape[0]
    if target.device.type != "cpu":
        return Scored(target, rows, None, ignored, given)
    if not ignored.any():
        return Scored(target, rows, None, None, given)
    kept = (~ignored).nonzero()[:, 0]
    source = kept if rows is None else rows[kept]
    return Scored(target[kept], source, kept, None, given)
