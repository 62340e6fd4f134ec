"""The model's linear layers by our own product while a phase runs on the CPU.

It is faster than a BLAS at the few rows of a decoding step, and a row's result does not depend on
its batch. The layers keep their weights; only their `forward` is another meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from srlm_fast.model.forward import Head
from srlm_kernels import invariant_linear

# With AMX oneDNN's bf16 products of more rows are faster than ours, which are made without it.
_MOST_ROWS_WITH_AMX = 128


@contextmanager
def invariant_linears(model: Any) -> Iterator[None]:
    """Every plain `nn.Linear` of `model` computes by `invariant_linear` inside, if it can."""
    layers = [
        layer
        for layer in model.modules()
        if type(layer) is torch.nn.Linear and "forward" not in vars(layer)
    ]
    try:
        for layer in layers:
            layer.forward = functools.partial(_forward, layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _forward(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    # Looked up now: hooks of weight normalisation or pruning have just made the weight.
    return linear(layer.weight, layer.bias, x)


def head_products(head: Head, hidden: Tensor) -> Tensor:
    """hidden @ weight.T + bias [R, V], float32 sums kept as such where the device can."""
    if hidden.dtype not in (torch.bfloat16, torch.float16) or hidden.dtype != head.weight.dtype:
        return linear(head.weight, head.bias, hidden)
    if hidden.is_cuda:
        products = torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
        return products if head.bias is None else products + head.bias
    return invariant_linear(hidden, head.weight, head.bias, out_dtype=torch.float32)


def linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x weight^T + bias in the dtype of `x`."""
    ours = x.dtype == torch.float32
    if x.dtype == torch.bfloat16:
        ours = x.numel() // x.shape[-1] <= _MOST_ROWS_WITH_AMX or not has_amx()
    if ours and x.device.type == "cpu" and x.dtype == weight.dtype:
        return invariant_linear(x, weight, bias)
    return F.linear(x, weight, bias)


@functools.cache
def has_amx() -> bool:
    """Whether this CPU multiplies matrices of bf16."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))
