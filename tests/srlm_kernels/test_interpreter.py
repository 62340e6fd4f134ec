"""Runs the tests of the Triton kernels under Triton's interpreter, where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
FILES = (
    "test_interpreter_repair.py",
    "test_triton_support.py",
    "test_row_stats_triton.py",
    "test_logits_grad_triton.py",
    "test_pair_grad_triton.py",
    "test_preference_pass_triton.py",
    "test_linear_logp_tiled.py",
    "test_tree_attention_triton.py",
    "test_merge_states_triton.py",
    "test_kv_write_triton.py",
    "test_sample.py",
    "test_sample_triton.py",
    "test_sample_distribution.py",
)


@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    # A process of its own: Triton decides on import whether it compiles or interprets, and a load
    # out of bounds would end this one.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}
    options = ["-q", "-p", "interpreter_repair", "-p", "no:cacheprovider", "--disable-warnings"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(HERE / name) for name in FILES)],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout, run.stdout
