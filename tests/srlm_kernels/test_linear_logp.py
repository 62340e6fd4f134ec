"""linear_logp against float64 formulas, and the traps that other implementations fell into."""

import math

import pytest
import torch

from srlm_kernels import linear_logp

pytestmark = pytest.mark.usefixtures("implementation")

OPTIONS = {
    "plain": {},
    "scaled": {"logit_scale": 0.7, "temperature": 1.3},
    "capped": {"softcap": 5.0},
    "all": {"logit_scale": 1.4, "softcap": 4.0, "temperature": 0.8},
}
ALL_OUTPUTS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_policy_reference_and_extrapolated_logp(problem, shape, options, true_logits, true_logp):
    p = problem(shape)
    out = linear_logp(
        p.hidden, p.weight, p.target, bias=p.bias, **p.reference, extrapolation=0.5, **options
    )
    z = true_logits(p.hidden, p.weight, p.bias, **options)
    z_ref = true_logits(p.ref_hidden, p.ref_weight, p.ref_bias, **options)
    close = 2e-6 * max(1.0, float(z.abs().max()))
    for ours, logits, atol in (
        (out.logp, z, close),
        (out.ref_logp, z_ref, close),
        (out.extrapolated_logp, 1.5 * z - 0.5 * z_ref, 1e-5),
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), true_logp(logits, p.target), atol=atol, rtol=0)


def test_gradients_are_onehot_minus_p(problem, shape, true_logits):
    p = problem(shape)
    hidden, weight, bias = p.trainable()
    upstream = torch.linspace(-1.0, 2.0, len(p.target))
    linear_logp(hidden, weight, p.target, bias=bias).logp.backward(upstream)
    z = true_logits(p.hidden, p.weight, p.bias)
    dz = -z.softmax(1)
    dz[torch.arange(len(dz)), p.target] += 1
    dz *= upstream.double()[:, None]
    for ours, truth in (
        (hidden.grad, dz @ p.weight.double()),
        (weight.grad, dz.T @ p.hidden.double()),
        (bias.grad, dz.sum(0)),
    ):
        assert (ours - truth).norm() <= 1e-6 * shape[1] ** 0.5 * truth.norm()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(problem, options):
    p = problem((6, 5, 7), torch.float64)
    rows = torch.tensor([0, 2, 2, 5, 1])
    target = torch.tensor([3, 0, 6, -100, 2])

    def logp(hidden, weight, bias):
        return linear_logp(hidden, weight, target, rows=rows, bias=bias, **options).logp

    assert torch.autograd.gradcheck(logp, p.trainable())


def test_row_predicts_the_token_after_it(problem, true_logits, true_logp):
    """Regression: log-probabilities of token t taken from the logits at t (no shift)."""
    tokens = torch.tensor([4, 1, 7, 7, 0, 9])
    p = problem((len(tokens), 8, 11))
    prompt = 2
    positions = torch.arange(prompt, len(tokens))
    ours = linear_logp(p.hidden, p.weight, tokens[positions], rows=positions - 1).logp
    z = true_logits(p.hidden, p.weight)
    shifted = true_logp(z[:-1], tokens[1:])[prompt - 1 :]
    unshifted = true_logp(z, tokens)[prompt:]
    torch.testing.assert_close(ours.double(), shifted, atol=1e-5, rtol=0)
    assert (ours - unshifted).abs().min() > 1e-3


def test_duplicate_rows_share_one_hidden_state(problem):
    p = problem((4, 8, 11), torch.float64)
    rows = torch.tensor([1, 3, 1, 1], dtype=torch.int32)
    hidden, weight, _ = p.trainable()
    out = linear_logp(hidden, weight, p.target, rows=rows)
    out.logp.backward(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))
    copies, same_weight, _ = p.trainable()
    copies = copies.detach()[rows.long()].requires_grad_()
    apart = linear_logp(copies, same_weight, p.target)
    apart.logp.backward(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))
    assert torch.equal(out.logp, apart.logp)
    expected = torch.stack(
        [torch.zeros(8), copies.grad[[0, 2, 3]].sum(0), torch.zeros(8), copies.grad[1]]
    )
    torch.testing.assert_close(hidden.grad, expected)
    torch.testing.assert_close(weight.grad, same_weight.grad)


