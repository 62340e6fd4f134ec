"""A model's norm, SwiGLU and rotary embedding, against what transformers computes.

python -m benchmarks --suite cpu --only layers

Of 2048 tokens forward and backward, as in training, and of 16 forward, as in a decoding step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, Work
from srlm_kernels import layers, native

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
EPS = 1e-6
Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """Of a pass: tokens, and the model's hidden size, intermediate size, heads and their width."""

    tokens: int
    hidden: int
    inner: int
    heads: int
    width: int = 64
    trains: bool = True


SHAPES = {
    "smoke": [Shape(5, 16, 24, 2, 8)],
    "cpu": [  # an 11M and a 0.5B model
        Shape(2048, 256, 688, 4),
        Shape(2048, 896, 4864, 14),
        Shape(16, 256, 688, 4, trains=False),
    ],
}


@dataclass
class Inputs:
    """What a layer takes, and the gradient of its result."""

    leaves: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    upstream: Tensor
    trains: bool

    def through(self, layer: Layer) -> Outputs:
        if not self.trains:
            with torch.no_grad():
                return {"out": layer(*self.leaves, *self.others)}
        out = layer(*self.leaves, *self.others)
        grads = torch.autograd.grad(out, self.leaves, self.upstream)
        return {"out": out.detach(), **{f"grad_{i}": grad for i, grad in enumerate(grads)}}

    def double(self) -> Inputs:
        leaves = (x.detach().double().requires_grad_() for x in self.leaves)
        others = (x.double() for x in self.others)
        return Inputs(tuple(leaves), tuple(others), self.upstream.double(), self.trains)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As LlamaRMSNorm, which keeps the weight itself."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    found: Tensor = apply_rotary_pos_emb(x, x[:, :0], cos, sin)[0]
    return found


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


LAYERS: dict[str, tuple[Layer, Layer]] = {
    "rms_norm": (rms_norm, partial(layers.rms_norm, eps=EPS)),
    "swiglu": (swiglu, layers.swiglu),
    "rotary": (rotary, layers.rotary),
}


def cases(suite: str) -> Iterator[Case]:
    if suite == "gpu":
        return  # Liger's are used there
    for shape in SHAPES[suite]:
        for kind, (theirs, ours) in LAYERS.items():
            for name in TOLERANCE:
                yield _case(kind, shape, name, theirs, ours)


def _case(kind: str, shape: Shape, name: str, theirs: Layer, ours: Layer) -> Case:
    dtype: torch.dtype = getattr(torch, name)
    size = {
        "rms_norm": f"{shape.hidden}",
        "swiglu": f"{shape.inner}",
        "rotary": f"{shape.heads} x {shape.width}",
    }[kind]
    return Case(
        op="layers",
        name=f"{kind}, {shape.tokens} tokens of {size}, {name}",
        params={"layer": kind} | vars(shape) | {"dtype": name, "device": "cpu"},
        make_inputs=partial(_inputs, kind, shape, dtype),
        variants={
            "transformers": Variant(partial(_call, theirs)),
            "transformers, compiled": Variant(partial(_compiled, theirs), compiles=True),
            "ours, cpp": Variant(partial(_ours, ours)),
        },
        oracle=lambda inputs, _: inputs.double().through(theirs),
        tolerance=TOLERANCE[name],
        work=_work(_inputs(kind, shape, dtype)),
        baselines=("transformers", "transformers, compiled"),
    )  # fmt: skip


def _work(inputs: Inputs) -> Work:
    """Every tensor once forward; backward its upstream too, and every gradient."""
    tensors = [*inputs.leaves, *inputs.others, inputs.upstream]
    once = sum(float(x.numel() * x.itemsize) for x in tensors)
    grads = sum(float(x.numel() * x.itemsize) for x in inputs.leaves)
    return Work(0.0, 2 * once + grads if inputs.trains else once, (1024, 1024, 1024))


def _inputs(kind: str, shape: Shape, dtype: torch.dtype) -> Inputs:
    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(1, shape.tokens, *size, generator=g).to(dtype)

    others: tuple[Tensor, ...] = ()
    if kind == "rms_norm":
        leaves = [draw(shape.hidden), draw(shape.hidden)[0, 0]]
    elif kind == "swiglu":
        leaves = [draw(shape.inner), draw(shape.inner)]
    else:
        leaves = [draw(shape.heads, shape.width).transpose(1, 2)]
        others = draw(shape.width), draw(shape.width)
    upstream = torch.randn(leaves[0].shape, generator=g).to(dtype)
    leaves = [x.requires_grad_(shape.trains) for x in leaves]
    return Inputs(tuple(leaves), others, upstream, shape.trains)


def _call(layer: Layer, inputs: Inputs) -> Call:
    return partial(inputs.through, layer)


def _compiled(layer: Layer, inputs: Inputs) -> Call:
    return _call(torch.compile(layer, dynamic=False), inputs)


def _ours(layer: Layer, inputs: Inputs) -> Call:
    if not layers.available():
        raise Unavailable(native.why())
    return _call(layer, inputs)
