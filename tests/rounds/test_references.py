"""What a round trains against: the average of the models so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from srlm_fast.rounds import engine as engines
from srlm_fast.train.preference import train_preference

MODELS = {"srlm": ["M1", "M2", "M3"], "spa": ["SFT", "DPO", "SPA1"]}


@pytest.mark.parametrize("method", ["srlm", "spa"])
def test_ema_is_the_moving_average_of_the_models_so_far(
    method: str, run_loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ref_1 = M_1 (spa: pi_init), ref_t = a M_t + (1 - a) ref_{t-1}, in a run that was resumed
    before its last training; and no model is changed by it."""
    seen: list[dict[str, torch.Tensor]] = []
    stops = []

    def spy(model: Any, reference: Any, *args: Any, **options: Any) -> Any:
        seen.append({name: p.detach().clone() for name, p in reference.named_parameters()})
        if len(seen) == 2 and not stops:
            stops.append(seen.pop())
            raise KeyboardInterrupt
        return train_preference(model, reference, *args, **options)

    monkeypatch.setattr(engines, "train_preference", spy)
    changes = {
        "preference__reference": "ema", "preference__ref_model_mixup_alpha": "0.25",
        "preference__learning_rate": "1e-3",
    }  # fmt: skip
    assert run_loop(method, tmp_path / "run", **changes) == 130
    assert run_loop(method, tmp_path / "run", "--resume", **changes) == 0
    folders = [tmp_path / "run" / "models" / name for name in MODELS[method]]
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    average = {name: p.detach().double() for name, p in models[0].named_parameters()}
    for reference, model in zip(seen, models, strict=False):
        for name, weight in model.named_parameters():
            average[name] = 0.25 * weight.detach().double() + 0.75 * average[name]
            torch.testing.assert_close(reference[name].double(), average[name], atol=1e-6, rtol=0)
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in average)
    rows = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stage = f"train/{'M3' if method == 'srlm' else 'SPA1'}"
    assert next(r for r in rows if r["stage"] == stage)["rewards/margins"] != 0
    notes = json.loads((tmp_path / "run" / "summary.json").read_text())["notes"]
    assert any("average of the models so far" in note for note in notes)
