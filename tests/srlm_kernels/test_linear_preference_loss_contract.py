"""What callers rely on beside the numbers: connection, accumulation, refusal, detachment."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from srlm_kernels import linear_preference_loss, losses

pytestmark = pytest.mark.usefixtures("implementation")

BETA = 0.1


def grads_of(loss: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    loss.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("empty", ["all ignored", "no rows", "no pairs"])
def test_nothing_to_score_still_gives_a_connected_zero_gradient(problem, empty):
    p = problem((4, 8, 11))
    leaves = p.trainable()
    rows = torch.arange(4 if empty == "all ignored" else 0)
    cu = torch.tensor({"all ignored": [0, 2, 4], "no rows": [0, 0, 0], "no pairs": [0]}[empty])
    out = linear_preference_loss(
        *leaves[:2],
        torch.full_like(rows, -100),
        cu,
        losses.with_nll(losses.dpo(BETA), 1.0),
        rows=rows,
        bias=leaves[2],
        **p.reference,
        extrapolation=0.5,
    )
    expected = 0.0 if empty == "no pairs" else math.log(2)
    assert out.loss.item() == pytest.approx(expected)
    for leaf, grad in zip(leaves, grads_of(out.loss, leaves), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_grad_weight_out_is_complete_before_backward(problem, packed):
    p = problem((5, 31, 123), torch.bfloat16)
    cu = packed(5)
    hidden, weight, _ = p.trainable()
    buffer = torch.ones(weight.shape)
    out = linear_preference_loss(
        hidden, weight, p.target, cu, losses.dpo(BETA), grad_weight_out=buffer
    )
    same_hidden, same_weight, _ = p.trainable()
    plain = linear_preference_loss(same_hidden, same_weight, p.target, cu, losses.dpo(BETA))
    plain.loss.backward()
    torch.testing.assert_close((buffer - 1).bfloat16(), same_weight.grad)
    before = buffer.clone()
    out.loss.backward()
    assert torch.equal(buffer, before)
    assert weight.grad is None
    assert torch.equal(hidden.grad, same_hidden.grad)


def test_grad_weight_out_refuses_another_upstream_gradient(problem, packed):
    p = problem((5, 31, 123))
    hidden, weight, _ = p.trainable()
    buffer = torch.zeros_like(weight)
    out = linear_preference_loss(
        hidden, weight, p.target, packed(5), losses.dpo(BETA), grad_weight_out=buffer
    )
    with pytest.raises(RuntimeError, match="put the factor into scale"):
        (0.5 * out.loss).backward()


def test_without_gradients_nothing_is_accumulated(problem, packed):
    p = problem((5, 31, 123))
    hidden, weight, _ = p.trainable()
    buffer = torch.zeros_like(weight)
    arguments = (p.target, packed(5), losses.dpo(BETA))
    with torch.no_grad():
        out = linear_preference_loss(hidden, weight, *arguments, grad_weight_out=buffer)
    assert not out.loss.requires_grad
    assert not buffer.any()
    assert not linear_preference_loss(p.hidden, p.weight, *arguments).loss.requires_grad


def test_upstream_gradient_is_applied_and_second_backward_raises(problem, packed):
    p = problem((5, 31, 123), torch.float64)
    arguments = (p.target, packed(5), losses.dpo(BETA))
    leaves = p.trainable()[:2]
    once = grads_of(linear_preference_loss(*leaves, *arguments).loss, leaves)
    scaled = p.trainable()[:2]
    loss = linear_preference_loss(*scaled, *arguments).loss
    loss *= -3  # in place, as trainers do
    loss.backward(retain_graph=True)
    for ours, truth in zip(scaled, once, strict=True):
        torch.testing.assert_close(ours.grad, -3 * truth)
    with pytest.raises(RuntimeError, match="earlier backward took the gradients"):
        loss.backward()


class Allocated(TorchDispatchMode):
    """Collects the shapes of new tensors in its region, views of `old` ones aside."""

    def __init__(self, *old):
        super().__init__()
        self.old = {t.untyped_storage().data_ptr() for t in old}
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        new = isinstance(result, torch.Tensor)
        if new and result.untyped_storage().data_ptr() not in self.old:
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("implementation", ["chunked", "small chunks"], indirect=True)
@pytest.mark.parametrize("why", ["no_grad", "frozen head", "trained"])
def test_what_needs_no_gradient_of_the_head_makes_none(problem, packed, why):
    p = problem((64, 128, 1000))
    hidden, weight, _ = p.trainable()
    weight.requires_grad_(why != "frozen head")
    with Allocated(weight) as allocated, torch.set_grad_enabled(why != "no_grad"):
        linear_preference_loss(hidden, weight, p.target, packed(64), losses.dpo(BETA))
    assert ((1000, 128) in allocated.shapes) == (why == "trained")


def test_inference_mode_gives_the_same_loss(problem, packed):
    """Regression: autograd, which finds the slopes, records no tensor made in inference mode."""
    p = problem((5, 31, 123))
    smoothing = {"label_smoothing": torch.tensor([0.1, 0.4])}
    arguments = (p.target, packed(5), losses.dpo(BETA))
    expected = linear_preference_loss(p.hidden, p.weight, *arguments, pair=smoothing).loss
    with torch.inference_mode():
        hidden = p.hidden * 1
        inside = {name: t * 1 for name, t in smoothing.items()}
        loss = linear_preference_loss(hidden, p.weight, *arguments, pair=inside).loss
    assert torch.equal(loss, expected)
    weight = p.weight.clone().requires_grad_()
    linear_preference_loss(hidden, weight, *arguments, pair=inside).loss.backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)])
def test_scale_is_a_number_or_a_tensor(problem, packed, scale):
    p = problem((5, 31, 123))
    arguments = (p.target, packed(5), losses.dpo(BETA))
    leaves = p.trainable()[:2]
    out = linear_preference_loss(*leaves, *arguments, scale=scale)
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, 0.25 * out.losses.sum())
    same = p.trainable()[:2]
    plain = linear_preference_loss(*same, *arguments, scale=1.0)
    for ours, truth in zip(grads_of(out.loss, leaves), grads_of(plain.loss, same), strict=True):
        torch.testing.assert_close(ours, truth / 4)


@pytest.mark.parametrize("upstream", [2.0, 65536.0, 0.0])
def test_a_grad_scaler_multiplies_the_gradients(problem, packed, upstream):
    p = problem((5, 31, 123), torch.bfloat16)
    arguments = (p.target, packed(5), losses.dpo(BETA))
    leaves, same = p.trainable()[:2], p.trainable()[:2]
    once = grads_of(linear_preference_loss(*leaves, *arguments).loss, leaves)
    scaled = grads_of(linear_preference_loss(*same, *arguments).loss * upstream, same)
    assert all(torch.equal(b, a * upstream) for a, b in zip(once, scaled, strict=True))


def test_offloading_hooks_see_no_gradient(problem, packed, implementation):
    """Regression: stashed gradients in `save_for_backward` are copied to the host and back."""
    p = problem((64, 128, 1000))
    arguments = (p.target, packed(64), losses.dpo(BETA))
    hidden, weight, _ = p.trainable()
    seen = []

    def pack(t):
        seen.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = linear_preference_loss(hidden, weight, *arguments).loss
    loss.backward()
    if implementation == "chunked":  # autograd of plain torch saves its logits
        assert max(seen, default=0) < 64
    offloaded, same_weight, _ = p.trainable()
    with torch.autograd.graph.save_on_cpu():
        loss = linear_preference_loss(offloaded, same_weight, *arguments).loss
    loss.backward()
    assert torch.equal(offloaded.grad, hidden.grad)
    assert torch.equal(same_weight.grad, weight.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_region_gives_the_same_gradients(problem, packed, reentrant):
    """It runs the call twice; only `grad_weight_out` would count that."""
    p = problem((5, 31, 123))
    results = []
    for region in (None, checkpoint):
        leaves = p.trainable()[:2]

        def loss(hidden, weight):
            arguments = (p.target, packed(5), losses.dpo(BETA))
            return linear_preference_loss(hidden.tanh(), weight, *arguments).loss

        inside = loss(*leaves) if region is None else region(loss, *leaves, use_reentrant=reentrant)
        results.append(grads_of(inside, leaves))
    assert all(map(torch.equal, *results))


def test_gradients_have_no_gradients(problem, packed):
    p = problem((5, 31, 123))
    hidden, weight, _ = p.trainable()
    loss = linear_preference_loss(hidden, weight, p.target, packed(5), losses.dpo(BETA)).loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_frozen_head_trains_the_hidden_states_alone(problem, packed):
    p = problem((5, 31, 123))
    arguments = (p.target, packed(5), losses.dpo(BETA))
    hidden, weight, _ = p.trainable()
    linear_preference_loss(hidden, weight, *arguments).loss.backward()
    frozen = p.hidden.clone().requires_grad_()
    linear_preference_loss(frozen, p.weight, *arguments).loss.backward()
    assert torch.equal(frozen.grad, hidden.grad)
    assert p.weight.grad is None


def test_tied_embedding_gets_both_gradients(problem, packed):
    p = problem((5, 8, 11), torch.float64)
    tokens = torch.tensor([3, 1, 4, 1, 5])

    def loss(embedding, head):
        return linear_preference_loss(
            embedding[tokens].tanh(), head, p.target, packed(5), losses.dpo(1.0)
        ).loss

    tied = p.weight.clone().requires_grad_()
    loss(tied, tied).backward()
    embedding, head = (p.weight.clone().requires_grad_() for _ in range(2))
    loss(embedding, head).backward()
    torch.testing.assert_close(tied.grad, embedding.grad + head.grad)


def test_everything_but_the_loss_is_detached(problem, packed):
    p = problem((5, 31, 123))
    hidden, weight, bias = p.trainable()
    reference = {name: t.clone().requires_grad_() for name, t in p.reference.items()}
    out = linear_preference_loss(
        hidden,
        weight,
        p.target,
        packed(5),
        losses.spa(BETA, 0.1, 0.0),
        bias=bias,
        **reference,
        extrapolation=0.5,
        outputs=("entropy",),
    )
    carrying = [n for n, t in vars(out).items() if t is not None and t.requires_grad]
    assert carrying == ["loss"]
    out.loss.backward()
    assert all(t.grad is None for t in reference.values())


def test_known_reference_sums_get_no_gradient(problem, packed):
    p = problem((5, 31, 123))
    hidden, weight, _ = p.trainable()
    ref_logp = torch.zeros(4, requires_grad=True)
    out = linear_preference_loss(
        hidden, weight, p.target, packed(5), losses.dpo(BETA), ref_logp=ref_logp
    )
    assert not out.margins.requires_grad
    out.loss.backward()
    assert ref_logp.grad is None


def test_any_function_of_the_sums_is_a_loss(problem):
    """One that ignores the rejected response: its rows get no gradient."""
    p = problem((5, 31, 123))
    hidden = p.hidden.clone().requires_grad_()
    out = linear_preference_loss(
        hidden, p.weight, p.target, torch.tensor([0, 2, 5]), lambda s: -s.chosen
    )
    out.loss.backward()
    assert out.loss.item() == -out.logp[0].item()
    assert hidden.grad[:2].any()
    assert not hidden.grad[2:].any()
