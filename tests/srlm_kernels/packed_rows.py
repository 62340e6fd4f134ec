"""Packed rows of groups, and attention of every response in a row of its own."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from srlm_kernels.prefix_attention import PrefixPlan
from tests.srlm_kernels.forests import dense

# Single tokens; every number of responses; groups that resemble each other and groups that do not;
# past 192, 512 and 768, where torch's flash attention takes other blocks.
PLANS = {
    "one token": PrefixPlan.of([(1, [])]),
    "one token each": PrefixPlan.of([(1, [1, 1])]),
    "prompts alone": PrefixPlan.of([(5, []), (1, []), (12, [])]),
    "pairs": PrefixPlan.of([(9, [4, 4]), (3, [7, 1]), (1, [2, 11])]),
    "ragged": PrefixPlan.of([(7, [3]), (33, [1, 18, 40, 2]), (2, []), (1, [35, 35]), (64, [64])]),
    "long": PrefixPlan.of([(200, [30, 193]), (770, [250, 1])]),
}


@dataclass(frozen=True)
class Heads:
    query: int
    kv: int
    width: int
    value_width: int | None = None


HEADS = {
    "one": Heads(1, 1, 8),
    "four": Heads(4, 4, 64),
    "odd": Heads(3, 3, 17),
    "grouped": Heads(6, 2, 32),
    "multi-query": Heads(3, 1, 128),
}


@dataclass
class Row:
    """Leaves of a packed row as models give them, [1, H, T, D].transpose, and a gradient."""

    plan: PrefixPlan
    heads: Heads
    device: str = "cpu"
    draw: int = 0
    """Another number, other values."""

    def normal(self, heads: int, width: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 100 * self.draw)
        shape = (heads, self.plan.total, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).transpose(0, 1)

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        """Query, key and value; those of one dtype are the others' rounded."""
        h, value_width = self.heads, self.heads.value_width or self.heads.width
        sizes = ((h.query, h.width), (h.kv, h.width), (h.kv, value_width))
        parts = [self.normal(*size, seed) for seed, size in enumerate(sizes)]
        # Scores of spread 4, so that some probabilities are large and most are not.
        parts[0] *= 4
        return [x.to(self.device, dtype).requires_grad_() for x in parts]

    def upstream(self, dtype: torch.dtype) -> Tensor:
        h = self.heads
        return self.normal(h.query, h.value_width or h.width, 3).to(self.device, dtype)


def by_response(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: PrefixPlan,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Prompts alone, and [prompt | response] for each response, as if nothing were shared."""

    def attention(tokens: list[int]) -> Tensor:
        q, k, v = (x[tokens] for x in (query, key, value))
        if window is None and softcap is None and sinks is None:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1)
        position = torch.arange(len(tokens), device=q.device)
        scale = q.shape[2] ** -0.5
        return dense(q, k, v, position, scale=scale, window=window, softcap=softcap, sinks=sinks)

    outs, token = [], 0
    for _, length, responses in plan.groups:
        prompt = list(range(token, token + length))
        token += length
        outs.append(attention(prompt))
        for response in responses:
            outs.append(attention(prompt + list(range(token, token + response)))[length:])
            token += response
    return torch.cat(outs)


def with_gradients(attention, row: Row, dtype: torch.dtype, **options) -> list[Tensor]:
    """The result, then the gradients of query, key, value and, where there are any, sinks."""
    leaves, upstream = row.leaves(dtype), row.upstream(dtype)
    inputs = list(leaves)
    if options.get("sinks") is not None:
        inputs.append(options["sinks"])
    out = attention(*leaves, row.plan, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    """The largest differences in the norm of a token and head, over the largest norm.

    Norms below 1 count as 1, as large as the inputs are: gradients may be 0 altogether.
    """
    return [
        float((f.double() - t).norm(dim=-1).max() / t.norm(dim=-1).max().clamp(min=1))
        for f, t in zip(found, truth, strict=True)
    ]
