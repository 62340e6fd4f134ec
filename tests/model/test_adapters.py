"""Adapters on one copy of the base weights: switched, kept, saved as PEFT saves them, loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from srlm_fast import installed
from srlm_fast.config import LoraConfig
from srlm_fast.errors import UserError
from srlm_fast.model.adapters import POLICY, Adapters, active_state, add_lora
from srlm_fast.model.load import load_model

LORA = LoraConfig(r=4, lora_alpha=8)
BASE = Path("base")
needs_peft = pytest.mark.skipif(
    installed.probe("peft", "peft", "peft").startswith("not"), reason="no peft"
)


def trained(adapters: Adapters, seed: int = 1) -> Adapters:
    """As after a training: the zeros of an untrained adapter hide what is switched."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapters.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=g) / 4)
    return adapters


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.tensor([[5, 6, 7]])).logits
    return found


def trainable(model: Any) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@needs_peft
def test_only_the_policy_trains_and_starts_as_the_base(make_model: Callable[..., Any]) -> None:
    plain, before = make_model(dtype=torch.bfloat16), torch.random.get_rng_state()
    model = add_lora(make_model(dtype=torch.bfloat16), LORA, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(logits(model), logits(plain))
    names = trainable(model)
    assert names and all("lora_" in name and f".{POLICY}." in name for name in names)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    twin, other = (add_lora(make_model(dtype=torch.bfloat16), LORA, seed=s) for s in (3, 4))
    key = next(name for name in names if "lora_A" in name)
    assert torch.equal(model.get_parameter(key), twin.get_parameter(key))
    assert not torch.equal(model.get_parameter(key), other.get_parameter(key))


@needs_peft
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_a_frozen_adapter_is_what_the_policy_was(
    family: str, make_model: Callable[..., Any]
) -> None:
    base = logits(make_model(family))
    adapters = trained(Adapters(make_model(family), LORA, base=BASE))
    model, start = adapters.model, logits(adapters.model)
    names, weights = trainable(model), len(list(model.parameters()))
    frozen, off = adapters.frozen(), adapters.frozen(BASE)
    trained(adapters, seed=2)
    now = logits(model)
    for other, expected in ((frozen, start), (off, base)):
        with pytest.raises(KeyboardInterrupt), other.active() as switched:
            assert switched is model and torch.equal(logits(model), expected)
            assert not torch.is_grad_enabled()
            raise KeyboardInterrupt
        assert torch.equal(logits(model), now) and not torch.equal(now, expected)
        assert trainable(model) == names
    assert adapters.frozen() == frozen and len(list(model.parameters())) == weights + len(names)
    with frozen.active():
        assert torch.equal(logits(model), now)


@needs_peft
def test_saved_as_peft_does_and_loaded_in_place(
    folder: Path, tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    import peft

    made = [Adapters(make_model(), LORA, base=folder) for _ in range(2)]
    one, two = trained(made[0]), made[1]
    untrained, expected = logits(two.model), logits(one.model)
    one.frozen()
    one.save(tokenizer, folder.parent / "M1")
    files = {p.name for p in (folder.parent / "M1").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not any((folder.parent / "M1" / name).is_dir() for name in files)
    saved = json.loads((folder.parent / "M1" / "adapter_config.json").read_text("utf-8"))
    assert saved["r"] == 4 and saved["base_model_name_or_path"] == str(folder)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder.parent / "M1", dtype="float32")
    assert theirs.active_adapter == "default" and list(theirs.peft_config) == ["default"]
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=0)

    places = [p.data_ptr() for p in two.model.parameters()]
    two.load(folder.parent / "M1")
    assert torch.equal(logits(two.model), expected)
    assert [p.data_ptr() for p in two.model.parameters()] == places
    two.load(folder)
    assert torch.equal(logits(two.model), untrained)
    with two.frozen(folder.parent / "M1").active():
        assert torch.equal(logits(two.model), expected)
    assert two.frozen(folder.parent / "M1").name == "M1" and torch.equal(
        logits(two.model), untrained
    )
    with pytest.raises(UserError, match=r"M1 holds LoRA adapters.* merge them into their base"):
        load_model(str(folder.parent / "M1"), device=torch.device("cpu"))


@needs_peft
def test_an_adapter_that_does_not_fit_or_is_damaged_is_said(
    tmp_path: Path, tokenizer: Any, make_model: Callable[..., Any]
) -> None:
    one = Adapters(make_model(), LoraConfig(r=2), base=BASE)
    one.save(tokenizer, tmp_path / "M1")
    two = Adapters(make_model(), LORA, base=BASE)
    with pytest.raises(UserError, match=r"M1 does not fit this run's: base_model.* differs"):
        two.load(tmp_path / "M1")
    (tmp_path / "M1" / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot load the adapter of"):
        one.load(tmp_path / "M1")


@needs_peft
def test_the_state_that_counts_leaves_out_what_is_off(make_model: Callable[..., Any]) -> None:
    adapters = trained(Adapters(make_model(), LORA, base=BASE))
    alone = active_state(adapters.model)
    frozen, off = adapters.frozen(), adapters.frozen(BASE)
    assert list(active_state(adapters.model)) == list(alone)
    with frozen.active() as model:
        assert len(active_state(model)) == len(alone)
        assert not any(f".{POLICY}." in name for name in active_state(model))
    with off.active() as model:
        assert not any("lora_" in name for name in active_state(model))


@needs_peft
@pytest.mark.parametrize(
    ("modules", "why"),
    [
        (("lm_head", "q_proj"), "the language-model head cannot have an adapter"),
        (("q_projj",), "target_modules: .*q_projj.*; name modules of this model"),
        (("q_proj", "v_projj"), "no module of this model is called 'v_projj'"),
    ],
)
def test_modules_that_cannot_have_one(
    modules: tuple[str, ...], why: str, make_model: Callable[..., Any]
) -> None:
    with pytest.raises(UserError, match=why):
        add_lora(make_model(), LoraConfig(r=2, target_modules=modules))


def test_without_peft(monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., Any]) -> None:
    monkeypatch.setattr(installed, "probe", lambda *names: "not installed: pip install it")
    with pytest.raises(
        UserError, match=r"peft is needed, and cannot be used here: not installed: pip"
    ):
        add_lora(make_model(), LORA)
