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
from srlm_fast.judge.pairwise import Comparison
from srlm_fast.recipes import load_config
from srlm_fast.rounds import engine, selection, srlm
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


def test_without_any_verdict_the_last_stays() -> None:
    unscored = outcome_rates([None, None])
    assert strongest([1, 2], lambda *_: unscored)[0] == 2
    tie = outcome_rates([None, 0.5])
    assert strongest([1, 2, 3], lambda one, _: tie if one == 2 else unscored)[0] == 1
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


def info(out: Path, model: str = "M2") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    return dict(found["stages"][f"train/{model}"]["info"])


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


def test_stopped_wherever_it_is(
    run_loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a training, while it chooses, between two rounds, and in the next training:
    the result is that of a run that was never stopped."""
    write, candidates = Checkpoints.write, srlm.candidates

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    def write_and_stop(self: Checkpoints, checkpoint: Checkpoint) -> None:
        write(self, checkpoint)
        if checkpoint.step == 2:
            raise KeyboardInterrupt

    def stop_in_round_2(engine: Any, prompts: Any, t: int) -> Any:
        return candidates(engine, prompts, t) if t == 1 else stop()

    changes = CHOOSE | {"rounds": "2"}
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run_loop("srlm", whole, **changes) == 0
    places: list[tuple[Any, str, Any]] = [
        (Checkpoints, "write", write_and_stop),
        (selection, "strongest", stop),
        (srlm, "candidates", stop_in_round_2),
        (Checkpoints, "write", write_and_stop),
    ]
    for place, name, act in places:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, act)
            assert run_loop("srlm", out, *["--resume"][: out.exists()], **changes) == 130
    done = json.loads((out / "manifest.json").read_text())["stages"]
    assert "train/M2" in done and "train/M3" not in done
    under_way = {path.name for path in (out / "state/M3").glob("training-*/*")}
    assert under_way == {"checkpoint-1", "checkpoint-2"}
    assert run_loop("srlm", out, "--resume", **changes) == 0
    for model in ("M2", "M3"):
        assert info(out, model) == info(whole, model)
        one, other = (load_file(o / f"models/{model}/model.safetensors") for o in (out, whole))
        assert all(one[key].equal(other[key]) for key in one)
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
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


def test_a_model_that_cannot_compare_is_its_last_step(
    run_loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the summary says why."""

    class Silent:
        name = "silent"

        def compare(self, prompts: Any, ones: Any, others: Any) -> list[Comparison]:
            return [Comparison(None) for _ in prompts]

    out = tmp_path / "run"
    monkeypatch.setattr(selection, "pairwise_judge", lambda *_: Silent())
    assert run_loop("srlm", out, **CHOOSE) == 0
    training = info(out)
    assert training["best_step"] == training["steps"] > 1
    assert all(contest["prompts"] == 0 for contest in training["checkpoints"])
    [note] = [n for n in json.loads((out / "summary.json").read_text())["notes"] if "verdict" in n]
    assert note.startswith("No comparison of M2's checkpoints gave a verdict")


def test_a_comparison_must_fit_in_the_context_of_the_sandbox_too(
    run_loop: Any, tmp_path: Path, capsys: Any
) -> None:
    changes = CHOOSE | {"pairwise__kind": "prompted"}
    assert run_loop("srlm", tmp_path / "run", **changes) == 2
    assert "pairwise.max_new_tokens = 512 leaves no room" in capsys.readouterr().err


def test_a_prompt_that_is_not_there_is_found_before_the_run(
    run_loop: Any, tmp_path: Path, capsys: Any
) -> None:
    changes = CHOOSE | {"pairwise__kind": "prompted", "pairwise__prompt": "verdikt"}
    assert run_loop("srlm", tmp_path / "run", **changes) == 2
    assert "did you mean verdict?" in capsys.readouterr().err
