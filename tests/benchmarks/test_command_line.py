"""Budgets, continuing, kills: what is on disk is always whole, and nothing is measured twice."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.rows import append_row, circumstances, is_final, key, read_rows

HERE = Path(__file__).parent
Bench = Callable[..., list[dict[str, Any]]]


def measured(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['case']}: {row['variant']}" for row in rows]


def test_a_budget_is_kept_and_a_second_call_continues(
    bench: Bench, clock: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A round takes 300 s. Gate, warm-up and five rounds of the first case: 2100 s. In the rest of
    # the second case one variant fits, the other would not be finished.
    some = bench("--only", "sleep", "--budget", "3000")
    assert measured(some) == ["case 0: short", "case 0: long", "case 1: short"]
    assert [row["seconds"]["rounds"] for row in some[:2]] == [5, 5]
    assert some[2]["seconds"]["rounds"] >= 3
    assert 2500 < clock.ahead <= 3000
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == ["left for another run, --resume continues:", "  sleep case 1: long"]

    everything = bench("--only", "sleep", "--resume", str(tmp_path / "rows.jsonl"))
    assert everything[:3] == some
    assert measured(everything[3:]) == ["case 1: long"]
    # Its baseline has a row, and was measured again to be in the same rounds.
    assert everything[3]["ratio_to"]["short"]["median"] == pytest.approx(2, rel=0.05)
    assert "left" not in capsys.readouterr().out
    assert bench("--only", "sleep", "--resume", str(tmp_path / "rows.jsonl")) == everything


def test_a_small_budget_means_fewer_rounds(bench: Bench, clock: Any) -> None:
    rows = bench("--only", "sleep", "--budget", "2000")
    assert [row["seconds"]["rounds"] for row in rows[:2]] == [3, 3]
    assert clock.ahead <= 2000


def test_nothing_starts_that_cannot_finish(bench: Bench, clock: Any) -> None:
    # The first call fits, three rounds do not.
    assert bench("--only", "sleep", "--budget", "300") == []
    assert clock.ahead == 200


def test_the_alarm_ends_what_no_prediction_saw(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--only", "sleep", "--budget", "2") == []  # 100 s, really slept
    assert "case 0: short" in capsys.readouterr().out


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_whole_rows(sent: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    arguments = ["--only", "sleep", "--threads", "1", "--json", str(path)]
    code = f"""
import signal, sys, time
from pathlib import Path
from benchmarks.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits none
sys.path.insert(0, {str(HERE)!r})
import bench_sleep
# Hangs from the first row on.
bench_sleep.sleep = lambda seconds: time.sleep(300 if Path({str(path)!r}).exists() else 1e-3)
sys.exit(main({arguments!r}, Path({str(HERE)!r})))
"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=HERE.parents[1])
    deadline = time.monotonic() + 300
    while not read_rows(path) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(sent)
    try:
        assert child.wait(timeout=60) == (130 if sent == signal.SIGINT else -sent)
    finally:
        child.kill()
    assert path.read_bytes().endswith(b"\n")
    assert measured(read_rows(path)) in (["case 0: short"], ["case 0: short", "case 0: long"])


def test_a_torn_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": ')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2 is not a whole row"):
        read_rows(path)


def test_which_rows_stand(bench: Bench) -> None:
    rows = {row["variant"]: row | {"commit": "abc"} for row in bench("--only", "toy")}
    assert is_final(rows["add"], at="another")
    assert is_final(rows["wrong"], at="abc") and not is_final(rows["wrong"], at="another")
    assert not is_final(rows["wrong"] | {"commit": "abc-dirty"}, at="abc-dirty")
    assert not is_final(rows["not_installed"], at="abc")


def test_a_reason_is_written_once(bench: Bench, tmp_path: Path) -> None:
    rows = bench("--only", "toy")
    again = bench("--only", "toy", "--resume", str(tmp_path / "rows.jsonl"))
    assert again[: len(rows)] == rows
    assert "not_installed" not in {row["variant"] for row in again[len(rows) :]}
    assert not [row for row in again[len(rows) :] if row["seconds"]]


@pytest.mark.parametrize("name", ["cpu", "threads", "variant", "params"])
def test_rows_of_other_circumstances_are_other_measurements(bench: Bench, name: str) -> None:
    row = bench("--only", "toy")[0]
    assert key(row) == key(row | {"date": "later", "commit": "other", "seconds": None})
    changed = row["params"] | {"n": 1} if name == "params" else "other"
    assert key(row) != key(row | {name: changed})


def test_an_unknown_op_is_an_error_that_lists_the_known(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench("--only", "toy")
    assert main(["--only", "nothing"], HERE) == 2
    assert "sleep, toy" in capsys.readouterr().err


def test_cases_can_be_chosen_by_their_name(bench: Bench, clock: Any) -> None:
    assert measured(bench("--only", "sleep", "--case", "1")) == ["case 1: short", "case 1: long"]


def test_the_command_of_a_row_names_no_file_of_rows():
    """Rows once said in whose scratch folder they were made."""
    for files in (["--json", "/scratch/r.jsonl"], ["--resume=/scratch/r.jsonl"]):
        row = circumstances(["--only", "gemm", *files, "--case", "a b"], compiling=False)
        assert row["command"] == "python -m benchmarks --only gemm --case 'a b'"
