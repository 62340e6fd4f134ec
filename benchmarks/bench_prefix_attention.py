"""Training attention of [prompt | chosen | rejected] against rows that repeat their prompt.

python -m benchmarks --suite cpu --only prefix_attention

Forward and backward of one layer's attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import Call, Case, Outputs, Variant, Work
from srlm_kernels import PrefixPlan, prefix_attention
from srlm_kernels.prefix_attention import sees

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
# Pairs, prompt, response; the main one first.
SIZES = {
    "smoke": ((2, 9, 7),),
    "cpu": ((1, 512, 256), (4, 256, 256), (4, 128, 512), (4, 1024, 128)),
    "gpu": ((16, 512, 512), (8, 2048, 512)),
}
# Query heads, KV heads, width of one; device; dtypes.
SETTINGS = {
    "smoke": ((4, 2, 16), "cpu", ("float32",)),
    "cpu": ((4, 4, 64), "cpu", ("float32", "bfloat16")),
    "gpu": ((12, 2, 128), "cuda", ("bfloat16",)),
}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Inputs:
    """Query, key and value [T, H, D] of the packed row, leaves; the pairs that it holds."""

    qkv: tuple[Tensor, Tensor, Tensor]
    pairs: int
    prompt: int
    response: int

    @property
    def plan(self) -> PrefixPlan:
        return PrefixPlan.of([(self.prompt, (self.response, self.response))] * self.pairs)

    def rows(self) -> Tensor:
        """[2P, prompt + response] tokens of each response's own row."""
        device, group = self.qkv[0].device, self.prompt + 2 * self.response
        first = torch.arange(self.pairs, device=device)[:, None, None] * group
        side = torch.arange(2, device=device)[None, :, None] * self.response
        place = torch.arange(self.prompt + self.response, device=device)
        return (first + place + side * (place >= self.prompt)).flatten(0, 1)


def cases(suite: str) -> Iterator[Case]:
    heads, device, dtypes = SETTINGS[suite]
    for size in SIZES[suite]:
        for dtype in dtypes:
            yield _case(heads, device, dtype, *size)


def _case(
    heads: tuple[int, int, int], device: str, name: str, pairs: int, prompt: int, response: int
) -> Case:
    dtype: torch.dtype = getattr(torch, name)
    tokens = pairs * (prompt + 2 * response)
    seen = pairs * (prompt**2 / 2 + 2 * prompt * response + response**2)
    ours = {"flex": "ours, flex"} if device == "cuda" else {"pieces": "ours, pieces"}
    variants = {text: Variant(partial(_ours, impl)) for impl, text in ours.items()}
    variants["SDPA, mask"] = Variant(_masked)
    variants["SDPA, unshared rows"] = Variant(_unshared)
    return Case(
        op="prefix_attention",
        name=f"{pairs} x [{prompt}, {response}, {response}], heads {list(heads)}, {name}",
        params={
            "pairs": pairs, "prompt": prompt, "response": response, "heads": list(heads),
            "dtype": name, "device": device,
        },
        make_inputs=partial(_inputs, heads, dtype, device, pairs, prompt, response),
        variants=variants,
        oracle=_exact,
        tolerance=TOLERANCE[name],
        work=Work(
            7 * 2.0 * heads[0] * heads[2] * seen,
            float(dtype.itemsize * tokens * (4 * heads[0] + 4 * heads[1]) * heads[2]),
            (prompt, heads[2], prompt),
        ),
        baselines=("SDPA, unshared rows",),
    )  # fmt: skip


def _inputs(
    heads: tuple[int, int, int], dtype: torch.dtype, device: str, pairs: int, prompt: int,
    response: int,
) -> Inputs:  # fmt: skip
    g = torch.Generator().manual_seed(0)
    tokens, (h, hkv, d) = pairs * (prompt + 2 * response), heads
    q, k, v = (
        torch.randn(tokens, n, d, generator=g).to(device, dtype).requires_grad_()
        for n in (h, hkv, hkv)
    )
    return Inputs((q, k, v), pairs, prompt, response)


def _both_ways(attend: Attention, inputs: Inputs) -> Call:
    upstream = torch.linspace(-1, 1, inputs.qkv[0].numel(), device=inputs.qkv[0].device)
    upstream = upstream.view_as(inputs.qkv[0]).to(inputs.qkv[0].dtype)

    def call() -> Outputs:
        out = attend(*inputs.qkv)
        grads = torch.autograd.grad(out, inputs.qkv, upstream)
        return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    return call


def _ours(impl: str, inputs: Inputs) -> Call:
    plan = inputs.plan
    return _both_ways(lambda q, k, v: prefix_attention(q, k, v, plan, impl=impl), inputs)


def _masked(inputs: Inputs) -> Call:
    """A dense mask of each group, which all groups share here."""
    group = PrefixPlan.of([(inputs.prompt, (inputs.response, inputs.response))])
    places = group.places(inputs.qkv[0].device)
    mask = sees(places.at((slice(None), None)), places, None)

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (inputs.pairs, -1)).transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return _both_ways(attend, inputs)


def _unshared(inputs: Inputs) -> Call:
    """Rows of equal length, of which the second half of a pair repeats the prompt. The prompt's own
    results are those of the first row."""
    rows = inputs.rows()

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (x[rows].transpose(1, 2) for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        chosen, rejected = out.transpose(1, 2).unflatten(0, (-1, 2)).unbind(1)
        return torch.cat([chosen, rejected[:, inputs.prompt :]], 1).flatten(0, 1)

    return _both_ways(attend, inputs)


def _exact(inputs: Inputs, computes: str) -> Outputs:
    qkv = tuple(x.detach().double().requires_grad_() for x in inputs.qkv)
    exact = Inputs((qkv[0], qkv[1], qkv[2]), inputs.pairs, inputs.prompt, inputs.response)
    return _ours("reference", exact)()
