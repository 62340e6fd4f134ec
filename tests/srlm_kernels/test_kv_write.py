"""Keys and values arrive in their slots, and nothing else changes."""

import pytest
import torch
from torch import Tensor

from srlm_kernels.backends import refusal
from srlm_kernels.kv_write import kv_write
from srlm_kernels.tree_attention import PAGE

KINDS = [("torch", torch.float32), ("torch", torch.bfloat16), ("torch", torch.float16),
         ("cpp", torch.float32), ("cpp", torch.bfloat16)]  # fmt: skip
# Not in order, with padding; the last slot of the last page.
SLOTS = [3 * PAGE - 1, -1, 0, PAGE, 70, -5, 2 * PAGE - 1, PAGE + 1, 5]
PAGES, HEADS = 3, 2


@pytest.fixture(params=["torch", "cpp"])
def impl(request: pytest.FixtureRequest) -> str:
    if reason := refusal(request.param, torch.zeros(0)):
        pytest.skip(reason)
    return request.param


def drawn(dtype: torch.dtype, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size[-1])
    return torch.randn(*size, generator=generator).to(dtype)


def expected(x: Tensor, pages: Tensor) -> Tensor:
    """`pages` with the tokens of `x` in their slots, one number at a time."""
    pages = pages.clone()
    for token, slot in enumerate(SLOTS):
        for head in range(HEADS):
            if slot >= 0:
                pages[slot // PAGE, head, slot % PAGE] = x[token, head]
    return pages


@pytest.mark.parametrize(("impl", "dtype"), KINDS, indirect=["impl"], ids=str)
@pytest.mark.parametrize("widths", [(64, 64), (24, 40), (1, 80)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_number_is_in_its_place(transposed, widths, dtype, impl) -> None:
    # As they come out of a model: [H, T, D] seen as [T, H, D].
    key, value = (drawn(dtype, HEADS, len(SLOTS), w).transpose(0, 1) for w in widths)
    key_pages, value_pages = (drawn(dtype, PAGES, HEADS, PAGE, w + 1)[..., 1:] for w in widths)
    if transposed:
        key_pages = key_pages.transpose(2, 3).contiguous().transpose(2, 3)
    truth = expected(key, key_pages), expected(value, value_pages)
    value_pages = value_pages.contiguous()
    kv_write(key, value, key_pages, value_pages, torch.tensor(SLOTS), impl=impl)
    assert key_pages.equal(truth[0]) and value_pages.equal(truth[1])


def test_no_tokens(impl) -> None:
    pages = torch.ones(1, 2, PAGE, 8)
    keys = torch.ones(1, 2, 8, PAGE).transpose(2, 3)
    none = torch.zeros(0, 2, 8)
    kv_write(none, none, keys, pages, torch.zeros(0, dtype=torch.int64), impl=impl)
    assert pages.eq(1).all() and keys.eq(1).all()


def test_nothing_but_padding(impl) -> None:
    pages = torch.ones(1, 2, PAGE, 8)
    keys = torch.ones(1, 2, 8, PAGE).transpose(2, 3)
    some = torch.full((3, 2, 8), torch.nan)
    kv_write(some, some, keys, pages, torch.tensor([-1, -64, -65]), impl=impl)
    assert pages.eq(1).all() and keys.eq(1).all()


WRONG = {
    "key": ({"key": torch.zeros(3, 8)}, ValueError, "key must be"),
    "value strides": ({"value": torch.zeros(3, 8, 2).mT}, ValueError, "value must be .* unit"),
    "pages": ({"key_pages": torch.zeros(2, 2, 64, 9)}, ValueError, "key_pages must be"),
    "heads": ({"key": torch.zeros(3, 4, 8)}, ValueError, "pages have 2 heads"),
    "value width": ({"value": torch.zeros(3, 2, 9)}, ValueError, "pages have 2 heads"),
    "dtype of pages": ({"key_pages": torch.zeros(2, 2, 64, 8).half()}, TypeError, "pages must be"),
    "dtype": ({"value": torch.zeros(3, 2, 8).half()}, TypeError, "value must be torch.float32"),
    "slot": ({"slot": torch.zeros(3, dtype=torch.int32)}, ValueError, r"slot must be int64 \[3\]"),
    "slots": ({"slot": torch.arange(2)}, ValueError, r"slot must be int64 \[3\]"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit_are_named(change, error, message) -> None:
    arguments = {
        "key": torch.zeros(3, 2, 8), "value": torch.zeros(3, 2, 8), "slot": torch.arange(3),
        "key_pages": torch.zeros(2, 2, 64, 8), "value_pages": torch.zeros(2, 2, 64, 8),
    }  # fmt: skip
    kv_write(**arguments, impl="torch")
    with pytest.raises(error, match=message):
        kv_write(**arguments | change)
