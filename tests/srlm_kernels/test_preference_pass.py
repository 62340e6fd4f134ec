"""How often the pass computes what: logits once, unless the loss couples the pairs."""

import pytest
import torch

from srlm_kernels import linear_preference_loss, losses
from srlm_kernels.head import Grads
from srlm_kernels.problem import Problem

CU = torch.tensor([0, 3, 5, 5, 9, 9, 9, 20, 27])  # pairs of 5, 4, 0 and 18 rows


@pytest.fixture
def calls(problem, monkeypatch):
    """Runs the op in chunks of 10 rows; returns the ranges scored, those differentiated, sides."""
    p = problem((27, 8, 40))
    scored, differentiated, sides = [], [], []
    score, backward, another = Problem.score, Problem.backward, Grads.another

    def watched_score(self, lo, hi):
        scored.append((lo, hi))
        return score(self, lo, hi)

    def watched_backward(self, lo, hi, *args, recompute=False, **options):
        differentiated.append((lo, hi, recompute))
        backward(self, lo, hi, *args, recompute=recompute, **options)

    def watched_another(self):
        sides.append(another(self))
        return sides[-1]

    monkeypatch.setattr(Problem, "score", watched_score)
    monkeypatch.setattr(Problem, "backward", watched_backward)
    monkeypatch.setattr(Grads, "another", watched_another)

    def run(loss_fn, trained=True):
        hidden = p.hidden.clone().requires_grad_(trained)
        linear_preference_loss(
            hidden, p.weight, p.target, CU, loss_fn, chunk_rows=10, impl="chunked"
        )
        return scored, differentiated, sides

    return run


def test_pairs_share_a_chunk_and_a_long_one_is_cut_at_its_responses(calls):
    scored, differentiated, _ = calls(losses.dpo(0.1))
    assert scored == [(0, 9), (9, 14), (14, 20), (20, 27)]
    assert differentiated == [(lo, hi, False) for lo, hi in scored]


@pytest.mark.parametrize(("loss_fn", "count"), [(losses.dpo(0.1), 1), (losses.ipo(0.1), 2)])
def test_a_long_pair_has_a_side_per_slope(calls, loss_fn, count):
    assert len(calls(loss_fn)[2]) == count


def test_coupled_pairs_wait_for_all_sums_and_are_computed_again(calls):
    scored, differentiated, sides = calls(losses.aot(0.1))
    assert scored == [(0, 9), (9, 18), (18, 27)]
    assert differentiated == [(lo, hi, True) for lo, hi in scored]
    assert not sides


@pytest.mark.parametrize("loss_fn", [losses.dpo(0.1), losses.ipo(0.1), losses.aot(0.1)])
def test_without_gradients_there_is_no_backward(calls, loss_fn):
    scored, differentiated, sides = calls(loss_fn, trained=False)
    assert [row for lo, hi in scored for row in range(lo, hi)] == [*range(27)]
    assert not differentiated
    assert not sides


def test_offsets_that_do_not_rise_are_refused_where_the_checks_cannot_look(problem):
    """Inside a compiled graph the checks see no values; the pass reads them anyway."""
    p = problem((27, 8, 40))

    @torch.compile(backend="eager")
    def call(cu):
        return linear_preference_loss(
            p.hidden, p.weight, p.target, cu, losses.dpo(0.1), impl="chunked"
        ).loss

    for wrong in ([0, 9, 5], [0, 5, 26], [1, 5, 27]):
        with pytest.raises(ValueError, match="cu_seqlens must rise"):
            call(torch.tensor(wrong))
    torch._dynamo.reset()
