"""Chunks and tiles are a matter of speed: cut as one may, the numbers stay."""

import itertools

import pytest
import torch

from srlm_kernels import linear_logp, linear_preference_loss, losses, native
from srlm_kernels.backends import row_kernel
from srlm_kernels.tiles import tile_bounds

CU = torch.tensor([0, 40, 64, 64, 70, 79, 79, 80, 95, 130, 192])
PAIRS = len(CU) // 2
NAMES = ("logp", "ref_logp", "extrapolated_logp", "margins", "losses", "loss", "token_logp")
# Of a small beta: a steep loss would multiply the roundings of margins of hundreds of nats.
DPO = losses.dpo(0.01)


def user_loss(s):
    """Chosen up, rejected left alone: no loss of ours has such slopes."""
    return -s.chosen / s.chosen_len.clamp(min=1)


LOSSES = {
    **{name: make(beta=0.5) for name, make in losses.LOSSES.items()},
    "spa": losses.spa(0.5, 0.3, torch.tensor(0.1)),
    "with_nll": losses.with_nll(losses.dpo(0.5), 0.7),
    "with_nll of aot": losses.with_nll(losses.aot(0.5), 0.7),
    "user": user_loss,
}


@pytest.fixture
def p(problem):
    """192 rows, 3 of them ignored, and a vocabulary of many tiles where they are small."""
    p = problem((192, 16, 1000))
    p.target[[3, 65, 191]] = -100
    return p


@pytest.fixture
def tiles(monkeypatch):
    """Sets the width of tiles and the row kernels for the rest of the test."""

    def cut(width, kernels="auto"):
        monkeypatch.setattr(
            "srlm_kernels.tiles.tile_bounds", lambda columns, _: tile_bounds(columns, width)
        )
        monkeypatch.setattr(
            "srlm_kernels.tiles.row_kernel", lambda op, _, like: row_kernel(op, kernels, like)
        )

    return cut


def run(p, loss_fn, *, dtype=torch.float64, chunk_rows, folded=False, **options):
    """Results by name, the gradients of hidden states, weight and bias among them."""
    tensors = (p.hidden, p.weight, p.bias)
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
    reference = {name: t.to(dtype) for name, t in p.reference.items()}
    wide = torch.promote_types(dtype, torch.float32)
    held = 1.0 if dtype == torch.float64 else 0.0  # what would cost fp32 digits of the sum
    buffer = torch.full(p.weight.shape, held, dtype=wide) if folded else None
    out = linear_preference_loss(
        *leaves[:2],
        p.target,
        CU,
        loss_fn,
        bias=leaves[2],
        **reference,
        extrapolation=0.5,
        grad_weight_out=buffer,
        chunk_rows=chunk_rows,
        impl="chunked",
        **options,
    )
    out.loss.backward()
    grads = [leaf.grad for leaf in leaves]
    if folded:
        grads[1] = buffer - held
    results = {name: getattr(out, name).detach() for name in NAMES}
    return results | dict(zip(("hidden", "weight", "bias"), grads, strict=True))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("folded", [False, True], ids=["autograd", "grad_weight_out"])
