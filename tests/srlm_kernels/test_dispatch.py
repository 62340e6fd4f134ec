import pytest
import torch

from srlm_kernels import explain, linear_logp, linear_preference_loss, losses


def test_explain_names_the_implementation_and_what_it_saw():
    line = explain("linear_logp", hidden=torch.zeros(4, 8), ref_hidden=None)
    assert line.startswith("linear_logp: reference (")
    assert line.endswith("hidden float32 [4, 8] on cpu")
    assert explain("linear_preference_loss").startswith("linear_preference_loss: reference (")


def test_unknown_op_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'softmax'.*linear_logp, linear_preference_loss"):
        explain("softmax")


def test_unknown_impl_lists_the_known_ones():
    hidden, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    weight = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"linear_logp has no impl='cuda'; known: auto, reference"):
        linear_logp(hidden, weight, target, impl="cuda")
    with pytest.raises(ValueError, match=r"no impl='fast'; known: auto, reference"):
        linear_preference_loss(
            hidden, weight, target, torch.tensor([0, 1, 2]), losses.dpo(0.1), impl="fast"
        )


def test_auto_is_the_implementation_that_explain_names():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 3, generator=g), torch.randn(5, 3, generator=g)
    target = torch.tensor([0, 4])
    name = explain("linear_logp").split()[1]
    auto, named = (linear_logp(hidden, weight, target, impl=impl) for impl in ("auto", name))
    assert torch.equal(auto.logp, named.logp)
