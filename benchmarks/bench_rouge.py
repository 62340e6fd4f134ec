"""How long does Self-Instruct's ROUGE-L filter take for a large pool of prompts?

    python -m benchmarks.bench_rouge --accepted 100000         # append a row
    python -m benchmarks.bench_rouge --accepted 2000 --brute   # every comparison made

Prompts come one by one, as from a model, until so many are accepted at a threshold of 0.7. They are
made up: words by Zipf's law, most behind one of 300 openings ("write a", "what is the"), a quarter
an accepted prompt with up to three words changed. One thread. `offered` must not depend on the way.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.rows import RESULTS, append_row, circumstances
from srlm_fast.prompts.rouge import RougeIndex, rouge_l, words

VOCABULARY = [f"w{i}" for i in range(30_000)]
WEIGHTS = list(accumulate(1 / rank for rank in range(1, len(VOCABULARY) + 1)))
THRESHOLD = 0.7


class Filter(Protocol):
    def has_similar(self, text: str) -> bool: ...

    def add(self, text: str) -> None: ...


class BruteForce:
    """Each prompt against every one before."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.texts: list[list[str]] = []

    def has_similar(self, text: str) -> bool:
        new = words(text)
        return any(rouge_l(new, old) > self.threshold for old in self.texts)

    def add(self, text: str) -> None:
        self.texts.append(words(text))


def prompts(rng: random.Random, mean_words: int, accepted: list[str]) -> Iterator[str]:
    """Without an end; `accepted` grows while it goes on."""

    def draw(count: int) -> list[str]:
        return rng.choices(VOCABULARY, cum_weights=WEIGHTS, k=count)

    openings = [draw(rng.randrange(2, 6)) for _ in range(300)]
    while True:
        if accepted and rng.random() < 0.25:
            new = rng.choice(accepted).split()
            for _ in range(rng.randrange(4)):
                new[rng.randrange(len(new))] = rng.choice(VOCABULARY)
        else:
            opening = rng.choice(openings) if rng.random() < 0.6 else []
            length = round(mean_words * rng.lognormvariate(-0.125, 0.5))  # of mean 1
            new = [*opening, *draw(min(max(length - len(opening), 4), 150))]
        yield " ".join(new)


def measure(pool: Filter, wanted: int, mean_words: int) -> dict[str, float]:
    """Fills `pool` up to `wanted` prompts, and says what the filter alone took."""
    accepted: list[str] = []
    offered, seconds, cpu_seconds = 0, 0.0, 0.0
    for text in prompts(random.Random(0), mean_words, accepted):
        offered += 1
        start, cpu_start = time.perf_counter(), time.process_time()
        if not pool.has_similar(text):
            pool.add(text)
            accepted.append(text)
        seconds += time.perf_counter() - start
        cpu_seconds += time.process_time() - cpu_start
        if len(accepted) == wanted:
            break
    words_in_all = sum(len(text.split()) for text in accepted)
    return {
        "accepted": wanted, "offered": offered, "mean_words": round(words_in_all / wanted, 1),
        "seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accepted", type=int, default=100_000)
    parser.add_argument("--mean-words", type=int, default=16, help="of a prompt; Self-Instruct's")
    parser.add_argument("--brute", action="store_true", help="compare with every prompt before")
    parser.add_argument("--json", type=Path, default=RESULTS / "rouge.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pool: Filter = BruteForce(THRESHOLD) if args.brute else RougeIndex(THRESHOLD)
    row = {"filter": type(pool).__name__, **measure(pool, args.accepted, args.mean_words)}
    row |= circumstances(sys.argv[1:], compiling=False, module="benchmarks.bench_rouge")
    append_row(args.json, row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
