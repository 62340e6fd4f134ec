"""Norm, SwiGLU and rotary embedding in C++ against float64, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from srlm_kernels import layers, native

pytestmark = pytest.mark.skipif(not layers.available(), reason=native.why())
FLOAT, BFLOAT = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
# Half a unit in the last place of a result that is rounded once, and what fp32 sums may add.
ERROR = {FLOAT: 5e-7, BFLOAT: 2**-8}


def normal(*size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size))).to(dtype)


def check(ours: Callable[..., Tensor], exact: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The result, element by element, and all gradients, by their norms."""
    mine = [x.clone().requires_grad_() for x in inputs]
    other = [x.double().requires_grad_() for x in inputs]
    found, expected = ours(*mine), exact(*other)
    assert found.dtype == inputs[0].dtype
    with torch.no_grad():
        assert torch.equal(ours(*mine), found)  # by another way
    error = ERROR[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=error, atol=1e-6)
    upstream = normal(*found.shape, dtype=found.dtype, seed=9)
    found.backward(upstream)
    expected.backward(upstream.double())
    for x, y in zip(mine, other, strict=True):
        assert x.grad is not None and y.grad is not None and x.grad.dtype == x.dtype
        off = torch.linalg.vector_norm(x.grad.double() - y.grad)
        assert off <= error * torch.linalg.vector_norm(y.grad) + 1e-6


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * (offset + weight)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 2), (3, 5, 16), (64, 33), (65, 192), (2, 67, 4, 48), (5, 4099)]
)
def test_rms_norm(shape: tuple[int, ...], offset: float, dtype: torch.dtype) -> None:
    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype, seed=1)
    check(
        lambda x, w: layers.rms_norm(x, w, 1e-5, offset),
        lambda x, w: rms_norm(x, w, 1e-5, offset),
        x, weight,
    )  # fmt: skip


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (15,), (16,), (3, 7, 11), (2, 40, 688)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = (4 * normal(*shape, dtype=dtype, seed=i) for i in range(2))
    check(layers.swiglu, lambda a, b: a * torch.sigmoid(a) * b, gate, up)


@DTYPES
@pytest.mark.parametrize("width", [2, 6, 32, 80, 128])
@pytest.mark.parametrize("rows", [1, 3])
def test_rotary(rows: int, width: int, dtype: torch.dtype) -> None:
    # Halves of cos and sin are equal in models, which the op does not rely on.
    cos, sin = (normal(rows, 9, width, dtype=dtype, seed=i) for i in range(2))
    x = normal(rows, 9, 5, width, dtype=dtype).transpose(1, 2)
    check(
        lambda x: layers.rotary(x, cos, sin),
        lambda x: rotated(x, cos.double(), sin.double()),
        x,
    )  # fmt: skip
    assert layers.rotary(x, cos, sin).transpose(1, 2).is_contiguous()


@DTYPES
def test_operands_may_lie_apart(dtype: torch.dtype) -> None:
    wide = normal(6, 5, 96, dtype=dtype)
    weight, apart = normal(32, dtype=dtype), wide[..., 32:64]
    plain = apart.contiguous()
    assert torch.equal(layers.rms_norm(apart, weight, 1e-6), layers.rms_norm(plain, weight, 1e-6))
    assert torch.equal(layers.swiglu(apart, wide[..., :32]), layers.swiglu(plain, wide[..., :32]))
    x, cos, sin = wide[None, ..., 32:64], wide[None, :5, 0, :32], wide[None, :5, 1, 7:39]
    assert torch.equal(layers.rotary(x, cos, sin), layers.rotary(plain[None].clone(), cos, sin))
    turned = wide.transpose(0, 2)[:32]  # its last stride is not 1
    found = layers.rms_norm(turned, weight[:6], 1e-6)
    assert torch.equal(found, layers.rms_norm(turned.contiguous(), weight[:6], 1e-6))


