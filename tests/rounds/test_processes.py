"""A whole recipe over several processes: the run of one process, written and told once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import srlm_kernels
from srlm_fast.errors import UserError
from tests.rounds.conftest import METHODS, TINY
from tests.rounds.launcher import at_first_row, start

ROOT, PACKAGE = Path(__file__).parents[2], Path(srlm_kernels.__file__).parents[1]
SETTINGS = {
    **TINY,
    "--rounds": "1",
    "--sandbox.cache_dir": "cache",
    # Adam's first steps are as long for a gradient that is all rounding as for any other.
    "--sft.learning_rate": "1e-4",
    "--preference.learning_rate": "1e-5",
}
OF_A_SEED = {"spa": {"--spa.seed_learning_rate": "1e-5"}}
FEW = {"--prompts.num_prompts": "2", "--evaluate.num_prompts": "1"}
FEW["--evaluate.num_judge_groups"] = "1"
SEED = {"--spa.num_seed_pairs": "2"}
SHARD = {"--sft.parallel": "shard", "--preference.parallel": "shard"}
SHARD |= {"--preference.save_steps": "1", "--preference.logging_steps": "2"}


def words(out: str, method: str = "spa", **changes: str) -> list[str]:
    settings = {**SETTINGS, **METHODS[method], **OF_A_SEED.get(method, {}), **changes}
    settings |= {"--out": out} if out else {}
    return [word for item in settings.items() for word in item]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def refuse() -> None:
    raise UserError("this rank has had enough")


def nothing(rank: int) -> None:
    """A rank as it is."""


def skewed(rank: int) -> None:
    """Clocks differ, and with them the names of folders."""
    time.strftime = lambda *_: f"as-rank-{rank}-says"  # type: ignore[assignment]


def elsewhere(rank: int) -> None:
    """As on two machines that share no disk."""
    folder = Path(f"machine-{rank}")
    folder.mkdir()
    os.chdir(folder)


def on_all(stage: str, act: Callable[[], None]) -> Callable[[int], None]:
    return lambda rank: at_first_row(stage, act)


def on_one(stage: str, act: Callable[[], None]) -> Callable[[int], None]:
    return lambda rank: at_first_row(stage, act) if rank == 1 else None


def script() -> None:
    """All runs of this file, in the current folder, and the exit codes of their ranks."""
    codes: dict[str, list[int]] = {}

    def run(
        name: str, world: int, argv: Sequence[str], change: Callable[[int], None] = nothing
    ) -> None:
        codes[name] = start(world, name, argv, change)

    run("two", 2, words(""), skewed)  # of these, one makes the base model
    run("one", 1, words("one"))
    run("killed", 2, words("killed"), on_all("train/SPA1", kill))
    shutil.copytree("killed", "by-one")
    run("resumed", 2, ["--resume", "--out", "killed"])
    run("resumed-by-one", 1, ["--resume", "--out", "by-one"])
    run("srlm-one", 1, words("srlm-one", "srlm", **FEW))
    run("srlm-three", 3, words("srlm-three", "srlm", **FEW))
    run("few-one", 1, words("few-one", **FEW, **SEED))
    run("few-three", 3, words("few-three", **FEW, **SEED))
    run("sharded", 2, words("sharded", **SHARD))
    run("sharded-killed", 2, words("sharded-killed", **SHARD), on_all("train/DPO", kill))
    shutil.copytree("sharded-killed/state", "sharded-state")
    run("sharded-resumed", 2, ["--resume", "--out", "sharded-killed"])
    run("online-one", 1, words("online-one", **{"--online": "true"}))
    run("online", 2, words("online", **{"--online": "true"}))
    run("refused", 2, words("refused"), on_one("train/SFT", refuse))
    run("lost", 2, words("lost"), on_one("train/SFT", kill))
    run("stopped", 2, words("stopped"), on_all("train/SFT", interrupt))
    run("stopped-by-one", 2, words("stopped-by-one"), on_one("train/SFT", interrupt))
    run("apart", 2, words("apart"), elsewhere)
    Path("codes.json").write_text(json.dumps(codes))


def launch(*argv: str, folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, PACKAGE)))}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environment, check=False, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    launch("-P", __file__, folder=folder)
    return folder


def said(runs: Path, name: str) -> list[str]:
    """Lines on stderr, of all ranks."""
    return [
        line
        for path in sorted(runs.glob(f"{name}-[0-9].err"))
        for line in path.read_text().splitlines()
        if line
    ]


def codes(runs: Path, name: str) -> list[int]:
    found: list[int] = json.loads((runs / "codes.json").read_text())[name]
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def what_was_drawn(folder: Path) -> dict[str, list[Any]]:
    """Of every file of samples, pairs and prompts; scores and log-probs are rounded elsewhere."""
    keys = ("prompt", "response_ids", "finish_reason", "seed", "chosen_ids", "rejected_ids")
    return {
        str(path.relative_to(folder)): [[row.get(key) for key in keys] for row in rows(path)]
        for path in sorted(folder.rglob("*.jsonl"))
        if path.name not in ("metrics.jsonl", "judgements.jsonl")
    }


def assert_same_result(one: Path, other: Path, *, to_rounding: bool) -> None:
    if to_rounding:
        assert what_was_drawn(one) == what_was_drawn(other)
    else:
        for path in sorted(one.rglob("*.jsonl")):
            assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path.name
    for path in sorted(one.glob("models/*/model.safetensors")):
        weights = load_file(path)
        for key, value in load_file(other / path.relative_to(one)).items():
            off = float((weights[key] - value).abs().max())
            assert off < (1e-5 if to_rounding else 1e-30), f"{path.parent.name} {key} {off}"


def test_two_processes_are_one_to_rounding(runs: Path) -> None:
    """Not to the bit: gradients of two ranks are sums of two sums."""
    assert codes(runs, "one") == [0] and codes(runs, "two") == [0, 0]
    folders = [path.name for path in (runs / "runs").iterdir()]
    assert folders == ["sandbox-spa-as-rank-0-says"], "the main rank names the folder"
    assert_same_result(runs / "one", runs / "runs" / folders[0], to_rounding=True)


def test_the_result_is_told_once(runs: Path) -> None:
    told = (runs / "two-0.out").read_text()
    assert "oracle score" in told and told.count("report: ") == 1
    assert (runs / "two-1.out").read_text() == ""
    assert said(runs, "two") == []


def test_a_killed_run_resumes_to_the_same_bytes(runs: Path) -> None:
    assert codes(runs, "killed") == [-signal.SIGKILL] * 2 and codes(runs, "resumed") == [0, 0]
    whole = next((runs / "runs").iterdir())
    assert_same_result(whole, runs / "killed", to_rounding=False)


def test_another_number_of_processes_goes_on(runs: Path) -> None:
    assert codes(runs, "resumed-by-one") == [0]
    assert_same_result(runs / "one", runs / "by-one", to_rounding=True)
    summary = json.loads((runs / "by-one" / "summary.json").read_text())
    assert any("number of processes" in note for note in summary["notes"])


def test_sharded_trainings_are_replicated_ones(runs: Path) -> None:
    assert codes(runs, "sharded") == [0, 0]
    assert_same_result(runs / "one", runs / "sharded", to_rounding=True)


def test_online_rounds_are_those_of_one_process(runs: Path) -> None:
    assert codes(runs, "online-one") == [0] and codes(runs, "online") == [0, 0]
    assert_same_result(runs / "online-one", runs / "online", to_rounding=True)


def test_a_run_that_is_killed_in_a_sharded_training_goes_on_in_it(runs: Path) -> None:
    """To the same bytes, metrics too."""
    assert codes(runs, "sharded-killed") == [-signal.SIGKILL] * 2
    (checkpoint,) = (runs / "sharded-state").glob("DPO/training-*/checkpoint-*")
    assert checkpoint.name == "checkpoint-1", "killed at the first metrics, of step 2"
    assert codes(runs, "sharded-resumed") == [0, 0] and said(runs, "sharded-resumed") == []
    assert_same_result(runs / "sharded", runs / "sharded-killed", to_rounding=False)
    assert not list((runs / "sharded-killed" / "state").iterdir()), "nothing is left of it"


@pytest.mark.parametrize("method", ["few", "srlm"])
def test_most_ranks_may_have_nothing(method: str, runs: Path) -> None:
    """Two prompts in a round and one in the evaluation, for three ranks."""
    assert codes(runs, f"{method}-three") == [0, 0, 0], said(runs, f"{method}-three")
    assert_same_result(runs / f"{method}-one", runs / f"{method}-three", to_rounding=True)


def test_an_error_of_one_rank_ends_all_with_its_words(runs: Path) -> None:
    assert codes(runs, "refused") == [1, 1]
    assert said(runs, "refused") == ["srlm_fast: this rank has had enough"]


def test_a_rank_that_is_lost_ends_the_other(runs: Path) -> None:
    assert codes(runs, "lost") == [1, -signal.SIGKILL]
    (line,) = said(runs, "lost")
    assert line.endswith("go on with --resume --out lost") and "another process" in line


@pytest.mark.parametrize("name", ["stopped", "stopped-by-one"])
def test_ctrl_c(name: str, runs: Path) -> None:
    assert 130 in codes(runs, name) and 0 not in codes(runs, name)
    assert said(runs, name) == [f"srlm_fast: stopped; go on with --resume --out {name}"]


def test_ranks_that_see_different_folders(runs: Path) -> None:
    assert 0 not in codes(runs, "apart")
    assert said(runs, "apart") == [
        "srlm_fast: apart is not the same folder for all processes; choose --out"
    ]


def test_torchrun(tmp_path: Path) -> None:
    # Alone on a port of its own: torchrun's usual one may be another test's, or taken.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    torchrun += ("-m", "srlm_fast.loop")
    plan = launch(*torchrun, "--dry-run", folder=tmp_path).stdout
    assert plan.count("method srlm") == 1 and "2 processes; in preference" in plan
    failed = launch(*torchrun, "--preference.bta", "1", folder=tmp_path, check=False)
    assert failed.returncode != 0 and failed.stderr.count("did you mean beta?") == 1


if __name__ == "__main__":
    script()
