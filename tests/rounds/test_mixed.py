"""Either judge with either method, and SPA's labels in SRLM's rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Judgement, Sample
from srlm_fast.loop import main


def models(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "summary.json").read_text())["models"]
    return found


def metrics(out: Path, model: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == f"train/{model}"]


def test_spa_with_a_judge_that_reads(run_loop: Any, tmp_path: Path) -> None:
    """Labels by an LLM as judge (table 2), refined as SPA does."""
    out = tmp_path / "run"
    changes = {"judge__kind": "expected", "judge__prompt": "sandbox", "rounds": "1"}
    assert run_loop("spa", out, spa__warmup_fraction="0", **changes) == 0
    verdicts = read_jsonl(out / "round-1" / "judgements.jsonl", Judgement)
    assert all(0 <= v.score <= 5 for v in verdicts if v.score is not None)
    assert "spa/tau" in metrics(out, "SPA1")[0] and "flags" in models(out)[-1]


def test_srlm_with_the_implicit_judge_and_refined_labels(run_loop: Any, tmp_path: Path) -> None:
    """No judgement is written, so nothing has to be learned about judging: no EFT."""
    out = tmp_path / "run"
    changes = {
        "judge__kind": "implicit", "judge__reference": "base", "eft__enabled": "false",
        "spa__refine_srlm": "true", "spa__lambdas": "[0.5, 0.25]", "spa__warmup_fraction": "0",
    }  # fmt: skip
    assert run_loop("srlm", out, **changes) == 0
    assert [m["name"] for m in models(out)] == ["SFT", "M2", "M3"]
    assert not (out / "seed").exists()
    for name in ("M2", "M3"):
        assert all("spa/tau" in row for row in metrics(out, name))
    flags = [m.get("flags") for m in models(out)]
    assert flags[0] is None and flags[1] and flags[2]


def test_srlm_does_not_refine_unless_it_is_asked_to(run_loop: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run_loop("srlm", out, rounds="1") == 0
    assert not any("spa/tau" in row for row in metrics(out, "M2"))


SMOKE = {
    "--sandbox.scale": "smoke",
    "--sandbox.pretrain_steps": "200",
    "--sandbox.min_exact": "0",
    "--sandbox.max_seconds": "600",
    "--rounds": "1",
}
MIXED = {
    "sandbox-spa": {
        "--judge.kind": "prompted", "--judge.prompt": "sandbox", "--judge.max_new_tokens": "60",
        "--sampling.num_candidates": "4",
    },
    "sandbox-srlm": {"--spa.refine_srlm": "true", "--preference.rpo_alpha": "0"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MIXED)
def test_words_with_scores_and_refined_labels(
    recipe: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The models write their judgements; four candidates, best against worst, labels refined."""
    cache = tmp_path_factory.getbasetemp() / "mixed-cache"
    out = tmp_path / "run"
    flags = SMOKE | MIXED[recipe] | {"--recipe": recipe, "--out": str(out)}
    flags["--sandbox.cache_dir"] = str(cache)
    assert main([word for item in flags.items() for word in item]) == 0
    verdicts = read_jsonl(out / "round-1" / "judgements.jsonl", Judgement)
    votes = [vote for v in verdicts for vote in v.votes]
    parsed = [vote for vote in votes if vote.score is not None]
    assert len(parsed) > 0.8 * len(votes)
    assert all("Score:" in vote.text for vote in parsed)
    samples = read_jsonl(out / "round-1" / "samples.jsonl", Sample)
    assert {s.index for s in samples} == {0, 1, 2, 3}
    last = models(out)[-1]
    assert last["pairs_kept"] > 5 and last["flags"]["flagged"] >= 0
    rows = metrics(out, last["name"])
    assert all("spa/tau" in row for row in rows)
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
