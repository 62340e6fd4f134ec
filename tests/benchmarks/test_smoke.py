"""The benchmarks of the ops themselves, on tiny shapes: every variant is right or says why not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import pair_batch, rows, shapes
from benchmarks.case import discover, load_cases
from srlm_fast.installed import OPS

BENCHMARKS = rows.ROOT / "benchmarks"
Bench = Callable[..., list[dict[str, Any]]]


def test_every_op_has_a_benchmark() -> None:
    assert set(OPS) <= discover(BENCHMARKS).keys()


@pytest.mark.parametrize("op", ["linear_logp", "linear_preference_loss"])
def test_smoke(bench: Bench, op: str) -> None:
    found = bench("--only", op, folder=BENCHMARKS)
    wanted = [
        (c.name, v) for c in load_cases(f"benchmarks.bench_{op}", "smoke") for v in c.variants
    ]
    assert sorted((row["case"], row["variant"]) for row in found) == sorted(wanted)
    for row in found:
        name = f"{row['case']}: {row['variant']}"
        assert row["gate"] is None or row["gate"]["ok"], f"{name}: {row['gate']}"
        assert (row["seconds"] is None) == (row["skipped"] is not None), name
        if "full logits" in row["variant"] or row["variant"] in {"ours, reference", "GEMMs alone"}:
            assert row["seconds"], f"{name}: {row['skipped']}"


@pytest.mark.parametrize("suite", ["cpu", "gpu"])
@pytest.mark.parametrize("op", ["linear_logp", "linear_preference_loss"])
def test_cases_of_the_large_suites_are_told_apart(suite: str, op: str) -> None:
    cases = load_cases(f"benchmarks.bench_{op}", suite)
    names = {case.name for case in cases}
    params = {str(case.params) for case in cases}
    assert len(names) == len(params) == len(cases) >= 4
    for case in cases:
        assert set(case.baselines) & case.variants.keys()
        assert case.device == ("cuda" if suite == "gpu" else "cpu")


def test_the_padded_batch_has_as_many_rows_as_the_full_one() -> None:
    gpu = {label: shape for label, shape, _, _ in shapes.of_suite("gpu")}
    padded = gpu["A, padded"]
    assert padded.rows == gpu["A"].rows == 8192
    assert padded.rows / (padded.sequences * padded.length) == pytest.approx(0.45, abs=0.005)
    assert all(
        p + r <= padded.length for p, r in zip(padded.prompts, padded.responses, strict=True)
    )


def test_a_batch_is_the_same_padded_and_packed() -> None:
    shape = pair_batch.Shape(8, 11, 9, prompts=(2, 1, 0, 3), responses=(3, 4, 5, 1))
    batch = pair_batch.make(shape, torch.float32, "cpu")
    counts = batch.padded_target != pair_batch.IGNORED
    assert counts.sum() == shape.rows == len(batch.rows)
    assert counts.view(4, 9).sum(1).tolist() == [3, 4, 5, 1]
    assert torch.equal(batch.padded_target[batch.rows], batch.target)
    # Packed: chosen (first half of the batch) and rejected in turn.
    assert batch.cu_seqlens.tolist() == [0, 3, 8, 12, 13]
    assert batch.rows[[0, 3, 8, 12]].tolist() == [2, 18, 10, 30]
    assert batch.sequence.tolist() == [0] * 3 + [1] * 5 + [2] * 4 + [3]
