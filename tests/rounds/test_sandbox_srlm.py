"""SRLM as it is meant: the model writes the prompts and judges in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Example, Judgement, PromptRow, prompt_text
from srlm_fast.loop import main
from srlm_fast.sandbox.world import parse_prompt


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole smoke run on a base model of a fifth of the usual pre-training."""
    out = tmp_path_factory.mktemp("srlm") / "run"
    settings = {
        "--sandbox.scale": "smoke",
        "--sandbox.pretrain_steps": "200",
        "--sandbox.min_exact": "0",
        "--sandbox.max_seconds": "600",
        "--sandbox.cache_dir": str(out.parent / "cache"),
        "--out": str(out),
    }
    assert main([word for item in settings.items() for word in item]) == 0
    return out


@pytest.mark.slow
def test_judgements_are_words_with_scores(finished: Path) -> None:
    for t in (1, 2):
        verdicts = read_jsonl(finished / f"round-{t}" / "judgements.jsonl", Judgement)
        votes = [vote for v in verdicts for vote in v.votes]
        assert len(votes) == 3 * len(verdicts)
        parsed = [vote for vote in votes if vote.score is not None]
        assert len(parsed) > 0.8 * len(votes)
        assert all(vote.text.rstrip().endswith(f"Score: {vote.score:g}") for vote in parsed)
        for v in verdicts:
            scores = [vote.score for vote in v.votes if vote.score is not None]
            if scores:
                assert v.score == pytest.approx(sum(scores) / len(scores), abs=1e-12)


@pytest.mark.slow
def test_new_prompts_are_new_tasks(finished: Path) -> None:
    seen: set[str] = set()
    for t in (1, 2):
        texts = [
            prompt_text(r.prompt)
            for r in read_jsonl(finished / f"round-{t}" / "prompts.jsonl", PromptRow)
        ]
        assert len(texts) >= 20
        assert all(parse_prompt(text) for text in texts)
        assert len(set(texts)) == len(texts) and not seen & set(texts)
        seen |= set(texts)


@pytest.mark.slow
def test_eft_rows_end_with_their_score(finished: Path) -> None:
    rows = read_jsonl(finished / "seed" / "eft.jsonl", Example)
    report = json.loads((finished / "manifest.json").read_text())["stages"]["seed/eft"]["info"]
    assert len(rows) == report["rows"] == sum(report["scores_after"].values())
    assert all(row.response.split()[-2] == "Score:" for row in rows)
