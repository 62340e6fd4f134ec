"""The ablations of the SRLM paper, whole: without EFT, and with positive examples only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Example, Judgement, Sample
from srlm_fast.rounds import engine
from srlm_fast.rounds.manifest import Run

POSITIVES = {"srlm__training": "positives", "srlm__positive_score": "3"}


def summary_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def test_without_eft_the_baseline_is_m1(run_loop: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_loop("srlm", out, eft__enabled="false", eft__target=None) == 0
    summary = summary_of(out)
    assert [(m["name"], m["round"]) for m in summary["models"]] == [
        ("SFT", 0),
        ("M2", 1),
        ("M3", 2),
    ]
    assert {p.name for p in (out / "models").iterdir()} == {"M0", "SFT", "M2", "M3"}
    against = [list(m["win_rates"] or {}) for m in summary["models"]]
    assert against == [[], ["SFT"], ["SFT", "M2"]]
    assert not (out / "seed").exists()
    assert any("SFT baseline is M1" in note for note in summary["notes"])


@pytest.fixture(scope="module")
def trained() -> list[tuple[Any, list[Any]]]:
    """A weight of each SFT's start model, and the rows it was given."""
    return []


@pytest.fixture(scope="module")
def with_positives(run_loop: Any, tmp_path_factory: Any, trained: list[Any]) -> Path:
    out: Path = tmp_path_factory.mktemp("positives") / "run"
    train = engine.train_sft

    def recording(model: Any, rows: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        trained.append((model.lm_head.weight.detach().clone(), list(rows)))
        return train(model, rows, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train_sft", recording)
        assert run_loop("srlm", out, **POSITIVES) == 0
    return out


def positives(out: Path, t: int) -> list[Sample]:
    return read_jsonl(out / f"round-{t}/positives.jsonl", Sample)


@pytest.mark.parametrize("t", [1, 2])
def test_every_response_that_scores_enough_is_taught(with_positives: Path, t: int) -> None:
    samples = read_jsonl(with_positives / f"round-{t}/samples.jsonl", Sample)
    verdicts = read_jsonl(with_positives / f"round-{t}/judgements.jsonl", Judgement)
    good = [samples[v.sample] for v in verdicts if v.score is not None and v.score >= 3]
    assert 0 < len(good) < len(verdicts) and positives(with_positives, t) == good
    model = summary_of(with_positives)["models"][t + 1]
    assert (model["positives_kept"], model["pairs_kept"]) == (len(good), None)
    assert model["dropped"]["score too low"] == len(verdicts) - len(good)
    assert len(samples) == len(good) + sum(model["dropped"].values())


def test_each_round_trains_the_base_model_on_all_that_there_is(
    with_positives: Path, trained: list[tuple[Any, list[Any]]]
) -> None:
    """Sampled token ids and all: M3 = SFT(M0; IFT + EFT + the positives of M1 and M2)."""
    base = load_file(with_positives / "models/M0/model.safetensors")
    start = base.get("lm_head.weight", base["model.embed_tokens.weight"])
    _, m1, m2, m3 = trained
    assert all(weight.equal(start) for weight, _ in trained)
    assert len(m1[1]) == 24 + len(read_jsonl(with_positives / "seed/eft.jsonl", Example))
    rounds = [
        [([*s.prompt_ids], [*s.response_ids]) for s in positives(with_positives, t)] for t in (1, 2)
    ]
    assert m2[1] == m1[1] + rounds[0]
    assert m3[1] == m1[1] + rounds[0] + rounds[1]


def test_no_response_scores_enough(run_loop: Any, tmp_path: Path, capsys: Any) -> None:
    changes = POSITIVES | {"srlm__positive_score": "4.99999"}
    assert run_loop("srlm", tmp_path / "run", **changes) == 1
    assert "--srlm.positive_score" in capsys.readouterr().err


def test_positives_are_made_once(
    run_loop: Any, tmp_path: Path, with_positives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after they were written, the run goes on with them and ends as if it had not been."""
    save = Run._save

    def save_and_stop(run: Run) -> None:
        save(run)
        if [*run.manifest["stages"]][-1:] == ["round-1/positives"]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", save_and_stop)
        assert run_loop("srlm", tmp_path / "run", **POSITIVES) == 130
    assert run_loop("srlm", tmp_path / "run", "--resume", **POSITIVES) == 0
    for path in with_positives.rglob("*.jsonl"):
        assert (
            path.read_bytes() == (tmp_path / "run" / path.relative_to(with_positives)).read_bytes()
        )
    one, other = (
        load_file(out / "models/M3/model.safetensors") for out in (with_positives, tmp_path / "run")
    )
    assert all(one[key].equal(other[key]) for key in one)
