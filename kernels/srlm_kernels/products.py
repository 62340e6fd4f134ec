"""Matrix products with the dtypes of operands and result apart, as far as devices can."""

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels.native_gemm import gemm_cpp, gemm_takes


def rounds_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch rounds products of such operands to their own half precision: on the CPU."""
    return device.type == "cpu" and dtype.itemsize < 4


def default_logits_dtype(hidden: Tensor, weight: Tensor, ref_weight: Tensor | None) -> torch.dtype:
    """fp32 from half operands, whose memory only a CPU would feel: there the operands' dtype."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if ref_weight is not None:
        dtype = torch.promote_types(dtype, ref_weight.dtype)
    return dtype if hidden.device.type == "cpu" else torch.promote_types(dtype, torch.float32)


def operand_dtype(hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype) -> torch.dtype:
    """What GEMMs of hidden states and head run in: the wider of the two.

    On a CPU it is no narrower than the logits that were asked for: wide ones are rare there, and
    then keep their digits in the gradients too.
    """
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if rounds_products(dtype, hidden.device):
        return torch.promote_types(dtype, logits_dtype)
    return dtype


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, rounded once, to the dtype of `out`."""
    if gemm_takes(a, b, out):
        return gemm_cpp(out, a, b)
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.dtype.itemsize > out.dtype.itemsize:
        return out.copy_(torch.mm(a, b))
    if rounds_products(a.dtype, a.device) or out.dtype != torch.float32:
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    wide: Tensor = torch.mm(a, b, out_dtype=out.dtype, out=out)
    return wide


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a @ b, or total = a @ b for the first; `total` is fp32 or wider.

    Where products are rounded to half precision the sum still is not.
    """
    if gemm_takes(a, b, total):
        gemm_cpp(total, a, b, add=not first)
        return
    if total.dtype == torch.float64:
        a, b = a.double(), b.double()
    if a.dtype == total.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif rounds_products(a.dtype, a.device) or a.dtype == torch.float64:
        part = torch.mm(a, b)
        total.copy_(part) if first else total.add_(part)
    elif first:
        torch.mm(a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
