"""Log-probabilities of target tokens straight from hidden states and the LM head."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from srlm_kernels.checks import check_projection, check_reference, stats_dtype
from srlm_kernels.dispatch import Need, choose
from srlm_kernels.operands import ready_operands, without_autocast
from srlm_kernels.row_stats import extrapolate, final_logits


@dataclass(frozen=True)
class LinearLogp:
    """Per-row results, [N] each, fp32 (fp64 when the logits are fp64); None: not asked for.

    Only `logp` carries gradients. Rows whose target is `ignore_index` hold 0 (False).
    """

    logp: Tensor
    ref_logp: Tensor | None = None
    extrapolated_logp: Tensor | None = None
    entropy: Tensor | None = None
    """-sum_v p(v) ln p(v), nats, of the policy."""
    mean_logit: Tensor | None = None
    """Mean over the vocabulary of the policy's final logits."""
    is_top1: Tensor | None = None
    """bool: no logit exceeds the target's."""
    log_sum_sq_probs: Tensor | None = None
    """ln sum_v p(v)^2 of the policy."""


def linear_logp(
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
    process_group: Any = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> LinearLogp:
    """ln softmax(logits)[target] with logits = softcap(logit_scale * (h W^T + bias)) / temperature.

    Row n is predicted from `hidden[rows[n]]`: to score the token at position t, `rows` names
    position t-1. Differentiable, with any upstream gradient, in `hidden`, `weight` and `bias`.

    Args:
        hidden: [T, D] float. `weight`: [V, D]. `bias`: [V].
        target: [N] int, 0 <= target < V, or `ignore_index` (log-probability 0, gradient 0).
        rows: [N] int indices into `hidden`, duplicates allowed; None: all T rows in order.
        ref_hidden: [T, D'] reference hidden states, indexed by `rows` as well; never
            differentiated. `ref_weight` [V, D'] None: the reference shares `weight`, and `bias`
            unless `ref_bias` [V] is given.
        extrapolation: l >= 0: also score under (1+l) logits - l ref_logits (SPA, eq. 12), which is
            -inf wherever either is. l = 0 is `logp` itself, bit for bit.
        softcap: c > 0: logits become c tanh(logits / c).
        outputs: any of "entropy", "mean_logit", "is_top1", "log_sum_sq_probs"; detached.
        logits_dtype: what the products h W^T are rounded to; statistics are fp32 or wider whatever
            is chosen. None: fp32, or fp64 for fp64 inputs; but half inputs keep their dtype in
            impl="chunked" on a CPU, whose GEMMs round to it anyway.
        process_group: the vocabulary is sharded over its ranks: `weight` and `bias` are this rank's
            consecutive rows, one or more; everything else (targets of the whole vocabulary) is the
            same on all ranks, and so are the results and the gradient of `hidden`. Every rank must
            make the call: one that raises leaves the others waiting until the group's timeout.
        chunk_rows: rows per chunk of impl="chunked"; None: chosen by device and vocabulary.
        impl: "auto" or the name of an implementation; see `explain`.

    Heads may be DTensors (FSDP2): they are gathered, and their gradient is the mean over the ranks.

    A target whose logit is -inf has log-probability -inf; its row's gradient stays finite.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options that do not fit together.
        IndexError: a target outside the vocabulary, on a CPU; elsewhere its results are NaN.
    """
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = ready_operands(  # type: ignore[assignment]
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, process_group=process_group
    )
    check_projection(
        hidden, weight, target, rows=rows, bias=bias, softcap=softcap, temperature=temperature,
        ignore_index=ignore_index, outputs=outputs, logits_dtype=logits_dtype,
        process_group=process_group, chunk_rows=chunk_rows,
    )  # fmt: skip
    check_reference(
        hidden, weight, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias,
        extrapolation=extrapolation,
    )  # fmt: skip
    need = Need(
        hidden, weight, bias, ref_hidden, ref_weight, outputs, logits_dtype,
        process_group is not None,
    )  # fmt: skip
    name = choose("linear_logp", impl, need)
    only_chunked = {"process_group": process_group, "chunk_rows": chunk_rows}
    with without_autocast(hidden):
        return _implementation(name)(
            hidden, weight, target, rows=rows, bias=bias, ref_hidden=ref_hidden,
            ref_weight=ref_weight, ref_bias=ref_bias, extrapolation=extrapolation,
            softcap=softcap, logit_scale=logit_scale, temperature=temperature,
            ignore_index=ignore_index, outputs=outputs, logits_dtype=logits_dtype,
            **(only_chunked if name == "chunked" else {}),
        )  # fmt: skip


def _implementation(name: str) -> Callable[..., LinearLogp]:
    if name == "tiled":
        from srlm_kernels.linear_logp_tiled import linear_logp_tiled

        return linear_logp_tiled
    if name == "chunked":
        from srlm_kernels.linear_logp_chunked import linear_logp_chunked

        return linear_logp_chunked
    return linear_logp_ref


def linear_logp_ref(
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
    """`linear_logp` in plain torch, [N, V] logits in memory; arguments are not checked."""
    dtype = stats_dtype(logits_dtype, hidden, weight, ref_weight)
    ignored = target == ignore_index
    index = target.long().masked_fill(ignored, 0)[:, None]
    transform = {"softcap": softcap, "logit_scale": logit_scale, "temperature": temperature}

    def logits(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        # A NaN in an ignored row would reach dW as 0 * NaN, so such rows are emptied first.
        x = _gather(h, rows).to(dtype).masked_fill(ignored[:, None], 0)
        z = F.linear(x, w.to(dtype)).to(logits_dtype or dtype)
        return final_logits(z, b, dtype, **transform)  # type: ignore[arg-type]

    def pick(values: Tensor) -> Tensor:
        return values.gather(1, index).squeeze(1).masked_fill(ignored, 0)

    z = logits(hidden, weight, bias)
    log_probs = z.log_softmax(-1)
    logp = pick(log_probs)
    with torch.no_grad():
        extra = {
            name: _output(name, z, log_probs, index).masked_fill(ignored, 0) for name in outputs
        }
        if ref_hidden is None:
            return LinearLogp(logp, **extra)
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        z_ref = logits(ref_hidden, ref_weight, ref_bias)
        ref_logp = pick(z_ref.log_softmax(-1))
        if extrapolation is None:
            extrapolated = None
        elif extrapolation == 0:
            extrapolated = logp.detach()
        else:
            extrapolated = pick(extrapolate(z, z_ref, extrapolation).log_softmax(-1))
    return LinearLogp(logp, ref_logp, extrapolated, **extra)


def _gather(hidden: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return hidden
    # Each is the gather whose backward adds duplicates in a fixed order on that device.
    return hidden[rows] if hidden.is_cuda else hidden.index_select(0, rows)


def _output(name: str, z: Tensor, log_probs: Tensor, index: Tensor) -> Tensor:
    if name == "entropy":
        terms: Tensor = torch.special.entr(log_probs.exp())  # 0, not NaN, where p is 0
        return terms.sum(-1)
    if name == "mean_logit":
        return z.mean(-1)
    if name == "is_top1":
        return z.gather(1, index).squeeze(1).eq(z.amax(-1))
    return (2 * log_probs).logsumexp(-1)