def test_ignored_rows_are_silent_even_when_they_hold_nan(problem):
    p = problem((6, 8, 11))
    hidden, weight, bias = p.trainable()
    with torch.no_grad():
        hidden[[1, 4]] = math.nan
    target = p.target.clone()
    target[[1, 4]] = 99
    reference = {**p.reference, "ref_hidden": hidden.detach()}
    out = linear_logp(
        hidden,
        weight,
        target,
        bias=bias,
        **reference,
        extrapolation=1.0,
        ignore_index=99,
        outputs=ALL_OUTPUTS,
    )
    out.logp.sum().backward()
    for values in vars(out).values():
        assert torch.equal(values[[1, 4]], torch.zeros_like(values[[1, 4]]))
        assert values.isfinite().all()
    assert torch.equal(hidden.grad[[1, 4]], torch.zeros(2, 8))
    scored = [0, 2, 3, 5]
    alone, same_weight, same_bias = p.trainable()
    linear_logp(
        alone, same_weight, p.target[scored], rows=torch.tensor(scored), bias=same_bias
    ).logp.sum().backward()
    torch.testing.assert_close(hidden.grad[scored], alone.grad[scored])
    torch.testing.assert_close(weight.grad, same_weight.grad)
    torch.testing.assert_close(bias.grad, same_bias.grad)


def test_no_rows(problem):
    p = problem((3, 8, 11))
    hidden, weight, _ = p.trainable()
    none = torch.zeros(0, dtype=torch.int64)
    out = linear_logp(hidden, weight, none, rows=none, outputs=ALL_OUTPUTS)
    out.logp.sum().backward()
    assert out.logp.shape == out.entropy.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_equal_models_have_equal_logp_bit_for_bit(problem, shape, dtype, strength):
    p = problem(shape, dtype)
    hidden, weight, bias = p.trainable()
    out = linear_logp(
        hidden,
        weight,
        p.target,
        bias=bias,
        ref_hidden=p.hidden.clone(),
        ref_weight=p.weight.clone(),
        ref_bias=p.bias.clone(),
        extrapolation=strength,
    )
    assert torch.equal(out.ref_logp, out.logp)
    assert torch.equal(out.extrapolated_logp, out.logp)


def test_lambda_zero_is_the_policy_bit_for_bit(problem, shape):
    p = problem(shape)
    # Where only the reference rules a token out, lambda = 0 must still be the policy.
    p.ref_bias[p.target[0]] = -math.inf
    out = linear_logp(p.hidden, p.weight, p.target, bias=p.bias, **p.reference, extrapolation=0.0)
    assert torch.equal(out.extrapolated_logp, out.logp)


def test_extrapolation_gap_is_a_renyi_divergence(problem, shape, true_logits):
    """(1+l) logp - l ref_logp - extrapolated_logp = l * D_{1+l}(policy || reference) >= 0."""
    strength = 0.5
    p = problem(shape, torch.float64)
    out = linear_logp(
        p.hidden, p.weight, p.target, bias=p.bias, **p.reference, extrapolation=strength
    )
    gap = (1 + strength) * out.logp - strength * out.ref_logp - out.extrapolated_logp
    policy = true_logits(p.hidden, p.weight, p.bias).softmax(1)
    reference = true_logits(p.ref_hidden, p.ref_weight, p.ref_bias).softmax(1)
    renyi = (policy ** (1 + strength) / reference**strength).sum(1).log() / strength
    torch.testing.assert_close(gap, strength * renyi, atol=1e-10, rtol=1e-10)
    assert (gap > 0).all()


