"""FlexAttention with shared prompts: mask and forward on any machine, gradients on a GPU."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from srlm_kernels import PrefixPlan, prefix_attention, prefix_attention_flex
from srlm_kernels.prefix_attention import choose, refusal, sees
from tests.srlm_kernels.packed_rows import HEADS, PLANS, Heads, Row, errors, with_gradients

CPU = torch.device("cpu")
attend = partial(prefix_attention, impl="flex")
reference = partial(prefix_attention, impl="reference")
OPTIONS = {
    "none": {},
    "window": {"window": 9},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 40, "softcap": 3.0, "sinks": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch):
    """Makes the op on the CPU run what `torch.compile` with these options makes of it."""

    def use(**options: object) -> None:
        run = prefix_attention_flex.compiled(**options)
        monkeypatch.setattr(prefix_attention_flex, "_run", lambda device: run)

    return use


def options_for(heads: Heads, options: dict, dtype: torch.dtype, device: str = "cpu") -> dict:
    sinks = torch.linspace(-1, 2, heads.query, dtype=dtype, device=device)
    return options | {"sinks": sinks.requires_grad_()} if "sinks" in options else options


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("window", [None, 1, 60])
def test_the_mask(window: int | None, plan: PrefixPlan) -> None:
    """Token by token, and in blocks: none that has something to see is left out."""
    places = plan.places(CPU)
    seen = sees(places.at((slice(None), None)), places, window)
    mask = prefix_attention_flex.block_mask(plan, window, CPU)
    n = plan.total
    assert create_mask(mask.mask_mod, 1, 1, n, n, device="cpu")[0, 0].equal(seen)
    blocks = -(-n // 128)
    padded = torch.nn.functional.pad(seen, (0, blocks * 128 - n, 0, blocks * 128 - n))
    occupied = padded.view(blocks, 128, blocks, 128).any(3).any(1)
    assert mask.to_dense()[0, 0].bool().equal(occupied)


@pytest.mark.parametrize("window", [None, 60, 400])
@pytest.mark.parametrize("rows", [128, 1024])
def test_the_mask_is_the_one_that_all_pairs_at_once_would_give(
    rows: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_attention_flex, "_ROWS", rows)
    for plan in (*PLANS.values(), PrefixPlan.of([(1500, [700, 3, 333]), (128, [128]), (40, [])])):
        ours = prefix_attention_flex.block_mask(plan, window, CPU)
        n = plan.total
        theirs = create_block_mask(ours.mask_mod, None, None, n, n, device="cpu")
        assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
        for name in ("kv", "full_kv", "q", "full_q"):
            for part in (f"{name}_num_blocks", f"{name}_indices"):
                assert getattr(ours, part).equal(getattr(theirs, part)), part
                assert getattr(ours, part).dtype == getattr(theirs, part).dtype


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("heads", [*HEADS.values(), Heads(4, 2, 16, value_width=40)], ids=str)
def test_the_forward_pass_without_a_compiler(heads: Heads, options: dict) -> None:
    for name in ("one token each", "pairs", "ragged"):
        row = Row(PLANS[name], heads)
        for dtype, atol in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
            with torch.no_grad():
                inputs, given = row.leaves(dtype), options_for(heads, options, dtype)
                out = attend(*inputs, row.plan, **given)
                truth = reference(*inputs, row.plan, **given)
            torch.testing.assert_close(out, truth, rtol=0, atol=atol)


def test_a_mask_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = prefix_attention_flex.block_mask
    monkeypatch.setattr(
        prefix_attention_flex, "block_mask", lambda *of: made.append(of[1]) or make(*of)
    )
    plan = PrefixPlan.of([(30, [4, 5])])
    inputs = [x.detach() for x in Row(plan, HEADS["grouped"]).leaves(torch.float32)]
    for window in (None, 9, None, 9, 100):  # 100 never cuts
        attend(*inputs, plan, window=window)
    assert made == [None, 9]


@torch.no_grad()
def test_other_lengths_are_not_compiled_anew(compiled) -> None:
    """A static and a dynamic graph for each kind of layer, as in a model with windowed layers."""
    counter = CompileCounterWithBackend("eager")
    compiled(backend=counter)
    for step in range(6):
        plan = PrefixPlan.of([(150 + step, [30, 2 * step + 1]), *[(7, [200])] * (step % 3)])
        inputs = Row(plan, HEADS["grouped"]).leaves(torch.float32)
        for window in (None, 50):
            out = attend(*inputs, plan, window=window)
            truth = reference(*inputs, plan, window=window)
            torch.testing.assert_close(out, truth, rtol=0, atol=1e-5)
    assert counter.frame_count <= 4


def test_a_windowed_model_does_not_run_out_of_recompilations(
    compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A self-test, then two lengths with gradients and without: torch's own limit is 8 graphs."""
    # The CPU has no backward, which is not asked for here.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    counter = CompileCounterWithBackend("eager")
    compiled(backend=counter)
    monkeypatch.setattr(prefix_attention_flex, "refusal", lambda *_: None)
    for prompt, gradients in [(6, False), (150, True), (150, False), (220, True), (40, True)]:
        row = Row(PrefixPlan.of([(prompt, [4, 30])]), HEADS["grouped"])
        for window in (None, 9):
            with torch.set_grad_enabled(gradients):
                attend(*row.leaves(torch.float32), row.plan, window=window)
    with torch.no_grad():
        attend(*row.leaves(torch.float32), row.plan)
    assert counter.frame_count > torch._dynamo.config.recompile_limit


