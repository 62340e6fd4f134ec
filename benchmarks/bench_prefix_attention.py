"""Training attention of pairs that share prompts, forward and backward.

python -m benchmarks --suite cpu --only prefix_attention

"SDPA, unshared rows" has every prompt once for each of its responses, as trainers lay out pairs
that do not share; its results and gradients are those of its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, Work
from benchmarks.shapes import TOLERANCE
from srlm_kernels.prefix_attention import PrefixPlan, prefix_attention, refusal

IMPLEMENTATIONS = {"cpu": ("cpp", "pieces"), "cuda": ("flex",)}


@dataclass(frozen=True)
class Shape:
    """Pairs of one prompt length and one response length; query heads are `group` per key head."""

    pairs: int
    prompt: int
    response: int
    kv_heads: int
    group: int
    width: int

    @property
    def tokens(self) -> int:
        """Of a pair that shares its prompt."""
        return self.prompt + 2 * self.response

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def plan(self) -> PrefixPlan:
        return PrefixPlan.of([(self.prompt, [self.response] * 2)] * self.pairs)

    def __str__(self) -> str:
        return (
            f"{self.pairs} x {self.prompt} + 2 x {self.response} tokens, "
            f"heads {self.kv_heads} x {self.group} x {self.width}"
        )


# Pairs, prompt, response: prompts that are most of a row, and prompts that are little of it. On a
# GPU with the heads of a 1.5B model.
LENGTHS = ((1, 512, 256), (4, 256, 256), (1, 128, 512), (1, 1024, 128))
SHAPES = {
    "smoke": [Shape(2, 5, 3, 1, 2, 16)],
    "cpu": [Shape(*lengths, 4, 1, 64) for lengths in LENGTHS],
    "gpu": [Shape(8 * pairs, prompt, response, 2, 6, 128) for pairs, prompt, response in LENGTHS],
}


@dataclass
class Batch:
    """Leaves and the gradient of the result, for one layout of the tokens."""

    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor

    def train(self, attention: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Outputs:
        """The result and the gradients."""
        leaves = (self.query, self.key, self.value)
        out = attention(*leaves)
        names = ("grad_query", "grad_key", "grad_value")
        grads = torch.autograd.grad(out, leaves, self.upstream)
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}

    def select(self, index: Tensor, dtype: torch.dtype) -> Batch:
        """Copies of the tokens [...] of `index`, as leaves [..., H, D]."""
        q, k, v, upstream = (
            x.detach()[index].to(dtype)
            for x in (self.query, self.key, self.value, self.upstream)
        )  # fmt: skip
        return Batch(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream)


@dataclass
class Inputs:
    """The packed row, tensors [T, H, D]."""

    shape: Shape
    packed: Batch

    @property
    def pairs(self) -> Tensor:
        """[pairs, tokens] of the row, a pair at a time."""
        return torch.arange(self.packed.query.shape[0]).view(self.shape.pairs, -1)

    @property
    def unshared(self) -> Tensor:
        """[2 * pairs, prompt + response] of the row, the prompts twice."""
        prompt, *responses = self.pairs.split([self.shape.prompt] + [self.shape.response] * 2, 1)
        return torch.cat([torch.cat([prompt, response], 1) for response in responses])


def cases(suite: str) -> Iterator[Case]:
    device = "cuda" if suite == "gpu" else "cpu"
    for shape in SHAPES[suite]:
        for name in ("bfloat16",) if suite == "gpu" else ("float32", "bfloat16"):
            dtype: torch.dtype = getattr(torch, name)
            ours = {
                f"ours, {i}": Variant(partial(_ours, i), "shared", compiles=i == "flex")
                for i in IMPLEMENTATIONS[device]
            }
            yield Case(
                op="prefix_attention",
                name=f"{shape}, {name}",
                params=vars(shape) | {"dtype": name, "device": device},
                make_inputs=partial(_inputs, shape, dtype, device),
                variants={
                    "SDPA, unshared rows": Variant(_unshared, "unshared"),
                    "SDPA, mask": Variant(_masked, "shared"),
                    **ours,
                },
                oracle=_oracle,
                tolerance=TOLERANCE[name],
                work=_work(shape, dtype),
                baselines=("SDPA, unshared rows", "SDPA, mask"),
            )


def _work(shape: Shape, dtype: torch.dtype) -> Work:
    """Two products forward and four backward over the scores that count; every tensor once."""
    p, r = shape.prompt, shape.response
    scores = shape.pairs * shape.heads * (p * (p + 1) / 2 + 2 * (p * r + r * (r + 1) / 2))
    # Query, result and their gradients; key, value and theirs.
    vectors = shape.pairs * shape.tokens * 4.0 * (shape.heads + shape.kv_heads)
    return Work(
        6 * 2.0 * scores * shape.width, vectors * shape.width * dtype.itemsize, (p, shape.width, p)
    )


def _inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (shape.pairs * shape.tokens, heads, shape.width)
        return torch.randn(size, generator=generator, device=device)

    query, key, value, upstream = (
        normal(heads) for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    leaves = [x.to(dtype).requires_grad_() for x in (3 * query, key, value)]
    return Inputs(shape, Batch(*leaves, upstream.to(dtype)))


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of rows [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def _oracle(inputs: Inputs, computes: str) -> Outputs:
    rows = inputs.packed.select(inputs.unshared, torch.float64)
    if computes == "unshared":
        return rows.train(_causal)
    packed = inputs.packed.select(torch.arange(inputs.packed.query.shape[0]), torch.float64)
    return packed.train(partial(_copied, inputs.shape, inputs.unshared))


def _copied(shape: Shape, index: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of packed tokens, by way of rows with copies of the prompts."""
    chosen, rejected = _causal(query[index], key[index], value[index]).chunk(2)
    return torch.cat([chosen, rejected[:, shape.prompt :]], 1).flatten(0, 1)


def _unshared(inputs: Inputs) -> Call:
    rows = inputs.packed.select(inputs.unshared, inputs.packed.query.dtype)
    return lambda: rows.train(_causal)


def _masked(inputs: Inputs) -> Call:
    """One call for all pairs, with one mask of booleans."""
    shape, device = inputs.shape, inputs.packed.query.device
    token = torch.arange(shape.tokens, device=device)
    segment = (token - shape.prompt).div(shape.response, rounding_mode="floor").clamp(min=-1)
    sees = (segment == segment[:, None]) | (segment == -1)
    mask = sees & (token <= token[:, None])

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (shape.pairs, -1)).transpose(1, 2) for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return lambda: inputs.packed.train(attention)


def _ours(impl: str, inputs: Inputs) -> Call:
    plan, batch = inputs.shape.plan(), inputs.packed
    if reason := refusal(impl, batch.query, batch.key, batch.value, plan):
        raise Unavailable(reason)
    return lambda: batch.train(lambda q, k, v: prefix_attention(q, k, v, plan, impl=impl))
