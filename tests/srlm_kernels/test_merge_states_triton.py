"""The Triton kernel of merge_states against the softmax over all parts in float64."""

import pytest
import torch
from torch import Tensor

from srlm_kernels.backends import refusal
from srlm_kernels.merge_states import merge_states_ref
from srlm_kernels.merge_states_triton import merge_states_triton
from tests.srlm_kernels.test_merge_states import COUNTS, Parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := refusal("triton", torch.empty(0, device=DEVICE)):
    pytest.skip(f"{reason}; test_interpreter.py runs this file", allow_module_level=True)


def tensors(parts: Parts) -> list[Tensor]:
    return [t.to(DEVICE) for t in parts.tensors(torch.float32)]


def merged(parts: Parts, *, with_sinks: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    sinks = parts.sinks.to(DEVICE, torch.bfloat16) if with_sinks else None
    return merge_states_triton(*tensors(parts), sinks=sinks, dtype=dtype).cpu()


def assert_merged(out: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-6)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(3, 24), (20, 128), (1, 1)])
def test_parts_make_the_whole(heads, width, with_sinks, counts) -> None:
    parts = Parts(counts, heads, width)
    sinks = parts.sinks.bfloat16().double() if with_sinks else None
    assert_merged(merged(parts, with_sinks=with_sinks), parts.truth(sinks))


@pytest.mark.parametrize("with_sinks", [False, True])
def test_empty_parts_count_for_nothing(with_sinks) -> None:
    parts = Parts([3, 2, 1])
    for token, part in ((0, 1), (1, 0), (1, 1), (2, 0)):
        parts.empty(token, part)
    out = merged(parts, with_sinks=with_sinks)
    assert_merged(out, parts.truth(parts.sinks.bfloat16().double() if with_sinks else None))
    assert not out[1:].any()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_log_sum_exps(shift) -> None:
    o, lse, *csr = tensors(Parts([4, 3], spread=100.0))
    rounded = (lse + shift).double() - shift  # what is left of them in fp32
    truth = merge_states_ref(o.double(), rounded, *csr, dtype=torch.float64)
    out = merge_states_triton(o, lse + shift, *csr, dtype=torch.float32)
    assert_merged(out.cpu(), truth.cpu())


@pytest.mark.parametrize("sink", [-200.0, 50.0, 200.0])
def test_a_sink_far_from_the_rest(sink) -> None:
    parts = Parts([2, 1])
    parts.sinks.fill_(sink)
    assert_merged(merged(parts, with_sinks=True), parts.truth(parts.sinks))


def test_a_single_part_is_returned_bit_for_bit() -> None:
    o, lse, ptr, entries = tensors(Parts([1, 1]))
    out = merge_states_triton(o, lse, ptr, entries, dtype=torch.float32)
    assert out.equal(o[entries[:2].long()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_are_rounded_once(dtype) -> None:
    parts = Parts([3, 2])
    assert merged(parts, dtype=dtype).equal(merged(parts).to(dtype))


def test_other_tokens_do_not_show() -> None:
    parts = Parts([7, 2, 5])
    o, lse, ptr, entries = tensors(parts)
    together = merge_states_triton(o, lse, ptr, entries, dtype=torch.float32)
    alone = merge_states_triton(o, lse, ptr[1:3] - ptr[1], entries[7:9], dtype=torch.float32)
    assert alone[0].equal(together[1])


def test_nan_stays_with_its_token_and_head() -> None:
    parts = Parts([2, 2])
    o, lse, *csr = tensors(parts)
    lse[parts.entries[0], 1] = torch.nan
    out = merge_states_triton(o, lse, *csr, dtype=torch.float32)
    assert out.isnan().any(2).tolist() == [[False, True, False], [False] * 3]


def test_no_tokens() -> None:
    out = merged(Parts([]))
    assert out.shape == (0, 3, 24)
