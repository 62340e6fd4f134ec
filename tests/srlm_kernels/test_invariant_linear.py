"""`invariant_linear` in torch and in C++ against float64."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from srlm_kernels import invariant_linear, native
from srlm_kernels.invariant_linear import _chosen

FLOAT, BFLOAT = torch.float32, torch.bfloat16
# Single elements; less than a vector; tails of every kind; K of whole vectors in both dtypes.
SIZES = [(1, 1), (3, 15), (16, 32), (33, 31), (50, 259), (97, 64), (5, 1000)]
# Around the numbers of rows at which another loop takes over.
ROWS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 24, 25, 32, 33, 41, 64, 95, 96, 200, 555]


@pytest.fixture(params=["torch", "cpp"])
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and not native.has("invariant_linear"):
        pytest.skip(f"no invariant_linear in C++: {native.why()}")
    return request.param


def normal(*size: int, dtype: torch.dtype = FLOAT, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed + sum(size))).to(dtype)


def whole_numbers(*size: int, dtype: torch.dtype) -> Tensor:
    """Whose products and sums are exact in fp32."""
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randint(-8, 9, size, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize(("columns", "depth"), SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_exact_where_sums_are(
    impl: str, rows: int, columns: int, depth: int, dtype: torch.dtype
) -> None:
    x, weight = (whole_numbers(n, depth, dtype=dtype) for n in (rows, columns))
    bias = whole_numbers(columns, dtype=dtype)
    expected = x.double() @ weight.double().T
    wide = dtype if impl == "torch" else FLOAT  # torch rounds bf16 products to bf16 at once
    assert_close(
        invariant_linear(x, weight, out_dtype=wide, impl=impl), expected.to(wide), rtol=0, atol=0
    )
    biased = invariant_linear(x, weight, bias, out_dtype=wide, impl=impl)
    assert_close(biased, (expected + bias.double()).to(wide), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("depth", [64, 259, 5021])
@pytest.mark.parametrize("rows", [1, 7, 16, 40, 130])
def test_sums_are_as_good_as_fp32_allows(
    impl: str, rows: int, depth: int, dtype: torch.dtype
) -> None:
    x, weight = normal(rows, depth, dtype=dtype), normal(77, depth, dtype=dtype)
    expected = x.double() @ weight.double().T

    def error(y: Tensor) -> float:
        return torch.linalg.vector_norm(y.double() - expected).item()

    ours = invariant_linear(x, weight, out_dtype=FLOAT, impl=impl)
    if impl == "torch":
        assert error(ours) <= error(expected.to(dtype)) + error(x.float() @ weight.float().T)
    else:
        assert error(ours) <= 3 * error(x.float() @ weight.float().T)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_the_output_is_rounded_once(impl: str, dtype: torch.dtype) -> None:
    x, weight, bias = normal(9, 40, dtype=dtype), normal(21, 40, dtype=dtype), normal(21)
    assert invariant_linear(x, weight, bias.to(dtype), impl=impl).dtype == dtype
    wide = invariant_linear(x, weight, bias.to(dtype), out_dtype=FLOAT, impl=impl)
    narrow = invariant_linear(x, weight, bias.to(dtype), out_dtype=BFLOAT, impl=impl)
    assert (wide.dtype, narrow.dtype) == (FLOAT, BFLOAT)
    assert torch.equal(narrow, wide.to(BFLOAT))


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("rows", [1, 12, 40, 130])
def test_operands_may_lie_apart(impl: str, rows: int, dtype: torch.dtype) -> None:
    x, weight = whole_numbers(rows, 37, dtype=dtype), whole_numbers(19, 37, dtype=dtype)
    expected = invariant_linear(x, weight, impl=impl)
    around = torch.full((2 * rows, 99), torch.nan, dtype=dtype)
    around[::2, 5:42] = x
    apart = torch.full((38, 99), torch.nan, dtype=dtype)
    apart[::2, 7:44] = weight
    for strided in (around[::2, 5:42], x.T.contiguous().T, x.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(invariant_linear(strided, apart[::2, 7:44], impl=impl), expected)


def test_leading_dimensions(impl: str) -> None:
    x, weight, bias = normal(2, 5, 3, 37), normal(19, 37), normal(19)
    expected = invariant_linear(x.view(30, 37), weight, bias, impl=impl)
    assert torch.equal(invariant_linear(x, weight, bias, impl=impl), expected.view(2, 5, 3, 19))
    turned = invariant_linear(x.transpose(0, 2), weight, bias, impl=impl)
    assert_close(turned, expected.view(2, 5, 3, 19).transpose(0, 2), rtol=1e-5, atol=1e-5)
    one = invariant_linear(x[0, 0, 0], weight, bias, impl=impl)
    assert one.shape == (19,)
    assert_close(one, expected[0], rtol=1e-5, atol=1e-5)


def test_empty_operands(impl: str) -> None:
    bias = normal(19)
    assert invariant_linear(normal(0, 37), normal(19, 37), bias, impl=impl).shape == (0, 19)
    assert invariant_linear(normal(4, 37), normal(0, 37), impl=impl).shape == (4, 0)
    nothing = invariant_linear(normal(4, 0), normal(19, 0), bias, impl=impl)
    assert torch.equal(nothing, bias.expand(4, 19))


@pytest.mark.parametrize("rows", [3, 12, 40, 130])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_what_is_not_finite_stays_in_its_row(impl: str, rows: int, dtype: torch.dtype) -> None:
    x, weight = normal(rows, 37, dtype=dtype), normal(19, 37, dtype=dtype)
    clean = invariant_linear(x, weight, impl=impl)
    x[1, 36], weight[17, 0] = torch.nan, torch.inf
    y = invariant_linear(x, weight, impl=impl)
    assert y[1].isnan().all() and not y[:, 17].isfinite().any()
    others = [row for row in range(rows) if row != 1]
    assert torch.equal(y[others][:, :17], clean[others][:, :17])


def test_arguments_that_do_not_fit() -> None:
    x, weight = normal(3, 37), normal(19, 37)
    with pytest.raises(ValueError, match=r"x must be \[..., K\] and weight \[N, K\]"):
        invariant_linear(x, normal(19, 38))
    with pytest.raises(TypeError, match="share a dtype"):
        invariant_linear(x, weight.bfloat16())
    with pytest.raises(ValueError, match=r"bias must have shape \[19\]"):
        invariant_linear(x, weight, normal(18))
    with pytest.raises(ValueError, match=r"no impl='triton'; known: auto, torch, cpp"):
        invariant_linear(x, weight, impl="triton")
    with pytest.raises(ValueError, match="float64 is for impl='torch'"):
        invariant_linear(x.double(), weight.double(), impl="cpp")


def test_gradients_are_refused_and_not_lost(impl: str) -> None:
    x, weight = normal(3, 37), normal(19, 37).requires_grad_()
    with pytest.raises(ValueError, match="no gradients"):
        invariant_linear(x, weight, impl=impl)
    with torch.no_grad():
        assert not invariant_linear(x, weight, impl=impl).requires_grad


def test_float64_is_for_torch() -> None:
    x, weight = normal(3, 37).double(), normal(19, 37).double()
    assert torch.equal(invariant_linear(x, weight), torch.nn.functional.linear(x, weight))


def test_a_library_without_it_is_not_used_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has", lambda op: False)
    monkeypatch.setattr(native, "available", lambda: True)
    _chosen.cache_clear()
    try:
        x, weight = normal(3, 37), normal(19, 37)
        assert torch.equal(invariant_linear(x, weight), torch.nn.functional.linear(x, weight))
        with pytest.raises(ValueError, match="built without AVX-512"):
            invariant_linear(x, weight, impl="cpp")
    finally:
        _chosen.cache_clear()