def test_a_token_that_either_model_rules_out_is_ruled_out(problem, true_logits, true_logp):
    """Regression: (1+l)(-inf) - l(-inf) is NaN."""
    p = problem((4, 8, 11))
    p.bias[[1, 2]] = -math.inf
    p.ref_bias[[2, 3]] = -math.inf
    target = torch.tensor([1, 2, 3, 4])
    hidden, weight, bias = p.trainable()
    out = linear_logp(hidden, weight, target, bias=bias, **p.reference, extrapolation=0.5)
    assert out.extrapolated_logp[:3].tolist() == [-math.inf] * 3
    z = true_logits(p.hidden, p.weight, p.bias)
    z_ref = true_logits(p.ref_hidden, p.ref_weight, p.ref_bias)
    left = [0, *range(4, 11)]
    truth = true_logp((1.5 * z - 0.5 * z_ref)[3:, left], torch.tensor([left.index(4)]))
    torch.testing.assert_close(out.extrapolated_logp[3:].double(), truth, atol=1e-5, rtol=0)
    assert out.logp[:2].tolist() == [-math.inf] * 2
    out.logp.backward(torch.ones(4))
    assert all(t.grad.isfinite().all() for t in (hidden, weight, bias))


def test_shared_head_is_the_policys_weight_and_bias(problem):
    p = problem((5, 31, 123))
    shared = linear_logp(p.hidden, p.weight, p.target, bias=p.bias, ref_hidden=p.ref_hidden)
    given = linear_logp(
        p.hidden,
        p.weight,
        p.target,
        bias=p.bias,
        ref_hidden=p.ref_hidden,
        ref_weight=p.weight,
        ref_bias=p.bias,
    )
    unbiased = linear_logp(
        p.hidden, p.weight, p.target, bias=p.bias, ref_hidden=p.ref_hidden, ref_weight=p.weight
    )
    assert torch.equal(shared.ref_logp, given.ref_logp)
    assert not torch.allclose(shared.ref_logp, unbiased.ref_logp)


def test_only_logp_carries_gradients(problem):
    p = problem((5, 31, 123))
    hidden, weight, bias = p.trainable()
    reference = {name: t.clone().requires_grad_() for name, t in p.reference.items()}
    out = linear_logp(
        hidden,
        weight,
        p.target,
        bias=bias,
        **reference,
        extrapolation=0.5,
        outputs=ALL_OUTPUTS,
    )
    assert [name for name, t in vars(out).items() if t.requires_grad] == ["logp"]