@DTYPES
def test_gradients_may_lie_apart(dtype: torch.dtype) -> None:
    x, weight = normal(5, 7, dtype=dtype).requires_grad_(), normal(7, dtype=dtype).requires_grad_()
    layers.rms_norm(x, weight, 1e-6).sum().backward()  # of an expanded number
    assert x.grad is not None and weight.grad is not None
    first = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    layers.rms_norm(x, weight, 1e-6).backward(torch.ones(5, 7, dtype=dtype))
    assert torch.equal(x.grad, first[0]) and torch.equal(weight.grad, first[1])


@DTYPES
def test_rows_and_threads_do_not_matter_to_the_bit(dtype: torch.dtype) -> None:
    x, weight = normal(700, 72, dtype=dtype), normal(72, dtype=dtype)

    def run() -> list[Tensor]:
        leaf, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        normed = layers.rms_norm(leaf, w, 1e-6)
        out = layers.swiglu(normed, leaf)
        out.backward(x)
        assert leaf.grad is not None and w.grad is not None
        return [normed, out, leaf.grad, w.grad]

    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))
    for row in (0, 3, 699):
        assert torch.equal(layers.rms_norm(x[row], weight, 1e-6), found[0][0][row])
        assert torch.equal(layers.swiglu(found[0][0][row], x[row]), found[0][1][row])


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, weight = normal(4, 20, dtype=FLOAT), normal(20, dtype=FLOAT)
    x[1, 19] = torch.nan
    for found in (layers.rms_norm(x, weight, 1e-6), layers.swiglu(x, x)):
        assert found[[0, 2, 3]].isfinite().all() and found[1, 19].isnan()
    far = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    torch.testing.assert_close(layers.swiglu(far, far), torch.nn.functional.silu(far) * far)
    layers.swiglu(far, torch.ones(5)).sum().backward()
    assert far.grad is not None
    torch.testing.assert_close(far.grad, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


def test_nothing_at_all() -> None:
    x, weight = torch.empty(0, 12, requires_grad=True), torch.ones(12, requires_grad=True)
    layers.swiglu(layers.rms_norm(x, weight, 1e-6), x).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros(12))
    assert layers.rotary(torch.empty(1, 2, 0, 8), *torch.empty(2, 1, 0, 8)).shape == (1, 2, 0, 8)


def test_a_frozen_weight_has_no_gradient() -> None:
    x, weight = torch.ones(3, 12, requires_grad=True), torch.ones(12)
    layers.rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and weight.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.rms_norm(torch.ones(3, 5), torch.ones(4), 1e-6), r"x must be \[N, D\]"),
        (lambda: layers.rms_norm(torch.ones(3, 4), torch.ones(4).bfloat16(), 1e-6), "dtype of x"),
        (lambda: layers.swiglu(torch.ones(3), torch.ones(4)), "of one size and dtype"),
        (lambda: layers.swiglu(torch.ones(3).double(), torch.ones(3).double()), "fp32 or bf16"),
        (lambda: layers.rotary(torch.ones(1, 2, 3, 5), *torch.ones(2, 1, 3, 5)), "of even D"),
        (lambda: layers.rotary(torch.ones(1, 2, 3, 4), *torch.ones(2, 1, 4, 4)), "cos and sin"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()


def test_what_it_takes() -> None:
    x = torch.ones(3)
    assert layers.takes(x, torch.nn.Parameter(x))
    assert not layers.takes(x, x.bfloat16()) and not layers.takes(x.double())
    assert not layers.takes(x, x.to("meta")) and not layers.takes(x.half())


@DTYPES
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.srlm_kernels_c
    x, weight, rstd = normal(70, 8, dtype=dtype), normal(8, dtype=dtype), torch.ones(70)
    out, parts = torch.zeros_like(x), torch.zeros(2, 8)
    for op, arguments in {
        ops.rms_norm: (out, rstd, x, weight, 1.0, 1e-6),
        ops.rms_norm_backward: (out, parts, x, x.clone(), weight, rstd, 1.0),
        ops.swiglu: (out, x, x.clone()),
        ops.swiglu_backward: (out, torch.zeros_like(x), x, x.clone(), x.clone()),
        ops.rotary: (out.view(7, 10, 8), x.view(7, 10, 8), x[:7], x[7:14], True),
    }.items():
        torch.library.opcheck(op.default, arguments)
