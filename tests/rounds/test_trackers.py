"""Trackers get what metrics.jsonl gets; a missing one is said before a run starts."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from srlm_fast.errors import UserError
from srlm_fast.rounds.trackers import Trackers, check_trackers

ROWS = [{"step": 10.0, "loss": 0.7}, {"step": 20.0, "loss": 0.6}]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What stand-ins for the three packages were asked to do."""
    found: list[tuple[str, Any]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            found.append(("open", folder))

        def add_scalar(self, *words: Any) -> None:
            found.append(("scalar", words))

        def close(self) -> None:
            found.append(("close", None))

    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    service: Any = ModuleType("wandb")
    service.init = lambda **options: found.append(("init", options))
    service.log = lambda row: found.append(("log", row))
    service.finish = lambda: found.append(("finish", None))
    for name, module in (("torch.utils.tensorboard", board), ("wandb", service)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "trackio", None)
    return found


def test_tensorboard_gets_scalars_by_stage(calls: list[tuple[str, Any]], tmp_path: Path) -> None:
    trackers = Trackers(["tensorboard"], tmp_path, {})
    for row in ROWS:
        trackers.log("train/M1", row)
    trackers.close()
    assert calls[0] == ("open", str(tmp_path / "tensorboard")) and calls[-1] == ("close", None)
    assert ("scalar", ("train/M1/loss", 0.6, 20)) in calls


def test_services_go_on_with_the_run(calls: list[tuple[str, Any]], tmp_path: Path) -> None:
    trackers = Trackers(["wandb"], tmp_path, {"seed": 3})
    trackers.log("train/M1", ROWS[0])
    trackers.close()
    (_, options), *rest = calls
    assert options["id"] == options["name"] == tmp_path.name and options["resume"] == "allow"
    assert options["config"] == {"seed": 3}
    assert rest == [("log", {"train/M1/step": 10.0, "train/M1/loss": 0.7}), ("finish", None)]


def test_rows_that_a_resumed_run_gives_again_reach_services_once(
    calls: list[tuple[str, Any]], tmp_path: Path
) -> None:
    """Twice stopped: the second time before it came as far as the first time."""
    for count in (2, 1, 3):
        trackers = Trackers(["wandb", "tensorboard"], tmp_path, {})
        trackers.log("train/SFT" if count == 3 else "train/M1", ROWS[0])
        for step in range(count):
            trackers.log("train/M2", {"step": float(step)})
        trackers.close()
    logged = [words for kind, words in calls if kind == "log"]
    assert [row for row in logged if "train/M2/step" in row] == [
        {"train/M2/step": float(step)} for step in range(3)
    ]
    assert sum("train/M1/loss" in row for row in logged) == 1
    assert sum("train/SFT/loss" in row for row in logged) == 1
    scalars = [words for kind, words in calls if kind == "scalar" and "M2" in words[0]]
    assert len(scalars) == 6, "it shows one of each step"


def test_what_is_missing_or_unknown_is_said_at_the_start(calls: list[tuple[str, Any]]) -> None:
    check_trackers(["wandb", "tensorboard"])
    with pytest.raises(UserError, match=r"report_to trackio does not load .*pip install trackio"):
        check_trackers(["wandb", "trackio"])
    with pytest.raises(UserError, match="knows tensorboard, trackio, wandb, not 'mlflow'"):
        check_trackers(["mlflow"])
    assert not calls


def test_real_tensorboard_files_can_be_read(tmp_path: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard"
    )
    trackers = Trackers(["tensorboard"], tmp_path, {})
    for row in ROWS:
        trackers.log("train/M1", row)
    trackers.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(e.step, round(e.value, 6)) for e in events.Scalars("train/M1/loss")]
    assert found == [(10, 0.7), (20, 0.6)], json.dumps(found)
