"""Sums over sequences, SPA's loss and its slopes, from log-probabilities of tokens.

python -m benchmarks --suite cpu --only pair_grad
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, Work
from srlm_kernels import losses
from srlm_kernels.pair_grad import pair_grad

SHAPES = {"smoke": (2, 5, "cpu"), "cpu": (32, 256, "cpu"), "gpu": (64, 1024, "cuda")}
IMPLEMENTATIONS = {"cpu": ("torch",), "cuda": ("torch", "triton")}
BETA, ALPHA, THRESHOLD = 0.1, 0.2, 0.05


@dataclass
class Tokens:
    """Policy, reference and extrapolated log-probabilities [3, N] of packed sequences."""

    logp: Tensor
    offsets: Tensor


def cases(suite: str) -> Iterator[Case]:
    pairs, length, device = SHAPES[suite]
    ours = {f"ours, {i}": Variant(partial(_ours, i)) for i in IMPLEMENTATIONS[device]}
    tokens = 2 * pairs * length
    yield Case(
        op="pair_grad",
        name=f"{pairs} pairs of {length} and {length}",
        params={"pairs": pairs, "length": length, "dtype": "float32", "device": device},
        make_inputs=partial(_tokens, pairs, length, device),
        variants={"torch autograd": Variant(_autograd), **ours},
        oracle=lambda tokens, _: _loss_and_slopes(tokens.logp.double(), tokens.offsets),
        tolerance=1e-4,
        work=Work(0.0, 3.0 * 4 * tokens, (64, 64, 64)),
        baselines=("torch autograd",),
    )


def _tokens(pairs: int, length: int, device: str) -> Tokens:
    generator = torch.Generator(device).manual_seed(0)
    logp = -torch.rand(3, 2 * pairs * length, generator=generator, device=device)
    return Tokens(logp, torch.arange(2 * pairs + 1, device=device) * length)


def _loss_and_slopes(logp: Tensor, offsets: Tensor) -> Outputs:
    """Written out once more, for sequences of one length."""
    sums = logp.view(3, len(offsets) - 1, -1).sum(2)
    policy = sums[0].requires_grad_()
    ratio, ext_ratio = policy - sums[1], sums[2] - sums[1]
    margin, ext_margin = ratio[0::2] - ratio[1::2], ext_ratio[0::2] - ext_ratio[1::2]
    smoothing = ALPHA * (BETA * ext_margin < THRESHOLD)
    x = BETA * margin
    log_sigmoid = torch.nn.functional.logsigmoid
    per_pair = -(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)
    (slopes,) = torch.autograd.grad(per_pair.sum(), policy)
    return {"losses": per_pair.detach(), "slopes": slopes}


def _autograd(tokens: Tokens) -> Call:
    return lambda: _loss_and_slopes(tokens.logp, tokens.offsets)


def _ours(impl: str, tokens: Tokens) -> Call:
    loss = losses.spa(BETA, ALPHA, THRESHOLD)
    scored = torch.ones_like(tokens.logp[0], dtype=torch.bool)

    def call() -> Outputs:
        policy, ref, ext = tokens.logp
        found = pair_grad(
            policy, scored, tokens.offsets, loss, scale=1.0, ref_logp=ref, extrapolated_logp=ext,
            impl=impl,
        )  # fmt: skip
        return {"losses": found.losses, "slopes": found.slopes}

    try:
        call()
    except ValueError as error:
        raise Unavailable(str(error)) from error
    return call
