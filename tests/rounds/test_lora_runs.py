"""Whole runs on adapters: resumed as they would have gone on, and saved as PEFT saves."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from srlm_fast.config import Config, JudgeConfig, LoraConfig, SamplingConfig
from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Judgement, Sample
from srlm_fast.errors import UserError
from srlm_fast.job import prepare
from srlm_fast.loop import main
from srlm_fast.model.load import load_tokenizer
from srlm_fast.rounds.manifest import Run
from srlm_fast.sampler import Sampler
from srlm_fast.train.checkpoint import Checkpoint, Checkpoints

peft = pytest.importorskip("peft", reason="peft is not installed (extra [peft])")

LORA = {"lora__r": "4", "sft__learning_rate": "1e-3", "preference__learning_rate": "1e-3"}
METHODS = {"spa": LORA, "srlm": LORA | {"preference__reference": "fixed"}}
MODELS = {"spa": ["SFT", "DPO", "SPA1", "SPA2"], "srlm": ["SFT", "M1", "M2", "M3"]}


def adapter(out: Path, name: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(out / "models" / name / "adapter_model.safetensors")
    return found


@pytest.fixture(scope="module")
def whole(run_loop: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nobody stopped."""
    made = {method: tmp_path_factory.mktemp(method) / "run" for method in METHODS}
    for method, changes in METHODS.items():
        assert run_loop(method, made[method], **changes) == 0
    return made


def assert_same_run(method: str, whole: Path, other: Path) -> None:
    for file in whole.rglob("*.jsonl"):
        assert file.read_bytes() == (other / file.relative_to(whole)).read_bytes(), file
    for name in MODELS[method]:
        one, two = adapter(whole, name), adapter(other, name)
        assert one.keys() == two.keys() and all(t.equal(two[key]) for key, t in one.items())


