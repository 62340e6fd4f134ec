"""Draw tokens from logits: a pure function, with counter-based randomness.

The uniform of a draw is a hash of (row seed, step), so a row's tokens do not depend on its batch,
its place in it, or on what retires. The draw inverts the CDF in vocabulary order: unlike an order
by probability, it moves a token only when the uniform lies within rounding of a boundary.
Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from srlm_fast.sampler.params import SamplingParams

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_FIRST_LOOK = 1024  # tokens that top_p looks at before it sorts a row's whole vocabulary


class Draw(NamedTuple):
    """The drawn tokens [R] int64 and their numbers [R] float32 (see `Completion`)."""

    token: Tensor
    logprob: Tensor
    sample_logprob: Tensor
    kept_mass: Tensor


def row_seed(seed: int, prompt_ids: Sequence[int], index: int) -> int:
    """The seed (a signed 64-bit integer) of candidate `index` of a prompt."""
    digest = hashlib.blake2b(f"{seed}:{index}:".encode(), digest_size=8)
    digest.update(np.asarray(prompt_ids, dtype="<i8").tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def uniforms(seeds_R: Tensor, step: int) -> Tensor:
    """[R] float64 in [0, 1), multiples of 2**-48: splitmix64 of each int64 seed at `step`."""
    x = seeds_R + _signed((step + 1) * _GOLDEN)
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return _shift(x ^ _shift(x, 31), 16).double() * 2.0**-48


def process(
    logits_RV: Tensor,
    params: SamplingParams,
    *,
    bias_V: Tensor | None = None,
    seen_RV: Tensor | None = None,
    banned_V: Tensor | None = None,
) -> Tensor:
    """The scores that sampling starts from: bias, repetition penalty, bans and temperature.

    `seen_RV` marks the tokens of prompt and response, `banned_V` the ids that may not be drawn yet
    (both bool). `logits_RV` itself is returned when nothing applies.
    """
    scores = logits_RV if bias_V is None else logits_RV + bias_V
    if seen_RV is not None:
        penalty = params.repetition_penalty
        penalised = torch.where(scores > 0, scores / penalty, scores * penalty)
        scores = torch.where(seen_RV, penalised, scores)
    if banned_V is not None:
        scores = scores.masked_fill(banned_V, -torch.inf)
    if params.temperature not in (0.0, 1.0):
        scores = scores / params.temperature
    return scores


def sample(logits_RV: Tensor, scores_RV: Tensor, params: SamplingParams, uniform_R: Tensor) -> Draw:
    """One token a row from the float32 `scores_RV` of `process`, reported against `logits_RV`."""
    log_total = scores_RV.logsumexp(-1)
    raw_total = log_total if scores_RV is logits_RV else logits_RV.logsumexp(-1)
    if params.greedy:
        token = scores_RV.argmax(-1)
        logprob = _at(logits_RV, token) - raw_total
        kept = (_at(scores_RV, token) - log_total).exp()
        return Draw(token, logprob, torch.zeros_like(logprob), kept)
    probs = (scores_RV - log_total[:, None]).exp_()
    cutoff = _cutoff(scores_RV, log_total, params)
    if cutoff is not None:
        probs.mul_(scores_RV >= cutoff)  # on a CPU much faster than masked_fill_
    token, mass = _invert_cdf(probs, uniform_R)
    logprob = _at(logits_RV, token) - raw_total
    sample_logprob = _at(scores_RV, token) - log_total
    if cutoff is None:
        return Draw(token, logprob, sample_logprob, torch.ones_like(logprob))
    return Draw(token, logprob, sample_logprob - mass.log(), mass)


def _invert_cdf(probs_RV: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    cdf = probs_RV.cumsum(-1, dtype=torch.float64)
    mass = cdf[:, -1]
    # A token of probability zero does not raise the CDF, so it is never the first one above.
    token = torch.searchsorted(cdf, (uniform_R * mass)[:, None], right=True)[:, 0]
    token.clamp_(max=probs_RV.shape[-1] - 1)
    if probs_RV.is_cuda:  # parallel prefix sums are not monotone to the last bit
        token = torch.where(_at(probs_RV, token) > 0, token, probs_RV.argmax(-1))
    return token, mass.float().clamp_(max=1.0)


def _cutoff(scores_RV: Tensor, log_total_R: Tensor, params: SamplingParams) -> Tensor | None:
    """[R, 1] the lowest score that top_k, top_p and min_p keep (ties with it are kept), or None."""
    cutoff = None
    top_k = min(params.top_k, scores_RV.shape[-1])
    if top_k > 0:
        top = (
            scores_RV.topk(top_k).values if scores_RV.is_cuda else _descending(scores_RV)[:, :top_k]
        )
        cutoff = top[:, -1:]
        if params.top_p < 1:
            cutoff = _nucleus(top, top.logsumexp(-1), params.top_p)[0]
    elif params.top_p < 1:
        cutoff = _nucleus_cutoff(scores_RV, log_total_R, params.top_p)
    if params.min_p > 0:
        lowest = scores_RV.amax(-1, keepdim=True) + math.log(params.min_p)
        cutoff = lowest if cutoff is None else torch.maximum(cutoff, lowest)
    return cutoff


def _nucleus_cutoff(scores_RV: Tensor, log_total_R: Tensor, top_p: float) -> Tensor:
    if not scores_RV.is_cuda:
        return _nucleus(_descending(scores_RV), log_total_R, top_p)[0]
    top = scores_RV.topk(min(scores_RV.shape[-1], _FIRST_LOOK)).values
    cutoff, complete = _nucleus(top, log_total_R, top_p)
    if not bool(complete.all()):
        rest = (~complete).nonzero()[:, 0]
        full = _descending(scores_RV[rest])
        cutoff[rest] = _nucleus(full, log_total_R[rest], top_p)[0]
    return cutoff


def _descending(scores_RV: Tensor) -> Tensor:
    if scores_RV.is_cuda:
        return scores_RV.sort(-1, descending=True).values
    # numpy's vectorised sort is some forty times faster than torch's on a CPU, and than its topk
    return torch.from_numpy(np.sort(scores_RV.numpy(), axis=-1)).flip(-1)


def _nucleus(top_RK: Tensor, log_total_R: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The score [R, 1] of the last token of the smallest descending run with mass >= top_p, and
    whether the run ends inside `top_RK` [R]."""
    probs = (top_RK - log_total_R[:, None]).exp_()
    before = probs.cumsum(-1) - probs
    count = (before < top_p).sum(-1, keepdim=True).clamp_(min=1)
    return top_RK.gather(-1, count - 1), before[:, -1] + probs[:, -1] >= top_p


def _at(values_RV: Tensor, token_R: Tensor) -> Tensor:
    return values_RV.gather(-1, token_R[:, None])[:, 0]


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch's is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x
