"""torch.compile: both ops inside a graph, equal to eager bit for bit, and their schemas."""

import pytest
import torch
from torch.library import opcheck

from srlm_kernels import linear_logp, linear_preference_loss, losses
from srlm_kernels.linear_logp_chunked import linear_logp_backward, linear_logp_forward
from srlm_kernels.linear_preference_loss_chunked import preference_forward

ROWS = torch.tensor([0, 1, 2, 3, 4, 4, 6, 7, 8])
CU = torch.tensor([0, 2, 5, 5, 9])
OPTIONS = {"rows": ROWS, "extrapolation": 0.5, "softcap": 20.0, "impl": "chunked"}
OUTPUTS = ("entropy", "is_top1")

LOSSES = {
    "dpo": (losses.dpo(0.5), {}),
    "a tensor per pair": (losses.dpo(0.5), {"label_smoothing": torch.tensor([0.1, 0.4])}),
    "spa": (losses.spa(0.5, 0.3, torch.tensor(0.1)), {}),
    "with_nll of ipo": (losses.with_nll(losses.ipo(0.1), 0.4), {}),
    "aot": (losses.aot(0.5), {}),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def p(problem):
    p = problem((9, 8, 40))
    p.target[3] = -100
    return p


@pytest.fixture
def compiled():
    return lambda call, **options: torch.compile(call, backend="aot_eager", **options)


def logp(p):
    def call(hidden, weight, bias):
        out = linear_logp(
            hidden * 2, weight, p.target, bias=bias, ref_hidden=p.ref_hidden, outputs=OUTPUTS,
            temperature=1.5, **OPTIONS,
        )  # fmt: skip
        return (out.logp * torch.arange(9)).sum(), out

    return call


def loss(p, loss_fn, pair=None, **more):
    def call(hidden, weight, bias):
        out = linear_preference_loss(
            hidden * 2, weight, p.target, CU, loss_fn, pair=pair, bias=bias,
            ref_hidden=p.ref_hidden, outputs=OUTPUTS, **OPTIONS, **more,
        )  # fmt: skip
        return out.loss * 3, out

    return call


def results(call, p, leaves=None):
    leaves = leaves or p.trainable()
    value, out = call(*leaves)
    value.backward()
    return {name: t for name, t in vars(out).items() if t is not None} | {
        f"gradient {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None
    }


def assert_same(ours, truth):
    assert ours.keys() == truth.keys()
    for name, values in truth.items():
        assert ours[name].dtype == values.dtype, name
        assert torch.equal(ours[name], values), name


def test_linear_logp(p, compiled):
    call = logp(p)
    assert_same(results(compiled(call, fullgraph=True), p), results(call, p))


@pytest.mark.parametrize("name", LOSSES)
def test_linear_preference_loss(p, compiled, name):
    call = loss(p, *LOSSES[name])
    assert_same(results(compiled(call, fullgraph=True), p), results(call, p))


@pytest.mark.parametrize("op", ["linear_logp", "linear_preference_loss"])
def test_traced_without_autograd(p, op):
    call = logp(p) if op == "linear_logp" else loss(p, *LOSSES["spa"])
    traced = torch.compile(call, backend="eager", fullgraph=True)
    assert_same(results(traced, p), results(call, p))


@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3), torch.tensor(0.3).double()])
def test_scale(p, compiled, scale):
    call = loss(p, losses.dpo(0.5), scale=scale)
    assert_same(results(compiled(call, fullgraph=True), p), results(call, p))


@pytest.mark.parametrize("trained", [("hidden",), ("weight", "bias"), ()])
def test_frozen_parts(p, compiled, trained):
    call = loss(p, losses.dpo(0.5))
    both = []
    for run in (call, compiled(call, fullgraph=True)):
        leaves = [t.clone().requires_grad_(n in trained) for n, t in [*vars(p).items()][:3]]
        if trained:
            both.append(results(run, p, leaves))
        else:
            both.append({"loss": run(*leaves)[0]})
            assert not both[-1]["loss"].requires_grad
    assert_same(*both)


def test_bf16(problem, compiled):
    p = problem((9, 8, 40), torch.bfloat16)
    call = loss(p, losses.dpo(0.5))
    assert_same(results(compiled(call, fullgraph=True), p), results(call, p))


def test_grad_weight_out(p, compiled):
    buffers = [torch.ones(40, 8) for _ in range(2)]

    def call(hidden, weight, buffer):
        return linear_preference_loss(
            hidden * 2, weight, p.target, CU, losses.dpo(0.5), grad_weight_out=buffer, rows=ROWS,
            impl="chunked",
        ).loss  # fmt: skip

    both = []
    for run, buffer in zip((call, compiled(call, fullgraph=True)), buffers, strict=True):
        hidden, weight, _ = p.trainable()
        value = run(hidden, weight, buffer)
        value.backward()
        assert weight.grad is None
        both.append((value.detach(), hidden.grad))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    torch.testing.assert_close(*buffers)
    assert not torch.equal(buffers[0], torch.ones(40, 8))


