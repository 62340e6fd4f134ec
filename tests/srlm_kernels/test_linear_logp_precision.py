"""How far linear_logp may be from float64 on the rounded inputs, per dtype of inputs and logits.

Half-precision logits are held to plain torch: logits in bf16, their log-softmax in fp32.
"""

import pytest
import torch
from torch.nn import functional as F

from srlm_kernels import linear_logp, native

pytestmark = pytest.mark.usefixtures("implementation")

BF16 = torch.bfloat16
STRENGTH = 2.0
NAMES = ("logp", "ref_logp", "extrapolated_logp")


def scores(op, p, upstream):
    """The three log-probabilities and the gradients of hidden states and weight."""
    dtype = torch.float64 if op is truth else p.hidden.dtype
    hidden, weight = (t.to(dtype, copy=True).requires_grad_() for t in (p.hidden, p.weight))
    logps = op(hidden, weight, p)
    logps[0].backward(upstream.to(logps[0].dtype))
    return [t.detach() for t in logps], [hidden.grad, weight.grad]


def ours(**options):
    def op(hidden, weight, p):
        reference = {"ref_hidden": p.ref_hidden, "ref_weight": p.ref_weight}
        out = linear_logp(hidden, weight, p.target, **reference, extrapolation=STRENGTH, **options)
        return [getattr(out, name) for name in NAMES]

    return op


def unfused(hidden, weight, p):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = F.linear(hidden, weight).to(wide)
    z_ref = F.linear(p.ref_hidden.to(hidden), p.ref_weight.to(hidden)).to(wide)
    streams = (z, z_ref, (1 + STRENGTH) * z - STRENGTH * z_ref)
    return [s.log_softmax(1).gather(1, p.target[:, None])[:, 0] for s in streams]


def truth(hidden, weight, p):
    return unfused(hidden, weight, p)


def errors(found, exact):
    return [(a.double() - b).abs() for a, b in zip(found, exact, strict=True)]


def distances(found, exact):
    """Relative, in the Frobenius norm."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.fixture
def upstream(shape):
    return torch.linspace(-1.0, 2.0, shape[0])


def test_fp32(problem, shape, upstream):
    p = problem(shape)
    (logps, grads), (exact, exact_grads) = (scores(op, p, upstream) for op in (ours(), truth))
    largest = max(1.0, float((p.hidden @ p.weight.T).abs().max()))
    for error, limit in zip(errors(logps, exact), (2e-6, 2e-6, 1e-5), strict=True):
        assert error.max() <= limit * largest
    assert max(distances(grads, exact_grads)) <= 1e-6 * shape[1] ** 0.5


def test_bf16_inputs_with_fp32_logits(problem, shape, upstream):
    p = problem(shape, BF16)
    runs = [scores(op, p, upstream) for op in (ours(logits_dtype=torch.float32), truth, unfused)]
    (logps, grads), (exact, exact_grads), (_, plain_grads) = runs
    for error, limit in zip(errors(logps, exact), (3e-5, 3e-5, 1e-4), strict=True):
        assert error.max() <= limit
    for mine, plain in zip(
        distances(grads, exact_grads), distances(plain_grads, exact_grads), strict=True
    ):
        assert mine <= 2.5e-3
        assert mine <= plain


def test_bf16_logits_score_no_worse_than_plain_torch(problem, shape, upstream):
    p = problem(shape, BF16)
    runs = [scores(op, p, upstream)[0] for op in (ours(logits_dtype=BF16), truth, unfused)]
    logps, exact, plain = runs
    for error, allowed in zip(errors(logps, exact), errors(plain, exact), strict=True):
        assert error.max() <= allowed.max() + 3e-5
        assert error.square().mean().sqrt() <= allowed.square().mean().sqrt() + 3e-5
    assert errors(logps, exact)[0].max() <= 0.07
    # The rounding really happens: fp32 logits would be a thousand times closer.
    assert errors(logps, exact)[0].max() > 1e-3


def test_bf16_logits_give_gradients_like_plain_torch(problem, shape, upstream):
    p = problem(shape, BF16)
    # At |z| up to 5: with larger logits plain torch itself is further away than the limit.
    p.weight, p.ref_weight = p.weight / 3, p.ref_weight / 3
    runs = [scores(op, p, upstream)[1] for op in (ours(logits_dtype=BF16), truth, unfused)]
    grads, exact, plain = runs
    # Without our GEMM a CPU rounds what tiles or chunks add up to, and then once more: about twice
    # the variance of plain torch's one rounding.
    slack = 1.0 if native.has("gemm") else 1.5
    for mine, allowed in zip(distances(grads, exact), distances(plain, exact), strict=True):
        assert mine <= slack * allowed + 1e-5
        assert mine <= 4e-3 or shape[0] == 1


def test_on_the_cpu_the_chunked_gemms_round_to_bf16_unless_told_not_to(problem, implementation):
    p = problem((64, 128, 1000), BF16)
    default = linear_logp(p.hidden, p.weight, p.target).logp
    kept = BF16 if implementation == "chunked" else torch.float32
    named = linear_logp(p.hidden, p.weight, p.target, logits_dtype=kept).logp
    assert torch.equal(default, named)
