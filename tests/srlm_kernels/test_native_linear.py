"""`invariant_linear` in C++: the same bits for a row in any company, and its checks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from srlm_kernels import native
from srlm_kernels.native_gemm import gemm_cpp
from srlm_kernels.native_linear import invariant_linear_cpp

pytestmark = pytest.mark.skipif(
    not native.has("invariant_linear"), reason=f"no invariant_linear in C++: {native.why()}"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
MOST = 120  # rows: every number of them from the loops for few to the blocks for many


def operands(columns: int, depth: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(columns + depth)
    x, weight = (torch.randn(n, depth, generator=g).to(dtype) for n in (MOST, columns))
    return x, weight, torch.randn(columns, generator=g)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return invariant_linear_cpp(x, weight, bias, out_dtype=torch.float32)


@DTYPES
@pytest.mark.parametrize(("columns", "depth"), [(1, 3), (33, 259), (64, 1024)])
def test_a_row_is_the_same_in_any_number_of_rows(
    columns: int, depth: int, dtype: torch.dtype
) -> None:
    x, weight, bias = operands(columns, depth, dtype)
    alone = torch.cat([linear(row, weight, bias) for row in x.split(1)])
    for rows in range(1, MOST + 1):
        assert torch.equal(linear(x[:rows], weight, bias), alone[:rows]), f"{rows} rows"
        assert torch.equal(linear(x[-rows:], weight, bias), alone[-rows:]), f"last {rows} rows"


@DTYPES
def test_a_row_is_the_same_in_any_order(dtype: torch.dtype) -> None:
    x, weight, bias = operands(50, 259, dtype)
    order = torch.randperm(MOST, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(x[order], weight, bias), linear(x, weight, bias)[order])


@DTYPES
@pytest.mark.parametrize("rows", [1, 6, 16, MOST])
def test_a_column_is_the_same_in_any_part_of_the_weight(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = operands(101, 259, dtype)
    whole = linear(x[:rows], weight, bias)
    for first, end in ((0, 1), (1, 101), (7, 40), (64, 101)):
        part = linear(x[:rows], weight[first:end], bias[first:end])
        assert torch.equal(part, whole[:, first:end])


@DTYPES
@pytest.mark.parametrize("rows", [1, 16, MOST])
def test_results_do_not_depend_on_threads(
    rows: int, dtype: torch.dtype, thread_count: Callable[[int], None]
) -> None:
    x, weight, bias = operands(4001, 259, dtype)
    thread_count(1)
    one = linear(x[:rows], weight, bias)
    thread_count(2)
    assert all(torch.equal(linear(x[:rows], weight, bias), one) for _ in range(5))


@DTYPES
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias = operands(33, 19, dtype)
    for out in (x.new_empty(MOST, 33), torch.empty(MOST, 33)):
        for shift in (None, bias):
            overload = torch.ops.srlm_kernels_c.invariant_linear.default
            torch.library.opcheck(overload, (out.zero_(), x, weight, shift))


def test_fake_tensors_pass() -> None:
    with FakeTensorMode() as mode:
        x, weight, bias = (mode.from_tensor(t) for t in operands(33, 19, torch.float32))
        assert linear(x, weight, bias).shape == (MOST, 33)


@pytest.mark.parametrize(
    ("position", "replacement", "message"),
    [
        (0, torch.zeros(3, 18), r"out must be \[..., N\]"),
        (0, torch.zeros(4, 19), r"out must be \[..., N\]"),
        (0, torch.zeros(57), r"out must be \[..., N\]"),
        (0, torch.zeros(3, 19, dtype=torch.float16), "out must be fp32 or bf16"),
        (0, torch.zeros(19, 3).T, "unit column stride"),
        (1, torch.zeros(3, 36), r"x must be \[..., K\]"),
        (1, torch.tensor(0.0), r"x must be \[..., K\]"),
        (1, torch.zeros(3, 37, dtype=torch.float64), "x must be fp32 or bf16"),
        (1, torch.zeros(37, 3).T, "unit column stride"),
        (2, torch.zeros(19, 37, dtype=torch.bfloat16), "of the same dtype"),
        (2, torch.zeros(37, 19).T, "unit column stride"),
        (2, torch.zeros(1, 19, 37), r"weight \[N, K\]"),
        (3, torch.zeros(18), "bias must be"),
        (3, torch.zeros(38)[::2], "contiguous"),
        (3, torch.zeros(19, dtype=torch.bfloat16), "bias must be"),
    ],
)
def test_no_memory_is_touched_that_is_not_there(
    position: int, replacement: Tensor, message: str
) -> None:
    arguments = [torch.zeros(3, 19), torch.zeros(3, 37), torch.zeros(19, 37), torch.zeros(19)]
    arguments[position] = replacement
    with pytest.raises(RuntimeError, match=message):
        torch.ops.srlm_kernels_c.invariant_linear(*arguments)


@pytest.mark.parametrize("rows", [1, 20, MOST])
@pytest.mark.parametrize("depth", [1, 128, 259, 1024])
def test_sums_are_those_of_every_other_product(rows: int, depth: int) -> None:
    """So that a row's logits are the same bits in sampling and in scoring."""
    x, weight, _ = operands(33, depth, torch.float32)
    other = gemm_cpp(torch.empty(rows, 33), x[:rows], weight.T)
    assert torch.equal(linear(x[:rows], weight), other)
