"""The verl backend: in verl where it is installed, else against its published names."""

import importlib
import inspect
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from srlm_fast.errors import UserError

OURS = "srlm_fast.integrations.verl"
V, D = 50, 16


class FusedLinearForPPO(nn.Module):
    """Stands in for the class of that name in verl.utils.experimental.torch_functional of 0.9.1:
    its arguments and results."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(impl_backend)
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        logp = ((hidden_states @ vocab_weights.t()) / temperature).float().log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, input_ids.long()[..., None])[..., 0], entropy.to(hidden_states.dtype)


def stand_ins(monkeypatch, fused=FusedLinearForPPO):
    """Modules of verl with the names that ours replaces; what `choose` was called with."""
    calls = []

    def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
        calls.append((use_fused_kernels, fused_kernels_backend))
        model._verl_fused_kernels_backend = fused_kernels_backend

    modules = {
        name: ModuleType(name)
        for name in (
            "verl", "verl.models", "verl.models.transformers", "verl.utils",
            "verl.models.transformers.monkey_patch", "verl.utils.experimental",
            "verl.utils.experimental.torch_functional",
        )
    }  # fmt: skip
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
        monkeypatch.setitem(sys.modules, name, module)
    functional = modules["verl.utils.experimental.torch_functional"]
    functional.FusedLinearForPPO = fused
    patch = modules["verl.models.transformers.monkey_patch"]
    patch.patch_forward_with_backends = patch_forward_with_backends
    return functional, patch, calls


@pytest.fixture
def verl(monkeypatch):
    names = stand_ins(monkeypatch)
    importlib.import_module(OURS)
    yield names
    sys.modules.pop(OURS)


def results(kind, backend):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, D, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, requires_grad=True)
    ids = torch.randint(V, (2, 7), generator=generator, dtype=torch.int32)
    found = kind(impl_backend=backend)(hidden, weight, ids, temperature=0.7)
    upstream = torch.randn(2, 2, 7, generator=generator)
    loss = sum((u * x).sum() for u, x in zip(upstream, found, strict=True))
    return [*found, *torch.autograd.grad(loss, (hidden, weight))]


def test_the_backend_gives_what_verls_does(verl):
    kind = verl[0].FusedLinearForPPO
    for ours, theirs in zip(results(kind, "srlm_fast"), results(kind, "torch"), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_signatures_are_verls(verl):
    for method in ("__init__", "forward"):
        ours, theirs = (
            [
                (p.name, p.default)
                for p in inspect.signature(getattr(kind, method)).parameters.values()
            ]
            for kind in (verl[0].FusedLinearForPPO, FusedLinearForPPO)
        )
        assert ours == theirs


def test_nothing_changes_until_it_is_chosen(verl):
    functional, patch, calls = verl
    model = SimpleNamespace()
    patch.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="triton")
    patch.patch_forward_with_backends(model, True, "srlm_fast")
    assert calls == [(True, "triton"), (True, "torch")]
    assert model._verl_fused_kernels_backend == "srlm_fast"
    patch.patch_forward_with_backends(SimpleNamespace(), False, "srlm_fast")
    assert calls[-1] == (False, "torch")
    assert isinstance(functional.FusedLinearForPPO(), FusedLinearForPPO)
    with pytest.raises(ValueError, match="cuda"):
        functional.FusedLinearForPPO(impl_backend="cuda")


def test_verl_finds_the_backend_by_its_entry_point():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    assert project["project"]["entry-points"]["verl.plugins"] == {"srlm_fast": OURS}


def test_a_verl_without_a_choice_is_refused(monkeypatch):
    stand_ins(monkeypatch, fused=type("FusedLinearForPPO", (nn.Module,), {}))
    with pytest.raises(UserError, match=r"verl 0\.9"):
        importlib.import_module(OURS)


@pytest.mark.skipif(find_spec("verl") is None, reason="verl is not installed")
def test_in_verl_itself(monkeypatch):
    import verl  # noqa: F401  its plugins are loaded with it
    from verl.models.transformers import monkey_patch

    importlib.import_module(OURS)
    monkeypatch.setattr(monkey_patch, "is_trl_available", lambda: False)  # not TRL's value heads
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    ids = torch.randint(V, (1, 12), generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(1))
    found = {}
    for backend in ("torch", "srlm_fast"):
        monkey_patch.apply_monkey_patch(
            model, use_remove_padding=False, ulysses_sp_size=1, use_fused_kernels=True,
            fused_kernels_backend=backend,
        )  # fmt: skip
        out = model(
            input_ids=ids, position_ids=torch.arange(12)[None], temperature=0.7, return_dict=True,
            use_cache=False,
        )  # fmt: skip
        loss = (upstream[0] * out.log_probs + upstream[1] * out.entropy).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found[backend] = [out.log_probs, out.entropy, *gradients]
        assert model._verl_fused_kernels_backend == backend
    for ours, theirs in zip(found["srlm_fast"], found["torch"], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