def test_outputs_match_their_definitions(problem, shape, true_logits):
    p = problem(shape)
    p.target[0] = (p.hidden[0] @ p.weight.T + p.bias).argmax()
    out = linear_logp(p.hidden, p.weight, p.target, bias=p.bias, outputs=ALL_OUTPUTS)
    z = true_logits(p.hidden, p.weight, p.bias)
    probs = z.softmax(1)
    close = {"atol": 2e-5, "rtol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(out.entropy, -(probs * probs.log()).sum(1), **close)
    torch.testing.assert_close(out.mean_logit, z.sum(1) / z.shape[1], **close)
    torch.testing.assert_close(out.log_sum_sq_probs, (probs**2).sum(1).log(), **close)
    assert torch.equal(out.is_top1, z.argmax(1) == p.target)
    assert out.is_top1[0]
    assert linear_logp(p.hidden, p.weight, p.target).entropy is None


def test_entropy_counts_impossible_tokens_as_zero(problem):
    p = problem((3, 8, 4))
    p.bias[:] = torch.tensor([0.0, -math.inf, 0.0, 0.0])
    entropy = linear_logp(
        p.hidden * 0, p.weight, p.target, bias=p.bias, outputs=("entropy",)
    ).entropy
    torch.testing.assert_close(entropy, torch.full((3,), math.log(3)))


def test_extreme_logits_stay_finite_and_exact():
    hidden = torch.tensor([[1.0], [-1.0], [1e-4]])
    weight = torch.tensor([[-1e4], [0.0], [1e4]])
    logp = linear_logp(hidden, weight, torch.tensor([2, 2, 0])).logp
    assert logp[0] == 0
    assert logp[1] == -2e4
    torch.testing.assert_close(logp[2], torch.tensor([-1.0, 0.0, 1.0]).log_softmax(0)[0])


@pytest.mark.parametrize("logits_dtype", [None, torch.float32, torch.bfloat16])
def test_statistics_follow_the_logits_and_gradients_the_inputs(problem, logits_dtype):
    """Regression: no gradient for fp64 inputs whose logits were asked for in fp32."""
    p = problem((5, 31, 123), torch.float64)
    hidden, weight, bias = p.trainable()
    logp = linear_logp(hidden, weight, p.target, bias=bias, logits_dtype=logits_dtype).logp
    logp.sum().backward()
    assert logp.dtype == (torch.float64 if logits_dtype is None else torch.float32)
    exact = p.trainable()
    linear_logp(*exact[:2], p.target, bias=exact[2], impl="reference").logp.sum().backward()
    rtol = {None: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[logits_dtype]
    for ours, truth in zip((hidden, weight, bias), exact, strict=True):
        assert ours.grad.dtype == torch.float64
        assert (ours.grad - truth.grad).norm() <= rtol * truth.grad.norm()


def test_a_second_backward_gives_the_same_gradient(problem):
    """Unlike the loss, whose gradients are stashed: here they are computed in backward."""
    p = problem((5, 31, 123))
    hidden, weight, _ = p.trainable()
    logp = linear_logp(hidden, weight, p.target).logp
    first = torch.autograd.grad(logp.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * logp.sum(), (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
def test_each_gradient_alone_is_what_it_is_among_all(problem, wanted):
    p = problem((5, 31, 123))
    rows = torch.tensor([0, 0, 3, 2, 2])
    names = ("hidden", "weight", "bias")
    every = dict(zip(names, p.trainable(), strict=True))
    alone = {name: every[name].detach().clone() for name in names}
    alone[wanted].requires_grad_()
    for tensors in (every, alone):
        linear_logp(target=p.target, rows=rows, **tensors).logp.sum().backward()
    assert torch.equal(alone[wanted].grad, every[wanted].grad)
    assert [name for name in names if alone[name].grad is not None] == [wanted]


def test_strided_inputs_are_those_of_their_copies(problem):
    p = problem((5, 31, 123))
    results = []
    for twist in (torch.clone, lambda t: t.t().contiguous().t()):
        hidden, weight = (twist(t).requires_grad_() for t in (p.hidden, p.weight))
        reference = {name: twist(t) if t.ndim == 2 else t for name, t in p.reference.items()}
        out = linear_logp(hidden, weight, p.target, **reference, extrapolation=0.5)
        out.logp.sum().backward()
        results.append((out.logp, out.ref_logp, out.extrapolated_logp, hidden.grad, weight.grad))
    torch.testing.assert_close(*results)


def test_rows_out_of_bounds_are_an_error(problem):
    p = problem((5, 31, 123))
    for row in (-1, 5):
        with pytest.raises(IndexError):
            linear_logp(p.hidden, p.weight, p.target, rows=torch.tensor([0, 1, 2, 3, row]))


def repeated(problem):
    p = problem((64, 128, 1000))
    rows = torch.arange(64) % 7
    results = set()
    for _ in range(10):
        hidden, weight, _ = p.trainable()
        logp = linear_logp(hidden, weight, p.target, rows=rows).logp
        logp.sum().backward()
        results.add(tuple(t.detach().numpy().tobytes() for t in (logp, hidden.grad, weight.grad)))
    return results


def test_repeats_bit_for_bit(problem):
    assert len(repeated(problem)) == 1


@pytest.mark.parametrize("implementation", ["chunked"], indirect=True)
def test_two_threads_repeat_bit_for_bit(problem, thread_count):
    thread_count(2)
    assert len(repeated(problem)) == 1
