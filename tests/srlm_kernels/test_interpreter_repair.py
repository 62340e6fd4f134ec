"""bf16 in the repaired interpreter is bf16."""

import pytest
import torch

from srlm_kernels.triton_support import INTERPRETED, jit, tl

if not INTERPRETED:
    pytest.skip("test_interpreter.py runs this file", allow_module_level=True)


@jit
def cast_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(tl.float32).to(out.dtype.element_ty))


@jit
def dot_kernel(x, y, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@jit
def add_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(out + at, value + value)


def numbers(size: int) -> torch.Tensor:
    """Of every magnitude, ties between two bf16 numbers among them, infinities and NaN."""
    bits = torch.randint(-(2**31), 2**31, (size,), generator=torch.Generator().manual_seed(0))
    bits = bits.to(torch.int32)
    bits[: size // 2] = (bits[: size // 2] & ~0xFFFF) | 0x8000
    x = bits.view(torch.float32)
    x[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    return x


def test_rounding_is_that_of_torch() -> None:
    x = numbers(4096)
    out = torch.empty(4096, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, SIZE=4096)
    expected = x.bfloat16()
    assert out.isnan().equal(expected.isnan())
    assert out.nan_to_num().equal(expected.nan_to_num())
    wide = torch.empty(4096)
    cast_kernel[(1,)](expected, wide, SIZE=4096)
    assert wide.nan_to_num().equal(expected.float().nan_to_num())


def test_dot() -> None:
    x, y = (torch.randn(32, 32, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    x, y = x.bfloat16(), y.bfloat16()
    out = torch.empty(32, 32)
    dot_kernel[(1,)](x, y, out, SIZE=32)
    torch.testing.assert_close(out, x.float() @ y.float())


def test_arithmetic_on_raw_bf16_is_an_error() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="cast to fp32 first"):
        add_kernel[(1,)](x, torch.empty_like(x), SIZE=16)
