"""Anchored rejection in whole runs: what is sampled from whom, and which pairs come of it."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Judgement, Pair, Sample
from srlm_fast.job import prepare
from srlm_fast.recipes import load_config
from srlm_fast.rounds import engine as engines
from srlm_fast.rounds.plan import plan

MODELS = {"srlm": "M1", "spa": "DPO"}  # that the first round starts from


@pytest.fixture(scope="module", params=MODELS)
def run(request: Any, run_loop: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp(request.param) / "run"
    changes = {"pairs__anchored_rejection": "true", "preference__learning_rate": "1e-3"}
    assert run_loop(request.param, out, **changes) == 0
    return out, MODELS[request.param]


def groups_of(out: Path, t: int) -> list[list[tuple[Sample, float]]]:
    """Judged candidates of round t, by prompt, with their scores."""
    samples = read_jsonl(out / f"round-{t}" / "samples.jsonl", Sample)
    judged = read_jsonl(out / f"round-{t}" / "judgements.jsonl", Judgement)
    rows = [(samples[v.sample], v.score) for v in judged if v.sample is not None]
    found = [list(group) for _, group in groupby(rows, key=lambda row: row[0].prompt)]
    return [[(s, score) for s, score in group if score is not None] for group in found]


def test_each_prompt_has_as_many_candidates_of_both(run: Any) -> None:
    out, _ = run
    for t in (1, 2):
        samples = read_jsonl(out / f"round-{t}" / "samples.jsonl", Sample)
        rounds = [[s.round for s in group] for _, group in groupby(samples, key=lambda s: s.prompt)]
        n = rounds[0].count(t)
        assert all(found == [t] * n + [0] * (n if t > 1 else 0) for found in rounds)
        assert [s.index for s in samples] == [*range(len(rounds[0]))] * len(rounds)


def test_the_past_is_the_model_that_the_first_round_started_from(run: Any) -> None:
    """Its log-probs are those of the anchors, and those of the others the last model's."""
    out, first = run
    past = AutoModelForCausalLM.from_pretrained(out / "models" / first)
    for sample in read_jsonl(out / "round-2" / "samples.jsonl", Sample)[:8]:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        with torch.no_grad():
            logp = past(input_ids=ids).logits[0].log_softmax(-1)
        start = len(sample.prompt_ids) - 1
        mine = [float(logp[start + i, y]) for i, y in enumerate(sample.response_ids)]
        same = mine == pytest.approx(list(sample.logprobs), abs=1e-4)
        assert same is (sample.round == 0)


def test_the_best_of_now_against_the_worst_of_both(run: Any) -> None:
    out, _ = run
    for t in (1, 2):
        expected = []
        for group in groups_of(out, t):
            now = [(s, score) for s, score in group if s.round == t]
            if len(group) < 2 or not now:
                continue
            best, high = max(now, key=lambda row: row[1])
            worst, low = min(group, key=lambda row: row[1])
            if high > low:
                expected.append((best.response_ids, worst.response_ids, high, low))
        pairs = read_jsonl(out / f"round-{t}" / "pairs.jsonl", Pair)
        assert expected == [
            (p.chosen_ids, p.rejected_ids, p.chosen_score, p.rejected_score) for p in pairs
        ]
    past = {s.response_ids for group in groups_of(out, 2) for s, _ in group if s.round == 0}
    assert any(pair.rejected_ids in past for pair in pairs)


def test_the_plan_counts_both() -> None:
    job = prepare(load_config("sandbox-srlm", {"pairs.anchored_rejection": "true"}))
    text = " ".join(plan(job.config, job.task, job.memory).split())
    assert "round 1: candidates 200 prompts x 4" in text
    assert "round 2: candidates 200 prompts x 8, at most 80,000 tokens" in text


def test_stopped_while_the_past_is_resident(
    run_loop: Any, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = run
    method = next(name for name, model in MODELS.items() if model == first)
    use, stops = engines.Engine.use, []

    def use_and_stop(engine: Any, folder: Path) -> None:
        use(engine, folder)
        if folder.name == first and engine.run.done(f"train/{'M2' if first == 'M1' else 'SPA1'}"):
            stops.append(folder)
            raise KeyboardInterrupt

    changes = {"pairs__anchored_rejection": "true", "preference__learning_rate": "1e-3"}
    with monkeypatch.context() as patch:
        patch.setattr(engines.Engine, "use", use_and_stop)
        assert run_loop(method, tmp_path / "run", **changes) == 130
    assert len(stops) == 1
    assert run_loop(method, tmp_path / "run", "--resume", **changes) == 0
    for file in out.rglob("*.jsonl"):
        assert file.read_bytes() == (tmp_path / "run" / file.relative_to(out)).read_bytes(), file
