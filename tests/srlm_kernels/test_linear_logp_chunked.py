"""What the chunked linear_logp keeps for its backward, and how it cuts its rows."""

import pytest
import torch

from srlm_kernels import linear_logp, native
from srlm_kernels.linear_logp_chunked import field_names, linear_logp_forward
from srlm_kernels.problem import Problem


def test_fields_are_in_the_order_of_the_op():
    assert field_names(False, None, "") == ["logp"]
    assert field_names(True, None, "is_top1") == ["logp", "ref_logp", "is_top1"]
    assert field_names(True, 0.0, "") == ["logp", "ref_logp", "extrapolated_logp"]


def test_the_op_returns_the_log_sum_exp_too(problem, true_logits):
    p = problem((5, 31, 123))
    p.target[3] = -100
    *_, lse = linear_logp_forward(
        p.hidden, p.weight, p.bias, p.target, None, None, None, None, None, None, 1.0, 1.0, -100,
        "", torch.float32, "", None,
    )  # fmt: skip
    truth = true_logits(p.hidden, p.weight, p.bias).logsumexp(1)
    truth[3] = 0
    torch.testing.assert_close(lse.double(), truth, atol=1e-5, rtol=0)


def test_backward_needs_the_inputs_and_one_number_per_row(problem):
    p = problem((64, 128, 1000))
    hidden, weight, bias = p.trainable()
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        logp = linear_logp(hidden, weight, p.target, bias=bias, impl="chunked").logp
    assert {tuple(t.shape) for t in saved} == {(64, 128), (1000, 128), (1000,), (64,)}
    assert {t.data_ptr() for t in saved if t.ndim == 2} == {hidden.data_ptr(), weight.data_ptr()}
    logp.sum().backward()
    with torch.autograd.graph.save_on_cpu():
        same = linear_logp(hidden, weight, p.target, bias=bias, impl="chunked").logp
    assert torch.equal(torch.autograd.grad(same.sum(), weight)[0], weight.grad)


@pytest.mark.parametrize("rows", [1, 10, 64, 100])
def test_chunks_have_no_more_rows_than_asked_for(problem, monkeypatch, rows):
    p = problem((64, 128, 1000))
    chunks = []
    score = Problem.score

    def watched(self, lo, hi):
        chunks.append((lo, hi))
        return score(self, lo, hi)

    monkeypatch.setattr(Problem, "score", watched)
    linear_logp(p.hidden, p.weight, p.target, chunk_rows=rows, impl="chunked")
    assert [row for lo, hi in chunks for row in range(lo, hi)] == [*range(64)]
    assert max(hi - lo for lo, hi in chunks) <= rows
    assert len(chunks) == -(-64 // rows)


def test_gradients_have_no_gradients(problem):
    p = problem((5, 31, 123))
    hidden, weight, _ = p.trainable()
    logp = linear_logp(hidden, weight, p.target, impl="chunked").logp
    (gradient,) = torch.autograd.grad(logp.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_and_heads_of_any_stride(problem, dtype):
    p = problem((20, 24, 300), dtype)

    def run(hidden, weight):
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        logp = linear_logp(hidden, weight, p.target, impl="chunked").logp
        logp.sum().backward()
        return logp.detach(), hidden.grad, weight.grad

    stepped = [x.repeat_interleave(3, 1)[:, ::3] for x in (p.hidden, p.weight)]
    for found, plain in zip(run(*stepped), run(p.hidden, p.weight), strict=True):
        torch.testing.assert_close(found, plain)


@pytest.mark.skipif(not native.has("gemm"), reason="a BLAS blocks by the number of rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_the_cpu_a_row_does_not_depend_on_the_rows_beside_it(problem, dtype):
    """Candidates that are scored alone, together or in chunks get the same bits."""
    p = problem((64, 131, 5021), dtype)

    def logp(rows, **options):
        return linear_logp(p.hidden[rows], p.weight, p.target[rows], impl="chunked", **options).logp

    whole = logp(slice(None))
    assert torch.equal(logp(slice(None), chunk_rows=7), whole)
    for rows in (slice(0, 1), slice(3, 40), slice(63, 64)):
        assert torch.equal(logp(rows), whole[rows])
