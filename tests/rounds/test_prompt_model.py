"""Prompts that a model of their own writes: loaded for that alone."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from srlm_fast.data.files import task_from_files
from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import PromptRow, prompt_text
from srlm_fast.data.template import ChatTemplate
from srlm_fast.errors import UserError
from srlm_fast.loop import main
from srlm_fast.model.load import load_model, load_tokenizer
from srlm_fast.prompts.self_instruct import new_prompts
from srlm_fast.recipes import load_config
from srlm_fast.rounds import engine, srlm
from srlm_fast.rounds.manifest import Run, stage_seed
from srlm_fast.sampler import Sampler
from tests.rounds.writer import SMALL, WORDS, WRITES, save_trees, save_writer


@pytest.fixture(scope="module")
def places(run_loop: Any, tmp_path_factory: Any) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("places")
    assert run_loop("spa", folder / "made", rounds="1") == 0
    return {
        "--model": str(folder / "made/models/SFT"),
        "--data.trees": save_trees(folder / "trees.jsonl"),
        "--prompts.model": save_writer(folder / "writer"),
    }


def run(out: Path, settings: dict[str, str], *flags: str) -> int:
    words = [word for item in {**SMALL, **WRITES, **settings}.items() for word in item]
    return main([*words, "--out", str(out), *flags])


@pytest.fixture(scope="module")
def loaded() -> list[weakref.ref[Any]]:
    """The models that were loaded from the writer's folder."""
    return []


@pytest.fixture(scope="module")
def whole(places: dict[str, str], loaded: list[Any], tmp_path_factory: Any) -> Path:
    """A run of two rounds, in which the writer must be gone when candidates are drawn."""
    out: Path = tmp_path_factory.mktemp("whole") / "run"
    load, draw = engine.load_model, srlm.candidates

    def load_and_note(path: str, **options: Any) -> Any:
        model = load(path, **options)
        if path == places["--prompts.model"]:
            loaded.append(weakref.ref(model))
        return model

    def draw_and_look(*args: Any) -> Any:
        assert all(model() is None for model in loaded)
        return draw(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "load_model", load_and_note)
        patch.setattr(srlm, "candidates", draw_and_look)
        assert run(out, {**places, "--rounds": "2"}) == 0
    return out


def texts(out: Path, t: int) -> list[str]:
    rows = read_jsonl(out / f"round-{t}/prompts.jsonl", PromptRow)
    return [prompt_text(row.prompt) for row in rows]


def test_it_is_loaded_in_each_round_and_let_go(whole: Path, loaded: list[Any]) -> None:
    assert len(loaded) == 2, "freed, as the run itself asserts"


def test_the_prompts_are_its_own(whole: Path, places: dict[str, str]) -> None:
    """What `new_prompts` makes with that model alone, outside any run."""
    settings = {**places, **WRITES, **SMALL}
    config = load_config("srlm", {k[2:]: v for k, v in settings.items() if k != "--recipe"})
    task, folder = task_from_files(config), config.prompts.model
    tokenizer = load_tokenizer(folder)
    sampler = Sampler(load_model(folder, device=torch.device("cpu")), tokenizer)
    held_out = [*task.test_prompts, *(group.prompt for group in task.judge_test)]
    expected, _ = new_prompts(
        sampler, ChatTemplate(tokenizer), [e.prompt for e in task.ift], config.prompts,
        seed=stage_seed(0, "prompts-1"), round=1, avoid=map(prompt_text, held_out),
    )  # fmt: skip
    assert texts(whole, 1) == [prompt_text(prompt) for prompt in expected]
    assert {word for t in (1, 2) for text in texts(whole, t) for word in text.split()} <= {*WORDS}
    assert not {*texts(whole, 1)} & {*texts(whole, 2)}


def test_a_resumed_run_loads_it_only_for_prompts_that_are_missing(
    whole: Path, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, out, load = Run._save, tmp_path / "run", engine.load_model
    found: list[str] = []

    def save_and_stop(run: Run) -> None:
        save(run)
        if [*run.manifest["stages"]][-1:] == ["round-1/prompts"]:
            raise KeyboardInterrupt

    def noting(path: str, **options: Any) -> Any:
        found.append(path)
        return load(path, **options)

    settings = {**places, "--rounds": "2"}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", save_and_stop)
        assert run(out, settings) == 130
    monkeypatch.setattr(engine, "load_model", noting)
    assert run(out, settings, "--resume") == 0
    assert found.count(places["--prompts.model"]) == 1, "for round 2"
    for path in whole.rglob("*.jsonl"):
        assert path.read_bytes() == (out / path.relative_to(whole)).read_bytes(), path.name


def test_it_must_stay_the_same_while_a_run_is_unfinished(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    writer = save_writer(tmp_path / "writer")
    settings = {**places, "--prompts.model": writer}

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "sft", stop)
        assert run(tmp_path / "run", settings) == 130
    config = Path(writer) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 5.0}))
    assert run(tmp_path / "run", settings, "--resume") == 2
    assert "config.json was changed after the run began" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"--prompts.model": "nowhere/at/all"}, "model folder 'nowhere/at/all' does not exist"),
        ({"--prompts.max_new_tokens": "256"}, "leaves no room for a list of tasks"),
        ({"--prompts.chat_template": "nothing"}, "unknown chat template 'nothing'"),
        (
            {"--prompts.model": "", "--prompts.max_new_tokens": "100000"},
            "prompts.max_new_tokens = 100000 leaves no room for a prompt in the model's context",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_run(
    settings: dict[str, str], complaint: str, places: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    assert run(tmp_path / "run", {**places, **settings}) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_writer_without_a_chat_template_is_told_where_to_name_one(
    places: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    writer = save_writer(tmp_path / "writer", chat=None)
    assert run(tmp_path / "run", {**places, "--prompts.model": writer}) == 2
    said = capsys.readouterr().err
    assert f"prompts.model {writer}" in said and "--prompts.chat_template: chatml" in said


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"prompts.model": "m", "prompts.source": "dataset"}, "leave one out"),
        ({"prompts.chat_template": "plain"}, "the run's is template"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_config("srlm", settings)
