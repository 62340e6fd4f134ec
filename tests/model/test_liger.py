"""Liger's kernels go into one model; the kernels themselves want a GPU."""

import copy

import pytest
import torch

from srlm_fast.errors import UserError
from srlm_fast.model import liger

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (extra [liger])")


def forward_of(module):
    return module.forward.__func__.__module__


def test_only_this_model_and_its_copies_change(make_model):
    plain, model = make_model(), make_model()
    liger._apply(model)
    norm = model.model.norm
    assert forward_of(norm).startswith("liger_kernel")
    assert forward_of(model.model.layers[0].mlp).startswith("liger_kernel")
    assert forward_of(model).startswith("transformers")  # no loss of theirs
    for other in (plain, make_model()):
        assert forward_of(other.model.norm).startswith("transformers")
    twin = copy.deepcopy(model).model.norm
    assert forward_of(twin).startswith("liger_kernel") and twin.forward.__self__ is twin


def test_what_cannot_be_is_refused(make_model):
    with pytest.raises(UserError, match="needs a GPU"):
        liger.use_liger_kernels(make_model())
    with pytest.raises(UserError, match="no kernels for gpt_neox"):
        liger._apply(make_model("gpt_neox"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_the_same(make_model, dtype):
    plain = make_model().to("cuda", dtype)
    model = copy.deepcopy(plain)
    liger.use_liger_kernels(model)
    ids = torch.arange(12, device="cuda")[None] % model.config.vocab_size
    found, expected = model(ids).logits.float(), plain(ids).logits.float()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    found.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        off = (p.grad.float() - q.grad.float()).norm()
        assert off <= tolerance * (1 + q.grad.float().norm()), name
