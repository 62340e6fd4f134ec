"""A run that was stopped anywhere and resumed ends as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from srlm_fast.rounds.manifest import Run
from srlm_fast.train.checkpoint import Checkpoint, Checkpoints

MODELS = {"spa": ["SFT", "DPO", "SPA1", "SPA2"], "srlm": ["SFT", "M1", "M2", "M3"]}


def data_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.jsonl"))}


def assert_same_run(method: str, one: Path, other: Path) -> None:
    assert data_files(one) == data_files(other)
    for name in MODELS[method]:
        a = load_file(one / "models" / name / "model.safetensors")
        b = load_file(other / "models" / name / "model.safetensors")
        assert a.keys() == b.keys()
        assert all(a[key].equal(b[key]) for key in a), name


class Stopped(BaseException):
    """Not an Exception, so that no handler of the product can swallow it."""


@pytest.mark.parametrize("method", ["spa", "srlm"])
def test_stop_after_every_stage_and_resume(
    method: str, run_loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_loop(method, tmp_path / "whole") == 0
    save = Run._save

    def save_and_stop(run: Run) -> None:
        save(run)
        if run.manifest["stages"]:
            raise Stopped

    stops = 0
    monkeypatch.setattr(Run, "_save", save_and_stop)
    while True:
        try:
            flags = ["--resume"] if stops else []
            assert run_loop(method, tmp_path / "stopped", *flags) == 0
            break
        except Stopped:
            stops += 1
    assert stops >= 10
    assert_same_run(method, tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("model", ["DPO", "SPA2"])
def test_stop_in_the_middle_of_training(
    model: str, run_loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that a killed stage had changed in memory, and metrics it had written, are gone."""
    assert run_loop("spa", tmp_path / "whole") == 0
    logger = Run.logger

    def stopping(run: Run, name: str) -> Any:
        log = logger(run, name)

        def log_and_stop(row: dict[str, float]) -> None:
            log(row)
            if name == f"train/{model}":
                raise KeyboardInterrupt

        return log_and_stop

    with monkeypatch.context() as patch:
        patch.setattr(Run, "logger", stopping)
        assert run_loop("spa", tmp_path / "stopped") == 130
    assert run_loop("spa", tmp_path / "stopped", "--resume") == 0
    assert_same_run("spa", tmp_path / "whole", tmp_path / "stopped")


def test_stop_after_every_step_of_every_training(
    run_loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training goes on from its last checkpoint: were it to begin anew, there would be no end."""
    changes = {
        "sft__save_steps": "1", "sft__logging_steps": "2", "preference__save_steps": "1",
        "preference__reference_cache": "states",
    }  # fmt: skip
    assert run_loop("spa", tmp_path / "whole", **changes) == 0
    write = Checkpoints.write

    def write_and_interrupt(checkpoints: Checkpoints, found: Checkpoint) -> None:
        write(checkpoints, found)
        raise KeyboardInterrupt

    stops = 0
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "write", write_and_interrupt)
        while code := run_loop("spa", tmp_path / "stopped", *["--resume"][:stops], **changes):
            assert code == 130
            stops += 1
    stages = json.loads((tmp_path / "whole" / "manifest.json").read_text())["stages"]
    assert stops == sum(
        stage["info"].get("steps", 0) for name, stage in stages.items() if name.startswith("train/")
    )
    assert_same_run("spa", tmp_path / "whole", tmp_path / "stopped")
    assert not list((tmp_path / "stopped" / "state").iterdir()), "nothing is left of it"


def test_kill_nine(run_loop: Any, tmp_path: Path, cache: Path) -> None:
    """A real SIGKILL in a real process: between stages, in a training and in a round."""
    often = {"sft__save_steps": "1", "preference__save_steps": "1"}
    assert run_loop("spa", tmp_path / "whole", **often) == 0
    stored = tmp_path / "config.yaml"
    stored.write_bytes((tmp_path / "whole" / "config.yaml").read_bytes())
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "srlm_fast.loop", "--recipe", str(stored), "--out", str(out)]
    kills = 0
    for place in ("models/M0", "state/DPO/*/checkpoint-2", "round-1/samples.jsonl"):
        resume = ["--resume"] if out.exists() else []
        process = subprocess.Popen([*command, *resume], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not list(out.glob(place)):
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        assert process.wait(timeout=120) in (0, -signal.SIGKILL)
    assert kills >= 1
    assert run_loop("spa", out, "--resume", **often) == 0
    assert_same_run("spa", tmp_path / "whole", out)
