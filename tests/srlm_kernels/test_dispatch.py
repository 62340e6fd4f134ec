"""Which implementation of an op with a head runs, and why another does not."""

import pytest
import torch

from srlm_kernels import explain, linear_logp, linear_preference_loss, losses
from srlm_kernels.dispatch import Need, choose, implementations


def test_unknown_impl_lists_the_known_ones():
    hidden, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    weight = torch.zeros(5, 3)
    known = "known: auto, tiled, chunked, reference"
    with pytest.raises(ValueError, match=rf"linear_logp has no impl='cuda'; {known}"):
        linear_logp(hidden, weight, target, impl="cuda")
    with pytest.raises(ValueError, match=r"no impl='fast'; known: auto, chunked, reference"):
        linear_preference_loss(
            hidden, weight, target, torch.tensor([0, 1, 2]), losses.dpo(0.1), impl="fast"
        )


HALF = torch.zeros(4, 8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        (Need(HALF.clone().requires_grad_(), HALF), "it computes no gradients"),
        (Need(HALF, HALF, outputs=("entropy",)), "it does not compute entropy"),
        (Need(HALF, HALF, logits_dtype=torch.bfloat16), "its logits are float32"),
        (Need(HALF, HALF, sharded=True), "the vocabulary is sharded over ranks"),
        (Need(HALF, HALF, ref_hidden=HALF.float()), "the reference torch.float32"),
        (Need(HALF, HALF), "run on CUDA, not on cpu|not installed"),
    ],
)
def test_an_implementation_that_cannot_serve_says_why(need, reason):
    with pytest.raises(ValueError, match=rf"cannot run with impl='tiled' here: .*({reason})"):
        choose("linear_logp", "tiled", need)
    assert choose("linear_logp", "auto", need) == "chunked"


def test_a_sharded_vocabulary_is_for_chunked():
    with pytest.raises(ValueError, match="needs impl='chunked'"):
        choose("linear_logp", "reference", Need(HALF, HALF, sharded=True))


def test_half_precision_that_a_cpu_is_slow_in_goes_to_the_reference():
    assert choose("linear_preference_loss", "auto", Need(HALF.half(), HALF.half())) == "reference"
    assert choose("linear_preference_loss", "auto", Need(HALF, HALF)) == "chunked"


@pytest.mark.parametrize("op", ["linear_logp", "linear_preference_loss"])
def test_auto_is_the_implementation_that_explain_names(op):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, generator=g), torch.randn(5, 3, generator=g)
    target = torch.tensor([0, 4])
    name = explain(op, hidden=hidden, weight=weight).split()[1]
    assert name in implementations(op)
    if op == "linear_logp":
        auto, named = (linear_logp(hidden, weight, target, impl=impl) for impl in ("auto", name))
        assert torch.equal(auto.logp, named.logp)
