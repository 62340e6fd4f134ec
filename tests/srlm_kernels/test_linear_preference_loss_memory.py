"""Peak memory of both ops by formula: what a call needs beside its inputs, and no more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from srlm_kernels import native

HERE = Path(__file__).resolve().parent
ROWS, WIDTH, COLUMNS = 1024, 128, 32000
CHUNK = 512  # rows on a CPU
TILE = CHUNK * 8192  # bytes of logits in a tile, whatever their dtype

LOGITS = CHUNK * COLUMNS  # numbers in a chunk's
HEAD = COLUMNS * WIDTH
DX = 4 * ROWS * WIDTH
# Our GEMM packs 512 lines of one operand at their whole depth, 4 MB at most, and 128 of the other,
# of 256 words each, and sums a block of 512 by 128. Of products with as few columns as dX has here,
# over a tile of the vocabulary, it packs 256 lines. Torch's for bf16 copies its operands whole, and
# its product, rounded, is there before it is added to the sum.
OURS = native.has("gemm")


def gemm(train, size):
    packed = 256 * TILE // (CHUNK * size) if train else 512 * WIDTH
    return 4 * (packed + 128 * 256 + 512 * 128) if OURS else 0


BF16_GEMM = 0 if OURS else TILE + 2 * 4096 * WIDTH * 2
# The row kernels in torch hold up to four copies of a tile in fp32 at a time, those in C++ none.
COPIES = 0 if native.available() else 4

CASES = {
    "loss": ({"reference": True}, 4 * LOGITS + TILE + 4 * HEAD + DX),
    "loss, frozen head": ({"frozen": True}, 4 * LOGITS + DX),
    "loss, grad_weight_out": ({"folded": True}, 4 * LOGITS + DX),
    "loss, no grad": ({"train": False, "reference": True}, 2 * TILE),
    "loss, bf16": ({"dtype": "bfloat16"}, 2 * LOGITS + 4 * HEAD + DX + BF16_GEMM),
    # dW is summed in fp32 and rounded once, when nothing else is left.
    "logp": ({"reference": True}, TILE + 4 * HEAD + DX),
    "logp, frozen head": ({"frozen": True}, TILE + 2 * DX),
    "logp, no grad": ({"train": False, "reference": True}, 2 * TILE),
    "logp, bf16": ({"dtype": "bfloat16"}, TILE + (4 + 2) * HEAD + DX),
}


@pytest.fixture(scope="module")
def peaks():
    ops = {"loss": "linear_preference_loss", "logp": "linear_logp"}
    common = {"rows": ROWS, "width": WIDTH, "columns": COLUMNS, "dtype": "float32"}
    cases = [{**common, "op": ops[name[:4]], **options} for name, (options, _) in CASES.items()]
    # Large tensors come straight from the system, none from what was freed before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = str(HERE.parents[1] / "kernels")
    done = subprocess.run(
        [sys.executable, HERE / "peak_memory.py", json.dumps(cases)],
        env=environment,
        capture_output=True,
        text=True,
    )
    if "clear_refs" in done.stderr:
        pytest.skip("the kernel's high-water mark cannot be reset here")
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_peak_is_what_the_formula_says(peaks, name):
    options, formula = CASES[name]
    formula += gemm(options.get("train", True), 2 if "dtype" in options else 4) + COPIES * TILE * (
        2 if "dtype" in options else 1
    )
    assert peaks[name] <= 1.05 * formula
    assert peaks[name] >= 0.75 * formula  # or the formula would say nothing
