"""The run folder: locked, tamper-evident, and whole after a failure."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from srlm_fast.data import jsonl
from srlm_fast.data.records import PromptRow, user
from srlm_fast.errors import UserError
from srlm_fast.recipes import load_config
from srlm_fast.rounds.manifest import Run, file_digest, stage_seed

ROWS = [PromptRow(user("one")), PromptRow(user("two"))]


def open_run(folder: Path) -> Run:
    return Run(folder, load_config("sandbox-spa"), {"torch": "x"})


def test_a_finished_stage_is_not_made_again(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    assert run.records("a/rows", PromptRow, lambda: (ROWS, {"dropped": {"tie": 2}})) == ROWS
    run.close()
    again = open_run(tmp_path)

    def never() -> tuple[list[PromptRow], dict[str, int]]:
        raise AssertionError("made twice")

    assert again.records("a/rows", PromptRow, never) == ROWS
    assert again.info("a/rows") == {"dropped": {"tie": 2}}


def test_a_failed_stage_leaves_nothing_behind(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(ZeroDivisionError):
        run.records("a", PromptRow, lambda: (ROWS, {"x": 1 / 0}))
    assert not run.done("a") and not (tmp_path / "a.jsonl").exists()
    assert json.loads((tmp_path / "manifest.json").read_text())["stages"] == {}


def test_a_folder_serves_one_run_at_a_time(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(UserError, match="in use"):
        open_run(tmp_path)
    run.close()
    open_run(tmp_path).close()


@pytest.mark.parametrize("damage", ["edit", "delete"])
def test_changed_files_are_noticed(damage: str, tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.records("a", PromptRow, lambda: (ROWS, {}))
    path = tmp_path / "a.jsonl"
    path.write_text(path.read_text().replace("one", "1")) if damage == "edit" else path.unlink()
    with pytest.raises(UserError, match=r"a\.jsonl is missing or was changed"):
        run.records("a", PromptRow, lambda: (ROWS, {}))


def test_metrics_of_an_unfinished_stage_are_cut(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.result("first", lambda: run.logger("first")({"loss": 1.0}) or {})
    run.logger("second")({"loss": 2.0})
    run.close()
    open_run(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"stage": "first", "loss": 1.0}]


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jsonl.os, "fsync", full)
    with pytest.raises(UserError, match="full"):
        run.records("a", PromptRow, lambda: (ROWS, {}))
    monkeypatch.undo()
    assert run.records("a", PromptRow, lambda: (ROWS, {})) == ROWS


def test_another_configuration_is_another_run(tmp_path: Path) -> None:
    open_run(tmp_path).close()
    with pytest.raises(UserError, match=r"config\.yaml was changed"):
        Run(tmp_path, load_config("sandbox-spa", {"seed": "1"}), {})


def test_changed_inputs_are_noticed(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    config = load_config("sandbox-spa")
    Run(tmp_path / "run", config, {}, {"data": file_digest(data)}).close()
    data.write_text("{ }")
    with pytest.raises(UserError, match="data was changed"):
        Run(tmp_path / "run", config, {}, {"data": file_digest(data)})


def test_a_lost_manifest_is_no_new_run(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.records("a", PromptRow, lambda: (ROWS, {}))
    run.close()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no manifest\.json"):
        open_run(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        open_run(tmp_path)


def test_other_versions_are_kept_beside_the_first(tmp_path: Path) -> None:
    config = load_config("sandbox-spa")
    for i, version in enumerate("122"):
        run = Run(tmp_path, config, {"torch": version})
        run.result(f"stage {i % 2}", dict)
        run.close()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["versions"] == [{"torch": "1"}, {"torch": "2"}]


def test_stage_seeds_are_independent_and_stable() -> None:
    assert stage_seed(0, "candidates-1") == stage_seed(0, "candidates-1")
    seeds = {stage_seed(s, f"candidates-{t}") for s in range(10) for t in range(10)}
    assert len(seeds) == 100 and all(0 <= s < 2**31 for s in seeds)
