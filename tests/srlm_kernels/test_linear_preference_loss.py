"""linear_preference_loss against float64 formulas whose gradients are written out by hand."""

import itertools

import pytest
import torch

from srlm_kernels import linear_preference_loss, losses

pytestmark = pytest.mark.usefixtures("implementation")

BETA = 0.1
SCALED = {"logit_scale": 1.3, "softcap": 6.0}


def sums(token_logp: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    ends = cu_seqlens.tolist()
    return torch.stack([token_logp[i:j].sum() for i, j in itertools.pairwise(ends)])


def grads_of(loss: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    loss.backward()
    return [leaf.grad for leaf in leaves]


def assert_grads_close(ours, truth, width: int) -> None:
    for a, b in zip(ours, truth, strict=True):
        assert (a - b).norm() <= 1e-6 * width**0.5 * b.norm() + 1e-12


def true_gradients(p, z, cu_seqlens, slopes):
    """dL/dz_t = c_sequence (onehot - p_t), then the two products of the head."""
    c = slopes.repeat_interleave(cu_seqlens.diff().long())
    dz = -z.softmax(1)
    dz[torch.arange(len(dz)), p.target] += 1
    dz *= c[:, None]
    return dz @ p.weight.double(), dz.T @ p.hidden.double(), dz.sum(0)


def test_dpo_and_its_gradients(problem, shape, true_logits, true_logp, packed):
    p = problem(shape)
    leaves = p.trainable()
    cu = packed(shape[0])
    out = linear_preference_loss(
        leaves[0], leaves[1], p.target, cu, losses.dpo(BETA), bias=leaves[2], **p.reference
    )
    z = true_logits(p.hidden, p.weight, p.bias)
    logp = sums(true_logp(z, p.target), cu)
    ref = sums(true_logp(true_logits(p.ref_hidden, p.ref_weight, p.ref_bias), p.target), cu)
    ratio = logp - ref
    margin = ratio[0::2] - ratio[1::2]
    per_pair = (1 + (-BETA * margin).exp()).log()
    for ours, truth in (
        (out.logp, logp),
        (out.ref_logp, ref),
        (out.extrapolated_logp, logp),
        (out.margins, margin),
        (out.ext_margins, margin),
        (out.losses, per_pair),
        (out.loss, per_pair.mean()),
    ):
        torch.testing.assert_close(ours.detach().double(), truth, atol=1e-4, rtol=1e-6)
    c = -BETA / (1 + (BETA * margin).exp()) / len(margin)
    truth = true_gradients(p, z, cu, torch.stack([c, -c], 1).flatten())
    assert_grads_close(grads_of(out.loss, leaves), truth, shape[1])


def test_spa_and_its_gradients(problem, shape, true_logits, true_logp, packed):
    """As the authors' code: mix the logits, sum, flag unless strictly above, smooth by alpha."""
    alpha, strength = 0.1, 0.5
    p = problem(shape)
    leaves = p.trainable()
    cu = packed(shape[0])
    z = true_logits(p.hidden, p.weight, p.bias)
    z_ref = true_logits(p.ref_hidden, p.ref_weight, p.ref_bias)
    mix = 1 + strength
    logp, ref, ext = (
        sums(true_logp(x, p.target), cu) for x in (z, z_ref, mix * z + (1 - mix) * z_ref)
    )
    ratio, mixed = logp - ref, ext - ref
    margin, mix_margin = ratio[0::2] - ratio[1::2], mixed[0::2] - mixed[1::2]
    # Between the two lowest margins: one pair is flagged, the others are not.
    gap = BETA * float(mix_margin.sort().values[:2].mean() if len(margin) > 1 else 1e3)
    clean = (BETA * mix_margin > gap).double()
    assert (clean == 0).sum() == 1
    weight = 1 - alpha + alpha * clean
    x = BETA * margin
    per_pair = weight * (1 + (-x).exp()).log() + (1 - weight) * (1 + x.exp()).log()

    out = linear_preference_loss(
        leaves[0],
        leaves[1],
        p.target,
        cu,
        losses.spa(BETA, alpha, torch.tensor(gap)),
        bias=leaves[2],
        **p.reference,
        extrapolation=strength,
    )
    torch.testing.assert_close(out.ext_margins.double(), mix_margin, atol=1e-4, rtol=1e-6)
    torch.testing.assert_close(out.losses.double(), per_pair, atol=1e-5, rtol=1e-6)
    c = BETA * (x.sigmoid() - weight) / len(margin)
    truth = true_gradients(p, z, cu, torch.stack([c, -c], 1).flatten())
    assert_grads_close(grads_of(out.loss, leaves), truth, shape[1])


def gradcheck(op, leaves) -> bool:
    """torch's gradcheck runs backward repeatedly; this makes every backward a fresh call."""

    class Repeatable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return op(*inputs).detach()

        @staticmethod
        def backward(ctx, upstream):
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            with torch.enable_grad():
                return torch.autograd.grad(op(*inputs), inputs, upstream)

    return torch.autograd.gradcheck(Repeatable.apply, leaves)


@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize(
    ("loss_fn", "pair"),
    [
        (losses.spa(0.5, 0.3, 0.1), {}),
        (losses.dpo(0.5), {"label_smoothing": torch.tensor([0.0, 0.4]).double()}),
        (losses.with_nll(losses.dpo(0.5), 0.7), {}),
        (losses.simpo(2.0, 0.5), {}),
        (losses.ipo(0.5), {}),
        (losses.apo_down(0.5), {}),
        (losses.sppo_hard(0.5), {}),
    ],
    ids=["spa", "cdpo", "rpo", "simpo", "ipo", "apo_down", "sppo"],
)
def test_gradcheck(problem, loss_fn, pair, strength):
    p = problem((7, 4, 6), torch.float64)
    p.target[3] = -100
    rows = torch.tensor([0, 1, 0, 3, 4, 4, 6])
    cu = torch.tensor([0, 2, 4, 4, 7])

    def loss(hidden, weight, bias):
        return linear_preference_loss(
            hidden,
            weight,
            p.target,
            cu,
            loss_fn,
            pair=pair,
            rows=rows,
            bias=bias,
            **p.reference,
            extrapolation=strength,
            **SCALED,
        ).loss

    assert gradcheck(loss, p.trainable())


def test_log_probabilities_are_summed_not_averaged(problem):
    """Regression: a masked mean instead of the sum over the response."""
    p = problem((6, 8, 11))
    once = linear_preference_loss(
        p.hidden, p.weight, p.target, torch.tensor([0, 2, 6]), losses.dpo(BETA)
    )
    rows = torch.tensor([0, 1, 0, 1, 2, 3, 4, 5])
    doubled = linear_preference_loss(
        p.hidden,
        p.weight,
        p.target[rows],
        torch.tensor([0, 4, 8]),
        losses.dpo(BETA),
        rows=rows,
    )
    torch.testing.assert_close(doubled.logp[0], 2 * once.logp[0])
    torch.testing.assert_close(doubled.logp[1], once.logp[1])


def test_without_a_reference_its_terms_are_zero(problem, packed):
    p = problem((5, 31, 123))
    out = linear_preference_loss(p.hidden, p.weight, p.target, packed(5), losses.dpo(BETA))
    assert not out.ref_logp.any()
    assert torch.equal(out.margins, out.logp[0::2] - out.logp[1::2])


def dpo_in_float64(p, cu_seqlens, true_logits, true_logp):
    """The margins, and the gradients of hidden states and weight."""
    z = true_logits(p.hidden, p.weight)
    logp = sums(true_logp(z, p.target), cu_seqlens)
    margin = logp[0::2] - logp[1::2]
    c = -BETA / (1 + (BETA * margin).exp()) / len(margin)
    slopes = torch.stack([c, -c], 1).flatten()
    return margin, true_gradients(p, z, cu_seqlens, slopes)[:2]


@pytest.mark.parametrize("shape", [(64, 128, 1000), (129, 96, 5021)], ids=["V1000", "V5021"])
def test_bf16_gradients_are_summed_wide_and_rounded_once(
    problem, shape, true_logits, true_logp, packed
):
    p = problem(shape, torch.bfloat16)
    cu = packed(shape[0])
    hidden, weight, _ = p.trainable()
    arguments = (p.target, cu, losses.dpo(BETA))
    options = {"logits_dtype": torch.float32}
    out = linear_preference_loss(hidden, weight, *arguments, **options)
    margin, truth = dpo_in_float64(p, cu, true_logits, true_logp)
    torch.testing.assert_close(out.margins.double(), margin, atol=5e-3, rtol=0)
    for ours, exact in zip(grads_of(out.loss, (hidden, weight)), truth, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() <= 2.5e-3 * exact.norm()

    wide = torch.zeros(p.weight.shape)
    linear_preference_loss(hidden, weight, *arguments, grad_weight_out=wide, **options)
    assert (wide - truth[1]).norm() <= 1e-5 * truth[1].norm()


def test_bf16_logits_are_no_worse_than_plain_torch(problem, true_logits, true_logp, packed):
    """Margins of bf16 logits under an fp32 log-softmax; logits small enough for the limit."""
    p = problem((129, 96, 5021), torch.bfloat16)
    p.weight = p.weight / 3
    cu = packed(129)
    hidden, weight, _ = p.trainable()
    out = linear_preference_loss(
        hidden, weight, p.target, cu, losses.dpo(BETA), logits_dtype=torch.bfloat16
    )
    margin, truth = dpo_in_float64(p, cu, true_logits, true_logp)
    log_probs = (p.hidden @ p.weight.T).float().log_softmax(1)
    plain = sums(log_probs.gather(1, p.target[:, None])[:, 0], cu)
    allowed = (plain[0::2] - plain[1::2] - margin).abs().max()
    assert (out.margins - margin).abs().max() <= allowed + 1e-4
    for ours, exact in zip(grads_of(out.loss, (hidden, weight)), truth, strict=True):
        assert (ours.double() - exact).norm() <= 4e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_margins_of_two_thousand_tokens(problem, dtype):
    """Of about one nat each, as in text: the sums are rounded to fp32, so more would cost more."""
    p = problem((64, 128, 1000), dtype)
    log_probs = (2 * p.hidden.double() @ p.weight.double().T).log_softmax(1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(4000) % 64
    target = torch.multinomial(log_probs.exp()[rows], 1, generator=generator)[:, 0]
    logp = log_probs[rows, target]
    assert -2 < logp.mean() < -1
    out = linear_preference_loss(
        2 * p.hidden,
        p.weight,
        target,
        torch.tensor([0, 2000, 4000]),
        losses.dpo(BETA),
        rows=rows,
        logits_dtype=torch.float32,
    )
    margin = logp[:2000].sum() - logp[2000:].sum()
    atol = 1e-4 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(out.margins.double(), margin[None], atol=atol, rtol=0)
