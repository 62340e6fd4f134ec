"""The inputs that the LM-head benchmarks share: hidden states, two heads and pairs of responses."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import srlm_kernels
from benchmarks.case import Work

IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """S = 2P sequences, padded to `length` rows; the first P are chosen, the others rejected.

    Of sequence i the `responses[i]` rows after `prompts[i]` rows count.
    """

    dim: int
    vocab: int
    length: int
    prompts: tuple[int, ...]
    responses: tuple[int, ...]

    @property
    def sequences(self) -> int:
        return len(self.responses)

    @property
    def rows(self) -> int:
        """That count, N."""
        return sum(self.responses)

    def params(self, dtype: str, device: str) -> dict[str, Any]:
        """What identifies the shape in a row of results."""
        return {
            "hidden": [self.sequences * self.length, self.dim], "vocab": self.vocab,
            "rows": self.rows, "sequences": self.sequences, "dtype": dtype, "device": device,
        }  # fmt: skip

    def work(self, gemms: int, itemsize: int) -> Work:
        """`gemms` products of [N, D] by [D, V]; inputs read once, gradients written once."""
        heads, hidden = 2 * self.vocab * self.dim, 2 * self.rows * self.dim
        moved = (heads + hidden) * (1.5 if gemms > 2 else 1.0) * itemsize
        flop = 2.0 * gemms * self.rows * self.dim * self.vocab
        return Work(flop, moved, (self.rows, self.dim, self.vocab))


def even(dim: int, vocab: int, sequences: int, length: int, prompt: int = 0) -> Shape:
    """Sequences of one length whose first `prompt` rows do not count."""
    response = length - prompt
    return Shape(dim, vocab, length, (prompt,) * sequences, (response,) * sequences)


def ragged(dim: int, vocab: int, seed: int = 0) -> Shape:
    """16 sequences as chat data has them: 8192 of 18208 rows count (45 %), 128 to 896 each."""
    order = random.Random(seed)
    responses = [128 + round(i * 51.2) for i in range(16)]
    prompts = [64 + i * 25 for i in range(8)]
    order.shuffle(responses)
    order.shuffle(prompts)
    return Shape(dim, vocab, 1138, (*prompts, *prompts), tuple(responses))


@dataclass(frozen=True)
class PairBatch:
    """Padded as a trainer lays it out, and packed: the rows that count, pair after pair.

    `hidden` and `weight` are leaves that require a gradient.
    """

    hidden: Tensor
    """[S * L, D]"""
    weight: Tensor
    """[V, D]"""
    ref_hidden: Tensor
    ref_weight: Tensor
    padded_target: Tensor
    """[S * L], IGNORED where a row does not count."""
    rows: Tensor
    """[N] into `hidden`: chosen and rejected response of the first pair, then of the second, ..."""
    target: Tensor
    """[N]"""
    cu_seqlens: Tensor
    """[2P + 1] into `rows`, on the host."""
    sequence: Tensor
    """[N]: which of the 2P packed sequences a row belongs to."""
    upstream: Tensor
    """[N] fp32: a gradient per token."""
    length: int


def make(shape: Shape, dtype: torch.dtype, device: str) -> PairBatch:
    """Logits of unit variance. Every second pair is ranked right by a wide margin, about 10 nats.

    So no sigmoid saturates, and no rounding moves a pair across SPA's threshold of 0.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device) * scale

    total, pairs = shape.sequences * shape.length, shape.sequences // 2
    weight = normal(shape.vocab, shape.dim, scale=shape.dim**-0.5)
    ref_weight = weight + normal(shape.vocab, shape.dim, scale=0.01 * shape.dim**-0.5)
    ref_hidden = normal(total, shape.dim)
    hidden = ref_hidden + normal(total, shape.dim, scale=0.02)
    target = torch.randint(shape.vocab, (total,), generator=generator, device=device)
    counts = torch.zeros(total, dtype=torch.bool, device=device)
    packed, offsets = [], [0]
    for i in (half + p for p in range(pairs) for half in (0, pairs)):
        start = i * shape.length + shape.prompts[i]
        rows = torch.arange(start, start + shape.responses[i], device=device)
        counts[rows] = True
        # A head's rows have length 1: this raises every target logit by as much.
        if (i < pairs) == (i % pairs % 2 == 0):
            hidden[rows] += 10 / shape.responses[i] * weight[target[rows]]
        packed.append(rows)
        offsets.append(offsets[-1] + shape.responses[i])
    rows = torch.cat(packed)
    lengths = torch.tensor([b - a for a, b in pairwise(offsets)], device=device)
    return PairBatch(
        hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(),
        ref_hidden.to(dtype), ref_weight.to(dtype),
        target.masked_fill(~counts, IGNORED), rows, target[rows],
        torch.tensor(offsets),
        torch.arange(len(lengths), device=device).repeat_interleave(lengths),
        normal(rows.shape[0]), shape.length,
    )  # fmt: skip


def oracle(
    batch: PairBatch,
    extrapolation: float | None = None,
    slopes: Callable[..., Tensor] | None = None,
) -> dict[str, Tensor]:
    """`linear_logp_ref` in float64, few rows at a time: log-probabilities [N] and gradients.

    `slopes(logp, ref_logp[, extrapolated_logp]) -> [N]` is d loss / d logp; gradients are those of
    `hidden` [T, D] and `weight` [V, D], and are left out without it.
    """
    x, w = (t.detach().double().requires_grad_() for t in (batch.hidden, batch.weight))
    ref, ref_w = batch.ref_hidden.double(), batch.ref_weight.double()
    pieces = [slice(lo, lo + 256) for lo in range(0, len(batch.target), 256)]

    def piece(part: slice) -> srlm_kernels.LinearLogp:
        return srlm_kernels.linear_logp(
            x, w, batch.target[part], rows=batch.rows[part], ref_hidden=ref, ref_weight=ref_w,
            extrapolation=extrapolation, impl="reference",
        )  # fmt: skip

    with torch.no_grad():
        parts = [piece(part) for part in pieces]
    names = ("logp", "ref_logp") + (() if extrapolation is None else ("extrapolated_logp",))
    found = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    if slopes is None:
        return found
    upstream = slopes(*found.values())
    for part in pieces:
        piece(part).logp.backward(upstream[part])
    assert x.grad is not None and w.grad is not None
    return {**found, "grad_hidden": x.grad, "grad_weight": w.grad}
