"""Argument checks of the ops: shapes, dtypes and options; none of them waits for a device."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

OUTPUTS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


def _expect_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _expect_device(hidden: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}")


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


def _expect_tokens(target: Tensor, vocabulary: int, ignore_index: int) -> None:
    outside = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if outside.any():
        raise IndexError(
            f"target holds {target[outside][0].item()}, out of bounds for a head of {vocabulary} "
            f"tokens and not ignore_index={ignore_index}"
        )


def stats_dtype(logits_dtype: torch.dtype | None, *operands: Tensor | None) -> torch.dtype:
    """The dtype of log-sum-exps and results: fp64 for fp64 logits, else fp32.

    Logits are fp64 when that was asked for, or nothing was and one of the operands is.
    """
    dtypes = (
        [t.dtype for t in operands if t is not None] if logits_dtype is None else [logits_dtype]
    )
    return torch.float64 if torch.float64 in dtypes else torch.float32


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
    ignore_index: int,
    logits_dtype: torch.dtype | None,
    process_group: object,
    chunk_rows: int | None,
) -> None:
    """Raises TypeError, ValueError or IndexError naming the argument that does not fit."""
    if process_group is not None and not hasattr(process_group, "group_name"):
        raise TypeError(
            f"process_group must be a torch.distributed group, got {type(process_group).__name__}"
        )
    _expect_matrix("hidden", hidden)
    _expect_matrix("weight", weight)
    _expect_shape("weight", weight, (weight.shape[0], hidden.shape[1]))
    _expect_shape("bias", bias, (weight.shape[0],))
    if rows is not None:
        _expect_indices("rows", rows)
    _expect_indices("target", target)
    _expect_shape("target", target, (hidden.shape[0] if rows is None else rows.shape[0],))
    # Only where reading the targets waits for no device; elsewhere such a row becomes NaN.
    whole = process_group is None
    if whole and target.device.type == "cpu" and not torch.compiler.is_compiling():
        _expect_tokens(target, weight.shape[0], ignore_index)
    _expect_device(hidden, weight=weight, target=target, rows=rows, bias=bias)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if logits_dtype is not None and not logits_dtype.is_floating_point:
        raise TypeError(f"logits_dtype must be a float dtype, got {logits_dtype}")
    if isinstance(outputs, str) or len(set(outputs)) != len(outputs):
        raise ValueError(f"outputs must be names without repetition, got {outputs!r}")
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
    _expect_device(hidden, ref_hidden=ref_hidden, ref_weight=head, ref_bias=ref_bias)
    if extrapolation is not None and not 0 <= extrapolation < math.inf:
        raise ValueError(f"extrapolation must be finite and >= 0, got {extrapolation}")


def check_pairs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    *,
    pair: Mapping[str, Tensor] | None,
    scale: float | Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_logp: Tensor | None,
    extrapolation: float | None,
    grad_weight_out: Tensor | None,
    logits_dtype: torch.dtype | None,
) -> None:
    """Raises TypeError or ValueError when sequences, pairs and references do not fit together."""
    _expect_indices("cu_seqlens", cu_seqlens)
    sequences = cu_seqlens.shape[0] - 1
    if sequences < 0 or sequences % 2:
        raise ValueError(
            f"cu_seqlens must hold 2P+1 offsets (chosen and rejected in turn), got {sequences + 1}"
        )
    # Only where reading the offsets waits for no device.
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = (int(cu_seqlens[0]), int(cu_seqlens[-1]))
        if ends != (0, target.shape[0]) or bool((cu_seqlens.diff() < 0).any()):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {target.shape[0]} rows of target, "
                f"got {cu_seqlens.tolist()}"
            )
    given = {f"pair[{name!r}]": tensor for name, tensor in (pair or {}).items()}
    for name, tensor in given.items():
        _expect_shape(name, tensor, (sequences // 2,))
    _expect_shape("ref_logp", ref_logp, (sequences,))
    _expect_device(hidden, **given, ref_logp=ref_logp, grad_weight_out=grad_weight_out)
    if isinstance(scale, Tensor):
        _expect_shape("scale", scale, ())
        given["scale"] = scale
    for name, tensor in given.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, which this op does not give; detach it, or form the "
                "loss yourself from the results of linear_logp"
            )
    if ref_logp is not None and ref_hidden is not None:
        raise ValueError("give ref_hidden or ref_logp, not both")
    if ref_logp is not None and extrapolation is not None:
        raise ValueError(
            "extrapolation mixes whole rows of logits, which ref_logp cannot give; "
            "pass ref_hidden, or extrapolation=None"
        )
    _expect_shape("grad_weight_out", grad_weight_out, tuple(weight.shape))
    dtype = stats_dtype(logits_dtype, hidden, weight, ref_weight)
    if grad_weight_out is not None and grad_weight_out.dtype != dtype:
        raise TypeError(f"grad_weight_out must be {dtype}, got {grad_weight_out.dtype}")


def check_block(
    logits: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    state: Tensor | None = None,
    ref_logits: Tensor | None = None,
    ref_bias: Tensor | None = None,
    lse: Tensor | None = None,
    upstream: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
) -> None:
    """Raises TypeError or ValueError when the arguments of a row kernel do not fit together."""
    _expect_matrix("logits", logits)
    rows, columns = logits.shape
    if columns > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits must have unit column stride, got strides {logits.stride()}")
    if columns == 0:
        raise ValueError("logits must have at least one column")
    _expect_shape("target", target, (rows,))
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if ref_logits is not None:
        _expect_shape("ref_logits", ref_logits, (rows, columns))
        if ref_logits.dtype != logits.dtype:
            raise TypeError(f"ref_logits must be {logits.dtype}, got {ref_logits.dtype}")
    _expect_shape("bias", bias, (columns,))
    _expect_shape("ref_bias", ref_bias, (columns,))
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for name, tensor in (("lse", lse), ("upstream", upstream), ("state", state)):
        if name != "state":
            _expect_shape(name, tensor, (rows,))
        elif tensor is not None and (tensor.shape[1:] != (rows,) or tensor.shape[0] not in (8, 11)):
            raise ValueError(f"state must be [8 or 11, {rows}], got {list(tensor.shape)}")
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if grad_dtype is not None and grad_dtype.itemsize > logits.dtype.itemsize:
        raise TypeError(f"grad_dtype {grad_dtype} is wider than the logits' {logits.dtype}")
