"""prefix_attention against rows that stand alone, its implementations against its reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from srlm_kernels import PrefixPlan, prefix_attention
from srlm_kernels.prefix_attention import refusal
from tests.srlm_kernels.packed import HEADS, OPTIONS, PLANS, gradients, operands, with_sinks

BOTH = pytest.mark.parametrize("impl", ["reference", "pieces"])


def alone(
    query: Tensor, key: Tensor, value: Tensor, plan: PrefixPlan, *, scale: float | None = None,
    window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Every response behind its own copy of the prompt, in a row of its own."""
    share = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(share, 1) for x in (key, value))
    out = torch.zeros(*query.shape[:2], value.shape[2], dtype=query.dtype)
    for start, prompt, responses in plan.groups:
        first = start + prompt
        for length in responses or (0,):
            places = [*range(start, start + prompt), *range(first, first + length)]
            q, k, v = (x[places].transpose(0, 1) for x in (query, key, value))
            s = q @ k.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
            s = s if softcap is None else softcap * torch.tanh(s / softcap)
            behind = torch.arange(len(places))[:, None] - torch.arange(len(places))
            s = s.masked_fill((behind < 0) | (behind >= (window or len(places))), -torch.inf)
            extra = s.new_full((*s.shape[:2], 1), -torch.inf)
            extra = extra if sinks is None else sinks[:, None, None].expand_as(extra)
            mixed = (torch.cat([s, extra], 2).softmax(2)[..., :-1] @ v).transpose(0, 1)
            mine = prompt if length else 0  # the prompt's own rows are taken once
            out = out.index_copy(0, torch.tensor(places[mine:] or places), mixed[mine:])
            if length and responses[0] == length and first == start + prompt:
                out = out.index_copy(0, torch.tensor(places[:prompt]), mixed[:prompt])
            first += length
    return out


def check(plan: PrefixPlan, heads: Any, options: dict[str, Any], impl: str) -> None:
    qkv = operands(plan, heads)
    options = with_sinks(options, qkv[0])
    leaves = [*qkv, *([options["sinks"]] if "sinks" in options else [])]
    out = prefix_attention(*qkv, plan, impl=impl, **options)
    truth = alone(*qkv, plan, **options)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
    for mine, exact in zip(gradients(out, leaves), gradients(truth, leaves), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-10)


@BOTH
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_groups_are_rows_that_stand_alone(name: str, heads: Any, impl: str) -> None:
    check(PrefixPlan.of(PLANS[name]), heads, {}, impl)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["a pair", "one token each", "ragged"])
def test_options_of_models(name: str, options: str) -> None:
    check(PrefixPlan.of(PLANS[name]), HEADS[1], OPTIONS[options], "auto")


@BOTH
def test_a_window_that_cuts_nothing_is_none(impl: str) -> None:
    check(PrefixPlan.of(PLANS["a pair"]), HEADS[1], {"window": 9}, impl)


def test_values_may_have_another_width() -> None:
    check(PrefixPlan.of(PLANS["ragged"]), (4, 2, 8, 5), {}, "auto")


@BOTH
def test_a_group_does_not_depend_on_what_else_is_packed(impl: str) -> None:
    groups = PLANS["ragged"]
    whole = PrefixPlan.of(groups)
    qkv = operands(whole, dtype=torch.float32)
    out = prefix_attention(*qkv, whole, impl=impl)
    for group, place in zip(groups, whole.groups, strict=True):
        part = [x[place.start : place.end] for x in qkv]
        assert torch.equal(
            prefix_attention(*part, PrefixPlan.of([group]), impl=impl), out[place.start : place.end]
        )


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_bits_every_time_and_with_or_without_gradients(impl: str, dtype: torch.dtype) -> None:
    plan = PrefixPlan.of(PLANS["ragged"])
    qkv = operands(plan, dtype=dtype)
    with torch.no_grad():
        expected = prefix_attention(*qkv, plan, impl=impl)
    runs = [prefix_attention(*qkv, plan, impl=impl) for _ in range(3)]
    assert all(torch.equal(run, expected) for run in runs)
    grads = [gradients(run, qkv) for run in runs]
    assert all(torch.equal(a, b) for g in grads for a, b in zip(g, grads[0], strict=True))


