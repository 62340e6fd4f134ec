"""Rows and heads of one call: scored chunk by chunk, and the gradients put where they belong."""

import pytest
import torch

from srlm_kernels.head import Grads, Head
from srlm_kernels.problem import Options, Problem, log_sum_exp

ROWS = torch.tensor([4, 0, 0, 2, 3, 1, 4])
TARGET = torch.tensor([3, -100, 122, 0, 64, -100, 9])
SCORED = [0, 2, 3, 4, 6]


@pytest.fixture
def p(problem):
    return problem((5, 31, 123), torch.float64)


def make(p, *, reference=False, **options):
    options = Options(logits_dtype=torch.float64, **options)
    head = Head(p.ref_weight, p.ref_bias) if reference else None
    states = p.ref_hidden if reference else None
    return Problem(
        p.hidden, Head(p.weight, p.bias), TARGET, ROWS, options, ref_hidden=states, reference=head
    )


def test_options_become_the_transform_of_logits():
    transform = Options(softcap=3.0, logit_scale=0.5, temperature=2.0).transform
    assert (transform.softcap, transform.logit_scale, transform.temperature) == (3.0, 0.5, 2.0)


def test_ignored_rows_are_not_scored(p):
    found = make(p)
    assert found.size == len(SCORED)
    assert found.target.tolist() == [3, 122, 0, 64, 9]
    assert found.limit == 512  # on a CPU
    assert make(p, chunk_rows=2).limit == 2


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_all_rows_are_the_chunks_together(p, true_logits, true_logp, rows):
    problem = make(p, reference=True, extrapolation=0.5, chunk_rows=rows)
    problem.allocate(rows=problem.size, keep=False)
    results = problem.results(problem.score_all())
    z = true_logits(p.hidden, p.weight, p.bias)[ROWS[SCORED]]
    z_ref = true_logits(p.ref_hidden, p.ref_weight, p.ref_bias)[ROWS[SCORED]]
    target = TARGET[SCORED]
    torch.testing.assert_close(results["logp"], true_logp(z, target))
    torch.testing.assert_close(results["ref_logp"], true_logp(z_ref, target))
    torch.testing.assert_close(
        results["extrapolated_logp"], true_logp(1.5 * z - 0.5 * z_ref, target)
    )


def test_no_rows_have_results_too(p):
    problem = Problem(p.hidden, Head(p.weight), TARGET[:0], ROWS[:0], Options())
    problem.allocate(rows=0, keep=False)
    assert problem.results(problem.score_all())["logp"].shape == (0,)


@pytest.mark.parametrize("keep", [True, False])
def test_kept_logits_and_those_computed_again_give_the_same_gradients(p, true_logits, keep):
    problem = make(p, chunk_rows=2)
    problem.allocate(rows=2, keep=keep)
    upstream = torch.linspace(-1, 2, len(SCORED), dtype=torch.float64)
    grads = Grads.of(problem.policy, torch.float64, weight=True, bias=True)
    grad_x = problem.new_grad_x()
    for lo, hi in ((0, 2), (2, 4), (4, 5)):
        lse = log_sum_exp(problem.score(lo, hi))
        if not keep:
            problem.score(0, 2)  # another chunk's logits lie in the memory now
        problem.backward(
            lo, hi, lse, upstream[lo:hi], grad_x=grad_x, grads=grads, recompute=not keep
        )
    z = true_logits(p.hidden, p.weight, p.bias)[ROWS[SCORED]]
    dz = -z.softmax(1)
    dz[torch.arange(len(SCORED)), TARGET[SCORED]] += 1
    dz *= upstream[:, None]
    torch.testing.assert_close(grads.total(), dz.T @ p.hidden[ROWS[SCORED]])
    torch.testing.assert_close(grads.bias, dz.sum(0))
    expected = torch.zeros_like(p.hidden).index_add(0, ROWS[SCORED], dz @ p.weight)
    torch.testing.assert_close(problem.grad_hidden(grad_x), expected)
