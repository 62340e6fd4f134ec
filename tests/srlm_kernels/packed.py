"""Packed rows, options of models, and operands for tests of prefix_attention."""

from typing import Any

import torch
from torch import Tensor

from srlm_kernels import PrefixPlan

PLANS = {
    "a pair": [(5, (3, 4))],
    "one token each": [(1, (1, 1))],
    "no responses": [(7, ())],
    "one response": [(4, (6,))],
    "ragged": [(33, (1, 17, 40, 2)), (1, (9, 8)), (20, ()), (3, (64, 64))],
    "longer than a block of keys": [(700, (530, 1))],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "window": {"window": 6},
    "window of one": {"window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 9, "softcap": 3.0, "sinks": True, "scale": 0.5},
}
HEADS = [(4, 4, 8, 8), (4, 2, 8, 8), (6, 1, 33, 33), (2, 2, 128, 128)]  # H, Hkv, Dk, Dv


def operands(
    plan: PrefixPlan, heads: tuple[int, int, int, int] = HEADS[1], dtype: Any = torch.float64
) -> list[Tensor]:
    """Query, key and value as a model has them: [1, H, T, D] transposed. Trainable."""
    g, (h, hkv, dk, dv) = torch.Generator().manual_seed(0), heads
    shapes = [(h, plan.total, dk), (hkv, plan.total, dk), (hkv, plan.total, dv)]
    made = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return [x.requires_grad_().transpose(0, 1) for x in made]


def with_sinks(options: dict[str, Any], like: Tensor) -> dict[str, Any]:
    if not options.get("sinks"):
        return options
    sinks = torch.linspace(-1, 2, like.shape[1], dtype=like.dtype, requires_grad=True)
    return options | {"sinks": sinks}


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad(out, leaves, upstream)
