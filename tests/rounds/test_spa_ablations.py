"""SPA's switches in whole runs: who judges, against what, and which labels are refined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from srlm_fast.config import Config
from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Judgement, Pair, Sample
from srlm_fast.errors import UserError
from srlm_fast.job import prepare
from srlm_fast.model.load import load_model
from srlm_fast.recipes import load_config
from srlm_fast.rounds.spa import refinement
from srlm_fast.sampler import Sampler


def models(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "summary.json").read_text())["models"]
    return found


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(out / "models" / name / "model.safetensors")
    return found


def logp(folder: Path, sample: Sample) -> float:
    sampler = Sampler(load_model(str(folder), device=torch.device("cpu")))
    ids = [list(sample.prompt_ids)], [[list(sample.response_ids)]]
    return float(sampler.score(*ids)[0][0].sum())


@pytest.mark.parametrize(
    ("reference", "judge", "against"),
    [("previous", "SPA1", "DPO"), ("base", "DPO", "M0"), ("none", "DPO", "")],
)
def test_the_judge_compares_with(
    reference: str, judge: str, against: str, run_loop: Any, tmp_path: Path
) -> None:
    t = 2 if judge == "SPA1" else 1
    out = tmp_path / "run"
    assert run_loop("spa", out, rounds=str(t), judge__reference=reference) == 0
    samples = read_jsonl(out / f"round-{t}" / "samples.jsonl", Sample)
    for verdict in read_jsonl(out / f"round-{t}" / "judgements.jsonl", Judgement)[:3]:
        sample = samples[verdict.sample or 0]
        expected = logp(out / "models" / judge, sample)
        if against:
            expected -= logp(out / "models" / against, sample)
        assert verdict.score == pytest.approx(expected, abs=1e-4)


def test_adapters_compare_with_the_one_before(run_loop: Any, tmp_path: Path) -> None:
    """Which is another adapter of the same model, or none at all."""
    peft = pytest.importorskip("peft", reason="peft is not installed (extra [peft])")
    out = tmp_path / "run"
    changes = {"lora__r": "4", "preference__learning_rate": "1e-3", "judge__reference": "previous"}
    assert run_loop("spa", out, rounds="2", **changes) == 0
    [verdict, *_] = read_jsonl(out / "round-2" / "judgements.jsonl", Judgement)
    sample = read_jsonl(out / "round-2" / "samples.jsonl", Sample)[verdict.sample or 0]
    ids = [list(sample.prompt_ids)], [[list(sample.response_ids)]]
    policy, start = (
        float(Sampler(peft.AutoPeftModelForCausalLM.from_pretrained(out / "models" / name).eval())
        .score(*ids)[0][0].sum())
        for name in ("SPA1", "DPO")
    )  # fmt: skip
    assert policy != start
    assert verdict.score == pytest.approx(policy - start, abs=1e-4)


def test_a_function_judges(run_loop: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """It orders the pairs and the responses, and must stay what it was when the run began."""
    source = tmp_path / "counting.py"
    source.write_text("def words(p, c): return [[-len(x.split()) for x in xs] for xs in c]\n")
    monkeypatch.syspath_prepend(tmp_path)
    out, judge = tmp_path / "run", {"judge__kind": "scorer", "judge__scorer": "counting:words"}
    assert run_loop("spa", out, rounds="1", **judge) == 0
    pairs = read_jsonl(out / "round-1" / "pairs.jsonl", Pair)
    assert pairs and all(len(p.chosen.split()) < len(p.rejected.split()) for p in pairs)
    assert models(out)[-1]["judge"]["judge"] == "scorer"
    source.write_text("def words(p, c): return [[len(x) for x in xs] for xs in c]\n")
    assert run_loop("spa", out, "--resume", rounds="1", **judge) == 2
    assert "counting.py was changed after the run began" in capsys.readouterr().err


def test_table_6(run_loop: Any, tmp_path: Path) -> None:
    """DPO; data expansion (DE); with self-refinement (SR); with decoupled noise detection (DND)."""
    settings = {
        "rounds": "1", "spa__warmup_fraction": "0", "preference__num_train_epochs": "3",
        "evaluate__num_prompts": "1", "evaluate__greedy": "false",
    }  # fmt: skip
    rows = {
        "DPO": {"rounds": "0"},
        "DE": {"spa__self_refinement": "false"},
        "alpha 0": {"spa__alpha": "0"},
        "DE+SR": {"spa__decoupled": "false"},
        "DE+SR+DND": {"spa__lambdas": "[8]"},  # so large that this model feels it
    }
    for name, changes in rows.items():
        assert run_loop("spa", tmp_path / name, **(settings | changes)) == 0
    assert [m["name"] for m in models(tmp_path / "DPO")] == ["SFT", "DPO"]
    trained = {name: weights(tmp_path / name, "SPA1") for name in rows if name != "DPO"}

    def equal(one: str, other: str) -> bool:
        return all(t.equal(trained[other][key]) for key, t in trained[one].items())

    def margins(name: str) -> list[float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [v for x in lines if (v := json.loads(x).get("spa/extrapolated_margin")) is not None]

    assert equal("DE", "alpha 0"), "plain DPO on the self-made pairs, to the last bit"
    assert not equal("DE", "DE+SR")
    assert margins("DE") == [] and margins("DE+SR") != margins("DE+SR+DND")
    flags = {name: "flags" in models(tmp_path / name)[-1] for name in trained}
    assert flags == {name: name != "DE" for name in trained}


def test_without_a_seed_the_model_judges_by_what_it_was_trained_from(
    run_loop: Any, tmp_path: Path
) -> None:
    """Figure 4; the sandbox's instruct model is SFT, and its base model is M0."""
    out = tmp_path / "run"
    changes = {"spa__no_seed": "true", "judge__reference": "base"}
    assert run_loop("spa", out, rounds="2", **changes) == 0
    assert [m["name"] for m in models(out)] == ["SFT", "SPA1", "SPA2"]
    assert not (out / "seed").exists() and not (out / "models" / "DPO").exists()
    samples = read_jsonl(out / "round-1" / "samples.jsonl", Sample)
    for verdict in read_jsonl(out / "round-1" / "judgements.jsonl", Judgement)[:3]:
        sample = samples[verdict.sample or 0]
        reward = logp(out / "models" / "SFT", sample) - logp(out / "models" / "M0", sample)
        assert verdict.score == pytest.approx(reward, abs=1e-4)
    assert models(out)[1]["pairs_kept"] == len(read_jsonl(out / "round-1" / "pairs.jsonl", Pair))


def test_lambda_of_each_round() -> None:
    config = load_config("spa", {"spa.lambdas": "[0.5, 0.25]"})
    lams = [refinement(config, i).lam for i in (1, 2, 3)]  # type: ignore[union-attr]
    assert lams == [0.5, 0.25, 0.25]
    coupled = load_config("spa", {"spa.decoupled": "false"})
    assert refinement(coupled, 1) == refinement(load_config("spa", {"spa.lambdas": "[0]"}), 1)
    assert refinement(load_config("spa", {"spa.self_refinement": "false"}), 1) is None
    assert refinement(Config(), 1) is None


def test_losses_other_than_dpo_need_labels_as_they_are() -> None:
    changes = {"preference.loss_type": "ipo"}
    with pytest.raises(UserError, match=r"loss_type to sigmoid, or spa\.self_refinement to false"):
        prepare(load_config("sandbox-spa", changes))
    changes["spa.self_refinement"] = "false"
    assert prepare(load_config("sandbox-spa", changes)).config.preference.loss_type == "ipo"
