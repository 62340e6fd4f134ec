"""The peak memory of a script: what was predicted, and what the system measured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def predicted_and_measured(script: Path, settings: dict[str, Any], *more: Path) -> list[Any]:
    """What `script` prints as JSON, run on `settings` and `more` in a process of its own."""
    # Large tensors come straight from the system, none from what was freed before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))
    done = subprocess.run(
        [sys.executable, script, json.dumps(settings), *more],
        env=environment,
        capture_output=True,
        text=True,
    )
    if "peft is needed" in done.stderr:
        pytest.skip("peft is not installed (extra [peft])")
    if "clear_refs" in done.stderr:
        pytest.skip("the kernel's high-water mark cannot be reset here")
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found