def test_tensors_of_the_loss_may_belong_to_a_graph(p, compiled):
    """Regression: no gradient flows to them, but the compiled graph asked for its formula."""
    threshold = torch.tensor(0.1, requires_grad=True)
    call = loss(p, losses.spa(0.5, 0.3, threshold))
    assert_same(results(compiled(call, fullgraph=True), p), results(call, p))
    assert threshold.grad is None


def test_a_new_threshold_needs_no_new_graph(p, compiled):
    def call(hidden, weight, bias, threshold):
        return loss(p, losses.spa(0.5, 0.3, threshold))(hidden, weight, bias)[1].losses

    once = compiled(call, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for threshold in (torch.tensor(0.1), torch.tensor(1e9), torch.tensor(-1e9)):
            leaves = p.trainable()
            assert torch.equal(once(*leaves, threshold), call(*leaves, threshold))


def test_sizes_may_change(p, compiled):
    def call(hidden, weight, target, cu):
        return linear_preference_loss(
            hidden, weight, target, cu, losses.dpo(0.5), impl="chunked"
        ).losses

    dynamic = compiled(call, fullgraph=True, dynamic=True)
    for offsets in ([0, 2, 9], [0, 4, 5], [0, 1, 3, 3, 7], [0, 0, 0, 2, 6, 7, 8]):
        cu = torch.tensor(offsets)
        arguments = (p.hidden[: cu[-1]], p.weight, p.target[: cu[-1]], cu)
        assert torch.equal(dynamic(*arguments), call(*arguments))


def test_a_loss_of_ones_own_breaks_the_graph_and_nothing_else(p, compiled):
    call = loss(p, lambda s: -s.margin)
    assert_same(results(compiled(call), p), results(call, p))


def test_a_loss_of_ones_own_cannot_be_part_of_a_whole_graph(p, compiled):
    call = compiled(loss(p, lambda s: -s.margin), fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"only a loss_fn of srlm_kernels"):
        call(*p.trainable())


def test_wrong_arguments_are_refused_in_graphs_too(p, compiled):
    call = compiled(lambda h, w: linear_logp(h, w, p.target, softcap=-1.0).logp)
    with pytest.raises(ValueError, match="softcap must be positive"):
        call(p.hidden, p.weight)


@pytest.mark.slow
def test_inductor(p):
    for call in (logp(p), loss(p, *LOSSES["spa"])):
        expected = results(call, p)
        # Inductor fuses what stands around the op, in an order of its own.
        for name, values in results(torch.compile(call, fullgraph=True), p).items():
            torch.testing.assert_close(values, expected[name], msg=name)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("referenced", [True, False])
def test_schema_of_linear_logp(p, trained, referenced):
    leaves = [t.requires_grad_(trained) for t in p.trainable()]
    reference = (p.ref_hidden, p.ref_weight, p.ref_bias, 0.5) if referenced else (None,) * 4
    opcheck(
        linear_logp_forward,
        (*leaves, p.target, ROWS, *reference, 20.0, 1.0, 1.5, -100, "entropy is_top1",
         torch.float32, "", None),
    )  # fmt: skip


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False], [True, False, False]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schema_of_linear_logp_backward(problem, wanted, dtype):
    p = problem((9, 8, 40), dtype)
    upstream, lse = torch.linspace(-1, 2, 9), torch.linspace(5, 6, 9)
    opcheck(
        linear_logp_backward,
        (upstream, lse, p.hidden, p.weight, p.bias, p.target, ROWS, 20.0, 1.0, 1.5, -100,
         torch.float32, "", 4, wanted),
    )  # fmt: skip


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False], [False] * 3])
@pytest.mark.parametrize("wide", [False, True], ids=["rounded", "wide"])
@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor(0.5).double()])
def test_schema_of_linear_preference_loss(problem, wanted, wide, scale):
    p = problem((9, 8, 40), torch.bfloat16)
    reference = (p.ref_hidden, p.ref_weight, None, None, 0.5)
    opcheck(
        preference_forward,
        (p.hidden, p.weight, p.bias, p.target, CU, '["spa", 0.5, 0.3, "tensor", false]',
         [torch.tensor(0.1)], "", [], scale, ROWS, *reference, 20.0, 1.0, -100, "entropy is_top1",
         torch.float32, "", 4, wanted, wide),
    )  # fmt: skip


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_schemas_of_the_row_kernels(p, biased):
    logits, ref_logits = p.hidden @ p.weight.T, p.ref_hidden @ p.ref_weight.T
    bias, ref_bias = (p.bias, p.ref_bias) if biased else (None, None)
    state, lse, upstream = torch.zeros(8, 9), torch.full((9,), 5.0), torch.ones(9)
    opcheck(
        torch.ops.srlm_kernels.row_stats,
        (state, logits, p.target, ref_logits, bias, ref_bias, 0, 0.5, 20.0, 1.0, 1.0, "torch"),
    )
    opcheck(
        torch.ops.srlm_kernels.logits_grad,
        (logits, p.target, lse, upstream, bias, 0, 20.0, 1.0, 1.0, torch.float32, "torch"),
    )
