"""SPA without gold pairs on a model folder: the judge's reference is another folder (figure 4)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Judgement, Sample
from srlm_fast.loop import main
from srlm_fast.model.load import load_model
from srlm_fast.sampler import Sampler

SMALL = [
    *("--rounds", "1", "--sampling.max_new_tokens", "6", "--prompts.num_prompts", "8"),
    *("--evaluate.num_prompts", "4", "--preference.learning_rate", "1e-4"),
]


@pytest.fixture(scope="module")
def made(run_loop: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model M0 and an instruct model SFT, with the same tokenizer."""
    out = tmp_path_factory.mktemp("made") / "run"
    assert run_loop("spa", out, rounds="0") == 0
    return out / "models"


@pytest.fixture
def argv(made: Path, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"sort these words : fig tea {'jam ' * i}\n" for i in range(14)))
    words = ["--recipe", "spa", "--model", str(made / "SFT"), "--out", str(tmp_path / "run")]
    return [*words, "--data.prompts", str(prompts), "--spa.no_seed", "true", *SMALL]


def test_a_base_model_judges_the_first_round(argv: list[str], made: Path, tmp_path: Path) -> None:
    assert main([*argv, "--judge.reference", str(made / "M0")]) == 0
    out = tmp_path / "run"
    summary = json.loads((out / "summary.json").read_text())
    assert [m["name"] for m in summary["models"]] == ["SFT", "SPA1"]
    inputs = json.loads((out / "manifest.json").read_text())["inputs"]
    assert str(made / "M0" / "model.safetensors") in inputs, "it must stay what it is"
    samplers = [
        Sampler(load_model(str(made / name), device=torch.device("cpu"))) for name in ("SFT", "M0")
    ]
    samples = read_jsonl(out / "round-1" / "samples.jsonl", Sample)
    for verdict in read_jsonl(out / "round-1" / "judgements.jsonl", Judgement)[:3]:
        sample = samples[verdict.sample or 0]
        ids = [list(sample.prompt_ids)], [[list(sample.response_ids)]]
        policy, base = (float(s.score(*ids)[0][0].sum()) for s in samplers)
        assert verdict.score == pytest.approx(policy - base, abs=1e-4)


def test_adapters_can_have_a_base_model_as_reference(
    argv: list[str], made: Path, tmp_path: Path
) -> None:
    """A model of its own beside the one that the adapters are on."""
    pytest.importorskip("peft", reason="peft is not installed (extra [peft])")
    assert main([*argv, "--judge.reference", str(made / "M0"), "--lora.r", "2"]) == 0
    assert (tmp_path / "run" / "models" / "SPA1" / "adapter_model.safetensors").is_file()


def test_a_reference_of_which_there_is_a_configuration_alone_can_be_planned_with(
    argv: list[str], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads((made / "M0" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(found | {"intermediate_size": 1 << 20}))
    words = [*argv, "--judge.reference", str(tmp_path)]
    assert main([*words, "--dry-run", "--memory", "100"]) == 0
    size = re.search(r"scoring: .*reference (\d+\.\d+)", capsys.readouterr().out)
    assert size and float(size[1]) > 1, "its own, not that of the model"
    assert main(words) == 2
    assert "copy the tokenizer files" in capsys.readouterr().err


def test_references_that_cannot_serve(
    argv: list[str], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(reference: str) -> str:
        assert main([*argv, "--judge.reference", reference]) == 2
        return capsys.readouterr().err

    other = shutil.copytree(made / "M0", tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["fig"], vocabulary["tea"] = vocabulary["tea"], vocabulary["fig"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has other token ids than the model" in complaint(str(other))

    shorter = shutil.copytree(made / "M0", tmp_path / "shorter")
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    assert "has a shorter context than the model" in complaint(str(shorter))

    assert "does not exist" in complaint("no/such/folder")
    assert not (tmp_path / "run").exists()


def test_a_seed_and_prompts_are_asked_for_otherwise(
    argv: list[str], made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_seed = [word for word in argv if word not in ("--spa.no_seed", "true")]
    assert main(with_seed) == 2
    assert "give a file with --data.preferences" in capsys.readouterr().err
    self_instruct = ["--judge.kind", "prompted", "--judge.prompt", "sandbox"]
    self_instruct += ["--prompts.source", "self_instruct"]
    assert main([*argv, *self_instruct, "--judge.max_new_tokens", "9"]) == 2
    assert "prompts.source is self_instruct" in capsys.readouterr().err