@pytest.mark.parametrize("method", ["spa", "srlm"])
def test_stop_between_stages_and_resume(
    method: str, run_loop: Any, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, save = whole[method].parent / "stopped", Run._save
    at = ["train/" + MODELS[method][i] for i in (0, 1, 3)] + ["round-2/judgements"]

    def save_and_stop(run: Run) -> None:
        save(run)
        if run.manifest["stages"] and [*run.manifest["stages"]][-1] in at:
            at.remove([*run.manifest["stages"]][-1])
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_save", save_and_stop)
    flags: list[str] = []
    while run_loop(method, stopped, *flags, **METHODS[method]) == 130:
        flags = ["--resume"]
    assert not at
    assert_same_run(method, whole[method], stopped)
    states = [adapter(whole[method], name) for name in MODELS[method]]
    for state in states:
        assert {key.rpartition(".lora_")[2] for key in state} == {"A.weight", "B.weight"}
    for one, two in pairwise(states):
        assert not any(one[key].equal(two[key]) for key in one if "lora_B" in key)


@pytest.mark.parametrize("method", ["spa", "srlm"])
def test_stop_after_every_step_of_every_training(
    method: str,
    run_loop: Any,
    whole: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """A checkpoint has the adapter that trains alone; the others are made anew."""
    changes = METHODS[method] | {"sft__save_steps": "1", "preference__save_steps": "1"}
    write, stopped, stops = Checkpoints.write, tmp_path / "stopped", 0

    def write_and_interrupt(checkpoints: Checkpoints, found: Checkpoint) -> None:
        write(checkpoints, found)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "write", write_and_interrupt)
        while run_loop(method, stopped, *["--resume"][:stops], **changes) == 130:
            stops += 1
    stages = json.loads((whole[method] / "manifest.json").read_text())["stages"]
    steps = [s["info"]["steps"] for name, s in stages.items() if name.startswith("train/")]
    assert stops == sum(steps) > len(MODELS[method])
    assert_same_run(method, whole[method], stopped)


def test_a_model_of_a_run_is_what_its_peft_folder_says(whole: dict[str, Path]) -> None:
    """SPA2 as loaded by PEFT draws what the run drew, and scores as the run's judges did: eq. 7
    with pi_init, another adapter on the same base."""
    out = whole["spa"]
    tokenizer = load_tokenizer(str(out / "models" / "SPA2"))
    models = {
        name: peft.AutoPeftModelForCausalLM.from_pretrained(out / "models" / name).eval()
        for name in ("SPA1", "SPA2", "SFT")
    }
    scores = {name: Sampler(model, tokenizer).score for name, model in models.items()}
    samples = read_jsonl(out / "round-2" / "samples.jsonl", Sample)
    judged = read_jsonl(out / "round-2" / "judgements.jsonl", Judgement)
    for verdict in judged[:4]:
        sample = samples[verdict.sample or 0]
        ids = [list(sample.prompt_ids)], [[list(sample.response_ids)]]
        policy, initial = (float(scores[name](*ids)[0][0].sum()) for name in ("SPA1", "SFT"))
        assert verdict.score == pytest.approx(policy - initial, abs=1e-4)
    row = read_jsonl(out / "evaluation" / "SPA2.jsonl", Sample)[0]
    [[again]] = scores["SPA2"]([list(row.prompt_ids)], [[list(row.response_ids)]])
    assert again.tolist() == pytest.approx(list(row.logprobs), abs=1e-4)


def test_a_reference_that_is_fixed_is_m1(whole: dict[str, Path]) -> None:
    """Margins of the second round do not start at 0 then."""
    rows = [json.loads(x) for x in (whole["srlm"] / "metrics.jsonl").read_text().splitlines()]
    first = {stage: r for r in reversed(rows) if (stage := r["stage"]).startswith("train/M")}
    assert first["train/M2"]["rewards/margins"] == 0 != first["train/M3"]["rewards/margins"]


def test_a_reference_that_follows_is_a_copy(run_loop: Any, tmp_path: Path) -> None:
    """Of the policy's adapter, after every step: margins are always 0, and DPO has no KL."""
    hard = {"preference__sync_ref_model": "true", "preference__ref_model_mixup_alpha": "1"}
    changes = LORA | hard | {"preference__ref_model_sync_steps": "1", "rounds": "1"}
    assert run_loop("spa", tmp_path / "run", **changes) == 0
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    margins = [row["rewards/margins"] for row in rows if "rewards/margins" in row]
    assert len(margins) > 3 and not any(margins)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    training = summary["models"][-1]["training"]
    assert training["reference_updates"] == training["steps"]


def test_one_cached_round(run_loop: Any, tmp_path: Path, whole: dict[str, Path]) -> None:
    cached = LORA | {"preference__reference_cache": "states", "rounds": "1"}
    assert run_loop("spa", tmp_path / "run", **cached) == 0
    one, other = (adapter(out, "SPA1") for out in (tmp_path / "run", whole["spa"]))
    assert all(torch.allclose(t, other[key], atol=1e-5) for key, t in one.items())


def test_what_cannot_be_is_said_before_the_run(
    tmp_path: Path, whole: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def config(model: str, modules: str) -> Config:
        return Config(
            model=model,
            method="spa",
            judge=JudgeConfig(kind="implicit"),
            lora=LoraConfig(r=2, target_modules=(modules,)),
            sampling=SamplingConfig(max_new_tokens=8),
        )

    base = str(whole["spa"] / "models" / "M0")
    with pytest.raises(UserError, match="language-model head cannot have an adapter"):
        prepare(config(base, "lm_head"))
    with pytest.raises(UserError, match="holds LoRA adapters"):
        prepare(config(str(whole["spa"] / "models" / "SFT"), "q_proj"))
    words = ["--recipe", "sandbox-spa", "--out", str(tmp_path / "x"), "--lora.r", "4"]
    assert main([*words, "--lora.lora_dropout", "0.1"]) == 2
    assert "lora.lora_dropout must be 0" in capsys.readouterr().err
    assert main([*words, "--lora.modules_to_save", "[lm_head]"]) == 2
    assert "unknown setting lora.modules_to_save" in capsys.readouterr().err
