"""Gradient checkpointing changes no gradient, whatever is under way when backward comes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.model.checkpointing import checkpointed
from srlm_fast.model.prefix import packed_states
from srlm_kernels import PrefixPlan


def batch(*groups: tuple[int, tuple[int, ...]]) -> tuple[Tensor, Tensor, PrefixPlan]:
    positions = [
        place
        for prompt, tails in groups
        for span in (range(prompt), *(range(prompt, prompt + n) for n in tails))
        for place in span
    ]
    ids = torch.arange(len(positions)) * 7 % 60 + 3
    return ids[None], torch.tensor([positions]), PrefixPlan.of(groups)


BATCHES = (batch((3, (4, 2))), batch((5, (2, 3)), (4, ())))


def loss(model: Any, which: int) -> Tensor:
    return packed_states(model, *BATCHES[which]).square().sum()


def gradients(model: Any) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradients_are_the_same(family: str, make_model: Callable[..., Any]) -> None:
    model = make_model(family, attention_dropout=0.5).double()
    loss(model, 0).backward()
    plain = gradients(model)
    with checkpointed(model):
        loss(model, 0).backward()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model), strict=True))


def test_two_batches_in_flight_and_backward_after_the_block(
    make_model: Callable[..., Any],
) -> None:
    """Each layer is computed again with the plan of its own batch, though the last one set differs,
    and the model's attention is its own again."""
    model = make_model().double()
    (loss(model, 0) + loss(model, 1)).backward()
    plain = gradients(model)
    with checkpointed(model):
        first, second = loss(model, 0), loss(model, 1)
    assert not any("forward" in module.__dict__ for module in model.modules())
    second.backward()
    first.backward()
    for a, b in zip(plain, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert model.config._attn_implementation == "sdpa"


def test_a_second_backward_computes_layers_once_more(make_model: Callable[..., Any]) -> None:
    model = make_model().double()
    with checkpointed(model):
        total = loss(model, 0)
    total.backward(retain_graph=True)
    once = gradients(model)
    total.backward()
    assert all(torch.equal(a, b) for a, b in zip(once, gradients(model), strict=True))


def test_layers_keep_only_their_input(make_model: Callable[..., Any]) -> None:
    model = make_model(num_hidden_layers=8)
    kept = []
    for context in (checkpointed(model), torch.enable_grad()):
        saved: dict[int, int] = {}

        def pack(t: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[t.data_ptr()] = t.numel()
            return t

        with context, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss(model, 0)
        weights = {p.data_ptr() for p in model.parameters()}
        kept.append(sum(n for pointer, n in saved.items() if pointer not in weights))
    assert kept[0] < kept[1] / 4


def test_a_patch_of_somebody_else_survives(make_model: Callable[..., Any]) -> None:
    model = make_model()
    layer = model.model.layers[0]
    layer.forward = patch = layer.forward
    with checkpointed(model):
        assert layer.forward is not patch
    assert layer.__dict__["forward"] is patch and "forward" not in model.model.layers[1].__dict__


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"Linear has no layers .* gradient_checkpointing to false"):
        checkpointed(torch.nn.Linear(2, 2)).__enter__()
