"""`pair_grad` for DPO and SPA as a Triton kernel: one program per pair."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from srlm_kernels.losses import dpo, spa
from srlm_kernels.pair_grad import PairGrad
from srlm_kernels.triton_support import EXACT, dense, jit, tl, triton


def takes(
    logp: Tensor, loss_fn: Callable[..., Tensor], pair: Mapping[str, Tensor] | None = None
) -> bool:
    """Whether the kernel knows this loss, its arguments and the dtype of `logp`."""
    if triton is None or logp.dtype != torch.float32:
        return False
    if type(loss_fn) is spa:
        return not pair
    # A wider smoothing makes the losses wider too.
    return type(loss_fn) is dpo and all(
        name == "label_smoothing" and tensor.is_floating_point() and tensor.itemsize <= 4
        for name, tensor in (pair or {}).items()
    )


def pair_grad_triton(
    logp: Tensor,
    scored: Tensor,
    cu_seqlens: Tensor,
    loss_fn: Callable[..., Tensor],
    *,
    scale: float | Tensor,
    pair: Mapping[str, Tensor] | None = None,
    ref_logp: Tensor | None = None,
    extrapolated_logp: Tensor | None = None,
    ref_sums: Tensor | None = None,
) -> PairGrad:
    """`pair_grad` for fp32; `scored` is not read, no loss here looks at lengths.

    Raises ValueError where `takes` says no.
    """
    if not takes(logp, loss_fn, pair) or not isinstance(loss_fn, dpo | spa):
        raise ValueError(f"impl='triton' knows fp32 dpo and spa, not {loss_fn} in {logp.dtype}")
    device = logp.device
    sequences = cu_seqlens.shape[0] - 1
    sums = logp.new_empty(3, sequences)
    losses, slopes = logp.new_empty(sequences // 2), logp.new_empty(sequences)
    smoothing: float | Tensor
    threshold: float | Tensor | None
    if isinstance(loss_fn, spa):
        smoothing, threshold = loss_fn.alpha, loss_fn.threshold
    else:
        smoothing, threshold = (pair or {}).get("label_smoothing", loss_fn.label_smoothing), None
    if sequences:
        with torch.cuda.device_of(logp):
            _pair_grad_kernel[(sequences // 2,)](
                sums, losses, slopes, dense(logp), dense(ref_logp), dense(extrapolated_logp),
                dense(ref_sums), dense(cu_seqlens.to(device, non_blocking=True)),
                sequences, float(loss_fn.beta),
                *_number_or_tensor(smoothing, device), *_number_or_tensor(threshold, device),
                *_number_or_tensor(scale, device),
                FLAG_EQUAL=isinstance(loss_fn, spa) and loss_fn.flag_equal, BLOCK=512, **EXACT,
            )  # fmt: skip
    policy, ref, ext = sums
    if extrapolated_logp is None:
        ext = policy
    return PairGrad(policy, ref, ext, losses, slopes)


def _number_or_tensor(
    value: float | Tensor | None, device: torch.device
) -> tuple[float | None, Tensor | None]:
    """One of the two, for the kernel; the other is None. Nothing waits for the device."""
    if isinstance(value, Tensor):
        return None, dense(value.to(device, non_blocking=True))
    return None if value is None else float(value), None


@jit
def _pair_grad_kernel(
    sums,
    losses,
    slopes,
    logp,
    ref_logp,
    ext_logp,
    ref_sums,
    offsets,
    sequences,
    beta,
    smoothing,
    smoothings,
    threshold,
    threshold_tensor,
    scale,
    scale_tensor,
    FLAG_EQUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0)
    policy, ref, ext = _sequence(
        sums, logp, ref_logp, ext_logp, ref_sums, offsets, 2 * pair, sequences, BLOCK
    )
    policy_l, ref_l, ext_l = _sequence(
        sums, logp, ref_logp, ext_logp, ref_sums, offsets, 2 * pair + 1, sequences, BLOCK
    )
    e = smoothing
    if smoothings is not None:
        e = tl.load(smoothings + pair).to(tl.float32)
    if threshold_tensor is not None:
        threshold = tl.load(threshold_tensor).to(tl.float32)
    if threshold is not None:
        # As the loss compares: in fp32, beta included.
        ext_margin = beta * ((ext - ref) - (ext_l - ref_l))
        flagged = ext_margin <= threshold if FLAG_EQUAL else ext_margin < threshold
        e = tl.where(flagged, e, 0.0)
    loss, slope = _smoothed(beta * ((policy - ref) - (policy_l - ref_l)), e)
    if scale_tensor is not None:
        scale = tl.load(scale_tensor).to(tl.float32)
    slope *= beta * scale
    tl.store(losses + pair, loss)
    tl.store(slopes + 2 * pair, slope)
    tl.store(slopes + 2 * pair + 1, -slope)


@jit
def _sequence(
    sums, logp, ref_logp, ext_logp, ref_sums, offsets, index, sequences, BLOCK: tl.constexpr
):
    """Stores and returns the policy's, reference's and extrapolated sum of a sequence."""
    # In fp64: in fp32 the running sum of a long response loses more than its terms ever lost.
    policy = tl.zeros([BLOCK], tl.float64)
    ref, ext = policy, policy
    last = tl.load(offsets + index + 1)
    for start in range(tl.load(offsets + index), last, BLOCK):
        position = start + tl.arange(0, BLOCK)
        inside = position < last
        policy += tl.load(logp + position, mask=inside, other=0.0).to(tl.float64)
        if ref_logp is not None:
            ref += tl.load(ref_logp + position, mask=inside, other=0.0).to(tl.float64)
        if ext_logp is not None:
            ext += tl.load(ext_logp + position, mask=inside, other=0.0).to(tl.float64)
    policy = tl.sum(policy, 0).to(tl.float32)
    ref = tl.sum(ref, 0).to(tl.float32)
    if ref_sums is not None:
        ref = tl.load(ref_sums + index).to(tl.float32)
    ext = tl.sum(ext, 0).to(tl.float32)
    if ext_logp is None:
        ext = policy
    tl.store(sums + index, policy)
    tl.store(sums + sequences + index, ref)
    tl.store(sums + 2 * sequences + index, ext)
    return policy, ref, ext


@jit
def _smoothed(x, e):
    """-(1-e) ls(x) - e ls(-x) and its derivative, `ls` the log-sigmoid; fp32."""
    # The exponential in fp64: that of fp32 is off by 1e-5 of its value near e^-80. It cannot
    # overflow, and with e at 0 or 1 nothing cancels below: there is no sigmoid(x) - (1-e).
    t = tl.exp(-tl.abs(x.to(tl.float64))).to(tl.float32)
    # log1p(t) as 2 artanh(t / (2 + t)), whose argument is at most 1/3: a minimax polynomial of
    # (artanh(s) / s - 1) / s^2, off by 5e-9. The hardware's logarithm is poor near 1.
    s = t / (2.0 + t)
    q = tl.fma(s * s, 0.140122295, 0.139995705)
    q = tl.fma(s * s, q, 0.200108495)
    q = tl.fma(s * s, q, 0.333332066)
    log1p = 2.0 * tl.fma(s * s * s, q, s)
    up = tl.where(x < 0, t, 1.0) / (1.0 + t)  # sigmoid(x)
    down = tl.where(x < 0, 1.0, t) / (1.0 + t)
    w = 1.0 - e
    # An infinite loss of weight 0 is no loss.
    loss = tl.where(w == 0, 0.0, w * (tl.maximum(-x, 0.0) + log1p))
    loss += tl.where(e == 0, 0.0, e * (tl.maximum(x, 0.0) + log1p))
    return loss, e * up - w * down
