"""Runs of the loop, and the rows that are made of them."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.fidelity.variants import Variant
from benchmarks.rows import ROOT, Row, commit

# Of a model's entry in summary.json.
KEPT = (
    "name", "oracle_score", "oracle_se", "greedy_oracle_score", "criteria", "win_rates", "judge",
    "mean_length", "mean_length_chars", "finished_share", "distinct_share", "pairs_kept", "labels",
    "label_accuracy", "flags", "pairs", "displacement",
)  # fmt: skip
DIGITS = 5


def run(variant: Variant, seed: int, extra: Mapping[str, str]) -> Row:
    """One whole loop in a process of its own, on one thread; raises RuntimeError where it fails."""
    settings, at = variant.settings(extra), commit()
    command = ["python", "-m", "srlm_fast.loop", "--recipe", f"sandbox-{variant.method}"]
    for name, value in {"seed": str(seed), **settings}.items():
        command += [f"--{name}", value]
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "run", time.monotonic()
        done = subprocess.run(
            [sys.executable, *command[1:], "--out", str(out)],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise RuntimeError(said[-1])
        seconds = time.monotonic() - start
        summary = json.loads((out / "summary.json").read_text("utf-8"))
    pretraining = next(s["seconds"] for s in summary["stages"] if s["name"] == "pretrain")
    return {
        "variant": variant.key, "seed": seed, "settings": settings,
        "models": [_rounded({k: m.get(k) for k in KEPT}) for m in summary["models"]],
        "base_exact": summary["base_model"]["exact"]["all"],
        "seconds": round(seconds - pretraining, 1), "pretrain_seconds": round(pretraining, 1),
        "versions": summary["versions"], "commit": at,
        "date": datetime.date.today().isoformat(), "command": shlex.join(command),
    }  # fmt: skip


def is_done(rows: list[Row], variant: Variant, seed: int, extra: Mapping[str, str]) -> bool:
    """Whether a row is there that was run with the variant's settings of today."""
    return any(row["seed"] == seed for row in of_variant(rows, variant, extra))


def of_variant(rows: list[Row], variant: Variant, extra: Mapping[str, str]) -> list[Row]:
    """The rows of a variant, the last of each seed; those with other settings are passed over."""
    settings = variant.settings(extra)
    latest = {
        row["seed"]: row
        for row in rows
        if row["variant"] == variant.key and row["settings"] == settings
    }
    return [latest[seed] for seed in sorted(latest)]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
