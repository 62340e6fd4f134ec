"""What the implicit judge of a round computes: the policy's log-probs are there already."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Judgement, Sample
from srlm_fast.rounds import stages
from srlm_fast.sampler import Sampler

WITHOUT_SEED = {"rounds": "1", "spa__no_seed": "true", "judge__reference": "base"}
Key = tuple[tuple[int, ...], tuple[int, ...]]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Counter[Key]:
    """How often a response was scored behind its prompt."""
    counts: Counter[Key] = Counter()
    score = Sampler.score

    def spy(self: Any, prompts: Any, completions: Any, progress: str = "") -> Any:
        for prompt, group in zip(prompts, completions, strict=True):
            counts.update((tuple(prompt), tuple(ids)) for ids in group)
        return score(self, prompts, completions, progress)

    monkeypatch.setattr(Sampler, "score", spy)
    return counts


@pytest.mark.parametrize(("dtype", "passes"), [("float32", 1), ("bfloat16", 2)])
def test_passes_of_the_judge(
    dtype: str, passes: int, run_loop: Any, tmp_path: Path, scored: Counter[Key]
) -> None:
    """In 32 bits pi_init's alone; in 16 bits both are scored along one path."""
    assert run_loop("spa", tmp_path / "run", dtype=dtype) == 0
    samples = read_jsonl(tmp_path / "run/round-1/samples.jsonl", Sample)
    verdicts = read_jsonl(tmp_path / "run/round-1/judgements.jsonl", Judgement)
    judged = [samples[v.sample] for v in verdicts if v.sample is not None]
    assert judged
    assert {scored[s.prompt_ids, s.response_ids] for s in judged} == {passes}
    if passes == 1:
        for sample, verdict in zip(judged, verdicts, strict=True):
            assert verdict.votes[0].text.startswith(f"log pi={sum(sample.logprobs):.4f} ")


def test_what_was_drawn_in_another_dtype_is_scored_again(
    run_loop: Any, tmp_path: Path, scored: Counter[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dtype: auto` may be another one on the device where a run is resumed."""
    out = tmp_path / "run"

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "drop_unusable", stop)
        assert run_loop("spa", out, **WITHOUT_SEED) == 130
    manifest = json.loads((out / "manifest.json").read_text())
    samples = manifest["stages"]["round-1/samples"]["info"]
    assert samples["dtype"] == "torch.float32"
    samples["dtype"] = "torch.bfloat16"
    (out / "manifest.json").write_text(json.dumps(manifest))
    scored.clear()
    assert run_loop("spa", out, "--resume", **WITHOUT_SEED) == 0
    judged = read_jsonl(out / "round-1/judgements.jsonl", Judgement)
    drawn = read_jsonl(out / "round-1/samples.jsonl", Sample)
    keys = [(drawn[v.sample].prompt_ids, drawn[v.sample].response_ids)
            for v in judged if v.sample is not None]  # fmt: skip
    assert keys and {scored[key] for key in keys} == {2}
