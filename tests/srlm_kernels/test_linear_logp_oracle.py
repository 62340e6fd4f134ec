"""linear_logp against float64 where it is hard: vocabularies of any width, logits of any kind."""

import math

import pytest
import torch

from srlm_kernels import linear_logp, native

pytestmark = pytest.mark.usefixtures("implementation")

# Few rows: the vocabulary is what is tested.
LARGE = [
    *((33, 64, 32003), (17, 64, 50257), (3, 16, 128256), (5, 32, 151936), (3, 32, 152064)),
    *((3, 16, 256000), (3, 16, 262144)),
]
# Around the widths of tiles: 2048 columns of fp32 on the CPU, 32 in the small chunks.
EDGES = [1, 2, 31, 32, 33, 63, 64, 65, 97, 2039, 2047, 2048, 2049, 4095, 4096, 4097]


@pytest.fixture
def check(implementation, true_logits, true_logp):
    # Torch's own log-softmax adds 150,000 columns up less exactly than tiles of them.
    slack = 1 if implementation == "chunked" else 4
    return lambda p: check_against_float64(p, slack, true_logits, true_logp)


def check_against_float64(p, slack, true_logits, true_logp):
    hidden, weight, bias = p.trainable()
    out = linear_logp(hidden, weight, p.target, bias=bias, **p.reference, extrapolation=0.5)
    z = true_logits(p.hidden, p.weight, p.bias)
    z_ref = true_logits(p.ref_hidden, p.ref_weight, p.ref_bias)
    close = 2e-6 * max(1.0, float(z.abs().max()))
    for ours, logits, atol in (
        (out.logp, z, close),
        (out.ref_logp, z_ref, close),
        (out.extrapolated_logp, 1.5 * z - 0.5 * z_ref, 1e-5 * slack),
    ):
        torch.testing.assert_close(ours.double(), true_logp(logits, p.target), atol=atol, rtol=0)
    upstream = torch.linspace(-1.0, 2.0, len(p.target))
    out.logp.backward(upstream)
    dz = -z.softmax(1)
    dz[torch.arange(len(dz)), p.target] += 1
    dz *= upstream.double()[:, None]
    products = (dz @ p.weight.double(), dz.T @ p.hidden.double(), dz.sum(0))
    plain = (dz.float() @ p.weight, dz.float().T @ p.hidden, dz.float().sum(0))
    limit = 1e-6 * slack * hidden.shape[1] ** 0.5
    for leaf, truth, torchs in zip((hidden, weight, bias), products, plain, strict=True):
        bound = limit * truth.norm() + 1e-6
        if slack > 1 or not native.has("gemm"):  # some BLAS alone is further off than the limit
            bound = max(bound, 2 * (torchs - truth).norm())
        assert (leaf.grad - truth).norm() <= bound


@pytest.mark.parametrize("shape", LARGE, ids=lambda s: "N{}-D{}-V{}".format(*s))
def test_large_vocabularies(problem, shape, check):
    check(problem(shape))


@pytest.mark.parametrize("columns", EDGES)
def test_vocabularies_around_the_edges_of_tiles(problem, columns, check):
    p = problem((9, 5, columns))
    # Both ends of the vocabulary, where tiles begin and end.
    p.target[:4] = torch.tensor([0, columns - 1, (columns - 1) // 2, columns // 2])
    check(p)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [(257, 192, 32003), (333, 576, 50257), (129, 896, 151936)],
    ids=lambda s: "N{}-D{}-V{}".format(*s),
)
@pytest.mark.parametrize("implementation", ["chunked"], indirect=True)
def test_shapes_of_real_models(problem, shape, check):
    check(problem(shape))


V = 4500  # tiles of a third on the CPU, of a twentieth in the small chunks


def kinds(g):
    """Rows of logits [6, V] and their targets, by kind."""
    normal = torch.randn(6, V, generator=g)
    target = torch.tensor([0, 17, 2047, 2048, V - 2, V - 1])
    own = torch.arange(6), target
    rising = torch.linspace(-50, 50, V).expand(6, V)
    return {
        "peaked at the target": (normal.index_put(own, torch.tensor(20.0)), target),
        "uniform": (torch.full((6, V), 3.5), target),
        "largest in the last column": (normal.index_fill(1, torch.tensor([V - 1]), 30.0), target),
        "largest in the first column": (normal.index_fill(1, torch.tensor([0]), 30.0), target),
        "larger tile by tile": (rising, target),
        "smaller tile by tile": (rising.flip(1), target),
        "huge": (torch.randint(-10_000, 10_001, (6, V), generator=g).float(), target),
        "all huge and negative": (normal - 1e4, target),
    }


KINDS = kinds(torch.Generator().manual_seed(0))


def score(logits, target, **options):
    """linear_logp of given rows of logits: hidden states e_n and the rows as the head's columns.

    Then dW is the transpose of dLogits.
    """
    rows = len(target)
    weight = logits.T.clone().requires_grad_()
    return linear_logp(torch.eye(rows), weight, target, **options), weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["uniform", "huge"])
