"""CREAM's weight: against its formula, from models that plain transformers runs."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from srlm_fast.config import Config, PairsConfig, PreferenceConfig, SPAConfig
from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Pair, Sample, user
from srlm_fast.errors import UserError
from srlm_fast.rounds.cream import consistency, weighted


def tau(x: list[float], y: list[float]) -> float:
    """Kendall's, without ties: pairs in the same order less pairs in opposite orders."""
    n = len(x)
    same = sum((x[i] < x[j]) == (y[i] < y[j]) for j in range(n) for i in range(j))
    return 2 * (2 * same) / (n * (n - 1)) - 1


def test_consistency_is_the_share_of_candidates_in_the_same_order() -> None:
    rng = random.Random(0)
    for n in (2, 3, 5, 8):
        x, y = ([rng.gauss(0, 3) for _ in range(n)] for _ in range(2))
        assert consistency(x, y) == pytest.approx((tau(x, y) + 1) / 2, abs=1e-12)
    assert consistency([1, 2, 3], [-7, 0, 9]) == 1 and consistency([1, 2, 3], [9, 0, -7]) == 0
    assert consistency([1, 2], [4, 4]) is None


# Of four candidates of two prompts, and one without company.
POLICY = [[-5.0, -4.0, -9.0], [-3.0, -8.0], [-1.0]]
PREVIOUS = [[-6.0, -4.0, -7.0], [-9.0, -7.0], [-1.0]]
START = [[-6.0, -6.0, -6.5], [-5.0, -5.0], [-1.0]]
LENGTHS = [[2, 1, 5], [2, 4], [3]]


class Fixed:
    """Scores as it was told, spread over the tokens."""

    def __init__(self, sums: list[list[float]]) -> None:
        self.sums = sums

    def score(self, prompts: Any, completions: Any, progress: str = "") -> list[list[torch.Tensor]]:
        return [
            [torch.full((len(ids),), self.sums[prompt[0]][i] / len(ids), dtype=torch.float64)
             for i, ids in enumerate(group)]
            for prompt, group in zip(prompts, completions, strict=True)
        ]  # fmt: skip


def fake(kind: str, lineage: list[str], start: Any = START) -> Any:
    models = {"M0": Fixed(start), "M1": Fixed(PREVIOUS)}
    pairs = SimpleNamespace(consistency=kind)
    return SimpleNamespace(
        config=SimpleNamespace(pairs=pairs), sampler=Fixed(POLICY), scorer=models.__getitem__,
        lineage=lineage,
    )  # fmt: skip


def groups_and_pairs() -> tuple[list[list[Sample]], list[Pair]]:
    groups = [
        [
            Sample(user(f"{p}"), (p,), "", tuple(range(n)), (), "stop", i, 0, 1)
            for i, n in enumerate(lengths)
        ]
        for p, lengths in enumerate(LENGTHS)
    ]
    pairs = [Pair(user(f"{p}"), (p,), "", (1,), "", (2,), 1.0, 0.0, 1) for p in (0, 0, 1)]
    return groups, pairs


def test_each_prompt_has_its_own_consistency() -> None:
    """Rewards of the first prompt: 1, 2, -2.5 now and 0, 2, -0.5 before; of the second: 2, -3 and
    -4, -2."""
    groups, pairs = groups_and_pairs()
    found, dropped, report = weighted(fake("dyn", ["M0", "M1", "M2"]), pairs, groups)
    assert [pair.label_smoothing for pair in found] == [0, 0, 1]
    assert report == {"mean": 0.5, "min": 0, "max": 1} and not +dropped


def test_or_all_have_the_mean() -> None:
    groups, pairs = groups_and_pairs()
    found, _, _ = weighted(fake("avg", ["M0", "M1", "M2"]), pairs, groups)
    assert [pair.label_smoothing for pair in found] == [0.5, 0.5, 0.5]


