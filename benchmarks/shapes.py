"""The shapes that the LM-head benchmarks measure, and how closely results must agree there."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.pair_batch import Shape, even, ragged

# A gate shows that variants compute the same thing; the tests of the ops hold ours to far less.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def of_suite(suite: str) -> Iterator[tuple[str, Shape, str, str]]:
    """Label, shape, dtype and device, the smallest first."""
    if suite == "smoke":
        for dtype in TOLERANCE:
            yield "tiny", even(16, 61, sequences=4, length=12, prompt=4), dtype, "cpu"
    elif suite == "cpu":
        for vocab in (32000, 128256):
            shape = even(256, vocab, sequences=8, length=256, prompt=64)
            for dtype in TOLERANCE:
                yield f"V={vocab}", shape, dtype, "cpu"
    else:
        # What 1B, 8B and 7B models of today have; then chat data padded to a rectangle.
        yield "C", even(2048, 32000, sequences=8, length=1024), "bfloat16", "cuda"
        yield "A", even(4096, 128256, sequences=8, length=1024), "bfloat16", "cuda"
        yield "A, padded", ragged(4096, 128256), "bfloat16", "cuda"
        yield "B", even(3584, 152064, sequences=8, length=2048), "bfloat16", "cuda"
