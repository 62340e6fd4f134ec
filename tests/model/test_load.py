"""Loading, and what is said when it cannot be done."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from srlm_fast.errors import UserError
from srlm_fast.model.load import (
    check_folder,
    context_length,
    context_of,
    eos_token_ids,
    load_model,
    load_tokenizer,
    resolve_device,
)

CPU = torch.device("cpu")


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_model_comes_back_equal_in_eval_mode(
    folder: Path, make_model: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(str(folder), device=CPU, dtype="auto")
    assert not loaded.training
    for (name, mine), theirs in zip(
        loaded.named_parameters(), make_model().parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "asked,got",
    [("auto", torch.float32), ("bfloat16", torch.bfloat16), (torch.float64, torch.float64)],
    ids=str,
)
def test_dtype_auto_is_float32_on_a_cpu(
    asked: Any, got: torch.dtype, tmp_path: Path, make_model: Callable[..., Any]
) -> None:
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device=CPU, dtype=asked).dtype == got


def test_a_softcap_of_scores_is_kept(tmp_path: Path) -> None:
    """transformers 5.17 takes SDPA for Gemma 2, which leaves it out."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device=CPU)
    assert loaded.config._attn_implementation == "eager"


def test_tokenizer_without_pad_token_pads_with_eos(folder: Path) -> None:
    loaded = load_tokenizer(str(folder))
    assert loaded.pad_token_id == loaded.eos_token_id == 2
    assert loaded.chat_template


def test_missing_folder() -> None:
    with pytest.raises(UserError, match=r"'\./nowhere/at/all' does not exist"):
        load_model("./nowhere/at/all", device=CPU)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        load_model(str(tmp_path / "weights.bin"), device=CPU)


def test_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_model(str(tmp_path), device=CPU)


def test_broken_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_model(str(folder), device=CPU)


@pytest.mark.parametrize(
    "wrong",
    [{"hidden_size": "a"}, {"num_attention_heads": 5}, {"dtype": "foo"}, {"architectures": [3]}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_wrong_values_of_the_configuration(wrong: Any, folder: Path) -> None:
    change_config(folder, **wrong)
    for read in (lambda path: load_model(path, device=CPU), check_folder):
        with pytest.raises(UserError, match=r"\A[^\n]*/m[: ][^\n]+\Z"):
            read(str(folder))


@pytest.mark.parametrize("size", [0, 100, -100], ids=["empty", "header", "cut"])
def test_damaged_weights(size: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"cannot load the weights of .*/m: .*; copy"):
        load_model(str(folder), device=CPU)
    with pytest.raises(UserError, match=r"cannot read the weights .*model\.safetensors: .*; copy"):
        check_folder(str(folder))


def test_weights_of_another_configuration(folder: Path) -> None:
    change_config(folder, hidden_size=64)
    with pytest.raises(UserError, match=r"config\.json of .*/m do not belong together: lm_head"):
        load_model(str(folder), device=CPU)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "Foo"}}'),
        ("tokenizer_config.json", "[]"),
    ],
    ids=["nothing", "rust", "list"],
)
def test_damaged_tokenizer(name: str, text: str, folder: Path) -> None:
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=r"\Acannot load the tokenizer of .*/m: [^\n]+\Z"):
        load_tokenizer(str(folder))


def test_check_folder_gives_the_configuration(folder: Path) -> None:
    assert context_of(check_folder(str(folder))) == 64
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert context_of(check_folder(str(folder))) == 64


def test_check_folder_refuses_what_has_no_weights_or_is_no_causal_lm(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"m has no weights \(.*\); copy them into it"):
        check_folder(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="not a causal language model"):
        check_folder(str(folder))


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the weights"):
        load_model(str(folder), device=CPU)


def test_folder_without_tokenizer(tmp_path: Path, make_model: Callable[..., Any]) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_encoder_decoder_is_no_causal_lm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match=r"'t5' model \(.*\), which is not a causal language model"):
        load_model(str(tmp_path), device=CPU)


def test_a_masked_lm_is_no_causal_lm(tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"BertForMaskedLM.*not a causal language model"):
        load_model(str(tmp_path), device=CPU)


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"incomplete: model\.norm\.weight is missing"):
        load_model(str(folder), device=CPU)


def test_remote_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my_own", "auto_map": {"AutoConfig": "trap.Trap"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass Trap: ...\n")
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_model(str(folder), device=CPU)
    assert not (tmp_path / "sprung").exists()


def test_unknown_device_and_dtype(folder: Path) -> None:
    for name in ("gpu", "mps", "meta", "xpu", "cuda:x", "cpu:3"):
        with pytest.raises(UserError, match=f"unknown device '{name}'; use auto, cpu, cuda"):
            resolve_device(name)
    with pytest.raises(UserError, match="cuda:99 is not here"):
        resolve_device("cuda:99")
    with pytest.raises(UserError, match="unknown dtype 'half4'"):
        load_model(str(folder), device=CPU, dtype="half4")


def test_device_auto_is_a_device_that_is_here() -> None:
    torch.zeros(1, device=resolve_device("auto"))


def test_eos_ids_of_all_places(make_model: Callable[..., Any]) -> None:
    model = make_model()
    model.generation_config.eos_token_id = [7, 9]
    assert eos_token_ids(model, SimpleNamespace(eos_token_id=5)) == (2, 5, 7, 9)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert eos_token_ids(model, SimpleNamespace(eos_token_id=None)) == ()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_context_length(family: str, make_model: Callable[..., Any]) -> None:
    assert context_length(make_model(family)) == 64
