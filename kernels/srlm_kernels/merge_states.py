"""Attention over several sets of keys, merged by the sets' log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels.backends import row_kernel


def merge_states(
    o: Tensor,
    lse: Tensor,
    token_ptr: Tensor,
    token_entries: Tensor,
    *,
    sinks: Tensor | None = None,
    dtype: torch.dtype,
    impl: str = "auto",
) -> Tensor:
    """Softmax over all keys of a token from softmaxes over disjoint parts of them.

    sum_i e^lse_i o_i / (sum_i e^lse_i + e^sink) over the entries of a token, in their order.

    Args:
        o: [Q, H, Dv] fp32 (fp64 with "torch"), contiguous: the results over the parts.
        lse: [Q, H], like `o`: their natural log-sum-exps. -inf: an empty part; its `o` may hold
            anything.
        token_ptr: [T + 1] int32, where each token begins in `token_entries`. A token may have
            none; entries from token_ptr[T] on belong to nobody.
        token_entries: int32, entries (rows of `o`) by token.
        sinks: [H] float, one more logit per head without a value, once per token.
        dtype: of the result.
        impl: "auto", "torch" or "triton" (CUDA, or under its interpreter).

    Returns:
        [T, H, Dv]; 0 for a token without entries, or with empty ones only.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, or an `impl` that cannot run here.
    """
    if o.ndim != 3 or o.shape[:2] != lse.shape or not (o.is_contiguous() and lse.is_contiguous()):
        raise ValueError(
            "o must be [Q, H, Dv] and lse [Q, H], contiguous, "
            f"got {list(o.shape)} and {list(lse.shape)}"
        )
    if o.dtype != lse.dtype or o.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"o and lse must be float32 or float64, got {o.dtype} and {lse.dtype}")
    if token_ptr.dtype != torch.int32 or token_entries.dtype != torch.int32:
        raise TypeError("token_ptr and token_entries must be int32")
    if sinks is not None and sinks.shape != lse.shape[1:]:
        raise ValueError(f"sinks must have shape {list(lse.shape[1:])}, got {list(sinks.shape)}")
    out: Tensor = row_kernel("merge_states", impl, o)(
        o, lse, token_ptr, token_entries, sinks=sinks, dtype=dtype
    )
    return out


def merge_states_ref(
    o: Tensor,
    lse: Tensor,
    token_ptr: Tensor,
    token_entries: Tensor,
    *,
    sinks: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """`merge_states` in plain torch; arguments are not checked."""
    tokens = len(token_ptr) - 1
    token = torch.arange(tokens, device=o.device).repeat_interleave(token_ptr.diff().long())
    entry = token_entries[: len(token)].long()
    o, lse = o[entry], lse[entry]
    top = lse.new_full((tokens, lse.shape[1]), -torch.inf)
    top = top.scatter_reduce(0, token[:, None].expand_as(lse), lse, "amax")
    top = top.masked_fill(top == -torch.inf, 0)  # -inf minus -inf is NaN
    weight = (lse - top[token]).exp()
    terms = (weight[..., None] * o).masked_fill((lse == -torch.inf)[..., None], 0)
    total = torch.zeros_like(top).index_add(0, token, weight)
    total = total if sinks is None else total + (sinks.to(top.dtype) - top).exp()
    sums = o.new_zeros(tokens, *o.shape[1:]).index_add(0, token, terms)
    return (sums / total.masked_fill(total == 0, 1)[..., None]).to(dtype)
