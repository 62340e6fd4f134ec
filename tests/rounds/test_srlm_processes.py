"""What SRLM adds to a run, over several processes: it is that of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.rounds.launcher import start
from tests.rounds.test_processes import assert_same_result, launch, words
from tests.rounds.writer import SMALL, WRITES, save_trees, save_writer

POSITIVES = {"--srlm.training": "positives", "--srlm.positive_score": "3"}


def nothing(rank: int) -> None:
    """A rank as it is."""


def script() -> None:
    """All runs of this file, in the current folder, and the exit codes of their ranks."""
    start(1, "made", words("made"), nothing)
    writer, trees = save_writer(Path("writer")), save_trees(Path("trees.jsonl"))
    files = {"--model": "made/models/SFT", "--data.trees": trees, "--prompts.model": writer}
    codes = {}
    for world in (1, 2):
        written = {**SMALL, **WRITES, **files, "--out": f"written-{world}"}
        flat = [word for item in written.items() for word in item]
        codes[f"written-{world}"] = start(world, f"written-{world}", flat, nothing)
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


@pytest.mark.parametrize("run", ["written", "positives"])
def test_two_processes_are_one_to_rounding(run: str, runs: Path) -> None:
    codes = json.loads((runs / "codes.json").read_text())
    assert codes[f"{run}-1"] == [0], (runs / f"{run}-1-0.err").read_text()
    assert codes[f"{run}-2"] == [0, 0], (runs / f"{run}-2-0.err").read_text()
    assert_same_result(runs / f"{run}-1", runs / f"{run}-2", to_rounding=True)


def test_the_same_positives_are_taught(runs: Path) -> None:
    one, two = (stage(runs, f"positives-{world}", "round-1/positives") for world in (1, 2))
    assert one["rows"] == two["rows"] > 0 and one["info"] == two["info"]


if __name__ == "__main__":
    script()
