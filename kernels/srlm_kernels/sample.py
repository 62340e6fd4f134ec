"""Draw a token per row of logits, with counter-based randomness and parameters of each row's own.

One uniform per draw, a hash of (row seed, step), inverts the CDF in vocabulary order. So a row's
tokens do not depend on its batch or its place in it, and every device draws the same token except
where the uniform lies within rounding of a boundary. Gumbel noise would need a hash per token, and
its tail ends where that hash's bits do.

Shapes: R rows, V vocabulary. The gap of a token is its distance from the row's best one after
temperature, (score - best) / temperature <= 0; a cutoff is the lowest gap that is kept, so that
ties with it are kept too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srlm_kernels.backends import row_kernel

SPLITMIX64 = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


class SampleParams(NamedTuple):
    """How each row is drawn, [R] tensors on the device of the logits; None: off for every row."""

    temperature: Tensor  # fp32, 0: greedy
    top_k: Tensor | None = None  # int32, 0: off, 1: greedy
    top_p: Tensor | None = None  # fp32, 1: off
    min_p: Tensor | None = None  # fp32, 0: off
    repetition_penalty: Tensor | None = None  # fp32, 1: off; needs `seen`
    min_tokens: Tensor | None = None  # int32: no stop token before step `min_tokens`


class Draw(NamedTuple):
    """What was drawn, [R] each."""

    token: Tensor  # int64
    logprob: Tensor  # of the token under the softmax of the logits as they came
    sample_logprob: Tensor  # under the distribution drawn from; greedy: 0
    kept_mass: Tensor  # the probability that the cutoff left; greedy: that of the token alone
    stopped: Tensor  # bool, is_stop[token]


def sample(
    logits: Tensor,
    seed: Tensor,
    step: Tensor,
    params: SampleParams,
    *,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
    is_stop: Tensor | None = None,
    impl: str = "auto",
) -> Draw:
    """Draw one token per row.

    In this order: bias, repetition penalty (x > 0: x / p, else x * p, where seen), no stop token
    while step < min_tokens, temperature; then top_k tokens are kept, of these the fewest whose
    renormalised mass reaches top_p, and those within a factor min_p of the most probable one.
    Greedy rows take the lowest id among the best and report at temperature 1.

    A row whose best processed score is not finite (NaN or +inf somewhere, or nothing left to draw)
    gets token 0, with NaN as sample_logprob and kept_mass. Values of parameters are not checked:
    on a GPU that would wait for it.

    Args:
        logits: [R, V] fp32, bf16 or fp16, unit column stride; fp64 with impl="torch".
        seed: [R] int64.
        step: [R] int64, the tokens that the row has drawn so far.
        bias: [V] fp32, added to every row. is_stop: [V] bool, needed by `min_tokens`.
        seen: [R, V] bool, the tokens of prompt and response; the caller adds the drawn ones.
        impl: "auto", "torch", "cpp" (CPU) or "triton" (CUDA, or under its interpreter).

    Returns:
        numbers in fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, or an `impl` that cannot run here.
    """
    _check(logits, seed, step, params, bias, seen, is_stop)
    draw: Draw = row_kernel("sample", impl, logits)(
        logits, seed, step, params, bias=bias, seen=seen, is_stop=is_stop
    )
    return draw


def _check(
    logits: Tensor,
    seed: Tensor,
    step: Tensor,
    params: SampleParams,
    bias: Tensor | None,
    seen: Tensor | None,
    is_stop: Tensor | None,
) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise TypeError(f"logits must be a 2-D float tensor, got {logits.dtype} {logits.shape}")
    rows, vocabulary = logits.shape
    if rows > 0 and vocabulary == 0:
        raise ValueError("logits have no column to draw from")
    whole = ("top_k", "min_tokens")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        "seed": (seed, (rows,), torch.int64),
        "step": (step, (rows,), torch.int64),
        "bias": (bias, (vocabulary,), torch.float32),
        "seen": (seen, (rows, vocabulary), torch.bool),
        "is_stop": (is_stop, (vocabulary,), torch.bool),
    }
    for name, x in params._asdict().items():
        expected[name] = (x, (rows,), torch.int32 if name in whole else torch.float32)
    for name, (x, shape, dtype) in expected.items():
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, got {list(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {x.dtype}")
        if x.device != logits.device:
            raise ValueError(f"{name} is on {x.device}, logits on {logits.device}")
    if params.repetition_penalty is not None and seen is None:
        raise ValueError("repetition_penalty needs seen")
    if params.min_tokens is not None and is_stop is None:
        raise ValueError("min_tokens needs is_stop")


def uniforms(seed: Tensor, step: Tensor) -> Tensor:
    """[R] fp64 in [0, 1), multiples of 2^-48: splitmix64 of each seed at its step."""
    golden, mix_1, mix_2 = map(_signed, SPLITMIX64)
    x = seed + (step + 1) * golden
    x = (x ^ _shift(x, 30)) * mix_1
    x = (x ^ _shift(x, 27)) * mix_2
    return _shift(x ^ _shift(x, 31), 16).double() * 2.0**-48


def sample_ref(
    logits: Tensor,
    seed: Tensor,
    step: Tensor,
    params: SampleParams,
    *,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
    is_stop: Tensor | None = None,
) -> Draw:
    """`sample` in plain torch; arguments are not checked."""
    raw = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    greedy = params.temperature == 0
    if params.top_k is not None:
        greedy = greedy | (params.top_k == 1)
    scores = processed(raw, step, params, bias=bias, seen=seen, is_stop=is_stop)
    best = scores.amax(-1)
    sharpness = (1 / params.temperature).clamp(max=torch.finfo(torch.float32).max)
    gap = (scores - best[:, None]) * sharpness.masked_fill(greedy, 1)[:, None]
    weight = gap.double().exp()
    total = weight.sum(-1)
    weight *= gap >= _cutoff(gap, params).masked_fill(greedy, 0)[:, None]
    # Where the weight is 0 so is the CDF: whatever its rounding, such a token is never the first
    # one above the uniform, and where the CDF is largest one always is.
    cdf = weight.cumsum(-1).masked_fill(weight == 0, 0)
    mass = cdf.amax(-1)
    level = (uniforms(seed, step) * mass).masked_fill(greedy, 0)
    token = (cdf > level[:, None]).byte().argmax(-1)

    def at_token(values: Tensor) -> Tensor:
        return values.gather(-1, token[:, None])[:, 0]

    sample_logprob = (at_token(gap) - mass.log()).masked_fill(greedy, 0)
    kept_mass = torch.where(greedy, 1, mass).div(total).clamp(max=1)
    drawable = best.isfinite()
    return Draw(
        token,
        at_token(raw.log_softmax(-1)),
        sample_logprob.where(drawable, torch.nan).to(raw.dtype),
        kept_mass.where(drawable, torch.nan).to(raw.dtype),
        torch.zeros_like(greedy) if is_stop is None else is_stop[token],
    )


def processed(
    scores: Tensor,
    step: Tensor,
    params: SampleParams,
    *,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
    is_stop: Tensor | None = None,
) -> Tensor:
    """The scores [R, V] that temperature is applied to."""
    if bias is not None:
        scores = scores + bias
    if params.repetition_penalty is not None and seen is not None:
        penalty = params.repetition_penalty[:, None]
        penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
        scores = torch.where(seen, penalised, scores)
    if params.min_tokens is not None and is_stop is not None:
        early = step < params.min_tokens
        scores = scores.masked_fill(early[:, None] & is_stop, -torch.inf)
    return scores


def _cutoff(gap: Tensor, params: SampleParams) -> Tensor:
    """[R], the lowest gap that top_k, top_p and min_p keep."""
    cutoff = gap.new_full(gap.shape[:1], -torch.inf)
    if params.top_k is not None or params.top_p is not None:
        top = gap.sort(-1, descending=True).values
        weight = top.double().exp()
        if params.top_k is not None:
            vocabulary = gap.shape[1]
            rank = torch.where(params.top_k > 0, params.top_k, vocabulary).clamp(max=vocabulary)
            cutoff = top.gather(-1, rank.long()[:, None] - 1)[:, 0]
            weight *= top >= cutoff[:, None]
        if params.top_p is not None:
            run = weight.cumsum(-1)
            needed = params.top_p[:, None] * run[:, -1:]
            count = (run - weight < needed).sum(-1, keepdim=True).clamp(min=1)
            nucleus = top.gather(-1, count - 1)[:, 0]
            cutoff = torch.where(params.top_p < 1, nucleus.maximum(cutoff), cutoff)
    if params.min_p is not None:
        # Through fp64, so that fp32 devices agree on the last bit.
        cutoff = cutoff.maximum(params.min_p.double().log().to(gap.dtype))
    return cutoff


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