def test_a_pair_longer_than_a_chunk_is_the_pair_in_one_chunk(p, loss, folded):
    """Slopes follow the gradients then: one scale if antisymmetric, two if not, none if coupled."""
    whole = run(p, LOSSES[loss], chunk_rows=1000, folded=folded)
    for rows in (1, 30, 64):
        cut = run(p, LOSSES[loss], chunk_rows=rows, folded=folded)
        for name, values in whole.items():
            torch.testing.assert_close(cut[name], values, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("rows", [1, 3, 17, 63, 64, 65, 191])
def test_fp32_gradients_do_not_depend_on_the_chunks(p, rows):
    whole = run(p, DPO, dtype=torch.float32, chunk_rows=192)
    cut = run(p, DPO, dtype=torch.float32, chunk_rows=rows)
    for name in ("hidden", "weight", "bias"):
        assert (cut[name] - whole[name]).norm() <= 1e-6 * whole[name].norm()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("width", [32, 96, 512, 1000])
def test_fp32_gradients_do_not_depend_on_the_tiles(p, tiles, width, kernels):
    whole = run(p, DPO, dtype=torch.float32, chunk_rows=192)
    tiles(width, kernels)
    cut = run(p, DPO, dtype=torch.float32, chunk_rows=50)
    for name in ("hidden", "weight", "bias"):
        assert (cut[name] - whole[name]).norm() <= 1e-6 * whole[name].norm()
    torch.testing.assert_close(cut["token_logp"], whole["token_logp"], rtol=0, atol=2e-5)


def test_bf16_inputs_with_fp32_logits_do_not_depend_on_the_chunks_before_the_rounding(p):
    options = {"dtype": torch.bfloat16, "logits_dtype": torch.float32, "folded": True}
    whole = run(p, DPO, chunk_rows=192, **options)["weight"]
    cut = run(p, DPO, chunk_rows=3, **options)["weight"]
    assert (cut - whole).norm() <= 1e-5 * whole.norm()


# Of whole pairs, or of parts of the longest one, whose dLogits are rounded before they are scaled.
@pytest.mark.parametrize(("rows", "limit"), [(97, 1e-5), (3, 2 * 1.7e-3)])
def test_bf16_gradients_of_chunks_are_summed_wide(p, rows, limit):
    options = {"dtype": torch.bfloat16, "folded": True}
    whole = run(p, DPO, chunk_rows=192, **options)["weight"]
    cut = run(p, DPO, chunk_rows=rows, **options)["weight"]
    if not native.has("gemm"):  # each chunk's product is rounded to bf16
        limit = 2 * 1.7e-3
    assert (cut - whole).norm() <= limit * whole.norm()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_linear_logp_does_not_depend_on_chunks_and_tiles(p, tiles, kernels):
    outputs = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
    results = []
    for rows, width in ((192, 2048), (64, 2048), (3, 32)):
        tiles(width, kernels)
        hidden, weight, bias = p.trainable()
        out = linear_logp(
            hidden,
            weight,
            p.target,
            bias=bias,
            **p.reference,
            extrapolation=2.0,
            softcap=20.0,
            outputs=outputs,
            chunk_rows=rows,
            impl="chunked",
        )
        out.logp.backward(torch.linspace(-1, 2, 192))
        results.append((vars(out), [hidden.grad, weight.grad, bias.grad]))
    (first, grads), *others = results
    for fields, others_grads in others:
        for name, values in fields.items():
            torch.testing.assert_close(values, first[name], rtol=1e-6, atol=2e-5, msg=name)
        for ours, truth in zip(others_grads, grads, strict=True):
            assert (ours - truth).norm() <= 1e-6 * truth.norm()


def test_duplicate_rows_are_added_in_a_fixed_order_across_chunks(p):
    """The last prompt row serves both responses, which may lie in different chunks."""
    rows = torch.arange(192) % 5
    results = [
        run(p, DPO, dtype=torch.float32, chunk_rows=n, rows=rows)["hidden"] for n in (7, 7, 192)
    ]
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).norm() <= 1e-6 * results[2].norm()


def test_a_scale_in_fp64_leaves_the_loss_in_fp32(p):
    """Regression: compiled, the loss was fp64 where the graph expected fp32."""
    wide = run(p, DPO, dtype=torch.float32, chunk_rows=64, scale=torch.tensor(0.3).double())
    plain = run(p, DPO, dtype=torch.float32, chunk_rows=64, scale=0.3)
    assert all(torch.equal(wide[name], plain[name]) for name in wide)
    assert wide["loss"].dtype == torch.float32


def test_more_rows_times_columns_than_int32_counts(true_logp):
    """One pair of 70,000 tokens on 32,000 columns: 2.2e9 logits that no moment sees together."""
    generator = torch.Generator().manual_seed(0)
    rows, width, columns = 70_000, 8, 32_000
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    weight = torch.randn(columns, width, generator=generator).requires_grad_()
    target = torch.randint(columns, (rows,), generator=generator)
    cu = torch.tensor([0, 40_000, rows])
    loss_fn = losses.ipo(0.1)  # not antisymmetric: two slopes
    out = linear_preference_loss(hidden, weight, target, cu, loss_fn, impl="chunked")
    out.loss.backward()

    seen = torch.cat([torch.arange(32), torch.arange(rows - 32, rows)])
    z = hidden.detach()[seen].double() @ weight.detach().double().T
    truth = true_logp(z, target[seen])
    torch.testing.assert_close(out.token_logp[seen].double(), truth, atol=1e-4, rtol=0)
    ends = itertools.pairwise(cu.tolist())
    sums = torch.stack([out.token_logp[i:j].double().sum() for i, j in ends])
    torch.testing.assert_close(out.logp.double(), sums, rtol=1e-6, atol=0)
    mean = sums / cu.diff()
    slope = 2 * (mean[0] - mean[1] - 5)
    slopes = torch.stack([slope / 40_000, -slope / 30_000]).repeat_interleave(cu.diff())
    dz = -z.softmax(1)
    dz[torch.arange(64), target[seen]] += 1
    dx = slopes[seen, None] * (dz @ weight.detach().double())
    assert (hidden.grad[seen] - dx).norm() <= 1e-5 * dx.norm()
    # A few columns of dW need all rows, but their own logits only.
    some = torch.tensor([0, 1, 15_999, 31_999])
    exact = hidden.detach().double() @ weight.detach().double().T[:, some]
    own = (hidden.detach().double() * weight.detach().double()[target]).sum(1)
    p = (exact - (own - out.token_logp.double())[:, None]).exp()
    dz = (target[:, None] == some).double() - p
    dw = (slopes[:, None] * dz).T @ hidden.detach().double()
    assert (weight.grad[some] - dw).norm() <= 1e-5 * dw.norm()
