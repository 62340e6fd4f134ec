"""An SPA round end to end: 2 samples a prompt, the implicit judge, one epoch of training.

python -m benchmarks --suite cpu --only round

"processes": with the start of every process, and models and samples on disk between them, as the
official pipeline is run; ours needs one. Otherwise everything is imported and loaded already.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Call, Case, Outputs, Variant, Work, optional
from benchmarks.round_stages import STAGES, Round, official_round, our_round
from benchmarks.rows import ROOT

# The shape of a 2.4M model with a vocabulary of 4,096.
SMALL = {
    "vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
TINY = SMALL | {"vocab_size": 199, "hidden_size": 48, "intermediate_size": 64}
ROUNDS = {
    "smoke": (Round(TINY, prompts=3, length=9, new_tokens=7),),
    "cpu": (Round(SMALL, prompts=256, length=64, new_tokens=128),),
    "gpu": (),
}


def cases(suite: str) -> Iterator[Case]:
    for work in ROUNDS[suite]:
        ways: dict[str, Callable[..., dict[str, float]]] = {
            "ours": our_round, "HF + TRL": official_round,
        }  # fmt: skip
        variants = {way: Variant(partial(_here, run, way)) for way, run in ways.items()}
        if suite != "smoke":
            variants |= {
                f"{way}, processes": Variant(partial(_processes, way), elsewhere=True)
                for way in ways
            }
        yield Case(
            op="round",
            name=f"SPA, {work.prompts} prompts of {work.length}, 2 x {work.new_tokens} tokens",
            params={**asdict(work), "dtype": "float32", "device": "cpu"},
            make_inputs=lambda work=work: work,  # type: ignore[misc]
            variants=variants,
            oracle=_expected,
            tolerance=0.0,
            work=_work(work),
            baselines=("HF + TRL", "HF + TRL, processes"),
        )


def _work(work: Round) -> Work:
    """The layers, and the head where a token is sampled or scored: prompts and responses once for
    sampling, judging (twice), the reference, and three times for the policy's training."""
    shape = work.shape
    d, inner, layers = (shape[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads = shape["num_attention_heads"] + shape["num_key_value_heads"]
    weights = layers * (2 * d * heads * shape["head_dim"] + 3 * d * inner)
    responses = 2 * work.prompts * work.new_tokens
    tokens = work.prompts * work.length + responses
    flop = 2.0 * 7 * (weights * tokens + shape["vocab_size"] * d * responses)
    return Work(flop, 4.0 * weights, (1024, d, inner))


def _expected(work: Round, computes: str) -> Outputs:
    counts = {"pairs": work.prompts, "tokens": 2 * work.prompts * work.new_tokens, "finite": 1}
    return _tensors(counts)


def _tensors(numbers: dict[str, float]) -> Outputs:
    return {name: torch.tensor(float(value)) for name, value in numbers.items()}


def _here(run: Callable[..., dict[str, float]], way: str, work: Round) -> Call:
    if way != "ours":
        optional("trl")
    models = work.models()

    def call() -> Outputs:
        policy, initial = (copy.deepcopy(model) for model in models)
        return _tensors(run(work, policy, initial))

    return call


def _processes(way: str, work: Round) -> Call:
    if way != "ours":
        optional("trl")

    def call() -> Outputs:
        with tempfile.TemporaryDirectory(prefix="round-") as name:
            folder = Path(name)
            (folder / "round.json").write_text(json.dumps(asdict(work)))
            for model, where in zip(work.models(), ("policy", "initial"), strict=True):
                model.save_pretrained(folder / where)
            for stage in STAGES[way]:
                _run(way, stage, folder)
            result: dict[str, Any] = json.loads((folder / "result.json").read_text())
            return _tensors(result)

    return call


def _run(way: str, stage: str, folder: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.round_stages", way, stage, str(folder)]
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"stage {stage} of {way}: {done.stderr.strip().splitlines()[-1][:300]}")
