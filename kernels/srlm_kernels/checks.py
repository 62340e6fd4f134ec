"""Argument checks shared by the ops: shapes, dtypes and options, so that no device is waited for.

Each takes the arguments of an op as keywords and passes over those that it does not check.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

OUTPUTS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


def _expect_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _expect_indices(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 1 or tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{name} must be a 1-D int32 or int64 tensor, "
            f"got {tensor.ndim}-D {str(tensor.dtype).removeprefix('torch.')}"
        )


def _expect_matrix(name: str, tensor: Tensor) -> None:
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise TypeError(
            f"{name} must be a 2-D float tensor, "
            f"got {tensor.ndim}-D {str(tensor.dtype).removeprefix('torch.')}"
        )


def stats_dtype(hidden: Tensor, logits_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of log-sum-exps and results: fp64 for fp64 logits, else fp32."""
    wide = (logits_dtype or hidden.dtype) == torch.float64
    return torch.float64 if wide else torch.float32


def check_projection(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    outputs: Collection[str],
    logits_dtype: torch.dtype | None,
    process_group: object,
    **_: object,
) -> None:
    """Raises TypeError or ValueError naming the argument that does not fit the others."""
    if process_group is not None:
        raise ValueError(
            "process_group: a vocabulary sharded over ranks is not implemented; "
            "pass the whole head and process_group=None"
        )
    _expect_matrix("hidden", hidden)
    _expect_matrix("weight", weight)
    _expect_shape("weight", weight, (weight.shape[0], hidden.shape[1]))
    _expect_shape("bias", bias, (weight.shape[0],))
    if rows is not None:
        _expect_indices("rows", rows)
    _expect_indices("target", target)
    _expect_shape("target", target, (hidden.shape[0] if rows is None else rows.shape[0],))
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if logits_dtype is not None and not logits_dtype.is_floating_point:
        raise TypeError(f"logits_dtype must be a float dtype, got {logits_dtype}")
    if unknown := set(outputs) - set(OUTPUTS):
        raise ValueError(f"unknown outputs {sorted(unknown)}; known: {', '.join(OUTPUTS)}")


def check_reference(
    hidden: Tensor,
    weight: Tensor,
    *,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    extrapolation: float | None,
    **_: object,
) -> None:
    """Raises TypeError or ValueError when the reference does not fit the policy."""
    if ref_hidden is None:
        if ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_weight and ref_bias need ref_hidden")
        if extrapolation is not None:
            raise ValueError("extrapolation needs ref_hidden: it mixes whole rows of logits")
        return
    _expect_matrix("ref_hidden", ref_hidden)
    head = weight if ref_weight is None else ref_weight
    _expect_matrix("ref_weight", head)
    if head.shape[0] != weight.shape[0]:
        raise ValueError(
            f"policy and reference must share one vocabulary, got {weight.shape[0]} and "
            f"{head.shape[0]} rows; cut both heads to their common tokens"
        )
    _expect_shape("ref_hidden", ref_hidden, (hidden.shape[0], head.shape[1]))
    _expect_shape("ref_bias", ref_bias, (weight.shape[0],))
    if extrapolation is not None and not 0 <= extrapolation < math.inf:
        raise ValueError(f"extrapolation must be finite and >= 0, got {extrapolation}")


def check_pairs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    *,
    pair: Mapping[str, Tensor] | None,
    ref_hidden: Tensor | None,
    ref_logp: Tensor | None,
    extrapolation: float | None,
    grad_weight_out: Tensor | None,
    logits_dtype: torch.dtype | None,
    **_: object,
) -> None:
    """Raises TypeError or ValueError when sequences, pairs and references do not fit together."""
    _expect_indices("cu_seqlens", cu_seqlens)
    sequences = cu_seqlens.shape[0] - 1
    if sequences < 0 or sequences % 2:
        raise ValueError(
            f"cu_seqlens must hold 2P+1 offsets (chosen and rejected in turn), got {sequences + 1}"
        )
    # Only where reading the offsets waits for no device.
    if cu_seqlens.device.type == "cpu":
        ends = (int(cu_seqlens[0]), int(cu_seqlens[-1]))
        if ends != (0, target.shape[0]) or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {target.shape[0]} rows of target, "
                f"got {cu_seqlens.tolist()}"
            )
    for name, tensor in (pair or {}).items():
        _expect_shape(f"pair[{name!r}]", tensor, (sequences // 2,))
    _expect_shape("ref_logp", ref_logp, (sequences,))
    if ref_logp is not None and ref_hidden is not None:
        raise ValueError("give ref_hidden or ref_logp, not both")
    if ref_logp is not None and extrapolation is not None:
        raise ValueError(
            "extrapolation mixes whole rows of logits, which ref_logp cannot give; "
            "pass ref_hidden, or extrapolation=None"
        )
    _expect_shape("grad_weight_out", grad_weight_out, tuple(weight.shape))
    dtype = stats_dtype(hidden, logits_dtype)
    if grad_weight_out is not None and grad_weight_out.dtype != dtype:
        raise TypeError(f"grad_weight_out must be {dtype}, got {grad_weight_out.dtype}")
