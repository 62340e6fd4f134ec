"""Products whose result has another dtype than its operands."""

import pytest
import torch

from srlm_kernels.products import (
    add_product,
    default_logits_dtype,
    operand_dtype,
    product,
    rounds_products,
)

CPU = torch.device("cpu")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def matrices(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*size, generator=g).to(dtype) for size in ((7, 33), (33, 5)))


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
@pytest.mark.parametrize("out_dtype", [BF16, FP32, FP64])
def test_a_product_is_rounded_once_to_the_dtype_of_its_result(dtype, out_dtype):
    a, b = matrices(dtype)
    out = torch.empty(7, 5, dtype=out_dtype)
    assert product(a, b, out) is out
    truth = a.double() @ b.double()
    eps = torch.finfo(out_dtype).eps if out_dtype != FP64 else torch.finfo(dtype).eps
    if dtype == BF16:
        eps = torch.finfo(out_dtype).eps  # the products of bf16 are exact in fp32
    assert (out - truth).abs().max() <= 8 * eps * truth.abs().max()


def test_a_product_may_land_in_a_padded_block():
    a, b = matrices(BF16)
    padded = torch.full((7, 32), torch.nan, dtype=BF16)
    product(a, b, padded[:, :5])
    assert torch.equal(padded[:, :5], product(a, b, torch.empty(7, 5, dtype=BF16)))
    assert padded[:, 5:].isnan().all()


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64])
def test_sums_of_products_are_wide(dtype):
    a, b = matrices(dtype)
    # Whole numbers: exact in whatever order they are summed, and small enough for bf16.
    a, b = a.round(), b.round()
    total = torch.full((7, 5), torch.nan, dtype=FP64 if dtype == FP64 else FP32)
    for i in range(3):
        add_product(total, a, b, first=i == 0)
    assert torch.equal(total, 3 * (a.double() @ b.double()).to(total.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_on_a_gpu_products_of_half_operands_are_fp32(dtype):
    """In the layouts of a chunk: a tile of padded rows, gradients in the first half of each, a part
    of the head's gradient."""
    g = torch.Generator("cuda").manual_seed(0)
    rows, width, columns = 37, 64, 100
    x, w, d = (
        torch.randn(*size, generator=g, device="cuda").to(dtype)
        for size in ((rows, width), (columns, width), (rows, columns))
    )
    memory = torch.full((rows, 128), torch.nan, device="cuda")
    z = memory[:, :columns]
    assert product(x, w.T, z) is z

    def assert_exact(found, truth):
        assert found.dtype == FP32
        assert (found - truth).abs().max() <= 1e-6 * truth.abs().max()

    assert_exact(z, x.double() @ w.double().T)
    assert memory[:, columns:].isnan().all()
    dz = z.view(dtype)[:, :columns]
    dz.copy_(d)
    grad_x = torch.full((rows, width), torch.nan, device="cuda")
    grad_w = torch.full((columns + 8, width), torch.nan, device="cuda")
    for first in (True, False):
        add_product(grad_x, dz, w, first=first)
        add_product(grad_w[4:-4], dz.T, x, first=first)
    assert_exact(grad_x, 2 * d.double() @ w.double())
    assert_exact(grad_w[4:-4], 2 * d.double().T @ x.double())
    assert grad_w[:4].isnan().all() and grad_w[-4:].isnan().all()


def test_which_dtypes_a_device_gives():
    half, single, double = (torch.zeros(1, 1, dtype=d) for d in (BF16, FP32, FP64))
    assert rounds_products(BF16, CPU) and rounds_products(FP16, CPU)
    assert not rounds_products(FP32, CPU)
    assert not rounds_products(BF16, torch.device("cuda"))
    assert default_logits_dtype(half, half, None) == BF16
    assert default_logits_dtype(half, half, single) == FP32
    assert default_logits_dtype(single, double, None) == FP64
    assert operand_dtype(half, half, BF16) == BF16
    assert operand_dtype(half, half, FP32) == FP32  # exact logits need exact products
    assert operand_dtype(single, half, BF16) == FP32
