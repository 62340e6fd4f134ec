"""`linear_logp` for scoring, as one Triton kernel: a tile of logits lives in registers only.

Each program takes some rows and a slice of the vocabulary, multiplies tile by tile, policy first
and reference second (one loop over both would need more registers than there are), and folds the
tiles into the statistics of `row_stats`. The slices' statistics, 32 bytes per row each, are merged
afterwards in a fixed order: a row's result depends on no other row.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srlm_kernels import row_stats as rs
from srlm_kernels.backends import refusal
from srlm_kernels.linear_logp import LinearLogp
from srlm_kernels.problem import log_sum_exp
from srlm_kernels.triton_support import (
    EXACT,
    constant,
    dense,
    extrapolated,
    final_logit,
    jit,
    target_arch,
    tl,
    transform_factors,
    triton,
)

LN2 = constant(math.log(2))

# Columns of the vocabulary per program: as few as give a small batch enough programs to fill a GPU.
# Not a function of the batch, or a row's bits would depend on it. A multiple of every tile.
SLICE = 1024

# Row tiles that run side by side over the same slices, so that a slice is read from memory once for
# all of them and they are still in the L2 cache for the next.
GROUP = 16


@dataclass(frozen=True)
class Tiling:
    """Tiles [rows, depth] of hidden states and [columns, depth] of the head, and how they run."""

    rows: int
    columns: int
    depth: int
    described: bool
    """Loaded through tensor descriptors, which are TMA from sm_90 on; else through pointers."""
    warps: int = 8
    stages: int = 3


def tiling(itemsize: int, paired: bool, arch: int) -> Tiling:
    """Tiles for operands of 2 or 4 bytes, with policy and reference together or one alone.

    The largest that leave all of it in registers, see tests/srlm_kernels/aot.py.
    """
    if itemsize == 4:
        return Tiling(64, 64, 32, described=False)
    if arch < 90:
        return Tiling(64 if paired else 128, 128, 64, described=False)
    return Tiling(128, 256 if arch == 90 and not paired else 128, 64, described=True)


def takes(hidden: Tensor, weight: Tensor) -> str | None:
    """Why the kernel cannot score `hidden` [T, D] under `weight` [V, D]; None: it can."""
    if reason := refusal("triton", hidden):
        return reason
    if hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return "it needs compute capability 8.0"
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bfloat16, float16 and float32, not {hidden.dtype}"
    if weight.dtype != hidden.dtype:
        return f"hidden is {hidden.dtype} and weight {weight.dtype}"
    if weight.stride(1) != 1 or _misaligned(weight):
        return "rows of weight must be contiguous and start at multiples of 16 bytes"
    return None


def _misaligned(matrix: Tensor) -> bool:
    return bool(matrix.data_ptr() % 16 or matrix.stride(0) * matrix.itemsize % 16)


def linear_logp_tiled(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    extrapolation: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: Collection[str] = (),
    logits_dtype: torch.dtype | None = None,
) -> LinearLogp:
    """See `linear_logp`; results carry no gradients. fp32 logits, no `outputs`.

    Raises ValueError with the reason where `takes` gives one, for the reference too.
    """
    if outputs or logits_dtype not in (None, torch.float32):
        raise ValueError("impl='tiled' has fp32 logits and computes no outputs")
    state = tiled_state(
        hidden, weight, target, rows=rows, bias=bias, ref_hidden=ref_hidden,
        ref_weight=ref_weight, ref_bias=ref_bias, extrapolation=extrapolation or None,
        softcap=softcap, logit_scale=logit_scale, temperature=temperature,
    )  # fmt: skip
    ignored = target == ignore_index
    logp = (state[rs.TARGET] - log_sum_exp(state)).masked_fill(ignored, 0)
    if ref_hidden is None:
        return LinearLogp(logp)
    ref_logp = (state[rs.REF_TARGET] - log_sum_exp(state, rs.REF_MAX)).masked_fill(ignored, 0)
    if not extrapolation:
        return LinearLogp(logp, ref_logp, None if extrapolation is None else logp.clone())
    mixed = rs.extrapolate(state[rs.TARGET], state[rs.REF_TARGET], extrapolation)
    mixed = (mixed - log_sum_exp(state, rs.EXT_MAX)).masked_fill(ignored, 0)
    return LinearLogp(logp, ref_logp, mixed)


@torch.no_grad()
def tiled_state(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    extrapolation: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """The state [8, N] fp32 of N rows over the whole vocabulary, as `row_stats` would leave it.

    Arguments are those of `linear_logp`, `extrapolation` not 0. A target outside the vocabulary
    leaves NaN, like any that `row_stats` never met. Raises ValueError as `linear_logp_tiled`.
    """
    policy = _Stream.of(hidden, rows, weight, bias)
    reference = None
    if ref_hidden is not None and ref_weight is None:
        reference = _Stream.of(ref_hidden, rows, weight, bias if ref_bias is None else ref_bias)
    elif ref_hidden is not None and ref_weight is not None:
        reference = _Stream.of(ref_hidden, rows, ref_weight, ref_bias)
    capped = softcap is not None
    inner, outer = transform_factors(softcap, logit_scale, temperature)
    # The kernel counts in units of ln 2: the hardware's exponential is that of base 2.
    factors = (inner, outer / math.log(2)) if capped else (inner / math.log(2), outer)
    if reference is not None and extrapolation is not None:
        return _state(policy, reference, float(extrapolation), target, factors, capped)
    state = _state(policy, None, None, target, factors, capped)
    if reference is not None:
        # Nothing mixes the two: one after the other they can have larger tiles.
        alone = _state(reference, None, None, target, factors, capped)
        state[rs.REF_MAX] = alone[rs.POLICY_MAX]
        state[rs.REF_SUM] = alone[rs.POLICY_SUM]
        state[rs.REF_TARGET] = alone[rs.TARGET]
    return state


@dataclass(frozen=True)
class _Stream:
    """Hidden states [N, D] and the head they meet."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(
        cls, hidden: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> _Stream:
        if reason := takes(hidden, weight):
            raise ValueError(f"impl='tiled' cannot run here: {reason}")
        hidden = hidden if rows is None else hidden.index_select(0, rows)
        if hidden.stride(1) != 1 or _misaligned(hidden):
            hidden = hidden.clone(memory_format=torch.contiguous_format)
        return cls(hidden, weight, dense(bias))

    def arguments(self, tile: Tiling) -> tuple[Any, ...]:
        """What the kernel takes: hidden, weight, their strides, width and bias."""
        hidden, weight = self.hidden, self.weight
        matrices: tuple[Any, Any] = hidden, weight
        if tile.described:
            from triton.tools.tensor_descriptor import TensorDescriptor

            matrices = (
                TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth]),
                TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
            )
        return *matrices, hidden.stride(0), weight.stride(0), weight.shape[1], self.bias


