"""Log-sum-exps of rows of logits, policy and reference in one read, block of columns by block."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from srlm_kernels.backends import row_kernel
from srlm_kernels.checks import check_block

# Rows of the state: per stream the largest logit so far and the sum of exp(logit - largest).
POLICY_MAX, POLICY_SUM, REF_MAX, REF_SUM, EXT_MAX, EXT_SUM = range(6)
# The logits of the target, NaN until its column was seen.
TARGET, REF_TARGET = 6, 7
# Of the policy, d = logit - largest: sum e^d d, sum of the logits, sum e^(2d).
WEIGHTED, TOTAL, SQUARES = 8, 9, 10
ROWS, ROWS_WITH_OUTPUTS = 8, 11


def new_state(
    rows: int, *, outputs: Collection[str] = (), dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The state of `rows` rows before any column: [8, rows], [11, rows] when outputs are wanted."""
    state = torch.zeros(ROWS_WITH_OUTPUTS if outputs else ROWS, rows, dtype=dtype, device=device)
    for largest in (POLICY_MAX, REF_MAX, EXT_MAX):
        state[largest] = -torch.inf
    state[TARGET : REF_TARGET + 1] = torch.nan
    return state


def row_stats(
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
    impl: str = "auto",
) -> None:
    """Fold a block of C vocabulary columns into the running statistics of N rows, in place.

    The final logits are softcap(logit_scale * (logits + bias)) / temperature, formed in the dtype
    of `state`; the extrapolated ones (1+l) policy - l reference, -inf wherever either is.

    Args:
        state: [8 or 11, N], from `new_state`; fp32 (fp64 for fp64 logits). With 11 rows the sums
            behind entropy, mean logit and squared probabilities are kept too.
        logits: [N, C] float, unit column stride: h W^T of columns first_column .. +C.
        target: [N] int64 column of the whole vocabulary; one outside the block changes nothing.
        ref_logits: [N, C] of the same columns. `bias`, `ref_bias`: [C].
        extrapolation: l > 0, needs ref_logits; None: the third stream is left alone.
        impl: "auto", "torch", "cpp" (CPU) or "triton" (CUDA, or under its interpreter).

    Raises:
        TypeError, ValueError: shapes, dtypes or options that do not fit, or an `impl` that cannot
            run here.
    """
    check_block(logits, target, bias=bias, ref_logits=ref_logits, ref_bias=ref_bias, state=state)
    torch.ops.srlm_kernels.row_stats(
        state, logits, target, ref_logits, bias, ref_bias, first_column, extrapolation, softcap,
        logit_scale, temperature, impl,
    )  # fmt: skip


@torch.library.custom_op("srlm_kernels::row_stats", mutates_args=("state",))
def _row_stats_op(
    state: Tensor,
    logits: Tensor,
    target: Tensor,
    ref_logits: Tensor | None,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    first_column: int,
    extrapolation: float | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    impl: str,
) -> None:
    row_kernel("row_stats", impl, logits)(
        state, logits, target, ref_logits=ref_logits, bias=bias, ref_bias=ref_bias,
        first_column=first_column, extrapolation=extrapolation, softcap=softcap,
        logit_scale=logit_scale, temperature=temperature,
    )  # fmt: skip


def final_logits(
    logits: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> Tensor:
    """softcap(logit_scale * (logits + bias)) / temperature in `dtype`."""
    z = logits.to(dtype)
    z = z if bias is None else z + bias.to(dtype)
    z = z if logit_scale == 1 else z * logit_scale
    z = z if softcap is None else torch.tanh(z / softcap) * softcap
    return z if temperature == 1 else z / temperature


def extrapolate(z: Tensor, z_ref: Tensor, strength: float) -> Tensor:
    """(1+l) z - l z_ref, written so that equal rows give back `z` exactly; -inf if either is."""
    mixed = torch.add(z, z - z_ref, alpha=strength)
    return mixed.masked_fill((z == -torch.inf) | (z_ref == -torch.inf), -torch.inf)


def row_stats_ref(
    state: Tensor,
    logits: Tensor,
    target: Tensor,
    *,
    ref_logits: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    first_column: int = 0,
    extrapolation: float | None = None,
    **transform: float | None,
) -> None:
    """`row_stats` in plain torch; arguments are not checked."""
    z = final_logits(logits, bias, state.dtype, **transform)  # type: ignore[arg-type]
    column = target - first_column
    inside = (column >= 0) & (column < z.shape[1])
    column = column.clamp(0, z.shape[1] - 1)[:, None]

    def fold(stream: Tensor, largest: int, seen: int | None) -> None:
        if seen is not None:
            state[seen] = torch.where(inside, stream.gather(1, column)[:, 0], state[seen])
        top = torch.maximum(state[largest], stream.amax(1))
        shift = top.masked_fill(top == -torch.inf, 0)  # nothing but -inf so far
        back = state[largest] - shift
        d = stream - shift[:, None]
        e = d.exp()
        if largest == POLICY_MAX and state.shape[0] == ROWS_WITH_OUTPUTS:
            moved = (state[POLICY_SUM] * back).masked_fill(state[POLICY_SUM] == 0, 0)
            terms = (e * d).masked_fill(e == 0, 0)  # 0, not NaN, for a logit of -inf
            state[WEIGHTED] = back.exp() * (state[WEIGHTED] + moved) + terms.sum(1)
            state[SQUARES] = (2 * back).exp() * state[SQUARES] + (2 * d).exp().sum(1)
            state[TOTAL] += stream.sum(1)
        state[largest + 1] = back.exp() * state[largest + 1] + e.sum(1)
        state[largest] = top

    fold(z, POLICY_MAX, TARGET)
    if ref_logits is None:
        return
    z_ref = final_logits(ref_logits, ref_bias, state.dtype, **transform)  # type: ignore[arg-type]
    fold(z_ref, REF_MAX, REF_TARGET)
    if extrapolation is not None:
        fold(extrapolate(z, z_ref, extrapolation), EXT_MAX, None)


def merge_states(states: Tensor) -> Tensor:
    """The state [S, N] of all columns from K states [K, S, N] of disjoint columns."""
    merged = states.sum(0)
    targets = states[:, TARGET : REF_TARGET + 1]  # at most one state has seen each
    merged[TARGET : REF_TARGET + 1] = targets.nansum(0).masked_fill(
        targets.isnan().all(0), torch.nan
    )
    for largest in (POLICY_MAX, REF_MAX, EXT_MAX):
        top = states[:, largest].amax(0)
        back = states[:, largest] - top.masked_fill(top == -torch.inf, 0)
        sums, factor = states[:, largest + 1], back.exp()
        if largest == POLICY_MAX and states.shape[1] == ROWS_WITH_OUTPUTS:
            moved = (sums * back).masked_fill(sums == 0, 0)
            merged[WEIGHTED] = (factor * (states[:, WEIGHTED] + moved)).sum(0)
            merged[SQUARES] = ((2 * back).exp() * states[:, SQUARES]).sum(0)
        merged[largest] = top
        merged[largest + 1] = (factor * sums).sum(0)
    return merged
