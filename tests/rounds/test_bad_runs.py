"""Runs that cannot go on: one sentence, exit code 1, and what was written stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Sample


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("srlm_fast: ")
    return message


def test_no_judgement_parses(run_loop: Any, tmp_path: Path, capsys: Any) -> None:
    """A model that has learned nothing cannot judge in words."""
    changes = {"judge__kind": "prompted", "eft__enabled": "false"}
    assert run_loop("srlm", tmp_path / "run", **changes) == 1
    assert "judgements gave a score" in complaint(capsys)
    assert read_jsonl(tmp_path / "run" / "round-1" / "samples.jsonl", Sample)


def test_no_pair_in_a_round(run_loop: Any, tmp_path: Path, capsys: Any) -> None:
    """Candidates that are all but greedy are all alike."""
    assert run_loop("srlm", tmp_path / "run", sampling__temperature="1e-6") == 1
    assert "no preference pair" in complaint(capsys)
    assert (tmp_path / "run" / "models" / "M1" / "model.safetensors").is_file()


def test_every_candidate_is_cut_off(run_loop: Any, tmp_path: Path, capsys: Any) -> None:
    changes = {"sampling__keep_truncated": "false", "sampling__max_new_tokens": "1"}
    assert run_loop("srlm", tmp_path / "run", **changes) == 1
    assert "--sampling.max_new_tokens" in complaint(capsys)


def test_no_prompt_fits_the_context(run_loop: Any, tmp_path: Path, capsys: Any) -> None:
    assert run_loop("spa", tmp_path / "run", sampling__max_new_tokens="100000") in (1, 2)
    assert "context" in complaint(capsys)


def test_eft_that_never_agrees(run_loop: Any, tmp_path: Path, capsys: Any) -> None:
    assert run_loop("srlm", tmp_path / "run", eft__target="judge") == 1
    assert "--eft.target rank" in complaint(capsys)


@pytest.mark.parametrize(
    ("method", "group"), [("spa", "sft"), ("spa", "preference"), ("srlm", "preference")]
)
def test_nothing_is_held_out(
    method: str, group: str, run_loop: Any, tmp_path: Path, capsys: Any
) -> None:
    """The sandbox has no test pairs, and no recipe keeps rows from SFT."""
    assert run_loop(method, tmp_path / "run", **{f"{group}__eval_steps": "2"}) != 0
    assert "eval_steps needs held-out data" in complaint(capsys)
    assert not (tmp_path / "run").exists()