def test_logits_of_every_kind(kind, other, true_logp):
    (logits, target), (ref, _) = KINDS[kind], KINDS[other]
    out, weight = score(
        logits, target, ref_hidden=torch.eye(6), ref_weight=ref.T, extrapolation=0.5
    )
    mixed = 1.5 * logits.double() - 0.5 * ref.double()
    for ours, z in ((out.logp, logits), (out.ref_logp, ref), (out.extrapolated_logp, mixed)):
        close = 2e-6 * max(1.0, float(z.abs().max()))
        truth = true_logp(z.double(), target)
        torch.testing.assert_close(ours.double(), truth, atol=close, rtol=0)
    out.logp.sum().backward()
    dz = -logits.double().softmax(1)
    dz[torch.arange(6), target] += 1
    close = 2e-6 * max(1.0, float(logits.abs().max()))
    torch.testing.assert_close(weight.grad.T.double(), dz, atol=close, rtol=0)


def test_the_kinds_are_what_they_say():
    peaked, target = KINDS["peaked at the target"]
    assert (peaked.softmax(1).gather(1, target[:, None]) > 0.999).all()
    out, _ = score(*KINDS["uniform"])
    torch.testing.assert_close(out.logp, torch.full((6,), -math.log(V)), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_row_sum_to_zero(kind, dtype):
    """Adding a number to all logits changes no probability."""
    logits, target = KINDS[kind]
    bias = torch.zeros(V, requires_grad=True)
    hidden, weight = torch.eye(6).to(dtype), logits.T.to(dtype)
    for row in range(6):
        one = slice(row, row + 1)
        logp = linear_logp(hidden[one], weight, target[one], bias=bias).logp
        (gradient,) = torch.autograd.grad(logp.sum(), bias)
        largest = max(1.0, float(logits.abs().max()))
        limit = 2e-6 * largest + (2e-3 if dtype == torch.bfloat16 else 0)
        assert gradient.double().sum().abs() <= limit


@pytest.mark.parametrize(
    "gone",
    [[0], [V - 1], [*range(2048)], [*range(2048, V)], [*range(0, V, 2)]],
    ids=["first", "last", "first tile", "all but the first tile", "every other"],
)
def test_columns_of_minus_infinity_are_as_if_they_were_not_there(problem, gone, true_logp):
    p = problem((6, 8, V))
    left = sorted({*range(V)} - {*gone})
    p.bias[gone] = -math.inf
    p.target = torch.tensor(left)[torch.linspace(0, len(left) - 1, 6).long()]
    hidden, weight, bias = p.trainable()
    reference = {**p.reference, "ref_bias": p.bias}
    out = linear_logp(hidden, weight, p.target, bias=bias, **reference, extrapolation=1.0)
    z = p.hidden.double() @ p.weight.double().T + p.bias.double()
    z_ref = p.ref_hidden.double() @ p.ref_weight.double().T + p.bias.double()
    target = torch.tensor([left.index(y) for y in p.target.tolist()])
    for ours, logits in ((out.logp, z[:, left]), (out.extrapolated_logp, (2 * z - z_ref)[:, left])):
        torch.testing.assert_close(ours.double(), true_logp(logits, target), atol=3e-5, rtol=0)
    out.logp.sum().backward()
    assert not weight.grad[gone].any()
    assert not bias.grad[gone].any()
    assert all(t.grad.isfinite().all() for t in (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_row(problem, value, dtype):
    p = problem((64, 128, 1000), dtype)
    outputs = ("entropy", "mean_logit", "log_sum_sq_probs")
    results = []
    for broken in (False, True):
        hidden, weight, _ = p.trainable()
        with torch.no_grad():
            hidden[9] = value if broken else hidden[9]
        out = linear_logp(hidden, weight, p.target, **p.reference, outputs=outputs)
        out.logp.sum().backward()
        results.append({**vars(out), "gradient": hidden.grad})
    others = torch.arange(64) != 9
    for name, clean in results[0].items():
        if clean is None or name == "is_top1":
            continue
        assert torch.equal(results[1][name][others], clean[others])
        assert name == "ref_logp" or results[1][name][9].isnan().all()
