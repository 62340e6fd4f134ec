"""The drop-in for Liger's fused linear DPO loss, against Liger's own."""

import inspect

import pytest
import torch

from srlm_fast.errors import UserError
from srlm_fast.integrations.liger import LOSS_TYPES, LigerFusedLinearDPOLoss

chunked_loss = pytest.importorskip(
    "liger_kernel.chunked_loss", reason="liger-kernel is not installed (extra [liger])"
)
THEIRS = chunked_loss.LigerFusedLinearDPOLoss
P, S, D, V = 5, 7, 12, 45  # not a multiple of anything that chunks
NAMES = ("chosen_logps", "rejected_logps", "chosen_logits_mean", "rejected_logits_mean",
         "nll_loss", "chosen_rewards", "rejected_rewards")  # fmt: skip


def problem(dtype=torch.float32, bias=False, lengths=((7, 3), (1, 7), (4, 4), (6, 2), (2, 5))):
    """Arguments of a call; padding and a prompt of one token are ignored."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    target = torch.randint(V, (2 * P, S), generator=generator)
    for pair, both in enumerate(lengths):
        for side, length in enumerate(both):
            target[side * P + pair, length:] = -100
    target[0, 0] = -100
    return {
        "lin_weight": draw(V, D).requires_grad_(),
        "_input": draw(2 * P, S, D).requires_grad_(),
        "target": target,
        "bias": draw(V).requires_grad_() if bias else None,
        "ref_input": draw(2 * P, S, D),
        "ref_weight": draw(V, D),
        "ref_bias": draw(V) if bias else None,
    }


def call(kind, arguments, upstream=1.0, **options):
    """The results of a loss module and its gradients."""
    leaves = [t for t in arguments.values() if t is not None and t.requires_grad]
    loss, rest = kind(compiled=False, **options)(**arguments)
    assert len(rest) == len(NAMES)
    gradients = torch.autograd.grad(loss * upstream, leaves)
    return [loss.detach(), *rest, *gradients]


def compare(arguments, upstream=1.0, **options):
    expected = call(THEIRS, arguments, upstream, **options)
    found = call(LigerFusedLinearDPOLoss, arguments, upstream, **options)
    assert len(found) == len(expected)
    for theirs, ours in zip(expected, found, strict=True):
        assert ours.shape == theirs.shape and not ours.requires_grad
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5, check_dtype=True)


def test_the_signatures_are_ligers():
    for method in ("__init__", "forward"):
        theirs, ours = (
            inspect.signature(getattr(kind, method)).parameters.values()
            for kind in (THEIRS, LigerFusedLinearDPOLoss)
        )
        assert [(p.name, p.default, p.kind) for p in ours] == [
            (p.name, p.default, p.kind) for p in theirs
        ]
    assert set(LOSS_TYPES) == THEIRS._SUPPORTED_LOSS_TYPES


@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_every_loss_type_is_ligers(kind, average):
    smoothing = 0.1 if kind in ("exo_pair", "robust") else 0.0
    compare(problem(), loss_type=kind, label_smoothing=smoothing, average_log_prob=average)


OPTIONS = {
    "beta": {"beta": 0.7},
    "smoothing that is ignored": {"label_smoothing": 0.3},
    "NLL": {"compute_nll_loss": True, "alpha": 0.6},
    "NLL beside averages": {"compute_nll_loss": True, "average_log_prob": True},
    "no reference": {"use_ref_model": False},
    "discopop_tau": {"loss_type": "discopop", "discopop_tau": 0.5},
    "chunks of two pairs": {"chunk_size": 2},
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_ligers(name, bias):
    compare(problem(bias=bias), **OPTIONS[name])


def test_an_upstream_gradient_scales():
    compare(problem(), upstream=0.25)


def test_another_ignore_index():
    arguments = problem()
    arguments["target"][arguments["target"] == -100] = 0
    compare(arguments, ignore_index=0)


def test_states_that_are_a_view_of_longer_ones():
    arguments = problem()
    longer = torch.cat([arguments["_input"], torch.zeros(2 * P, 1, D)], 1).detach()
    arguments["_input"] = longer.requires_grad_()
    expected = call(THEIRS, arguments | {"_input": longer[:, :-1]})
    found = call(LigerFusedLinearDPOLoss, arguments | {"_input": longer[:, :-1]})
    torch.testing.assert_close(found[0], expected[0])


def test_without_gradients():
    with torch.no_grad():
        loss, _ = LigerFusedLinearDPOLoss()(**problem())
    assert not loss.requires_grad


def test_a_frozen_head_gets_no_gradient():
    arguments = problem()
    arguments["lin_weight"].requires_grad_(False)
    compare(arguments)


def test_bf16_is_nearer_to_float64_than_ligers():
    rounded = problem(torch.bfloat16)
    wide = {
        k: v.detach().double().requires_grad_(v.requires_grad)
        if v is not None and v.is_floating_point() else v for k, v in rounded.items()
    }  # fmt: skip
    truth = call(LigerFusedLinearDPOLoss, wide)
    ours, theirs = call(LigerFusedLinearDPOLoss, rounded), call(THEIRS, rounded)
    for i in (0, -2, -1):  # the loss, dW and dX
        error = (ours[i].double() - truth[i]).norm()
        assert error <= (theirs[i].double() - truth[i]).norm() + 1e-3 * truth[i].norm()


def test_an_empty_response_counts_as_nothing():
    arguments = problem(lengths=((7, 0), (1, 7), (4, 4), (6, 2), (0, 0)))
    compare(arguments)
    loss, rest = LigerFusedLinearDPOLoss(average_log_prob=True)(**arguments)
    assert loss.isfinite() and all(value.isfinite().all() for value in rest)


@pytest.mark.parametrize("nll", [False, True])
def test_a_batch_without_a_label_has_no_margin_and_no_gradient(nll):
    arguments = problem()
    arguments["target"].fill_(-100)
    loss, chosen, *_, of_head, of_states = call(
        LigerFusedLinearDPOLoss, arguments, compute_nll_loss=nll
    )
    assert loss == pytest.approx(0.6931472) and not chosen.any()
    assert not of_head.any() and not of_states.any()


def test_what_liger_refuses_is_refused():
    with pytest.raises(UserError, match="unknown loss_type 'ipo'"):
        LigerFusedLinearDPOLoss(loss_type="ipo")
    with pytest.raises(UserError, match="loss_type exo_pair: label_smoothing"):
        LigerFusedLinearDPOLoss(loss_type="exo_pair")
    with pytest.raises(UserError, match="loss_type robust: label_smoothing"):
        LigerFusedLinearDPOLoss(loss_type="robust", label_smoothing=0.5)
    with pytest.raises(UserError, match="pass ref_input"):
        LigerFusedLinearDPOLoss()(**problem() | {"ref_input": None})
    arguments = problem()
    with pytest.raises(UserError, match="put the chosen responses first"):
        LigerFusedLinearDPOLoss()(**arguments | {"target": arguments["target"][:-1]})