def _state(
    policy: _Stream,
    reference: _Stream | None,
    extrapolation: float | None,
    target: Tensor,
    factors: tuple[float, float],
    capped: bool,
) -> Tensor:
    count, vocabulary = policy.hidden.shape[0], policy.weight.shape[0]
    device = policy.hidden.device
    if count == 0:
        return rs.new_state(0, dtype=torch.float32, device=device)
    slices = triton.cdiv(vocabulary, SLICE)
    states = torch.empty(slices, rs.ROWS, count, dtype=torch.float32, device=device)
    with torch.cuda.device_of(policy.hidden):
        tile = tiling(policy.hidden.itemsize, reference is not None, target_arch())
        _tiled_kernel[(triton.cdiv(count, tile.rows) * slices,)](
            states, *policy.arguments(tile),
            *(reference.arguments(tile) if reference else (None,) * 6),
            dense(target), count, vocabulary, *factors, extrapolation,
            CAPPED=capped, SLICE=SLICE, GROUP=GROUP, ROWS=tile.rows, COLUMNS=tile.columns,
            DEPTH=tile.depth, DESCRIBED=tile.described, num_warps=tile.warps,
            num_stages=tile.stages, **EXACT,
        )  # fmt: skip
    return rs.merge_states(states)


@jit
def _tiled_kernel(
    states,
    hidden,
    weight,
    hidden_stride,
    weight_stride,
    width,
    bias,
    ref_hidden,
    ref_weight,
    ref_hidden_stride,
    ref_weight_stride,
    ref_width,
    ref_bias,
    target,
    count,
    vocabulary,
    inner,
    outer,
    strength,
    CAPPED: tl.constexpr,
    SLICE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    tile, part = _place(tl.cdiv(count, ROWS), tl.cdiv(vocabulary, SLICE), GROUP)
    first_row, first_column = tile * ROWS, part * SLICE
    last_column = tl.minimum(first_column + SLICE, vocabulary)
    row = first_row + tl.arange(0, ROWS)
    y = tl.load(target + row, mask=row < count, other=-1)
    met = (y >= first_column) & (y < last_column)
    y = tl.where(met, y, -1).to(tl.int32)

    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    at_target = tl.where(met, 0.0, float("nan"))
    ref_top, ref_total, ref_at_target = top, total, at_target
    ext_top, ext_total = top, total
    for start in range(first_column, last_column, COLUMNS):
        hit = (start + tl.arange(0, COLUMNS))[None, :] == y[:, None]
        z = _logits(
            hidden, weight, hidden_stride, weight_stride, width, bias, first_row, count, start,
            vocabulary, inner, outer, CAPPED, ROWS, COLUMNS, DEPTH, DESCRIBED,
        )  # fmt: skip
        at_target += tl.sum(tl.where(hit, z, 0.0), 1)
        top, total = _fold(z, top, total)
        if ref_hidden is not None:
            z_ref = _logits(
                ref_hidden, ref_weight, ref_hidden_stride, ref_weight_stride, ref_width, ref_bias,
                first_row, count, start, vocabulary, inner, outer,
                CAPPED, ROWS, COLUMNS, DEPTH, DESCRIBED,
            )  # fmt: skip
            ref_at_target += tl.sum(tl.where(hit, z_ref, 0.0), 1)
            ref_top, ref_total = _fold(z_ref, ref_top, ref_total)
            ext_top, ext_total = _fold(extrapolated(z, z_ref, strength), ext_top, ext_total)
    if ref_hidden is None:
        ref_at_target += float("nan")  # never met

    states += part.to(tl.int64) * (8 * count) + row
    stored = row < count
    tl.store(states, top * LN2, mask=stored)
    tl.store(states + count, total, mask=stored)
    tl.store(states + 2 * count, ref_top * LN2, mask=stored)
    tl.store(states + 3 * count, ref_total, mask=stored)
    tl.store(states + 4 * count, ext_top * LN2, mask=stored)
    tl.store(states + 5 * count, ext_total, mask=stored)
    tl.store(states + 6 * count, at_target * LN2, mask=stored)
    tl.store(states + 7 * count, ref_at_target * LN2, mask=stored)


@jit
def _place(tiles, parts, GROUP: tl.constexpr):
    """The row tile and the slice of this program: within a group of tiles, slice after slice."""
    program = tl.program_id(0)
    first = program // (GROUP * parts) * GROUP
    size = tl.minimum(tiles - first, GROUP)
    within = program % (GROUP * parts)
    return first + within % size, within // size


@jit
def _logits(
    hidden, weight, hidden_stride, weight_stride, width, bias, row, count, start, vocabulary,
    inner, outer, CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Final logits of a tile in units of ln 2, -inf beyond the vocabulary."""
    z = tl.zeros([ROWS, COLUMNS], tl.float32)
    for d in range(0, width, DEPTH):
        x = _tile(hidden, hidden_stride, row, count, d, width, ROWS, DEPTH, DESCRIBED)
        w = _tile(weight, weight_stride, start, vocabulary, d, width, COLUMNS, DEPTH, DESCRIBED)
        z = tl.dot(x, w.T, z, input_precision="ieee")
    column = start + tl.arange(0, COLUMNS)
    inside = column < vocabulary
    if bias is not None:
        z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside[None, :], final_logit(z, inner, outer, CAPPED), -float("inf"))


@jit
def _tile(
    matrix, stride, first, rows, d, width,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Elements d.. of rows first.. of a matrix, 0 beyond its width, anything beyond its rows."""
    if DESCRIBED:
        tile = matrix.load([first, d])
    else:
        row = tl.minimum(first + tl.arange(0, ROWS), rows - 1) - first
        column = d + tl.arange(0, DEPTH)
        at = matrix + tl.cast(first, tl.int64) * stride + row[:, None] * stride + column[None, :]
        tile = tl.load(at, mask=column[None, :] < width, other=0.0)
    return tile


@jit
def _fold(z, top, total):
    """Largest logit and sum of 2^(logit - largest) per row after one more tile."""
    largest = tl.maximum(top, tl.max(z, 1))
    shift = tl.where(largest == -float("inf"), 0.0, largest)  # nothing but -inf so far
    return largest, total * tl.exp2(top - shift) + tl.sum(tl.exp2(z - shift[:, None]), 1)
