"""What SRLM adds to a run, over several processes: it is that of one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from srlm_fast.rounds import selection
from srlm_fast.rounds.engine import Engine
from srlm_fast.train.reference import fingerprint
from tests.rounds.launcher import start
from tests.rounds.test_processes import assert_same_result, launch, words
from tests.rounds.writer import SMALL, WRITES, save_trees, save_writer

# Prompts of a model of their own, answers compared, and the best checkpoint chosen.
CHOOSES = {
    "--preference.load_best_model_at_end": "true",
    "--preference.save_steps": "1",
    "--preference.save_total_limit": "0",
    "--preference.per_device_train_batch_size": "4",
    "--preference.learning_rate": "5e-5",
    "--pairwise.kind": "score",
    "--pairwise.num_prompts": "2",
    "--evaluate.num_prompts": "1",
    "--evaluate.head_to_head": "true",
}
POSITIVES = {"--srlm.training": "positives", "--srlm.positive_score": "3"}


def nothing(rank: int) -> None:
    """A rank as it is."""


def notes_its_choice(world: int, rank: int) -> None:
    """A rank that writes down which checkpoint it took, and what its weights are then."""
    plain = selection.load_best_checkpoint

    def load_best_checkpoint(engine: Engine, *rest: Any) -> dict[str, Any]:
        found = plain(engine, *rest)
        note = found | {"weights": fingerprint(engine.model)}
        Path(f"chosen-{world}-{rank}.json").write_text(json.dumps(note))
        return found

    selection.load_best_checkpoint = load_best_checkpoint


def script() -> None:
    """All runs of this file, in the current folder, and the exit codes of their ranks."""
    start(1, "made", words("made"), nothing)
    writer, trees = save_writer(Path("writer")), save_trees(Path("trees.jsonl"))
    files = {"--model": "made/models/SFT", "--data.trees": trees, "--prompts.model": writer}
    codes = {}
    for world in (1, 2):
        chooses = {**SMALL, **WRITES, **CHOOSES, **files, "--out": f"chooses-{world}"}
        flat = [word for item in chooses.items() for word in item]
        notes = partial(notes_its_choice, world)
        codes[f"chooses-{world}"] = start(world, f"chooses-{world}", flat, notes)
        positives = words(f"positives-{world}", "srlm", **POSITIVES)
        codes[f"positives-{world}"] = start(world, f"positives-{world}", positives, nothing)
    Path("codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    launch("-P", __file__, folder=folder)
    return folder


def stage(runs: Path, run: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runs / run / "manifest.json").read_text())["stages"][name]
    return found


@pytest.mark.parametrize("run", ["chooses", "positives"])
def test_two_processes_are_one_to_rounding(run: str, runs: Path) -> None:
    codes = json.loads((runs / "codes.json").read_text())
    assert codes[f"{run}-1"] == [0], (runs / f"{run}-1-0.err").read_text()
    assert codes[f"{run}-2"] == [0, 0], (runs / f"{run}-2-0.err").read_text()
    assert_same_result(runs / f"{run}-1", runs / f"{run}-2", to_rounding=True)


def test_the_same_checkpoint_is_chosen(runs: Path) -> None:
    one, two = (stage(runs, f"chooses-{world}", "train/M2")["info"] for world in (1, 2))
    assert one["steps"] > 1 and one["best_step"] == two["best_step"]
    assert one["checkpoints"] == two["checkpoints"]


def test_all_ranks_have_the_checkpoint_that_is_saved(runs: Path) -> None:
    one, two = (json.loads((runs / f"chosen-2-{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    assert one["best_step"] == stage(runs, "chooses-2", "train/M2")["info"]["best_step"]


def test_the_same_positives_are_taught(runs: Path) -> None:
    one, two = (stage(runs, f"positives-{world}", "round-1/positives") for world in (1, 2))
    assert one["rows"] == two["rows"] > 0 and one["info"] == two["info"]


if __name__ == "__main__":
    script()
