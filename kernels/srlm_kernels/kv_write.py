"""New keys and values into their slots of the pages."""

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels.backends import row_kernel
from srlm_kernels.tree_attention import PAGE, check_pages


def kv_write(
    key: Tensor,
    value: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    slot: Tensor,
    *,
    impl: str = "auto",
) -> None:
    """Write the keys and values of T tokens into pages, in place.

    Args:
        key: [T, Hkv, Dk] fp32, bf16 or fp16 (fp64 with "torch"), unit last stride.
        value: [T, Hkv, Dv], the same.
        key_pages: [P, Hkv, 64, Dk] of the same dtype, any strides.
        value_pages: [P, Hkv, 64, Dv].
        slot: [T] int64, page * 64 + slot in the page, no two the same; negative: write nothing.
        impl: "auto", "torch", "cpp" (CPU) or "triton" (CUDA, or under its interpreter).

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, or an `impl` that cannot run here.
    """
    for name, x in (("key", key), ("value", value)):
        if x.ndim != 3 or (x.shape[2] > 1 and x.stride(2) != 1):
            raise ValueError(
                f"{name} must be [T, Hkv, D] with unit last stride, got {list(x.shape)} with "
                f"strides {x.stride()}"
            )
    check_pages(key_pages, value_pages, width=key.shape[2], dtype=key.dtype)
    expected = (key.shape[0], key_pages.shape[1])
    if key.shape[:2] != expected or value.shape != (*expected, value_pages.shape[3]):
        raise ValueError(
            f"pages have {key_pages.shape[1]} heads with values of {value_pages.shape[3]}, "
            f"key is {list(key.shape)}, value {list(value.shape)}"
        )
    if value.dtype != key.dtype:
        raise TypeError(f"value must be {key.dtype}, got {value.dtype}")
    if slot.shape != key.shape[:1] or slot.dtype != torch.int64:
        raise ValueError(
            f"slot must be int64 [{key.shape[0]}], got {slot.dtype} {list(slot.shape)}"
        )
    row_kernel("kv_write", impl, key)(key, value, key_pages, value_pages, slot)


def kv_write_ref(
    key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slot: Tensor
) -> None:
    """`kv_write` in plain torch; arguments are not checked."""
    written = slot >= 0
    page, offset = slot[written] // PAGE, slot[written] % PAGE
    key_pages[page, :, offset] = key[written]
    value_pages[page, :, offset] = value[written]
