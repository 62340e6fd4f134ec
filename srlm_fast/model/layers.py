"""Norms, SwiGLU and rotary embeddings of a model by our own kernels while a phase runs on the CPU.

A layer is recognised by what it computes: its class is tried once on a few random numbers, and
keeps its own `forward` when the results differ. The weights stay where they are.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from srlm_kernels import layers

_ROTARY = "apply_rotary_pos_emb"
_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
Forward = Callable[..., Any]


@contextmanager
def fused_layers(model: Any) -> Iterator[None]:
    """Layers of `model` that compute what a kernel of ours does run in it inside, on a CPU."""
    found: dict[nn.Module, Forward] = {}
    if layers.available() and next(model.parameters()).device.type == "cpu":
        for module in model.modules():
            if "forward" not in vars(module) and (fused := _fused(type(module), module)):
                found[module] = functools.partial(fused, module)
    try:
        for module, forward in found.items():
            module.forward = forward
        yield
    finally:
        for module in found:
            vars(module).pop("forward", None)


_KINDS: dict[tuple[Any, ...], Forward | None] = {}


def _fused(kind: Any, example: Any) -> Forward | None:
    """What to call in place of `forward` of modules like `example`, them before the arguments."""
    activation = getattr(example, "act_fn", None)  # the configuration's choice, not the class's
    activation = type(activation) if isinstance(activation, nn.Module) else activation
    key = kind, kind.forward, activation  # a class may be patched meanwhile
    if key not in _KINDS:
        _KINDS[key] = _norm(kind, example) or _mlp(kind, example) or _attention(kind)
    return _KINDS[key]


def _norm(kind: Any, example: Any) -> Forward | None:
    weight = getattr(example, "weight", None)
    if "RMSNorm" not in kind.__name__ or weight is None or weight.ndim != 1:
        return None
    eps = "variance_epsilon" if hasattr(example, "variance_epsilon") else "eps"

    def with_offset(offset: float) -> Forward:
        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            weight = getattr(module, "weight", None)  # some of a class may be without one
            if len(args) == 1 and not kwargs and weight is not None:
                (x,) = args
                if x.shape[-1:] == weight.shape and layers.takes(x, weight):
                    return layers.rms_norm(x, weight, getattr(module, eps), offset)
            return kind.forward(module, *args, **kwargs)

        return forward

    def same(forward: Forward) -> bool:
        norm = _twin(example)
        norm._parameters = {"weight": nn.Parameter(_random(24) + 1)}
        small_too = torch.tensor([[30.0], [1.0], [1e-3]])  # where eps counts
        return _agree(kind.forward, forward, norm, _random(3, 24) * small_too)

    return next((f for f in map(with_offset, (0.0, 1.0)) if same(f)), None)


def _mlp(kind: Any, example: Any) -> Forward | None:
    if example._modules.keys() - {"act_fn"} != {"gate_proj", "up_proj", "down_proj"}:
        return None

    def gated(module: Any, gate: Tensor, up: Tensor) -> Tensor:
        if layers.takes(gate, up) and gate.shape == up.shape:
            return layers.swiglu(gate, up)
        product: Tensor = module.act_fn(gate) * up
        return product

    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs:
            return kind.forward(module, *args, **kwargs)
        # No names for the two: they would be in memory until the last product is over.
        return module.down_proj(gated(module, module.gate_proj(*args), module.up_proj(*args)))

    mlp = _twin(example)
    mlp._modules = {**example._modules, "gate_proj": _Times(7), "up_proj": _Times(3)}
    mlp._modules["down_proj"] = _Times(1)
    # Large numbers, for some families clamp them.
    return forward if _agree(kind.forward, forward, mlp, 99 * _random(9, 24)) else None


class _Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def _attention(kind: Any) -> Forward | None:
    """`forward` with another `apply_rotary_pos_emb`, which is no method but a global name of it."""
    own = kind.forward
    if _ROTARY not in getattr(getattr(own, "__code__", None), "co_names", ()):
        return None
    rotate = _rotation(own.__globals__[_ROTARY])
    if rotate is None:
        return None
    names = {**own.__globals__, _ROTARY: rotate}
    forward = types.FunctionType(
        own.__code__, names, own.__name__, own.__defaults__, own.__closure__
    )
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


@functools.cache
def _rotation(own: Forward) -> Forward | None:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes = {
            (q.shape[0], *q.shape[2:]),
            (k.shape[0], *k.shape[2:]),
            (*cos.shape,),
            (*sin.shape,),
        }
        if args or kwargs or len(sizes) > 1 or q.shape[-1] % 2 or not layers.takes(q, k, cos, sin):
            return own(q, k, cos, sin, *args, **kwargs)
        return layers.rotary(q, cos, sin), layers.rotary(k, cos, sin)

    q, k, cos, sin = _random(2, 3, 5, 8), _random(2, 1, 5, 8), _random(2, 5, 8), _random(2, 5, 8)
    return rotate if _agree(own, rotate, q, k, cos, sin) else None


def _twin(example: Any) -> Any:
    """A module that may be given other weights. Not copy.copy, for which FSDP makes a new one."""
    twin = object.__new__(type(example))
    vars(twin).update(vars(example))
    return twin


def _random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) - 0.5


def _agree(own: Forward, ours: Forward, *arguments: Any) -> bool:
    """Whether both return the same, to rounding. What `own` cannot be asked is no match."""
    try:
        with torch.no_grad():
            expected, found = own(*arguments), ours(*arguments)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    except (AssertionError, *_ERRORS):
        return False
    return True