@pytest.mark.slow
@torch.no_grad()
def test_the_forward_pass_compiled(compiled) -> None:
    """With fixed sizes: Inductor's C++ for dynamic ones does not compile in torch 2.13."""
    compiled(dynamic=False)
    row = Row(PLANS["ragged"], HEADS["grouped"])
    inputs = row.leaves(torch.float32)
    for options in ({}, {"window": 9, "softcap": 2.0}):
        out, truth = (f(*inputs, row.plan, **options) for f in (attend, reference))
        torch.testing.assert_close(out, truth, rtol=0, atol=1e-5)


def test_on_the_cpu_it_is_only_taken_by_name_and_without_gradients() -> None:
    row = Row(PLANS["pairs"], HEADS["grouped"])
    inputs = (*row.leaves(torch.float32), row.plan)
    with pytest.raises(ValueError, match="impl='flex' here: FlexAttention has no backward on the"):
        attend(*inputs)
    with torch.no_grad():
        assert refusal("flex", *inputs) is None
        assert choose(*inputs)[0] != "flex"
    sinks = torch.zeros(row.heads.query, requires_grad=True)
    constant = (*(x.detach() for x in inputs[:3]), row.plan)
    assert "no backward" in refusal("flex", *constant, sinks=sinks)


REAL = {"qwen": Heads(12, 2, 128), "llama": Heads(8, 2, 64), "mla": Heads(4, 4, 96, 64)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("heads", REAL.values(), ids=REAL)
def test_gradients_on_a_gpu(heads, options, dtype) -> None:
    """One plan after the other, so that but the first are computed by graphs of changing lengths,
    as in a training, and few are compiled."""
    for plan in PLANS.values():
        check_gradients(plan, heads, options, dtype)


def check_gradients(plan: PrefixPlan, heads: Heads, options: dict, dtype: torch.dtype) -> None:
    """At most four times the error of the reference in the same dtype, and a few roundings."""
    row = Row(plan, heads, "cuda")
    run = partial(options_for, heads, options, device="cuda")
    rounded = [x.detach().double() for x in (*row.leaves(dtype), row.upstream(dtype))]
    given = run(torch.float64)
    leaves = [x.requires_grad_() for x in rounded[:3]]
    out = reference(*leaves, plan, **given)
    wanted = [*leaves, *([given["sinks"]] if "sinks" in given else [])]
    truth = [out.detach(), *torch.autograd.grad(out, wanted, rounded[3])]
    ours, theirs = (
        errors(with_gradients(f, row, dtype, **run(torch.float32)), truth)
        for f in (attend, reference)
    )
    for our, their in zip(ours, theirs, strict=True):
        assert our <= 4 * their + 8 * torch.finfo(dtype).eps, (ours, theirs)


@pytest.mark.gpu
def test_auto_takes_flex_on_a_gpu_and_says_why_not() -> None:
    row = Row(PLANS["ragged"], REAL["qwen"], "cuda")
    inputs = (*row.leaves(torch.bfloat16), row.plan)
    assert prefix_attention(*inputs).equal(attend(*inputs))
    narrow = (*Row(PLANS["ragged"], HEADS["one"], "cuda").leaves(torch.bfloat16), row.plan)
    assert refusal("flex", *narrow) == "heads must be at least 16 wide"
    assert prefix_attention(*narrow).equal(reference(*narrow))
    double = (*row.leaves(torch.float64), row.plan)
    assert "float64" in refusal("flex", *double)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ten_runs_on_a_gpu_give_equal_bits_with_gradients_and_without(options: dict) -> None:
    row = Row(PLANS["ragged"], REAL["qwen"], "cuda")
    given = options_for(row.heads, options, torch.float32, "cuda")
    first = with_gradients(attend, row, torch.bfloat16, **given)
    for _ in range(9):
        again = with_gradients(attend, row, torch.bfloat16, **given)
        assert all(a.equal(b) for a, b in zip(again, first, strict=True))
    with torch.no_grad():
        assert attend(*row.leaves(torch.bfloat16), row.plan, **given).equal(first[0])