def test_the_first_model_ranks_by_its_likelihood_of_a_token() -> None:
    """-3, -6, -1.3 against 1, 2, -2.5, and -2.5, -1.25 against 2, -3: both in opposite orders."""
    groups, pairs = groups_and_pairs()
    found, _, _ = weighted(fake("dyn", ["M0", "M2"]), pairs, groups)
    assert [pair.label_smoothing for pair in found] == [1, 1, 1]


def test_pairs_that_a_model_cannot_rank_are_dropped() -> None:
    """The reward of the second prompt's candidates is the same now."""
    groups, pairs = groups_and_pairs()
    start = [START[0], [-3.0, -8.0], [-1.0]]
    found, dropped, _ = weighted(fake("dyn", ["M0", "M1", "M2"], start), pairs, groups)
    assert [pair.prompt_ids for pair in found] == [(0,), (0,)]
    assert dropped == {"no consistency": 1}


def log_likelihood(model: Any, sample: Sample) -> float:
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0].double().log_softmax(-1)
    start = len(sample.prompt_ids) - 1
    return sum(float(logp[start + i, y]) for i, y in enumerate(sample.response_ids))


@pytest.mark.parametrize("lora", ["0", "4"])
def test_a_run(lora: str, run_loop: Any, tmp_path: Path) -> None:
    """Both rounds' smoothing from the models that the run saved: M0 ranks for M1, M1 for M2."""
    pytest.importorskip("peft", reason="peft is not installed (extra [peft])")
    changes = {"lora__r": lora, "preference__learning_rate": "1e-3", "sft__learning_rate": "1e-3"}
    assert run_loop("srlm", tmp_path / "run", pairs__consistency="dyn", **changes) == 0
    models = {}
    for name in ("M0", "M1", "M2"):
        folder = tmp_path / "run" / "models" / name
        models[name] = AutoModelForCausalLM.from_pretrained(folder).double()
    for t in (1, 2):
        folder = tmp_path / "run" / f"round-{t}"
        by_prompt: dict[tuple[int, ...], list[Sample]] = {}
        seen = set()
        for sample in read_jsonl(folder / "samples.jsonl", Sample):
            if sample.response.strip() and (sample.prompt_ids, sample.response) not in seen:
                by_prompt.setdefault(sample.prompt_ids, []).append(sample)
                seen.add((sample.prompt_ids, sample.response))
        pairs = read_jsonl(folder / "pairs.jsonl", Pair)
        assert len(pairs) >= 4
        for pair in pairs:
            logp = {
                name: [log_likelihood(model, s) for s in by_prompt[pair.prompt_ids]]
                for name, model in models.items()
            }
            now, before = (
                [a - b for a, b in zip(logp[name], logp["M0"], strict=True)]
                for name in (f"M{t}", f"M{t - 1}")
            )
            if t == 1:
                lengths = [len(s.response_ids) for s in by_prompt[pair.prompt_ids]]
                before = [a / n for a, n in zip(logp["M0"], lengths, strict=True)]
            assert pair.label_smoothing == pytest.approx(1 - (tau(now, before) + 1) / 2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    reports = [model["consistency"] for model in summary["models"]]
    assert reports[:2] == [None, None] and all(0 <= r["mean"] <= 1 for r in reports[2:])
    assert any(pair.label_smoothing not in (0, 1) for pair in pairs)
    assert math.isfinite(summary["models"][-1]["training"]["loss_last"])


def test_senseless_settings_are_refused() -> None:
    cream = PairsConfig(consistency="avg")
    with pytest.raises(UserError, match=r"set preference\.loss_type to sigmoid"):
        Config(pairs=cream, preference=PreferenceConfig(loss_type="ipo"))
    with pytest.raises(UserError, match="label_smoothing to 0"):
        Config(pairs=cream, preference=PreferenceConfig(label_smoothing=0.1))
    with pytest.raises(UserError, match="both smooth labels"):
        Config(pairs=cream, method="spa")
    Config(pairs=cream, method="spa", spa=SPAConfig(self_refinement=False))
    with pytest.raises(UserError, match="without a seed the first has none"):
        Config(pairs=cream, method="spa", spa=SPAConfig(self_refinement=False, no_seed=True))
