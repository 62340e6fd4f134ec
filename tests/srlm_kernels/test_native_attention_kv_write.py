"""What the C++ copy into pages does beyond what test_kv_write.py asks of every implementation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from srlm_kernels import native
from srlm_kernels.kv_write import kv_write, kv_write_ref
from srlm_kernels.tree_attention import PAGE

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why())
DTYPES = [torch.float32, torch.bfloat16]
PAGES, HEADS, KEY, VALUE = 8, 3, 24, 40

# Runs that are cut by a page, by a gap, by padding, by a step back, and one that fills a page.
SLOTS = [
    *range(60, 70), 72, 73, -1, -1, 74, *range(200, 190, -1), *range(256, 320),
    *range(330, 384), *range(100, 130),
]  # fmt: skip


def pages(dtype: torch.dtype, transposed: bool) -> tuple[Tensor, Tensor]:
    shape = (PAGES, HEADS, KEY, PAGE) if transposed else (PAGES, HEADS, PAGE, KEY)
    keys = torch.full(shape, torch.nan, dtype=dtype)
    values = torch.full((PAGES, HEADS, PAGE, VALUE), torch.nan, dtype=dtype)
    return keys.transpose(2, 3) if transposed else keys, values


def tokens(dtype: torch.dtype, count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(count)
    key = torch.randn(HEADS, count, KEY, generator=g).to(dtype).transpose(0, 1)
    return key, torch.randn(count, HEADS, VALUE, generator=g).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_runs_of_slots(
    threads: int, transposed: bool, dtype: torch.dtype, thread_count: Callable[[int], None]
) -> None:
    thread_count(threads)
    ours, theirs = (pages(dtype, transposed) for _ in range(2))
    key, value = tokens(dtype, len(SLOTS))
    slot = torch.tensor(SLOTS)
    kv_write(key, value, *ours, slot, impl="cpp")
    kv_write_ref(key, value, *theirs, slot)
    for x, y in zip(ours, theirs, strict=True):
        assert x.isnan().equal(y.isnan()) and x.nan_to_num().equal(y.nan_to_num())
        assert x.isnan().any() and not x.isnan().all()


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of the op itself, by name, in order."""
    key, value = tokens(dtype, 3)
    key_pages, value_pages = (x.zero_() for x in pages(dtype, transposed=True))
    return {
        "key": key, "value": value, "key_pages": key_pages, "value_pages": value_pages,
        "slot": torch.tensor([PAGE - 1, PAGE, -1]),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    op = torch.ops.srlm_kernels_c.kv_write.default
    torch.library.opcheck(op, tuple(arguments(dtype).values()))


def test_fake_tensors_pass() -> None:
    with FakeTensorMode() as mode:
        values = [mode.from_tensor(x) for x in arguments().values()]
        assert torch.ops.srlm_kernels_c.kv_write(*values) is None


WRONG = {
    "slot past the last page": ({"slot": torch.tensor([0, PAGES * PAGE, 1])}, "slot 512 is past"),
    "number of slots": ({"slot": torch.arange(2)}, "key must be"),
    "slots in gaps": ({"slot": torch.arange(6)[::2]}, "slot must be"),
    "int32": ({"slot": torch.arange(3, dtype=torch.int32)}, "slot must be"),
    "key heads": ({"key": torch.zeros(3, HEADS + 1, KEY)}, "key must be"),
    "key width": ({"key": torch.zeros(3, HEADS, KEY + 1)}, "key must be"),
    "key strides": ({"key": torch.zeros(3, KEY, HEADS).mT}, "key must be .* unit last stride"),
    "key dtype": ({"key": torch.zeros(3, HEADS, KEY).bfloat16()}, "key must be"),
    "value width": ({"value": torch.zeros(3, HEADS, VALUE - 1)}, "value must be"),
    "value tokens": ({"value": torch.zeros(2, HEADS, VALUE)}, "value must be"),
    "page of 32": ({"key_pages": torch.zeros(PAGES, HEADS, 32, KEY)}, "key_pages must be"),
    "value pages": ({"value_pages": torch.zeros(PAGES - 1, HEADS, PAGE, VALUE)}, "value_pages"),
    "fp64": ({n: x.double() for n, x in arguments().items() if n != "slot"}, "2 or 4 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_no_memory_is_written_that_is_not_there(change, message) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.srlm_kernels_c.kv_write(*(arguments() | change).values())


def test_the_op_takes_these_arguments() -> None:
    """So that each refusal above is for its one change."""
    a = arguments()
    torch.ops.srlm_kernels_c.kv_write(*a.values())
    assert a["key_pages"][0, :, PAGE - 1].equal(a["key"][0])
    assert a["value_pages"][1, :, 0].equal(a["value"][1])
