"""Merging the partial results of one decoding step.

python -m benchmarks --suite gpu --only merge_states
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, Work
from srlm_kernels.merge_states import merge_states

# Tokens, partial results of each, heads, width; as 0.5B and 8B models have after 2048 tokens.
SHAPES = {
    "smoke": (6, 3, 2, 16, "cpu"),
    "cpu": (16, 5, 14, 64, "cpu"),
    "gpu": (256, 5, 32, 128, "cuda"),
}
IMPLEMENTATIONS = {"cpu": ("torch",), "cuda": ("torch", "triton")}


@dataclass
class States:
    """Partial results o [Q, H, Dv], their log-sum-exps [Q, H], and the entries of each token."""

    o: Tensor
    lse: Tensor
    token_ptr: Tensor
    token_entries: Tensor


def cases(suite: str) -> Iterator[Case]:
    tokens, parts, heads, width, device = SHAPES[suite]
    ours = {f"ours, {i}": Variant(partial(_ours, i)) for i in IMPLEMENTATIONS[device]}
    peers = {
        "torch": Variant(partial(_plain, lambda f: f, parts)),
        "torch, compiled": Variant(partial(_plain, torch.compile, parts), compiles=True),
    }
    moved = 4.0 * tokens * parts * heads * (width + 1) + 2.0 * tokens * heads * width
    yield Case(
        op="merge_states",
        name=f"{tokens} tokens of {parts} parts, heads {heads} x {width}",
        params={
            "tokens": tokens, "parts": parts, "heads": heads, "width": width,
            "dtype": "bfloat16", "device": device,
        },
        make_inputs=partial(_states, tokens, parts, heads, width, device),
        variants={**peers, **ours},
        oracle=lambda states, _: _merged(parts, states.o.double(), states.lse.double()),
        tolerance=5e-3,
        work=Work(0.0, moved, (64, 64, 64)),
        baselines=("torch", "torch, compiled"),
    )  # fmt: skip


def _states(tokens: int, parts: int, heads: int, width: int, device: str) -> States:
    generator = torch.Generator(device).manual_seed(0)
    o = torch.randn(tokens * parts, heads, width, generator=generator, device=device)
    lse = 2 * torch.randn(tokens * parts, heads, generator=generator, device=device)
    csr = torch.arange(tokens * parts + 1, dtype=torch.int32, device=device)
    return States(o, lse, csr[::parts].contiguous(), csr[:-1])


def _merged(parts: int, o: Tensor, lse: Tensor) -> Outputs:
    """Where every token has the same number of parts, in order, as here: a sum over a rectangle."""
    weight = lse.unflatten(0, (-1, parts)).softmax(1)
    out = (weight[..., None] * o.unflatten(0, (-1, parts))).sum(1)
    return {"out": out if o.dtype == torch.float64 else out.to(torch.bfloat16)}


def _plain(compiled: Callable[..., Callable[..., Outputs]], parts: int, states: States) -> Call:
    run = compiled(partial(_merged, parts))
    return lambda: run(states.o, states.lse)


def _ours(impl: str, states: States) -> Call:
    from srlm_kernels.backends import refusal

    if reason := refusal(impl, states.o):
        raise Unavailable(reason)
    return lambda: {"out": merge_states(**vars(states), dtype=torch.bfloat16, impl=impl)}
