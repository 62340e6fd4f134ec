"""`row_stats` as a Triton kernel: one program per row, each logit is read once."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels import row_stats as rs
from srlm_kernels.triton_support import (
    EXACT,
    constant,
    dense,
    extrapolated,
    final_logit,
    jit,
    tl,
    transform_factors,
)

POLICY, REFERENCE, EXTRAPOLATED = map(constant, (rs.POLICY_MAX, rs.REF_MAX, rs.EXT_MAX))
TARGET, REF_TARGET = constant(rs.TARGET), constant(rs.REF_TARGET)
WEIGHTED, TOTAL, SQUARES = map(constant, (rs.WEIGHTED, rs.TOTAL, rs.SQUARES))

# Stands for "nothing seen": unlike -inf it can be subtracted from -inf. A row of nothing but -inf
# is told apart by its sum, which stays 0.
LOWEST = constant(torch.finfo(torch.float32).min)


def row_stats_triton(
    state: Tensor,
    logits: Tensor,
    target: Tensor,
    *,
    ref_logits: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    first_column: int = 0,
    extrapolation: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> None:
    """`row_stats` for fp32 state and fp32, bf16 or fp16 logits; arguments are not checked."""
    rows, columns = logits.shape
    if rows == 0:
        return
    inner, outer = transform_factors(softcap, logit_scale, temperature)
    outputs = state.shape[0] == rs.ROWS_WITH_OUTPUTS
    strength = None if ref_logits is None or extrapolation is None else float(extrapolation)
    with torch.cuda.device_of(logits):
        _row_stats_kernel[(rows,)](
            state, logits, ref_logits, dense(target), dense(bias), dense(ref_bias),
            columns, first_column, logits.stride(0),
            0 if ref_logits is None else ref_logits.stride(0), state.stride(0), inner, outer,
            strength, CAPPED=softcap is not None, OUTPUTS=outputs,
            BLOCK=1024 if outputs or logits.dtype == torch.float32 else 2048, num_warps=8,
            maxnreg=128 if outputs else None,  # unasked, ptxas spills to get by with 64
            **EXACT,
        )  # fmt: skip


@jit
def _row_stats_kernel(
    state,
    logits,
    ref_logits,
    target,
    bias,
    ref_bias,
    columns,
    first_column,
    logits_stride,
    ref_stride,
    state_stride,
    inner,
    outer,
    strength,
    CAPPED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Every lane keeps statistics of its own columns, so that the loop holds no reduction. Row
    # offsets are 64-bit: rows * columns passes 2^31.
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    state += row
    lane = tl.arange(0, BLOCK)
    top, total = _begin(state, POLICY, state_stride, lane)
    if OUTPUTS:
        weighted = _first_lane(state + WEIGHTED * state_stride, lane)
        squares = _first_lane(state + SQUARES * state_stride, lane)
        plain = _first_lane(state + TOTAL * state_stride, lane)
    if ref_logits is not None:
        ref_logits += row * ref_stride
        ref_top, ref_total = _begin(state, REFERENCE, state_stride, lane)
    if strength is not None:
        ext_top, ext_total = _begin(state, EXTRAPOLATED, state_stride, lane)

    for start in range(0, columns, BLOCK):
        column = start + lane
        inside = column < columns
        z = _logit(logits, bias, column, inside, inner, outer, CAPPED)
        if OUTPUTS:
            weighted, squares = _fold_outputs(z, top, total, weighted, squares)
            plain += tl.where(inside, z, 0.0)
        top, total = _fold(z, top, total)
        if ref_logits is not None:
            z_ref = _logit(ref_logits, ref_bias, column, inside, inner, outer, CAPPED)
            ref_top, ref_total = _fold(z_ref, ref_top, ref_total)
            if strength is not None:
                mixed = extrapolated(z, z_ref, strength)
                ext_top, ext_total = _fold(mixed, ext_top, ext_total)

    _end(state, POLICY, state_stride, top, total)
    if OUTPUTS:
        back = top - _largest(top)
        factor = tl.exp(back)
        weighted = tl.where(factor == 0, 0.0, factor * (weighted + total * back))
        tl.store(state + WEIGHTED * state_stride, tl.sum(weighted, 0))
        tl.store(state + SQUARES * state_stride, tl.sum(factor * factor * squares, 0))
        tl.store(state + TOTAL * state_stride, tl.sum(plain, 0))
    if ref_logits is not None:
        _end(state, REFERENCE, state_stride, ref_top, ref_total)
    if strength is not None:
        _end(state, EXTRAPOLATED, state_stride, ext_top, ext_total)

    column = tl.load(target + row) - first_column
    inside = (column >= 0) & (column < columns)
    z = _logit(logits, bias, column, inside, inner, outer, CAPPED)
    tl.store(state + TARGET * state_stride, z, mask=inside)
    if ref_logits is not None:
        z_ref = _logit(ref_logits, ref_bias, column, inside, inner, outer, CAPPED)
        tl.store(state + REF_TARGET * state_stride, z_ref, mask=inside)


@jit
def _logit(logits, bias, column, inside, inner, outer, CAPPED: tl.constexpr):
    """Final logits of some columns, -inf outside."""
    x = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, final_logit(x, inner, outer, CAPPED), -float("inf"))


@jit
def _first_lane(value, lane):
    """What the state holds in lane 0, 0 in the others."""
    return tl.where(lane == 0, tl.load(value), 0.0)


@jit
def _begin(state, stream: tl.constexpr, stride, lane):
    """Largest logit and sum per lane before the loop."""
    before = tl.maximum(tl.load(state + stream * stride), LOWEST, tl.PropagateNan.ALL)
    top = tl.where(lane == 0, before, LOWEST)
    return top, _first_lane(state + (stream + 1) * stride, lane)


@jit
def _fold(z, top, total):
    """The statistics after one more logit per lane."""
    # One exponential serves both cases: of the sum so far when z is the new maximum, else of z.
    e = tl.exp(-tl.abs(z - top))
    total = tl.where(z > top, tl.fma(total, e, 1.0), total + e)
    return tl.maximum(top, z, tl.PropagateNan.ALL), total


@jit
def _fold_outputs(z, top, total, weighted, squares):
    """sum e^d d and sum e^2d after one more logit, d = logit - largest; `total` is from before."""
    step = -tl.abs(z - top)
    e = tl.exp(step)
    e_step = tl.where(e == 0, 0.0, e * step)  # -inf * 0 is no term
    rises = z > top
    weighted = tl.where(rises, tl.fma(e, weighted, total * e_step), weighted + e_step)
    return weighted, tl.where(rises, tl.fma(squares, e * e, 1.0), tl.fma(e, e, squares))


@jit
def _largest(x):
    """The maximum, NaN if there is one: `tl.max` passes over NaN."""
    return tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), tl.max(x, 0))


@jit
def _end(state, stream: tl.constexpr, stride, top, total):
    """Writes the statistics of all lanes together."""
    largest = _largest(top)
    total = tl.sum(tl.exp(top - largest) * total, 0)
    tl.store(state + stream * stride, tl.where(total == 0, -float("inf"), largest))
    tl.store(state + (stream + 1) * stride, total)
