"""The Triton kernel of kv_write: keys and values arrive in their slots, nothing else changes."""

import pytest
import torch

from srlm_kernels.backends import refusal
from srlm_kernels.kv_write_triton import kv_write_triton
from srlm_kernels.tree_attention import PAGE
from tests.srlm_kernels.test_kv_write import HEADS, PAGES, SLOTS, drawn, expected

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := refusal("triton", torch.empty(0, device=DEVICE)):
    pytest.skip(f"{reason}; test_interpreter.py runs this file", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (24, 40), (1, 80)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_number_is_in_its_place(transposed, widths, dtype) -> None:
    # More tokens than a program takes, as they come out of a model: [H, T, D] seen as [T, H, D].
    key, value = (drawn(dtype, HEADS, len(SLOTS), w).to(DEVICE).transpose(0, 1) for w in widths)
    key_pages, value_pages = (
        drawn(dtype, PAGES, HEADS, PAGE, w + 1).to(DEVICE)[..., 1:] for w in widths
    )
    if transposed:
        key_pages = key_pages.transpose(2, 3).contiguous().transpose(2, 3)
    truth = expected(key, key_pages), expected(value, value_pages)
    kv_write_triton(key, value, key_pages, value_pages, torch.tensor(SLOTS, device=DEVICE))
    assert key_pages.equal(truth[0]) and value_pages.equal(truth[1])


@pytest.mark.parametrize("slots", [[], [-1, -64, -65]], ids=["no tokens", "padding"])
def test_nothing_to_write(slots) -> None:
    pages = torch.ones(1, 2, PAGE, 8, device=DEVICE)
    some = torch.full((len(slots), 2, 8), torch.nan, device=DEVICE)
    slot = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    kv_write_triton(some, some, pages, pages, slot)
    assert pages.eq(1).all()
