"""Flash attention of parts, merged, against attention of every response in a row of its own."""

from functools import partial

import pytest
import torch
from torch import Tensor

from srlm_kernels import PrefixPlan, prefix_attention
from srlm_kernels.prefix_attention_pieces import Piece, pieces
from tests.srlm_kernels.packed_rows import (
    HEADS,
    PLANS,
    Heads,
    Row,
    by_response,
    errors,
    with_gradients,
)

attend = partial(prefix_attention, impl="pieces")


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_float64_is_exact(plan: PrefixPlan, heads: Heads) -> None:
    row = Row(plan, heads)
    found, truth = (with_gradients(f, row, torch.float64) for f in (attend, by_response))
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f, t, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_as_close_as_torch_with_unshared_prompts(plan, heads, dtype) -> None:
    """Twice its error at most, and one rounding: a merged result has been rounded before. In the
    mean over some rows: the error of one short row is as large as chance has it."""
    totals = torch.zeros(2, 4, dtype=torch.float64)
    draws = range(5)
    for draw in draws:
        row = Row(plan, heads, draw=draw)
        rounded = [x.to(torch.float64) for x in (*row.leaves(dtype), row.upstream(dtype))]
        leaves = [x.detach().requires_grad_() for x in rounded[:3]]
        out = by_response(*leaves, plan)
        truth = [out.detach(), *torch.autograd.grad(out, leaves, rounded[3])]
        found = [errors(with_gradients(f, row, dtype), truth) for f in (attend, by_response)]
        assert dtype == torch.bfloat16 or max(found[0]) < 1e-5
        totals += torch.tensor(found, dtype=torch.float64)
    ours, theirs = totals / len(draws)
    assert (ours <= 2 * theirs + torch.finfo(dtype).eps).all(), (ours, theirs)


@pytest.mark.parametrize("heads", [Heads(1, 1, 3), Heads(4, 2, 2)], ids=str)
def test_gradients_are_those_of_the_result(heads: Heads) -> None:
    row = Row(PrefixPlan.of([(2, [3, 1]), (1, [1]), (3, [])]), heads)
    assert torch.autograd.gradcheck(
        lambda *x: attend(*x, row.plan, scale=0.4), row.leaves(torch.float64)
    )


def test_the_parts_of_a_row() -> None:
    plan = PrefixPlan.of([(2, [3, 1]), (4, [])])
    assert list(pieces(plan)) == [
        Piece(slice(0, 2), slice(0, 2), causal=True, joins=False),
        Piece(slice(2, 6), slice(0, 2), causal=False, joins=False),
        Piece(slice(2, 5), slice(2, 5), causal=True, joins=True),
        Piece(slice(5, 6), slice(5, 6), causal=True, joins=True),
        Piece(slice(6, 10), slice(6, 10), causal=True, joins=False),
    ]


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_parts_of_very_different_weight(shift: float) -> None:
    """Prompt and response merge where e^score of either would overflow."""
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

    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        found = with_gradients(shifted(attend), row, dtype)
        truth = with_gradients(shifted(by_response), row, torch.float64)
        assert max(errors(found, truth)) < bound


@pytest.mark.parametrize("trained", range(3), ids=["query", "key", "value"])
def test_one_input_that_is_trained(trained: int) -> None:
    row = Row(PLANS["pairs"], HEADS["grouped"])
    full = with_gradients(attend, row, torch.float32)
    leaves = [x.detach() for x in row.leaves(torch.float32)]
    leaves[trained].requires_grad_()
    out = attend(*leaves, row.plan)
    (grad,) = torch.autograd.grad(out, leaves[trained], row.upstream(torch.float32))
    assert grad.equal(full[1 + trained])


def test_a_gradient_without_strides() -> None:
    row = Row(PLANS["ragged"], HEADS["grouped"])
    leaves = row.leaves(torch.float64)
    found = torch.autograd.grad(attend(*leaves, row.plan).sum(), leaves)
    truth = torch.autograd.grad(by_response(*leaves, row.plan).sum(), leaves)
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f, t, rtol=0, atol=1e-11)


def test_nothing_of_the_size_of_the_scores_is_kept() -> None:
    row = Row(PLANS["long"], HEADS["grouped"])
    leaves, kept = row.leaves(torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attend(*leaves, row.plan)
    lse = row.plan.total * row.heads.query
    assert sorted(x.numel() for x in kept) == sorted(
        [lse, out.numel(), *(x.numel() for x in leaves)]
    )
    storages = {x.untyped_storage().data_ptr() for x in kept}
    assert {x.untyped_storage().data_ptr() for x in (*leaves, out)} <= storages


def test_nan_stays_in_its_response() -> None:
    plan = PrefixPlan.of([(5, [4, 3]), (6, [2])])
    row = Row(plan, HEADS["four"])
    for poisoned in range(3):
        leaves = [x.detach().clone() for x in row.leaves(torch.float32)]
        leaves[poisoned][6:9] = torch.nan
        out = attend(*leaves, plan)
        # For a query whose scores are all NaN, torch's flash attention gives 0 on the CPU.
        assert out[6:9].isnan().all() == (poisoned > 0)
        assert out[:5].isfinite().all() and out[9:].isfinite().all()


def test_a_second_derivative_is_refused() -> None:
    row = Row(PLANS["pairs"], HEADS["one"])
    leaves = row.leaves(torch.float64)
    upstream = row.upstream(torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(attend(*leaves, row.plan), leaves[0], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
