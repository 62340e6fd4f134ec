"""Counting where the texts of one row part, and a tiny model of which none does."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_flips
from benchmarks.sampler_engines import Request


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ([[1, 2, 3], [4, 5, 6]], (6, 0)),
        ([[1, 2, 9], [4, 5, 6]], (6, 1)),
        ([[9, 2, 3], [4, 9, 9]], (3, 2)),
    ],
    ids=str,
)
def test_tokens_count_up_to_the_flip(other: list[list[int]], expected: tuple[int, int]) -> None:
    assert bench_flips.count([[[1, 2, 3], [4, 5, 6]]], [other]) == expected
    assert bench_flips.count([[row] for row in [[1, 2, 3], [4, 5, 6]]],
                             [[row] for row in other]) == expected  # fmt: skip


def test_an_engine_whose_rows_depend_on_their_batch_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def depends(task: object):
        def generate(prompts: list[list[int]], request: Request) -> list[list[list[int]]]:
            return [[[7, len(prompts)]] * request.n for _ in prompts]

        return generate

    monkeypatch.setitem(bench_flips.ENGINES, "ours", depends)
    assert bench_flips.measure("ours", None, [[5], [6], [7]], Request(2, 2)) == (12, 6)


def test_a_row_for_every_engine(tmp_path: Path) -> None:
    path = tmp_path / "flips.jsonl"
    bench_flips.main(["--model", "tiny", "--dtypes", "float32", "--prompts", "3",
                      "--json", str(path)])  # fmt: skip
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["engine"], row["temperature"]) for row in rows] == [
        ("ours", 0.0), ("ours", 1.0), ("ours, plain torch", 0.0), ("ours, plain torch", 1.0),
        ("HF generate", 0.0),
    ]  # fmt: skip
    for row in rows[:2]:
        assert row["flips"] == row["per_million"] == 0
        assert row["tokens"] == 3 * row["params"]["n"] * row["params"]["new_tokens"]
