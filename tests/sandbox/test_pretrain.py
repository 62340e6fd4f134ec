import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from srlm_fast.config import SandboxConfig
from srlm_fast.errors import UserError
from srlm_fast.sandbox import pretrain as module
from srlm_fast.sandbox.pretrain import cache_key, make_base_model


def forbid(*_: Any, **__: Any) -> Any:
    raise AssertionError("it must not train again")


def test_base_model_is_an_ordinary_folder(quick: SandboxConfig) -> None:
    folder = make_base_model(quick, seed=0)
    assert folder.parent == Path(quick.cache_dir)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 256
    assert tokenizer.chat_template
    record = json.loads((folder / "pretraining.json").read_text())
    assert record["steps"] == 3
    assert record["capped"] is False


def test_cache_hit(quick: SandboxConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_base_model(quick, seed=0)
    monkeypatch.setattr(module, "pretrain", forbid)
    later = dataclasses.replace(quick, max_seconds=9.0, scale="smoke")
    assert make_base_model(later, seed=0) == folder
    with pytest.raises(AssertionError, match="train again"):
        make_base_model(quick, seed=1)


@pytest.mark.parametrize(
    "change",
    [{"world": "W2"}, {"pretrain_steps": 4}, {"min_exact": 0.5}],
    ids=["world", "steps", "gate"],
)
def test_key_changes_with_what_determines_the_weights(
    quick: SandboxConfig, change: dict[str, Any]
) -> None:
    assert cache_key(dataclasses.replace(quick, **change), 0) != cache_key(quick, 0)


def test_key_changes_with_seed_code_prompts_and_versions(
    quick: SandboxConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [cache_key(quick, 0), cache_key(quick, 1)]
    for name, value in {
        "SOURCES": (*module.SOURCES, "task"),
        "JUDGE_PROMPT": dataclasses.replace(
            module.JUDGE_PROMPT, text="<INSTRUCTION_HERE><RESPONSE_HERE>"
        ),
        "TASK_LIST": dataclasses.replace(module.TASK_LIST, heading="write tasks"),
    }.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            keys.append(cache_key(quick, 0))
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.append(cache_key(quick, 0))
    assert len(set(keys)) == len(keys)


def test_key_ignores_scale_cache_and_time_cap(quick: SandboxConfig) -> None:
    other = dataclasses.replace(quick, scale="small", cache_dir="elsewhere", max_seconds=1.0)
    assert cache_key(other, 0) == cache_key(quick, 0)


def test_a_capped_model_serves_only_the_same_cap(
    quick: SandboxConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = module.pretrain
    capped = []

    def short(config: SandboxConfig, tokenizer: Any, *, seed: int) -> tuple[Any, Any]:
        model, record = train(config, tokenizer, seed=seed)
        capped.append(config.max_seconds)
        return model, dataclasses.replace(record, capped=config.max_seconds < 100)

    monkeypatch.setattr(module, "pretrain", short)
    hasty = dataclasses.replace(quick, max_seconds=9.0)
    first = make_base_model(hasty, seed=0)
    assert make_base_model(hasty, seed=0) == first
    full = make_base_model(quick, seed=0)
    assert full != first
    assert make_base_model(hasty, seed=0) == full, "a complete model serves any cap"
    assert capped == [9.0, 600.0]


@pytest.mark.parametrize("stage", ["save_model", "pretrain"])
def test_interrupted_making_leaves_nothing(
    quick: SandboxConfig, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    with monkeypatch.context() as patch:
        original = getattr(module, stage)

        def interrupt(*args: Any, **kwargs: Any) -> None:
            original(*args, **kwargs)
            raise KeyboardInterrupt

        patch.setattr(module, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_base_model(quick, seed=0)
    cache = Path(quick.cache_dir)
    assert not cache.exists() or list(cache.iterdir()) == []
    assert (make_base_model(quick, seed=0) / "model.safetensors").is_file()


def test_two_makers_at_once_end_with_one_whole_model(
    quick: SandboxConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_trained = threading.Barrier(2)

    def together(*args: Any) -> Path:
        both_trained.wait(timeout=60)
        return save(*args)

    save = module._save
    monkeypatch.setattr(module, "_save", together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: make_base_model(quick, seed=0), range(2))
    assert first == second
    assert list(Path(quick.cache_dir).iterdir()) == [first]
    assert AutoModelForCausalLM.from_pretrained(first).config.hidden_size == 128


def test_missing_the_gate_is_a_warning(
    quick: SandboxConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srlm_fast.sandbox.training.EXTENSION_STEPS", 3)
    make_base_model(dataclasses.replace(quick, min_exact=1.0), seed=0)
    assert "below sandbox.min_exact" in caplog.text


def test_default_cache_folder(quick: SandboxConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(quick.cache_dir).parent / "xdg"
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    folder = make_base_model(dataclasses.replace(quick, cache_dir=""), seed=0)
    assert folder.parent == place / "srlm_fast"


def test_thread_count_holds_for_the_training_only(
    quick: SandboxConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = torch.get_num_threads(), []

    def counting(*_: Any, **__: Any) -> Any:
        seen.append(torch.get_num_threads())
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "pretrain", counting)
    for threads in (before + 1, 0):
        with pytest.raises(KeyboardInterrupt):
            make_base_model(quick, seed=0, num_threads=threads)
    assert seen == [before + 1, before]
    assert torch.get_num_threads() == before


def test_unknown_world(quick: SandboxConfig) -> None:
    with pytest.raises(UserError, match=r"sandbox\.world"):
        make_base_model(dataclasses.replace(quick, world="W9"), seed=0)


def test_a_cache_that_cannot_be_written_is_said_before_the_training(
    quick: SandboxConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pretrain", forbid)
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(quick, cache_dir=str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"--sandbox\.cache_dir"):
        make_base_model(config, seed=0)
