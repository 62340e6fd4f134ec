"""Vocabulary tiles: their bounds, their memory, and a chunk against float64."""

import pytest
import torch

from srlm_kernels.head import Grads, Head
from srlm_kernels.row_stats import POLICY_MAX, POLICY_SUM, TARGET
from srlm_kernels.tiles import Transform, VocabTiles, tile_bounds


@pytest.mark.parametrize("width", [16, 32, 100, 2048])
@pytest.mark.parametrize("columns", [0, 1, 31, 32, 33, 97, 5021, 32003])
def test_tiles_cover_the_vocabulary_and_their_padded_rows_do_not_overlap(columns, width):
    bounds = tile_bounds(columns, width)
    assert [c for lo, hi in bounds for c in range(lo, hi)] == list(range(columns))
    end = 0
    for lo, hi in bounds:
        assert lo >= end and lo % 32 == 0
        end = lo + -(-(hi - lo) // 32) * 32
    assert end <= -(-columns // 32) * 32


def tiles_of(head: Head, hidden: torch.Tensor, *, keep: bool) -> VocabTiles:
    return VocabTiles(
        head, None, hidden, rows=len(hidden), keep=keep, transform=Transform(), extrapolation=None,
        outputs=(), logits_dtype=hidden.dtype,
    )  # fmt: skip


@pytest.fixture
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srlm_kernels.tiles.tile_width", lambda dtype, device: 32)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chunk_and_its_gradients(problem, true_logits, narrow_tiles, keep, dtype):
    p = problem((9, 31, 123), dtype)
    head = Head(p.weight, p.bias)
    tiles = tiles_of(head, p.hidden, keep=keep)
    assert len(tiles.bounds) == 4
    state = tiles.score(p.hidden, None, p.target)
    lse = state[POLICY_MAX] + state[POLICY_SUM].log()
    z = true_logits(p.hidden, p.weight, p.bias)
    torch.testing.assert_close(lse.double(), z.logsumexp(1), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(
        state[TARGET].double(), z.gather(1, p.target[:, None])[:, 0], atol=1e-5, rtol=1e-6
    )
    upstream = torch.linspace(-1, 1, 9, dtype=dtype)
    grads = Grads.of(head, dtype, weight=True, bias=True)
    grad_x = torch.full_like(p.hidden, torch.nan)
    tiles.backward(
        p.hidden, p.target, lse, upstream, recompute=not keep, grad_x=grad_x, grads=grads
    )
    dz = -z.softmax(1)
    dz[torch.arange(9), p.target] += 1
    dz *= upstream.double()[:, None]
    close = {"atol": 2e-5, "rtol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(grad_x, dz @ p.weight.double(), **close)
    torch.testing.assert_close(grads.total(), dz.T @ p.hidden.double(), **close)
    torch.testing.assert_close(grads.bias, dz.sum(0), **close)


@pytest.mark.parametrize("columns", [61, 64, 123])
def test_nan_in_a_row_stays_there_in_bf16(problem, narrow_tiles, columns):
    """Regression: the GEMM multiplied what lay behind a row, garbage or the next row, by zero."""
    p = problem((40, 32, columns), torch.bfloat16)
    p.hidden[7] = torch.nan
    tiles = tiles_of(Head(p.weight), p.hidden, keep=True)
    state = tiles.score(p.hidden, None, p.target)
    lse = state[POLICY_MAX] + state[POLICY_SUM].log()
    grad_x = torch.empty(40, 32)
    tiles.backward(
        p.hidden, p.target, lse, torch.ones(40), recompute=False, grad_x=grad_x,
        grads=Grads(None, None),
    )  # fmt: skip
    assert torch.equal(lse.isnan().nonzero()[:, 0], torch.tensor([7]))
    assert torch.equal(grad_x.isnan().any(1).nonzero()[:, 0], torch.tensor([7]))


def test_only_a_kept_chunk_has_room_for_all_its_logits(problem, narrow_tiles):
    p = problem((9, 31, 123))
    head = Head(p.weight)
    assert tiles_of(head, p.hidden, keep=True).buffer.numel() == 9 * 128
    assert tiles_of(head, p.hidden, keep=False).buffer.numel() == 9 * 32
