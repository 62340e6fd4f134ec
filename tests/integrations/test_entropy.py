"""The entropy's gradient, against autograd through all logits."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from benchmarks.train_engines import policy_and_reference
from srlm_fast.integrations import entropy as module
from srlm_fast.integrations.entropy import linear_logp_with_entropy
from srlm_kernels import linear_logp

T, D, V = 11, 6, 37
SHAPE = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip
TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "all": {"temperature": 1.7, "softcap": 4.0, "logit_scale": 1.5},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", 4)


def operands(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    target = torch.randint(V, (T,), generator=generator)
    target[2] = target[9] = -100
    return draw(T, D), draw(V, D), draw(V), target, torch.randn(2, T, generator=generator)


def expected(hidden, weight, bias, target, upstream, softcap=None, logit_scale=1.0,
             temperature=1.0):  # fmt: skip
    """Gradients of upstream[0] . logp + upstream[1] . entropy, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    z = logit_scale * F.linear(*leaves)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logp = z.log_softmax(-1)
    scored = target != -100
    token = logp.gather(1, target.clamp(min=0)[:, None])[:, 0]
    both = upstream[0] * token + upstream[1] * -(logp.exp() * logp).sum(-1)
    return torch.autograd.grad(both[scored].sum(), leaves)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_of_the_entropy_beside_those_of_the_logps(name):
    hidden, weight, bias, target, upstream = operands()
    found = linear_logp_with_entropy(
        hidden, weight, target, bias=bias, outputs=["entropy"], **TRANSFORMS[name]
    )
    loss = (upstream[0] * found.logp + upstream[1] * found.entropy).sum()
    ours = torch.autograd.grad(loss, (hidden, weight, bias))
    theirs = expected(hidden, weight, bias, target, upstream, **TRANSFORMS[name])
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_state_that_predicts_several_rows_sums_their_gradients():
    hidden, weight, _, target, upstream = operands()
    rows = torch.tensor([3, 3, 0, 10, 5, 3, 5, 1, 2, 0, 9])
    gradients = []
    for states, where in ((hidden, rows), (hidden[rows], None)):
        found = linear_logp_with_entropy(states, weight, target, rows=where, outputs=["entropy"])
        loss = (upstream[1] * found.entropy).sum()
        gradients.append(torch.autograd.grad(loss, (hidden, weight)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_rounds_as_autograd_does():
    hidden, weight, bias, target, upstream = operands(torch.bfloat16)
    truth = expected(hidden, weight, bias, target, 0 * upstream + upstream[1])
    found = linear_logp_with_entropy(hidden, weight, target, bias=bias, outputs=["entropy"])
    ours = torch.autograd.grad(
        (upstream[1] * (found.logp + found.entropy)).sum(), (hidden, weight, bias)
    )
    logp = F.linear(hidden, weight, bias).float().log_softmax(-1)
    token = logp.gather(1, target.clamp(min=0)[:, None])[:, 0]
    both = upstream[1] * (token - (logp.exp() * logp).sum(-1))
    plain = torch.autograd.grad(both[target != -100].sum(), (hidden, weight, bias))
    for a, p, t in zip(ours, plain, truth, strict=True):
        assert (a - t).norm() <= 1.5 * (p - t).norm() + 1e-3 * t.norm()


def test_probabilities_that_vanish_give_no_nan():
    hidden, weight, _, target, _ = operands()
    found = linear_logp_with_entropy(
        (1e4 * hidden.detach()).requires_grad_(), weight, target, outputs=["entropy"]
    )
    (gradient,) = torch.autograd.grad(found.entropy.sum(), weight)
    assert gradient.isfinite().all()


def test_values_and_other_outputs_are_the_ops():
    hidden, weight, bias, target, _ = operands()
    outputs = ["entropy", "mean_logit", "is_top1", "log_sum_sq_probs"]
    ours, theirs = (
        op(hidden, weight, target, bias=bias, outputs=outputs)
        for op in (linear_logp_with_entropy, linear_logp)
    )
    for name in ("logp", *outputs):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert linear_logp_with_entropy(hidden, weight, target).entropy is None


def test_an_entropy_that_is_only_logged_costs_nothing(monkeypatch):
    def refuse(*_):
        raise AssertionError("logits were formed again")

    monkeypatch.setattr(module, "_slope", refuse)
    hidden, weight, _, target, _ = operands()
    found = linear_logp_with_entropy(hidden, weight, target, outputs=["entropy"])
    found.logp.sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("way", ["accelerate", "patch_logprobs"])
def test_trls_entropy_has_trls_gradient(way):
    pytest.importorskip("trl", reason="trl is not installed (extra [trl])")
    from accelerate import Accelerator
    from trl.trainer.utils import add_fused_lm_head

    from srlm_fast.integrations.trl import accelerate, patch_logprobs

    ids = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    upstream = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))

    def gradients(model):
        out = model(input_ids=ids, labels=labels, fused_lm_head=True)
        loss = (upstream * (out.entropy - 2 * out.log_probs)).sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    def with_head():
        model = policy_and_reference(SHAPE, torch.float32)[0]
        add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
        return model

    expected = gradients(with_head())
    if way == "accelerate":
        trainer = SimpleNamespace(model=with_head(), accelerator=Accelerator(cpu=True))
        found = gradients(accelerate(trainer).model)
    else:
        with patch_logprobs():
            found = gradients(with_head())
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
