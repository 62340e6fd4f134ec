"""Gradients of target log-probabilities in the logits, written over the logits themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels.backends import row_kernel
from srlm_kernels.checks import check_block
from srlm_kernels.row_stats import final_logits


def logits_grad(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    upstream: Tensor,
    *,
    bias: Tensor | None = None,
    first_column: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    grad_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """upstream * d logp / d logits for a block of C vocabulary columns, in the logits' own memory.

    d logp / dz = onehot(target) - exp(z - lse) for the final logits z of `row_stats`, times dz /
    dlogits. 1 - p is formed in the dtype of `lse` before the result is rounded. Rows whose upstream
    is 0 become 0 whatever their logits hold.

    Args:
        logits: [N, C] float, unit column stride; destroyed.
        target: [N] int64 column of the whole vocabulary; one outside the block has no onehot here.
        lse: [N] log-sum-exp over the whole vocabulary, of the values in `logits` (not of more exact
            ones: the rows of the gradient would no longer sum to zero). fp32, fp64 for fp64 logits.
        upstream: [N], like `lse`.
        bias: [C], part of the logits as in `row_stats`.
        grad_dtype: dtype of the result, no wider than that of `logits`; None: the same.
        impl: "auto", "torch", "cpp" (CPU) or "triton" (CUDA, or under its interpreter).

    Returns:
        [N, C] view of the first bytes of each row of `logits`.

    Raises:
        TypeError, ValueError: shapes, dtypes or options that do not fit, or an `impl` that cannot
            run here.
    """
    check_block(logits, target, bias=bias, lse=lse, upstream=upstream, grad_dtype=grad_dtype)
    grad_dtype = grad_dtype or logits.dtype
    torch.ops.srlm_kernels.logits_grad(
        logits, target, lse, upstream, bias, first_column, softcap, logit_scale, temperature,
        grad_dtype, impl,
    )  # fmt: skip
    return narrowed(logits, grad_dtype)


@torch.library.custom_op("srlm_kernels::logits_grad", mutates_args=("logits",))
def _logits_grad_op(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    upstream: Tensor,
    bias: Tensor | None,
    first_column: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    grad_dtype: torch.dtype,
    impl: str,
) -> None:
    row_kernel("logits_grad", impl, logits)(
        logits, target, lse, upstream, bias=bias, first_column=first_column, softcap=softcap,
        logit_scale=logit_scale, temperature=temperature, grad_dtype=grad_dtype,
    )  # fmt: skip


def narrowed(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The first bytes of each row as [N, C] of a dtype that is no wider."""
    return logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]


def logits_grad_ref(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    upstream: Tensor,
    *,
    bias: Tensor | None = None,
    first_column: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """`logits_grad` in plain torch; arguments are not checked."""
    z = final_logits(
        logits, bias, lse.dtype, softcap=softcap, logit_scale=logit_scale, temperature=temperature
    )
    p = (z - lse[:, None]).exp().masked_fill(z == -torch.inf, 0)
    column = torch.arange(first_column, first_column + z.shape[1], device=z.device)
    d = (column == target[:, None]).to(p.dtype) - p
    d = d * (upstream * (logit_scale / temperature))[:, None]
    if softcap is not None:
        d = d * (1 - (z * (temperature / softcap)) ** 2)
    d = d.masked_fill((upstream == 0)[:, None], 0)
    return narrowed(logits, grad_dtype or logits.dtype).copy_(d)
