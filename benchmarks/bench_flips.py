"""Does what a row draws depend on its batch? Flips per million tokens.

    python -m benchmarks.bench_flips                      # results/flips.jsonl
    python -m benchmarks.bench_flips --device cuda --dtypes float32 bfloat16

Every prompt is sampled alone and in a call with all others. The tokens of a row count up to the
first that differs between the two, which is a flip: behind it they are other texts. Weights are
random, so that choices are closer to each other than those of a trained model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows, sampler_engines
from benchmarks.bench_sampler import MODELS, model_of
from benchmarks.sampler_engines import Generate, Prompts, Request, Samples, Task

RESULTS = rows.RESULTS / "flips.jsonl"
LENGTH, TOKENS = 200, 64


ENGINES: dict[str, Callable[[Task], Generate]] = {
    "ours": partial(sampler_engines.ours, forget=True),
    "ours, plain torch": partial(sampler_engines.ours, impl="reference", forget=True),
    "HF generate": sampler_engines.hf_generate,
}
# HF's samples share one random stream, and so differ in another batch whatever the rounding.
GREEDY_ONLY = {"HF generate"}


def count(alone: Samples, together: Samples) -> tuple[int, int]:
    """Tokens up to the first difference of each row, itself included; how many rows have one."""
    tokens = flips = 0
    for group, other in zip(alone, together, strict=True):
        for row, same in zip(group, other, strict=True):
            pairs = enumerate(zip(row, same, strict=True))
            first = next((i for i, (a, b) in pairs if a != b), None)
            tokens += len(row) if first is None else first + 1
            flips += first is not None
    return tokens, flips


def measure(engine: str, model: Any, prompts: Prompts, request: Request) -> tuple[int, int]:
    """`count` for one engine."""
    task = Task(model, len(prompts) * request.n, len(prompts[0]) + request.new_tokens)
    generate = ENGINES[engine](task)
    alone = [generate([prompt], request)[0] for prompt in prompts]
    return count(alone, generate(prompts, request))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--model", default="11M", choices=list(MODELS))
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=RESULTS)
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    for dtype in args.dtypes:
        model = model_of(args.model, dtype, args.device)
        draw = torch.Generator().manual_seed(1)
        size, vocab = (args.prompts, LENGTH), model.config.vocab_size
        prompts = torch.randint(3, vocab, size, generator=draw).tolist()
        for engine in ENGINES:
            for greedy in (True, False)[: 1 if engine in GREEDY_ONLY else 2]:
                request = Request(1 if greedy else 4, TOKENS, greedy)
                tokens, flips = measure(engine, model, prompts, request)
                row = {
                    "op": "flips", "engine": engine, "temperature": float(not greedy),
                    "params": {
                        "model": args.model, "dtype": dtype, "device": args.device,
                        "prompts": args.prompts, "length": LENGTH, "n": request.n,
                        "new_tokens": TOKENS,
                    },
                    "tokens": tokens, "flips": flips, "per_million": 1e6 * flips / tokens,
                    **rows.circumstances(
                        arguments, compiling=False, module="benchmarks.bench_flips"
                    ),
                }  # fmt: skip
                rows.append_row(args.json, row)
                how = "greedy" if greedy else "sampled"
                print(f"{dtype}, {engine}, {how}: {flips} flips in {tokens} tokens", flush=True)


if __name__ == "__main__":
    main()
