"""The checkpoint that a pairwise judge prefers becomes the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from srlm_fast.config import Config, EvaluateConfig, PairwiseConfig, PreferenceConfig
from srlm_fast.data.records import user
from srlm_fast.data.task import Task
from srlm_fast.errors import UserError
from srlm_fast.evaluate.responses import outcome_rates
from srlm_fast.recipes import load_config
from srlm_fast.rounds import engine, selection
from srlm_fast.rounds.selection import strongest, validation_prompts
from srlm_fast.train.checkpoint import Checkpoint, Checkpoints, saved_weights

CHOOSE = {
    "rounds": "1",
    "preference__load_best_model_at_end": "true",
    "preference__save_steps": "1",
    "preference__save_total_limit": "0",
    "preference__learning_rate": "3e-4",
    "preference__per_device_train_batch_size": "2",
    "pairwise__kind": "score",
    "pairwise__num_prompts": "6",
    "judge__kind": "random",
}


def test_each_challenges_the_best_before_it() -> None:
    strength = {2: 1, 4: 3, 6: 3, 8: 2}

    def contest(one: int, other: int) -> dict[str, Any]:
        better, worse = strength[one], strength[other]
        outcome = float(better > worse) if better != worse else 0.5
        return outcome_rates([outcome] * 3 + [None])

    best, contests = strongest([2, 4, 6, 8], contest)
    assert best == 4, "of equals the earlier"
    assert [(c["step"], c["against"]) for c in contests] == [(4, 2), (6, 4), (8, 4)]
    assert [(c["win"], c["tie"], c["lose"]) for c in contests] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert all(c["unscored"] == 1 for c in contests)


def test_without_a_verdict_the_first_stays() -> None:
    assert strongest([1, 2], lambda *_: outcome_rates([None, None]))[0] == 1
    assert strongest([7], lambda *_: outcome_rates([1.0])) == (7, [])


def test_prompts_to_choose_on_are_in_no_evaluation() -> None:
    config = Config(
        preference=PreferenceConfig(load_best_model_at_end=True, save_steps=1),
        pairwise=PairwiseConfig(num_prompts=2),
        evaluate=EvaluateConfig(num_prompts=3),
    )
    prompts = [user(str(i)) for i in range(6)]
    assert validation_prompts(config, Task("t", test_prompts=prompts)) == prompts[3:5]
    with pytest.raises(UserError, match=r"needs 2 .* leaves 1 of 4 test prompts; raise data.num"):
        validation_prompts(config, Task("t", test_prompts=prompts[:4]))
    assert validation_prompts(Config(), Task("t")) == ()


def test_remains_of_a_removed_checkpoint_are_no_weights(tmp_path: Path) -> None:
    """A run that was killed while it removed one goes on, and may write no other."""
    assert saved_weights(tmp_path, 2) == {}
    kept = Checkpoints(tmp_path / "training-1", limit=0)
    for step in (2, 9, 10):
        kept.write(Checkpoint(step, [], [{}], {"weight/w": torch.zeros(1)}))
    files = {step: kept.folder / f"checkpoint-{step}/state.safetensors" for step in (2, 9, 10)}
    assert list(saved_weights(tmp_path, 0).items()) == list(files.items()), "in order"
    files.pop(2).unlink()
    assert saved_weights(tmp_path, 2) == files


Seen = dict[str, list[torch.Tensor]]


@pytest.fixture(scope="module")
def seen() -> Seen:
    """A weight of the model that answers, and of the one that judges, each time it does."""
    return {"answers": [], "judges": []}


@pytest.fixture(scope="module")
def chosen(run_loop: Any, tmp_path_factory: Any, seen: Seen) -> Path:
    """A run whose checkpoints are kept to be looked at."""
    out: Path = tmp_path_factory.mktemp("chosen") / "run"
    sample, pairwise_judge = engine.Engine.candidates, selection.pairwise_judge

    def candidates(self: Any, prompts: Any, *, stage: str, **others: Any) -> Any:
        if stage == "select/M2":
            seen["answers"].append(self.model.model.norm.weight.detach().clone())
        return sample(self, prompts, stage=stage, **others)

    def judge(self: Any, stage: str) -> Any:
        seen["judges"].append(self.model.model.norm.weight.detach().clone())
        return pairwise_judge(self, stage)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Engine, "_forget", lambda self, name: None)
        patch.setattr(engine.Engine, "candidates", candidates)
        patch.setattr(selection, "pairwise_judge", judge)
        assert run_loop("srlm", out, **CHOOSE) == 0
    return out


def info(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return dict(found["stages"]["train/M2"]["info"])


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    [file] = out.glob(f"state/M2/training-*/checkpoint-{step}/state.safetensors")
    return {k.removeprefix("weight/"): t for k, t in load_file(file).items() if "weight/" in k}


def test_the_best_checkpoint_becomes_the_model(chosen: Path) -> None:
    training = info(chosen)
    assert training["steps"] > 2
    assert [c["step"] for c in training["checkpoints"]] == list(range(2, training["steps"] + 1))
    model = load_file(chosen / "models/M2/model.safetensors")
    best = weights(chosen, training["best_step"])
    assert best.keys() == model.keys() and all(best[key].equal(model[key]) for key in model)
    others = {*range(1, training["steps"] + 1)} - {training["best_step"]}
    assert all(not weights(chosen, s)[k].equal(model[k]) for s in others for k in list(model)[:1])


def test_each_checkpoint_answers_and_the_model_before_the_training_judges(
    chosen: Path, seen: Seen
) -> None:
    name = "model.norm.weight"
    saved = [weights(chosen, step)[name] for step in range(1, info(chosen)["steps"] + 1)]
    assert len(saved) == len(seen["answers"])
    assert all(one.equal(other) for one, other in zip(saved, seen["answers"], strict=True))
    [judge] = seen["judges"]
    assert judge.equal(load_file(chosen / "models/M1/model.safetensors")[name])
    assert not judge.equal(saved[0])


def model_file(out: Path) -> dict[str, torch.Tensor]:
    [file] = (out / "models/M2").glob("*.safetensors")
    found: dict[str, torch.Tensor] = load_file(file)
    return found


@pytest.mark.parametrize("rank", ["0", "4"], ids=["all weights", "adapters"])
def test_the_last_step_is_a_candidate_though_it_was_not_saved(
    rank: str, run_loop: Any, chosen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when it is chosen, the result is that of a run that chooses nothing."""
    if rank != "0":
        pytest.importorskip("peft", reason="peft is not installed (extra [peft])")
    steps = info(chosen)["steps"]
    changes = CHOOSE | {"preference__save_steps": str(steps - 1), "lora__r": rank}
    strongest = "srlm_fast.rounds.selection.strongest"
    with monkeypatch.context() as patch:
        patch.setattr(selection, "load_best_checkpoint", lambda *_: {})
        assert run_loop("srlm", tmp_path / "nothing", **changes) == 0
    models = [model_file(tmp_path / "nothing")]
    for place in (-1, 0):
        monkeypatch.setattr(strongest, lambda steps, _, place=place: (steps[place], []))
        assert run_loop("srlm", tmp_path / str(place), **changes) == 0
        models.append(model_file(tmp_path / str(place)))
    nothing, last, first = models
    assert all(nothing[key].equal(last[key]) for key in nothing)
    assert not all(nothing[key].equal(first[key]) for key in nothing)


