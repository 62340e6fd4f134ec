"""The C++ attention of packed groups against attention of every response in a row of its own."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from srlm_kernels import PrefixPlan, native, prefix_attention
from srlm_kernels.prefix_attention import refusal
from tests.srlm_kernels.packed_rows import (
    HEADS,
    PLANS,
    Heads,
    Row,
    by_response,
    errors,
    with_gradients,
)

pytestmark = pytest.mark.skipif(
    not native.has("prefix_attention"), reason=f"{native.why()}, or without AVX-512"
)
DTYPES = [torch.float32, torch.bfloat16]
# A window of 70 begins and ends inside pages of 64 keys.
OPTIONS = {
    "window of 1": {"window": 1},
    "window of 70": {"window": 70},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 9, "softcap": 3.0, "sinks": True},
}
attend = partial(prefix_attention, impl="cpp")


def given(options: dict, heads: Heads, dtype: torch.dtype) -> dict:
    if "sinks" not in options:
        return options
    return options | {"sinks": torch.linspace(-1, 2, heads.query, dtype=dtype).requires_grad_()}


def assert_as_close(
    ours, theirs, plan: PrefixPlan, heads: Heads, dtype, options: dict, more: float = 0.0
) -> None:
    """Twice its error at most, one rounding and `more`, in the mean over some rows, against
    float64."""
    totals: list[Tensor] = [torch.tensor(0.0), torch.tensor(0.0)]
    draws = range(5)
    for draw in draws:
        row = Row(plan, heads, draw=draw)
        rounded = [x.to(torch.float64) for x in (*row.leaves(dtype), row.upstream(dtype))]
        leaves = [x.detach().requires_grad_() for x in rounded[:3]]
        exact = given(options, heads, torch.float64)
        inputs = [*leaves, exact["sinks"]] if "sinks" in exact else leaves
        out = by_response(*leaves, plan, **exact)
        truth = [out.detach(), *torch.autograd.grad(out, inputs, rounded[3])]
        for i, attention in enumerate((ours, theirs)):
            found = with_gradients(attention, row, dtype, **given(options, heads, dtype))
            totals[i] = totals[i] + torch.tensor(errors(found, truth))
    if dtype == torch.float32:
        assert float(totals[0].max()) / len(draws) < 1e-5
    worst = 2 * totals[1] / len(draws) + torch.finfo(dtype).eps + more
    assert (totals[0] / len(draws) <= worst).all(), totals


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_as_close_as_torch_with_unshared_prompts(plan, heads, dtype) -> None:
    assert_as_close(attend, by_response, plan, heads, dtype, {})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [HEADS["grouped"], Heads(4, 2, 5, value_width=35)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, heads, dtype) -> None:
    """Dense scores are not computed twice and have their own softmax's gradient, so that theirs is
    more exact: by some roundings in fp32."""
    dense = partial(prefix_attention, impl="reference")
    for name in ("one token each", "pairs", "ragged", "long"):
        assert_as_close(attend, dense, PLANS[name], heads, dtype, options, more=1e-6)


def test_a_query_with_one_key_has_no_gradient() -> None:
    """Whatever its width, whose sum is rounded: both sums of the difference are rounded alike."""
    for width in (8, 17, 128):
        row = Row(PLANS["one token"], Heads(3, 1, width))
        _, query, key, value = with_gradients(attend, row, torch.float32)
        assert not query.any() and not key.any()
        assert value.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads(dtype: torch.dtype) -> None:
    row = Row(PLANS["ragged"], HEADS["grouped"])
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(with_gradients(attend, row, dtype))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(a.equal(b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_scores_whose_powers_overflow(shift: float) -> None:
    row = Row(PLANS["pairs"], HEADS["four"])

    def shifted(attention):
        def call(query: Tensor, key: Tensor, value: Tensor, plan: PrefixPlan) -> Tensor:
            places = plan.places(torch.device("cpu"))
            lever = torch.where(places.segment == 0, shift, 0.0).to(query.dtype)
            ones = torch.ones_like(query[..., :1])
            # One more dimension adds `shift` to the scores of keys of prompts.
            key = torch.cat([key, lever[:, None, None].expand_as(ones)], 2)
            query = torch.cat([query, ones * key.shape[2] ** 0.5], 2)
            return attention(query, key, torch.cat([value, ones], 2), plan)[..., :-1]

        return call

    found = with_gradients(shifted(attend), row, torch.float32)
    truth = with_gradients(shifted(by_response), row, torch.float64)
    assert max(errors(found, truth)) < 1e-4


@pytest.mark.parametrize("trained", range(3), ids=["query", "key", "value"])
def test_one_input_that_is_trained(trained: int) -> None:
    row = Row(PLANS["pairs"], HEADS["grouped"])
    full = with_gradients(attend, row, torch.float32)
    leaves = [x.detach() for x in row.leaves(torch.float32)]
    leaves[trained].requires_grad_()
    out = attend(*leaves, row.plan)
    (grad,) = torch.autograd.grad(out, leaves[trained], row.upstream(torch.float32))
    assert grad.equal(full[1 + trained])


def test_nothing_of_the_size_of_the_scores_is_kept() -> None:
    row = Row(PLANS["long"], HEADS["grouped"])
    leaves, kept = row.leaves(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attend(*leaves, row.plan)
    lse = row.plan.total * row.heads.query
    assert sorted(x.numel() for x in kept) == sorted(
        [lse, out.numel(), *(x.numel() for x in leaves)]
    )


def test_nan_stays_in_its_response() -> None:
    plan = PrefixPlan.of([(5, [4, 3]), (6, [2])])
    row = Row(plan, HEADS["four"])
    for poisoned in range(3):
        leaves = [x.detach().clone() for x in row.leaves(torch.float32)]
        leaves[poisoned][6:9] = torch.nan
        out = attend(*leaves, plan)
        assert out[6:9].isnan().all()
        assert out[:6].isfinite().all() and out[9:].isfinite().all()


def test_a_second_derivative_is_refused() -> None:
    row = Row(PLANS["pairs"], HEADS["one"])
    leaves = row.leaves(torch.float32)
    upstream = row.upstream(torch.float32).requires_grad_()
    (grad,) = torch.autograd.grad(attend(*leaves, row.plan), leaves[0], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_it_does_not_take() -> None:
    row = Row(PLANS["pairs"], HEADS["grouped"])
    double = (*row.leaves(torch.float64), row.plan)
    assert refusal("cpp", *double) == "it takes float32 and bfloat16, not torch.float64"
    assert prefix_attention(*double).equal(prefix_attention(*double, impl="pieces"))
    wide = dataclasses.replace(HEADS["grouped"], value_width=5)
    for options in ({}, {"window": 3}, {"softcap": 2.0}):
        inputs = (*Row(PLANS["pairs"], wide).leaves(torch.float32), row.plan)
        assert prefix_attention(*inputs, **options).equal(attend(*inputs, **options))


SEGMENTS = {
    "too short": ([[2, 0]], "segments must cover the tokens"),
    "no prompt": ([[6, 3]], "has no prompt"),
    "empty": ([[6, 0], [0, 6]], "a segment is empty"),
    "elsewhere": ([[2, 0], [4, 3]], "responses follow their prompt"),
}


@pytest.mark.parametrize(("segments", "message"), SEGMENTS.values(), ids=SEGMENTS)
def test_segments_that_would_read_elsewhere_are_refused(segments: list, message: str) -> None:
    x = torch.zeros(6, 1, 8)
    lse, cut = torch.zeros(6, 1), torch.tensor(segments, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.srlm_kernels_c.prefix_attention.default(
            torch.zeros(6, 1, 8), lse, x, x, x, cut, None, 1.0, None, None
        )
