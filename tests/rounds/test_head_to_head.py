"""Models that compare their answers with those of the models before them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Sample
from srlm_fast.evaluate.responses import outcome_rates
from srlm_fast.judge.controls import RandomJudge
from srlm_fast.rounds.manifest import stage_seed

COMPARE = {"evaluate__head_to_head": "true", "rounds": "1", "evaluate__num_prompts": "8"}


def models(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "summary.json").read_text())["models"]
    return found


def test_first_answers_are_compared_prompt_by_prompt(run_loop: Any, tmp_path: Path) -> None:
    """By a judge whose scores can be had without the run: random, fixed by seed and response."""
    out = tmp_path / "run"
    assert run_loop("srlm", out, pairwise__kind="score", **COMPARE) == 0
    first = {
        model["name"]: read_jsonl(out / f"evaluation/{model['name']}.jsonl", Sample)[::2]
        for model in models(out)
    }
    judge = RandomJudge(stage_seed(0, "evaluate"))
    scores = {}
    for name, samples in first.items():
        assert [s.prompt for s in samples] == [s.prompt for s in first["SFT"]]
        judged = judge.score([s.prompt for s in samples], [[s] for s in samples])
        scores[name] = [judgement.score or 0.0 for [judgement] in judged]

    nobody_asked = {"judged_by": "random", "inconsistent": None, "first_place": None}
    found = {model["name"]: model["head_to_head"] for model in models(out)}
    assert found["SFT"] is None
    assert (set(found["M1"]), set(found["M2"])) == ({"SFT"}, {"SFT", "M1"})
    for name, opponent in (("M1", "SFT"), ("M2", "SFT"), ("M2", "M1")):
        pairs = zip(scores[name], scores[opponent], strict=True)
        outcomes = [0.5 if a == b else float(a > b) for a, b in pairs]
        assert found[name][opponent] == outcome_rates(outcomes) | nobody_asked
        assert found[name][opponent]["prompts"] == 8
    assert "head to head with M1: win/tie/lose" in (out / "report.html").read_text()


@pytest.mark.parametrize("method", ["srlm", "spa"])
def test_a_model_that_cannot_compare_gives_no_verdict(
    method: str, run_loop: Any, tmp_path: Path
) -> None:
    """Answers that differ are unscored then; they are no ties."""
    out = tmp_path / "run"
    prompt = tmp_path / "short.txt"
    prompt.write_text("<INSTRUCTION_HERE> <RESPONSE_A_HERE> ; <RESPONSE_B_HERE>")
    changes = {"pairwise__prompt": str(prompt), "pairwise__max_new_tokens": "6"}
    assert run_loop(method, out, **COMPARE, **changes) == 0
    found = [duel for model in models(out)[1:] for duel in model["head_to_head"].values()]
    assert len(found) == 3
    for duel in found:
        assert (duel["judged_by"], duel["win"] or 0, duel["lose"] or 0) == ("pairwise", 0, 0)
        assert duel["prompts"] + duel["unscored"] == 8
    assert sum(duel["unscored"] for duel in found) > 0
