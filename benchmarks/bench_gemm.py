"""The three products of an LM head on the CPU: logits, dX and dW of a chunk of rows.

python -m benchmarks --suite cpu --only gemm

dX and dW are added to an fp32 sum, as the ops do tile after tile and chunk after chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, Work
from srlm_kernels import native
from srlm_kernels.native_gemm import gemm_cpp

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
# Rows, columns of a tile, width of the hidden states.
SIZES = {"smoke": ((40, 70, 33),), "cpu": ((512, 2048, 256), (512, 2048, 1024))}


@dataclass
class Operands:
    """a [M, K] and b [K, N], and whether their product is added to an fp32 sum."""

    a: Tensor
    b: Tensor
    sums: bool

    def out(self) -> Tensor:
        shape = (self.a.shape[0], self.b.shape[1])
        return torch.zeros(shape, dtype=torch.float32 if self.sums else self.a.dtype)


def cases(suite: str) -> Iterator[Case]:
    if suite == "gpu":
        return  # a product of the CPU
    for rows, columns, width in SIZES[suite]:
        for dtype in TOLERANCE:
            yield _case("logits", rows, columns, width, "nt", dtype)
            yield _case("dX", rows, width, columns, "nn", dtype)
            yield _case("dW", columns, width, rows, "tn", dtype)


def _case(what: str, m: int, n: int, k: int, layout: str, name: str) -> Case:
    dtype: torch.dtype = getattr(torch, name)
    return Case(
        op="gemm",
        name=f"{what}, [{m}, {k}] x [{k}, {n}], {name}",
        params={"what": what, "m": m, "n": n, "k": k, "dtype": name, "device": "cpu"},
        make_inputs=partial(_operands, m, n, k, layout, dtype, what != "logits"),
        variants={"torch": Variant(_torch), "ours, cpp": Variant(_ours)},
        oracle=lambda inputs, _: {"out": inputs.a.double() @ inputs.b.double()},
        tolerance=TOLERANCE[name],
        work=Work(2.0 * m * n * k, float(dtype.itemsize * (m * k + k * n + m * n)), (m, k, n)),
        baselines=("torch",),
    )


def _operands(m: int, n: int, k: int, layout: str, dtype: torch.dtype, sums: bool) -> Operands:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    a, b = (
        draw(columns, rows).to(dtype).T if how == "t" else draw(rows, columns).to(dtype)
        for rows, columns, how in ((m, k, layout[0]), (k, n, layout[1]))
    )
    return Operands(a, b, sums)


def _torch(inputs: Operands) -> Call:
    """What torch offers: an fp32 sum of bf16 matrices needs their product, rounded, in between."""
    out, a, b = inputs.out(), inputs.a, inputs.b

    def call() -> Outputs:
        if not inputs.sums:
            return {"out": torch.mm(a, b, out=out)}
        out.zero_()
        return {"out": out.addmm_(a, b) if a.dtype == out.dtype else out.add_(torch.mm(a, b))}

    return call


def _ours(inputs: Operands) -> Call:
    if not native.has("gemm"):
        raise Unavailable(f"not in the C++ library; {native.why()}")
    out, a, b = inputs.out(), inputs.a, inputs.b

    def call() -> Outputs:
        if inputs.sums:
            out.zero_()
        return {"out": gemm_cpp(out, a, b, add=inputs.sums)}

    return call
