"""Copies of weights."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srlm_fast.errors import UserError
from srlm_fast.model.load import load_model, load_tokenizer
from srlm_fast.model.weights import FullWeights, frozen_copy, load_weights, save_model


def equal(one: Any, two: Any) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_frozen_copy_stays_behind_when_the_model_trains(make_model: Callable[..., Any]) -> None:
    model = make_model().train()
    model(torch.tensor([[5, 6]])).logits.sum().backward()
    twin = frozen_copy(model)
    assert equal(twin, model)
    assert not twin.training and model.training
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.grad is None for p in twin.parameters())
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert not equal(twin, model)


def test_frozen_copy_keeps_tied_weights_tied(make_model: Callable[..., Any]) -> None:
    twin = frozen_copy(make_model(tie_word_embeddings=True))
    assert twin.lm_head.weight is twin.model.embed_tokens.weight  # type: ignore[union-attr]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded_in_place(
    tied: bool, dtype: torch.dtype, tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_model(tie_word_embeddings=tied).to(dtype)
    save_model(model, tokenizer, tmp_path / "models" / "M1")
    other = make_model(seed=1, tie_word_embeddings=tied).to(dtype)
    pointers = [p.data_ptr() for p in other.parameters()]
    load_weights(other, tmp_path / "models" / "M1")
    assert equal(other, model)
    assert [p.data_ptr() for p in other.parameters()] == pointers
    assert other.dtype == dtype


def test_saved_folder_is_an_ordinary_one(
    tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_model()
    save_model(model, tokenizer, tmp_path / "M1")
    assert equal(load_model(str(tmp_path / "M1"), device=torch.device("cpu")), model)
    assert load_tokenizer(str(tmp_path / "M1")).chat_template == tokenizer.chat_template
    assert [p.name for p in tmp_path.iterdir()] == ["M1"]
    assert (tmp_path / "M1" / "generation_config.json").is_file()


def test_saving_twice_gives_equal_bytes_and_replaces(
    tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    save_model(make_model(seed=1), tokenizer, tmp_path / "M1")
    save_model(make_model(), tokenizer, tmp_path / "M1")
    save_model(make_model(), tokenizer, tmp_path / "M2")
    names = sorted(p.name for p in (tmp_path / "M1").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "M2").iterdir())
    for name in names:
        assert (tmp_path / "M1" / name).read_bytes() == (tmp_path / "M2" / name).read_bytes()


def test_full_disk_leaves_the_old_folder_and_no_rest(
    tmp_path: Path,
    make_model: Callable[..., Any],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = make_model()
    save_model(old, tokenizer, tmp_path / "M1")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(UserError, match="the disk is full"):
        save_model(make_model(seed=1), tokenizer, tmp_path / "M1")
    assert [p.name for p in tmp_path.iterdir()] == ["M1"]
    assert equal(load_model(str(tmp_path / "M1"), device=torch.device("cpu")), old)


def test_weights_of_another_shape_are_refused(
    tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    save_model(make_model(intermediate_size=40), tokenizer, tmp_path / "M1")
    model = make_model()
    before = frozen_copy(model)
    for load in (lambda f: load_weights(model, f), FullWeights(model).frozen):
        with pytest.raises(UserError, match=r"does not fit this one: .*mlp.* differs"):
            load(tmp_path / "M1")
        assert equal(model, before)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_model_beside_the_resident_one_takes_no_third_copy(
    tied: bool,
    dtype: torch.dtype,
    tmp_path: Path,
    make_model: Callable[..., Any],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = make_model(seed=1, tie_word_embeddings=tied).to(dtype)
    save_model(saved, tokenizer, tmp_path / "M1")
    model = make_model(tie_word_embeddings=tied).to(dtype).train()
    model.model.norm.patched = "yes"
    model(torch.tensor([[5, 6]])).logits.sum().backward()

    def copied(*_: Any) -> None:
        raise AssertionError("of the resident model's weights there is a copy")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Parameter, "__deepcopy__", copied)
        twin: Any = FullWeights(model).frozen(tmp_path / "M1")
    assert equal(twin, saved) and not equal(twin, model) and twin.dtype == dtype
    assert twin.model.norm.patched == "yes" and not twin.training and model.training
    assert not any(p.requires_grad or p.grad is not None for p in twin.parameters())
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == tied
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert equal(twin, saved), "the memory is its own"
