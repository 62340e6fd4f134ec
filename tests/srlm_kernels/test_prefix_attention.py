"""Attention with shared prompts against attention of every response in a row of its own."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from srlm_kernels import PrefixPlan, native, prefix_attention
from srlm_kernels.prefix_attention import choose, refusal, sees
from tests.srlm_kernels.packed_rows import HEADS, PLANS, Heads, Row, by_response, with_gradients

DOUBLE, FLOAT, BFLOAT = torch.float64, torch.float32, torch.bfloat16
reference = partial(prefix_attention, impl="reference")

HAS_CPP = native.has("prefix_attention")
CPP = pytest.param(
    "cpp", marks=pytest.mark.skipif(not HAS_CPP, reason=f"{native.why()}, or without AVX-512")
)
IMPLS = ["reference", "pieces", CPP]

# What "pieces" does not do. A window of 1 is the token itself, 9 cuts across prompts.
OPTIONS = {
    "window of 1": {"window": 1},
    "window of 9": {"window": 9},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 6, "softcap": 3.0, "sinks": True},
}


def options_for(heads: Heads, options: dict, dtype: torch.dtype = DOUBLE) -> dict:
    """`options` with a tensor of sinks, which asks for a gradient, in place of True."""
    if "sinks" not in options:
        return options
    return options | {"sinks": torch.linspace(-1, 2, heads.query, dtype=dtype).requires_grad_()}


def assert_all_close(found: list[Tensor], truth: list[Tensor], atol: float) -> None:
    for f, t in zip(found, truth, strict=True):
        torch.testing.assert_close(f, t, rtol=0, atol=atol)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_reference_is_every_response_alone(plan: PrefixPlan, heads: Heads) -> None:
    row = Row(plan, heads)
    found, truth = (with_gradients(f, row, DOUBLE) for f in (reference, by_response))
    assert_all_close(found, truth, atol=1e-11)


@pytest.mark.parametrize("heads", [HEADS["grouped"], Heads(4, 2, 5, value_width=11)], ids=str)
@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["none", *OPTIONS])
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_options(impl: str, options: dict, heads: Heads) -> None:
    for name in ("one token each", "pairs", "ragged"):
        row = Row(PLANS[name], heads)
        given = options_for(heads, options)
        found = with_gradients(partial(prefix_attention, impl=impl), row, DOUBLE, **given)
        truth = with_gradients(by_response, row, DOUBLE, **given)
        assert_all_close(found, truth, atol=1e-11)


@pytest.mark.parametrize("impl", ["reference", "pieces"])
def test_a_row_of_one_prompt_is_causal_attention(impl: str) -> None:
    row = Row(PrefixPlan.of([(40, [])]), HEADS["four"])
    q, k, v = row.leaves(DOUBLE)
    out = prefix_attention(q, k, v, row.plan, scale=0.3, impl=impl)
    theirs = scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=0.3
    )
    torch.testing.assert_close(out, theirs[0].transpose(0, 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "pieces"])
def test_a_window_that_never_cuts_is_none(impl: str) -> None:
    """One that is a position narrower cuts one token off from another."""
    plan = PrefixPlan.of([(4, [9, 2]), (11, [1])])
    assert plan.longest == 13
    q, k, v = Row(plan, HEADS["grouped"]).leaves(DOUBLE)
    none = prefix_attention(q, k, v, plan, impl=impl)
    for window in (13, 4096):
        assert refusal("pieces", q, k, v, plan, window=window) is None
        assert prefix_attention(q, k, v, plan, window=window, impl=impl).equal(none)
    none, cut = (reference(q, k, v, plan, window=window) for window in (13, 12))
    assert (cut != none).any(2).any(1).nonzero().flatten().tolist() == [12]


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_bits_with_gradients_and_without(impl: str, dtype: torch.dtype) -> None:
    row = Row(PLANS["ragged"], HEADS["grouped"])
    attend = partial(prefix_attention, impl=impl)
    first = with_gradients(attend, row, dtype)
    assert all(a.equal(b) for a, b in zip(first, with_gradients(attend, row, dtype), strict=True))
    leaves = row.leaves(dtype)
    with torch.no_grad():
        assert attend(*leaves, row.plan).equal(first[0])
    with torch.inference_mode():
        assert attend(*(x.detach() for x in leaves), row.plan).equal(first[0])
    for leaf in leaves[1:]:
        leaf.requires_grad_(False)
    assert attend(*leaves, row.plan).equal(first[0])


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_what_else_is_packed_does_not_show(impl: str, dtype: torch.dtype) -> None:
    """Result and gradients of a group, alone and anywhere in the row."""
    attend = partial(prefix_attention, impl=impl)
    heads = HEADS["four"]
    groups = [(9, (4, 4)), (200, (30, 64)), (1, (5,)), (70, ())]
    first, *others = groups
    alone = with_gradients(attend, Row(PrefixPlan.of([first]), heads), dtype)
    tokens = alone[0].shape[0]
    for before in range(len(others) + 1):
        plan = PrefixPlan.of([*others[:before], first, *others[before:]])
        start = plan.groups[before].start
        row = Row(plan, heads)
        leaves, upstream = row.leaves(dtype), row.upstream(dtype)
        mine = Row(PrefixPlan.of([first]), heads)
        with torch.no_grad():
            for all_, part in zip(
                [*leaves, upstream], [*mine.leaves(dtype), mine.upstream(dtype)], strict=True
            ):
                all_[start : start + tokens] = part
        out = attend(*leaves, plan)
        found = [out, *torch.autograd.grad(out, leaves, upstream)]
        for f, a in zip(found, alone, strict=True):
            assert f[start : start + tokens].equal(a)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl: str) -> None:
    row = Row(PLANS["pairs"], HEADS["grouped"])
    attend, plan, upstream = partial(prefix_attention, impl=impl), row.plan, row.upstream(FLOAT)

    def results(*leaves: Tensor) -> list[Tensor]:
        out = attend(*leaves, plan)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    as_given = row.leaves(FLOAT)
    assert not as_given[0].is_contiguous()
    expected = results(*as_given)
    for layout in (
        lambda x: x.detach().contiguous(),
        lambda x: x.detach().mT.contiguous().mT,
        lambda x: x.detach().repeat_interleave(2, 2)[..., ::2],
    ):
        found = results(*(layout(x).requires_grad_() for x in as_given))
        assert_all_close(found, expected, atol=1e-5)
    fused = torch.cat(as_given, 1).detach().requires_grad_()  # views of one projection
    out = attend(*fused.split([x.shape[1] for x in as_given], 1), plan)
    (grad,) = torch.autograd.grad(out, fused, upstream)
    assert_all_close([out, grad], [expected[0], torch.cat(expected[1:], 1)], atol=1e-5)


@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["none", "all"])
def test_activation_checkpointing_changes_nothing(options: dict) -> None:
    row = Row(PLANS["pairs"], HEADS["grouped"])
    given = options_for(row.heads, options, FLOAT)
    attend = partial(prefix_attention, **given)

    def block(*leaves: Tensor) -> Tensor:
        return attend(*(x * 2 for x in leaves), row.plan).sin()

    def checkpointed(*inputs: object) -> Tensor:
        return checkpoint(block, *inputs, use_reentrant=False)

    found, expected = (
        with_gradients(lambda q, k, v, _, run=run: run(q, k, v), row, FLOAT)
        for run in (checkpointed, block)
    )
    assert all(f.equal(e) for f, e in zip(found, expected, strict=True))


def test_autocast_makes_it_what_it_is_in_that_dtype() -> None:
    """As it does with torch's own attention; queries and values may come in two dtypes then."""
    row = Row(PLANS["pairs"], HEADS["grouped"])
    for impl in ("reference", "pieces", *(["cpp"] if HAS_CPP else [])):
        attend = partial(prefix_attention, impl=impl)

        def under_autocast(q, k, v, plan, attend=attend) -> Tensor:
            with torch.autocast("cpu", dtype=BFLOAT):
                return attend(q, k, v.to(BFLOAT), plan)

        def in_its_dtype(q, k, v, plan, attend=attend) -> Tensor:
            return attend(q.to(BFLOAT), k.to(BFLOAT), v.to(BFLOAT), plan)

        found, expected = (with_gradients(f, row, FLOAT) for f in (under_autocast, in_its_dtype))
        assert all(f.equal(e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("window", [None, 1, 7])
def test_who_sees_whom(window: int | None, plan: PrefixPlan) -> None:
    """Token by token, for rows that are short enough."""
    if plan.total > 400:
        plan = PrefixPlan.of([(6, [3, 2])])
    truth = torch.zeros(plan.total, plan.total, dtype=torch.bool)
    token = 0
    for _, prompt, responses in plan.groups:
        shared, token = list(range(token, token + prompt)), token + prompt
        rows = [shared]
        for length in responses:
            rows.append(shared + list(range(token, token + length)))
            token += length
        for row in rows:
            for i, query in enumerate(row):
                truth[query, row[0 if window is None else max(0, i + 1 - window) : i + 1]] = True
    places = plan.places(torch.device("cpu"))
    assert sees(places.at((slice(None), None)), places, window).equal(truth)


def test_plans() -> None:
    plan = PrefixPlan.of([(2, [3, 1]), (4, [])])
    assert plan == PrefixPlan.of(((2, (3, 1)), (4, ()))) != PrefixPlan.of([(2, [3, 1])])
    assert {plan: 1}[PrefixPlan.of([(2, [3, 1]), (4, [])])] == 1
    assert [(g.start, g.end) for g in plan.groups] == [(0, 6), (6, 10)]
    assert (plan.total, plan.longest) == (10, 5)
    places = plan.places(torch.device("cpu"))
    assert places is plan.places(torch.device("cpu"))
    assert places.group.tolist() == [0] * 6 + [1] * 4
    assert places.segment.tolist() == [0, 0, 1, 1, 1, 2, 0, 0, 0, 0]
    assert places.position.tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 2, 3]
    assert {x.dtype for x in places} == {torch.int32}
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.groups = ()


@pytest.mark.parametrize("groups", [[(0, [1])], [(2, []), (3, [1, 0])], [(-1, [])]], ids=str)
def test_plans_without_tokens_are_refused(groups: list) -> None:
    with pytest.raises(ValueError, match=f"at least one token, group {len(groups) - 1} has a"):
        PrefixPlan.of(groups)
    with pytest.raises(ValueError, match="at least one group"):
        PrefixPlan.of([])


WRONG = {
    "query of two dimensions": ({"query": torch.zeros(6, 8)}, r"query must be a float tensor \[T"),
    "query of integers": ({"query": torch.zeros(6, 4, 8).int()}, "float tensor .* torch.int32"),
    "key width": ({"key": torch.zeros(6, 2, 9)}, r"key must be \[6, Hkv, 8\]"),
    "key tokens": ({"key": torch.zeros(5, 2, 8)}, r"key must be \[6, Hkv, 8\]"),
    "value heads": ({"value": torch.zeros(6, 1, 8)}, r"value \[6, Hkv, Dv\], got .*\[6, 1, 8\]"),
    "value of two dimensions": ({"value": torch.zeros(6, 2)}, "got .* and"),
    "heads": ({"query": torch.zeros(6, 3, 8)}, "3 query heads cannot share 2 key heads"),
    "dtypes": ({"value": torch.zeros(6, 2, 8).bfloat16()}, "key and value must be torch.float32"),
    "plan": ({"plan": PrefixPlan.of([(7, [])])}, "plan is for 7 tokens, query has 6"),
    "sinks": ({"sinks": torch.zeros(2)}, r"sinks must be a float tensor \[4\]"),
    "device": ({"key": torch.zeros(6, 2, 8, device="meta")}, "key is on meta, query on cpu"),
    "window": ({"window": 0}, "window must be at least 1"),
    "softcap": ({"softcap": 0.0}, "softcap must be positive and finite"),
    "impl": ({"impl": "cuda"}, "no impl='cuda'; known: auto, flex, cpp, pieces, reference"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit_are_named(change: dict, message: str) -> None:
    arguments = {
        "query": torch.zeros(6, 4, 8), "key": torch.zeros(6, 2, 8), "value": torch.zeros(6, 2, 8),
        "plan": PrefixPlan.of([(3, [1, 2])]),
    }  # fmt: skip
    assert prefix_attention(**arguments).shape == (6, 4, 8)
    with pytest.raises((TypeError, ValueError), match=message):
        prefix_attention(**arguments | change)


REFUSED = {
    "half": ({}, torch.float16, None, "takes float32, bfloat16 and float64, not torch.float16"),
    "widths": ({}, FLOAT, 5, "keys are 32 wide and values 5"),
    "window": ({"window": 9}, FLOAT, None, "it does not do a window that cuts"),
    "two": ({"softcap": 9.0, "sinks": True}, FLOAT, None, "does not do softcap and sinks"),
}


@pytest.mark.parametrize(("options", "dtype", "width", "reason"), REFUSED.values(), ids=REFUSED)
def test_auto_takes_another_where_pieces_say_no(options, dtype, width, reason) -> None:
    heads = dataclasses.replace(HEADS["grouped"], value_width=width)
    row, given = Row(PLANS["pairs"], heads), options_for(heads, options, dtype)
    inputs = (*row.leaves(dtype), row.plan)
    assert reason in refusal("pieces", *inputs, **given)
    with pytest.raises(ValueError, match=f"cannot run with impl='pieces' here: .*{reason}"):
        prefix_attention(*inputs, **given, impl="pieces")
    out = prefix_attention(*inputs, **given)
    assert out.dtype == dtype
    other = "cpp" if HAS_CPP and dtype == FLOAT else "reference"
    assert choose(*inputs, **given)[0] == other
    assert out.equal(prefix_attention(*inputs, **given, impl=other))


def test_what_auto_takes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(PLANS["pairs"], HEADS["grouped"])
    inputs = (*row.leaves(FLOAT), row.plan)
    dense = prefix_attention(*inputs, impl="reference")
    found = prefix_attention(*inputs)
    assert not found.equal(dense)
    assert found.equal(prefix_attention(*inputs, impl="cpp" if HAS_CPP else "pieces"))
    monkeypatch.setattr(native, "has", lambda op: False)
    name, reasons = choose(*inputs)
    assert name == "pieces" and list(reasons) == ["cpp"]
    pieces = prefix_attention(*inputs, impl="pieces")
    assert prefix_attention(*inputs).equal(pieces) and not pieces.equal(dense)
