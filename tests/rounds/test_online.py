"""Whole online runs: a round of one step is an offline one, and a stopped run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from srlm_fast.config import Config, PairsConfig, PreferenceConfig, SPAConfig, SRLMConfig
from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Pair
from srlm_fast.errors import UserError
from srlm_fast.job import prepare
from srlm_fast.recipes import load_config
from srlm_fast.rounds.engine import Engine
from srlm_fast.rounds.manifest import Run
from srlm_fast.rounds.plan import plan

LAST = {"spa": "SPA2", "srlm": "M3"}
ONLINE = {"online": "true", "preference__per_device_train_batch_size": "3"}
LORA = {"lora__r": "4", "sft__learning_rate": "1e-3", "preference__learning_rate": "1e-3"}


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    (file,) = (out / "models" / name).glob("*model.safetensors")
    found: dict[str, torch.Tensor] = load_file(file)
    return found


def assert_same_run(method: str, one: Path, other: Path) -> None:
    for file in one.rglob("*.jsonl"):
        assert file.read_bytes() == (other / file.relative_to(one)).read_bytes(), file
    ours, theirs = weights(one, LAST[method]), weights(other, LAST[method])
    assert all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("spa", {"preference__gradient_checkpointing": "true"}),
        ("srlm", {"sampling__force_eos": "true"}),
        ("srlm", {"judge__kind": "expected", "judge__prompt": "sandbox"}),
        ("spa", {"spa__self_refinement": "false", "preference__sync_ref_model": "true",
                 "preference__ref_model_sync_steps": "1"}),
    ],
)  # fmt: skip
def test_a_round_of_one_step_is_an_offline_one(
    method: str, changes: dict[str, str], run_loop: Any, tmp_path: Path
) -> None:
    """The same candidates, judgements and pairs, and the same model up to the order of sums."""
    changes = {"preference__per_device_train_batch_size": "50", "rounds": "1", **changes}
    found = []
    for online in ("true", "false"):
        out = tmp_path / online
        assert run_loop(method, out, online=online, **changes) == 0
        pairs = read_jsonl(out / "round-1" / "pairs.jsonl", Pair)
        name = "SPA1" if method == "spa" else "M2"
        found.append((sorted(map(repr, pairs)), weights(out, name)))
    assert found[0][0] == found[1][0] and found[0][0]
    for key, weight in found[0][1].items():
        torch.testing.assert_close(weight, found[1][1][key], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("method", "changes"), [("spa", {}), ("srlm", {}), ("spa", LORA)])
def test_stop_after_every_stage_and_resume(
    method: str,
    changes: dict[str, str],
    run_loop: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And once in the midst of a round, which begins anew."""
    changes = ONLINE | changes
    assert run_loop(method, tmp_path / "whole", **changes) == 0
    save, candidates, stops = Run._save, Engine.candidates, []

    def save_and_stop(run: Run) -> None:
        save(run)
        if run.manifest["stages"]:
            stops.append([*run.manifest["stages"]][-1])
            raise KeyboardInterrupt

    def sample_and_stop(engine: Engine, *args: Any, stage: str, **options: Any) -> Any:
        found = candidates(engine, *args, stage=stage, **options)
        if stage == "candidates-2/1" and stage not in stops:
            stops.append(stage)
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Run, "_save", save_and_stop)
    monkeypatch.setattr(Engine, "candidates", sample_and_stop)
    while code := run_loop(method, tmp_path / "stopped", *["--resume"][: len(stops)], **changes):
        assert code == 130
    assert "candidates-2/1" in stops and {"round-1/pairs", "round-2/pairs"} <= {*stops}
    monkeypatch.undo()
    assert_same_run(method, tmp_path / "whole", tmp_path / "stopped")


def test_what_a_run_says(run_loop: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_loop("spa", out, **ONLINE) == 0
    summary = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for t in (1, 2):
        model, pairs = summary["models"][t + 1], read_jsonl(out / f"round-{t}/pairs.jsonl", Pair)
        prompts = (out / f"round-{t}" / "prompts.jsonl").read_text().splitlines()
        training = model["training"]
        assert training["steps"] == -(-len(prompts) // 3) == 3
        assert model["pairs_kept"] == training["pairs"] == len(pairs)
        assert len(pairs) + sum(
            model["dropped"].get(why, 0) for why in ("tie", "fewer than two judged")
        ) == len(prompts)
        assert [row["step"] for row in rows if row["stage"] == f"train/SPA{t}"] == [1, 2, 3]
        assert not (out / f"round-{t}" / "samples.jsonl").exists()
        assert model["flags"] is not None and model["labels"]["accuracy"] is not None
    assert all(pair.round == 2 for pair in pairs)


def test_the_plan() -> None:
    """Of 200 prompts with 4 candidates each, twice."""
    job = prepare(
        load_config("sandbox-srlm", {"online": "true", "preference.num_train_epochs": "2"})
    )
    text = " ".join(plan(job.config, job.task, job.memory).split())
    assert "round 2: candidates 200 prompts x 8, at most 80,000 tokens" in text
    assert "round 2: online sigmoid, sampling and judging 16 prompts a step" in text


def test_no_pair_in_a_round(run_loop: Any, tmp_path: Path, capsys: Any) -> None:
    """Candidates that are all but greedy are all alike; it is said again on resume."""
    alike = ONLINE | {"sampling__temperature": "1e-6"}
    for flags in ([], ["--resume"]):
        assert run_loop("srlm", tmp_path / "run", *flags, **alike) == 1
        assert "round 1 made no preference pair" in capsys.readouterr().err


def test_senseless_settings_are_refused() -> None:
    for pairs in (
        PairsConfig(consistency="avg"), PairsConfig(anchored_rejection=True),
        PairsConfig(gold_replay=0.5),
    ):  # fmt: skip
        with pytest.raises(UserError, match="are for rounds that make all pairs first"):
            Config(online=True, method="spa", pairs=pairs, spa=SPAConfig(self_refinement=False))
    with pytest.raises(UserError, match=r"set srlm\.training to preference"):
        Config(online=True, srlm=SRLMConfig(training="positives"))
    for name, value in (
        ("save_steps", 1), ("eval_steps", 1), ("parallel", "shard"), ("reference_cache", "states")
    ):  # fmt: skip
        train = PreferenceConfig(**{name: value})  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"preference\.{name} must be"):
            Config(online=True, preference=train)
    spa = SPAConfig(tau="dataset")
    with pytest.raises(UserError, match=r"spa\.tau dataset"):
        Config(online=True, method="spa", spa=spa)
    Config(online=True, method="spa", spa=replace(spa, self_refinement=False))
