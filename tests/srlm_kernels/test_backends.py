"""Which code runs a row kernel, and what is said when it cannot."""

import pytest
import torch

from srlm_kernels import native
from srlm_kernels.backends import refusal, row_backend, row_kernel
from srlm_kernels.logits_grad import logits_grad_ref
from srlm_kernels.row_stats import row_stats_ref

FP32 = torch.zeros(2, 3)


def test_auto_takes_cpp_where_it_is_built():
    best = "cpp" if native.available() else "torch"
    assert row_backend("auto", FP32) == row_backend("auto", FP32.bfloat16()) == best


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_auto_takes_torch_for_dtypes_that_cpp_has_not(dtype):
    assert row_backend("auto", FP32.to(dtype)) == "torch"


@pytest.mark.parametrize(
    ("impl", "dtype", "message"),
    [
        (
            "cuda",
            torch.float32,
            r"no kernels with impl='cuda'; known: auto, torch, cpp, triton",
        ),
        ("cpp", torch.float16, r"take float32 and bfloat16, not torch.float16"),
        ("cpp", torch.float64, r"float64 is for impl='torch'"),
        ("triton", torch.float32, r"triton is not installed|run on CUDA, not on cpu"),
    ],
)
def test_a_name_that_cannot_run_here_says_why(impl, dtype, message):
    with pytest.raises(ValueError, match=message):
        row_backend(impl, FP32.to(dtype))


def test_cpp_that_is_not_built_says_so(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why", lambda: "not built: no compiler")
    assert row_backend("auto", FP32) == "torch"
    assert refusal("cpp", FP32) == "not built: no compiler"


def test_torch_is_the_reference():
    assert row_kernel("row_stats", "torch", FP32) is row_stats_ref
    assert row_kernel("logits_grad", "torch", FP32) is logits_grad_ref