@BOTH
def test_gradcheck(impl: str) -> None:
    plan = PrefixPlan.of([(2, (2, 1)), (1, ())])
    qkv = operands(plan, (2, 1, 4, 4))
    torch.autograd.gradcheck(lambda *x: prefix_attention(*x, plan, impl=impl), qkv)


@BOTH
def test_activation_checkpointing(impl: str) -> None:
    plan = PrefixPlan.of(PLANS["ragged"])
    qkv = operands(plan)

    def run(*x: Tensor) -> Tensor:
        return prefix_attention(*x, plan, impl=impl)

    kept = gradients(checkpoint(run, *qkv, use_reentrant=False), qkv)
    assert all(torch.equal(a, b) for a, b in zip(kept, gradients(run(*qkv), qkv), strict=True))


def test_places_of_tokens() -> None:
    places = PrefixPlan.of([(2, (1, 2)), (1, ())]).places(torch.device("cpu"))
    assert places.group.tolist() == [0, 0, 0, 0, 0, 1]
    assert places.segment.tolist() == [0, 0, 1, 2, 2, 0]
    assert places.position.tolist() == [0, 1, 2, 2, 3, 0]


def test_why_an_implementation_is_passed_over() -> None:
    plan = PrefixPlan.of(PLANS["a pair"])
    qkv = [x.detach() for x in operands(plan)]
    assert refusal("pieces", *qkv, plan) is None
    assert "a window that cuts" in (refusal("pieces", *qkv, plan, window=3) or "")
    assert "softcap and sinks" in (
        refusal("pieces", *qkv, plan, softcap=1.0, sinks=torch.zeros(4)) or ""
    )
    assert "no backward" in (refusal("flex", *operands(plan), plan) or "")
    with pytest.raises(ValueError, match="impl='pieces' here: it does not do softcap"):
        prefix_attention(*qkv, plan, softcap=1.0, impl="pieces")


def _changed(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], None]:
    def apply(qkv: list[Tensor]) -> None:
        qkv[index] = change(qkv[index])

    return apply


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (_changed(0, lambda x: x[0]), {}, "query must be a float tensor"),
        (_changed(1, lambda x: x[:-1]), {}, "key must be"),
        (_changed(2, lambda x: x[:, :1]), {}, "key must be"),
        (_changed(1, lambda x: x.float()), {}, "key and value must be torch.float64"),
        (_changed(0, lambda x: x[:, :3]), {}, "3 query heads cannot share 2 key heads"),
        (lambda qkv: None, {"impl": "fast"}, "known: auto, flex, pieces, reference"),
        (lambda qkv: None, {"window": 0}, "window must be at least 1"),
        (lambda qkv: None, {"softcap": -1.0}, "softcap must be positive"),
        (lambda qkv: None, {"sinks": torch.zeros(3)}, r"sinks must be a float tensor \[4\]"),
    ],
)
def test_what_does_not_fit_is_said(
    spoil: Callable[[list[Tensor]], None], options: dict[str, Any], message: str
) -> None:
    plan = PrefixPlan.of(PLANS["a pair"])
    qkv = [x.detach() for x in operands(plan)]
    spoil(qkv)
    with pytest.raises((TypeError, ValueError), match=message):
        prefix_attention(*qkv, plan, **options)


@pytest.mark.parametrize("groups", [[], [(0, (1,))], [(2, (1, 0))]])
def test_plans_need_tokens(groups: list[tuple[int, tuple[int, ...]]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        PrefixPlan.of(groups)


def test_a_plan_of_other_tokens() -> None:
    plan = PrefixPlan.of(PLANS["a pair"])
    qkv = [x[:-1] for x in operands(plan)]
    with pytest.raises(ValueError, match="plan is for 12 tokens, query has 11"):
        prefix_attention(*qkv, plan)
