"""Hidden states and head together are the model's logits, family by family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from srlm_fast.errors import UserError
from srlm_fast.model.forward import hidden_states, lm_head

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 5.0},
    "gpt_neox": {},
    "gpt2": {},
    "phi": {},  # its head has a bias
    "phi3": {},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "opt": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_head_give_the_models_logits(
    family: str, make_model: Callable[..., Any]
) -> None:
    model = make_model(family.removesuffix("-tied"), **FAMILIES[family])
    head = lm_head(model)
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    ids = torch.randint(3, 80, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = hidden_states(model, ids)
        logits = head.logits(states)
    assert states.shape == (2, 9, 32)
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_head_of_every_kind_is_covered(make_model: Callable[..., Any]) -> None:
    heads = {name: lm_head(make_model(name, **FAMILIES[name])) for name in ("phi", "gemma2")}
    assert heads["phi"].bias is not None
    assert heads["gemma2"].softcap == 5.0
    assert lm_head(make_model("cohere", logit_scale=0.25)).logit_scale == 0.25
    assert lm_head(make_model("granite", logits_scaling=4.0)).logit_scale == 0.25


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
def test_padding_on_either_side_changes_nothing(
    family: str, make_model: Callable[..., Any]
) -> None:
    model = make_model(family, **FAMILIES[family])
    ids = torch.randint(3, 80, (1, 7), generator=torch.Generator().manual_seed(0))
    pad = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        alone = hidden_states(model, ids)
        right = hidden_states(model, torch.cat([ids, pad], 1))[:, :7]
        mask = torch.cat([pad, torch.ones_like(ids)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        left = hidden_states(model, torch.cat([pad, ids], 1), mask, positions)[:, 3:]
    torch.testing.assert_close(right, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(left, alone, atol=1e-5, rtol=1e-5)


def test_no_logits_are_made_and_gradients_flow(make_model: Callable[..., Any]) -> None:
    model = make_model()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("logits were computed"))
    hidden_states(model, torch.tensor([[5, 6, 7]])).sum().backward()
    assert all(
        p.grad is not None for name, p in model.named_parameters() if name != "lm_head.weight"
    )


def test_adapters_in_the_head_are_refused_while_they_are_on(make_model: Callable[..., Any]) -> None:
    """They are no part of the weight that the fused head reads."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), config)
    with pytest.raises(UserError, match="leave it out of target_modules"):
        lm_head(model)
    with model.disable_adapter():
        assert lm_head(model).weight is model.get_base_model().lm_head.base_layer.weight
    model.merge_adapter()
    lm_head(model)
