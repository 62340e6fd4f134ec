"""The GEMM in C++ against float64: every layout and dtype, odd shapes, and what it must not mix."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from srlm_kernels import native
from srlm_kernels.native_gemm import gemm_cpp, gemm_takes

pytestmark = pytest.mark.skipif(
    not native.has("gemm"), reason=f"no GEMM in C++: {native.why()}, or built without AVX-512"
)
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
SHAPES = [
    (1, 1, 1), (7, 33, 5), (16, 32, 256), (9, 31, 511), (257, 300, 513), (40, 513, 1030),
    (33, 7, 0),
]  # fmt: skip


def operands(
    m: int, n: int, k: int, dtype: torch.dtype, layout: str = "nn"
) -> tuple[Tensor, Tensor]:
    """[m, k] and [k, n]; a "t" says that the matrix is a transposed one."""
    g = torch.Generator().manual_seed(m + n + k)
    a, b = torch.randn(m, k, generator=g).to(dtype), torch.randn(k, n, generator=g).to(dtype)
    return tuple(
        x.T.contiguous().T if how == "t" else x for x, how in zip((a, b), layout, strict=True)
    )


def limit(exact: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the error: a few roundings of all that is summed, and one of the result."""
    rounding = exact.abs() * (torch.finfo(dtype).eps / 2 if dtype == BF16 else 0)
    return rounding + 4 * torch.finfo(FP32).eps * (a.abs() @ b.abs() + 1)


@DTYPES
@pytest.mark.parametrize("out_dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_any_layout(
    shape: tuple[int, int, int], layout: str, out_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    m, n, k = shape
    a, b = operands(m, n, k, dtype, layout)
    truth = a.double() @ b.double()
    start = torch.linspace(-1, 1, m * n).reshape(m, n).to(out_dtype)
    for add in (False, True):
        out = start.clone() if add else torch.full((m, n), torch.nan, dtype=out_dtype)
        exact = truth + start.double() if add else truth
        assert gemm_cpp(out, a, b, add=add) is out
        assert (
            (out.double() - exact).abs() <= limit(exact, a.double(), b.double(), out_dtype)
        ).all()


@DTYPES
def test_long_sums_stay_exact(dtype: torch.dtype) -> None:
    """Of 100,000 equal terms, where one running sum in fp32 would lose three digits."""
    a, b = torch.full((2, 100_000), 0.7, dtype=dtype), torch.full((100_000, 3), 0.3, dtype=dtype)
    out = gemm_cpp(torch.empty(2, 3), a, b)
    exact = float(a[0, 0]) * float(b[0, 0]) * 100_000
    assert (out.double() / exact - 1).abs().max() < 1e-5


@DTYPES
@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
def test_a_result_depends_on_its_row_and_column_alone(layout: str, dtype: torch.dtype) -> None:
    a, b = operands(300, 290, 700, dtype, layout)
    whole = gemm_cpp(torch.empty(300, 290), a, b)
    for rows, columns in ((slice(0, 1), slice(0, 1)), (slice(5, 290), slice(3, 288))):
        part = gemm_cpp(torch.empty_like(whole[rows, columns]), a[rows], b[:, columns])
        assert torch.equal(part, whole[rows, columns])
    a[7] = torch.nan
    b[:, 11] = torch.inf
    spoiled = gemm_cpp(torch.empty(300, 290), a, b)
    left = torch.ones(300, 290, dtype=torch.bool)
    left[7], left[:, 11] = False, False
    assert torch.equal(spoiled[left], whole[left])
    assert spoiled[7].isnan().all() and not spoiled[:, 11].isfinite().any()


@DTYPES
def test_results_do_not_depend_on_threads(
    dtype: torch.dtype, thread_count: Callable[[int], None]
) -> None:
    a, b = operands(513, 300, 700, dtype, "tn")
    results = []
    for threads in (1, 2, 2, 2):
        thread_count(threads)
        results.append(gemm_cpp(torch.empty(513, 300), a, b))
    assert all(torch.equal(result, results[0]) for result in results)


@DTYPES
def test_results_land_in_a_part_of_a_matrix_and_nowhere_else(dtype: torch.dtype) -> None:
    a, b = operands(9, 33, 5, dtype)
    around = torch.full((11, 40), 7.0)
    gemm_cpp(around[1:10, 3:36], a, b)
    assert torch.equal(around[1:10, 3:36], gemm_cpp(torch.empty(9, 33), a, b))
    around[1:10, 3:36] = 7.0
    assert (around == 7.0).all()


@DTYPES
def test_opcheck(dtype: torch.dtype) -> None:
    a, b = operands(9, 33, 5, dtype, "nt")
    torch.library.opcheck(torch.ops.srlm_kernels_c.gemm.default, (torch.zeros(9, 33), a, b, True))


@pytest.mark.parametrize(
    ("out", "a", "b", "message"),
    [
        (torch.empty(2, 3), torch.ones(2, 4), torch.ones(5, 3), "shapes must be"),
        (torch.empty(2, 2), torch.ones(2, 4), torch.ones(4, 3), "shapes must be"),
        (torch.empty(2, 3), torch.ones(2, 4), torch.ones(4, 3).bfloat16(), "both be fp32 or both"),
        (torch.empty(2, 3).double(), torch.ones(2, 4), torch.ones(4, 3), "must be fp32 or bf16"),
        (torch.empty(3, 2).T, torch.ones(2, 4), torch.ones(4, 3), "unit column stride"),
        (torch.empty(2, 3), torch.ones(4), torch.ones(4, 3), "must be matrices"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(out: Tensor, a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        gemm_cpp(out, a, b)


def test_what_it_takes() -> None:
    single, half, out = torch.ones(2, 2), torch.ones(2, 2).bfloat16(), torch.ones(2, 2)
    assert gemm_takes(single, single, half) and gemm_takes(half, half, out)
    assert not gemm_takes(single.half(), single.half(), out)
    assert not gemm_takes(single, half, out)
    assert not gemm_takes(single, single, out.double())
    assert not gemm_takes(single, single, out.T)


@DTYPES
def test_operands_without_a_unit_stride(dtype: torch.dtype) -> None:
    a, b = operands(9, 33, 5, dtype)
    expected = gemm_cpp(torch.empty(9, 33), a, b)
    wide_a, wide_b = a.repeat_interleave(2, 1), b.repeat_interleave(3, 1)
    assert torch.equal(gemm_cpp(torch.empty(9, 33), wide_a[:, ::2], wide_b[:, ::3]), expected)
    number = torch.ones(1, 1, dtype=dtype).expand(9, 5)  # strides of 0
    assert gemm_cpp(torch.empty(9, 33), number, b).isfinite().all()
    column = torch.ones(4, 6, dtype=dtype)[:, 2:3].as_strided((4, 1), (6, 7))
    row = torch.ones(1, 5, dtype=dtype)
    assert torch.equal(gemm_cpp(torch.empty(4, 5), column, row), torch.ones(4, 5))
    # Of one number, or of none, whose strides `contiguous` leaves as they are.
    one = torch.ones(4, 9, dtype=dtype)[::3, ::2][:1, :1].as_strided((1, 1), (27, 2))
    assert torch.equal(gemm_cpp(torch.empty(1, 1), one, one), torch.ones(1, 1))
    none = torch.ones(4, 9, dtype=dtype)[:, ::2][:, :0]
    assert torch.equal(gemm_cpp(torch.empty(4, 3), none, none.new_empty(0, 3)), torch.zeros(4, 3))
