"""Linear layers for the few rows of a decoding step.

python -m benchmarks --suite cpu --only invariant_linear

A call goes through so many layers of one size that their weights come from memory, as those of a
model do, and not from a cache where the call before has left them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, Work
from srlm_kernels import invariant_linear, native

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
Product = Callable[[Tensor, Tensor], Tensor]

# Rows; columns and depth of: attention and MLP of an 11M model, its head, and that of a 0.5B model.
ROWS = {"smoke": (3,), "cpu": (1, 4, 16, 32, 64)}
SIZES = {
    "smoke": ((61, 37),),
    "cpu": ((256, 256), (1024, 256), (256, 1024), (32000, 256), (151936, 896)),
}
WEIGHT_BYTES = {"smoke": 2**15, "cpu": 2**26}


@dataclass
class Layers:
    """Activations [M, K] and the weights [N, K] of some layers."""

    x: Tensor
    weights: list[Tensor]

    def through(self, product: Product) -> Outputs:
        """The results of the first and of the last layer; those between are computed too."""
        results = [product(self.x, weight) for weight in self.weights]
        return {"first": results[0], "last": results[-1]}


def cases(suite: str) -> Iterator[Case]:
    if suite == "gpu":
        return  # an op of the CPU
    for columns, depth in SIZES[suite]:
        for name in TOLERANCE:
            for rows in ROWS[suite]:
                yield _case(rows, columns, depth, name, WEIGHT_BYTES[suite])


def _case(rows: int, columns: int, depth: int, name: str, weight_bytes: int) -> Case:
    dtype: torch.dtype = getattr(torch, name)
    size = columns * depth * dtype.itemsize
    layers = max(1, weight_bytes // size)
    return Case(
        op="invariant_linear",
        name=f"{rows} rows, {layers} x [{columns}, {depth}], {name}",
        params={
            "rows": rows, "columns": columns, "depth": depth, "layers": layers, "dtype": name,
            "device": "cpu",
        },
        make_inputs=partial(_layers, rows, columns, depth, layers, dtype),
        variants={
            "F.linear": Variant(partial(_through, F.linear)),
            "(w @ x.T).T": Variant(partial(_through, lambda x, w: (w @ x.T).T)),
            "F.linear, compiled": Variant(_compiled, compiles=True),
            "ours, cpp": Variant(_ours),
        },
        oracle=lambda inputs, _: inputs.through(lambda x, w: x.double() @ w.double().T),
        tolerance=TOLERANCE[name],
        work=Work(
            2.0 * rows * columns * depth * layers,
            float(layers * (size + rows * columns * dtype.itemsize)),
            (1024, 1024, 1024),
        ),
        baselines=("F.linear",),
    )  # fmt: skip


def _layers(rows: int, columns: int, depth: int, layers: int, dtype: torch.dtype) -> Layers:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    return Layers(
        draw(rows, depth).to(dtype), [draw(columns, depth).to(dtype) for _ in range(layers)]
    )


def _through(product: Product, inputs: Layers) -> Call:
    @torch.inference_mode()
    def call() -> Outputs:
        return inputs.through(product)

    return call


def _compiled(inputs: Layers) -> Call:
    return _through(torch.compile(F.linear, dynamic=False), inputs)


def _ours(inputs: Layers) -> Call:
    if not native.has("invariant_linear"):
        raise Unavailable(f"not in the C++ library; {native.why()}")
    return _through(partial(invariant_linear, impl="cpp"), inputs)