def test_stopped_while_it_chooses(
    run_loop: Any, chosen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(selection, "strongest", stop)
        assert run_loop("srlm", out, **CHOOSE) == 130
    assert run_loop("srlm", out, "--resume", **CHOOSE) == 0
    assert info(out) == info(chosen)
    one, other = (load_file(o / "models/M2/model.safetensors") for o in (out, chosen))
    assert all(one[key].equal(other[key]) for key in one)
    assert not list((out / "state").iterdir()), "nothing is left of it"


BEST = {"preference.load_best_model_at_end": "true", "preference.save_steps": "5"}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"pairwise.kind": "score"}, "pairwise compares checkpoints .* set one of them"),
        ({"preference.load_best_model_at_end": "true"}, "set preference.save_steps$"),
        (BEST | {"method": "spa"}, "is for method srlm with srlm.training: preference"),
        (
            BEST | {"srlm.training": "positives"},
            "is for method srlm with srlm.training: preference",
        ),
        (BEST | {"online": "true"}, "load_best_model_at_end must be False where pairs are made"),
        (BEST | {"preference.parallel": "shard"}, "needs preference.parallel: replicate"),
        (BEST | {"pairwise.kind": "score", "judge.kind": "implicit"}, "grows by drift alone"),
        (BEST | {"pairwise.kind": "score", "pairwise.prompt": "x"}, "asks nobody to compare"),
        (
            {
                "evaluate.head_to_head": "true",
                "pairwise.kind": "score",
                "judge.kind": "implicit",
            },
            "grows by drift alone",
        ),
        (
            {"evaluate.head_to_head": "true", "pairwise.num_prompts": "9"},
            "num_prompts is of preference.load_best_model_at_end",
        ),
        (BEST | {"pairwise.num_prompts": "0"}, "num_prompts must be at least 1"),
        (BEST | {"pairwise.max_new_tokens": "0"}, "max_new_tokens must be at least 1"),
        (BEST | {"pairwise.top_p": "0"}, "top_p must be above 0"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_config("srlm", settings)


def test_a_prompt_that_is_not_there_is_found_before_the_run(
    run_loop: Any, tmp_path: Path, capsys: Any
) -> None:
    changes = CHOOSE | {"pairwise__kind": "prompted", "pairwise__prompt": "verdikt"}
    assert run_loop("srlm", tmp_path / "run", **changes) == 2
    assert "did you mean verdict?" in capsys.readouterr().err
