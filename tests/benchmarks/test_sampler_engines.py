"""The benchmark of the sampler: fresh prompts, wrong engines caught, vLLM behind its pipe."""

import gc
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bench_sampler import Inputs, Workload, model_of
from benchmarks.case import Unavailable, load_cases
from benchmarks.rows import ROOT
from benchmarks.sampler_engines import (
    ENGINES,
    VLLM_PYTHON,
    Generate,
    Prompts,
    Request,
    Samples,
    Task,
    hf_generate,
    ours,
    vllm,
)

Bench = Callable[..., list[dict[str, Any]]]
BENCHMARKS = ROOT / "benchmarks"
# Stands in for the package: answers with what it was asked, and says things on stdout.
VLLM = """
from types import SimpleNamespace as N
__version__ = "0"
print("hello")
class LLM:
    def __init__(self, **options): self.options = options
    def generate(self, prompts, params, use_tqdm):
        print("working")
        if params.max_tokens == 13: raise ValueError("no luck")
        ids = [self.options["max_model_len"], self.options["max_num_seqs"], params.max_tokens]
        return [N(outputs=[N(token_ids=(i, *p["prompt_token_ids"], *ids)) for i in range(params.n)])
                for p in prompts]
class SamplingParams(N): pass
"""


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VLLM_PYTHON, "")


@pytest.fixture
def task() -> Task:
    return Task(model_of("tiny", "float32", "cpu"), rows=6, length=105)


def short(generate: Generate) -> Generate:
    return lambda prompts, request: [[ids[:-1] for ids in g] for g in generate(prompts, request)]


def outside(generate: Generate) -> Generate:
    return lambda prompts, request: [
        [[199, *ids[1:]] for ids in group] for group in generate(prompts, request)
    ]


def alike(generate: Generate) -> Generate:
    return lambda prompts, request: [group[:1] * len(group) for group in generate(prompts, request)]


def never_greedy(generate: Generate) -> Generate:
    return lambda prompts, request: generate(prompts, Request(request.n, request.new_tokens))


def test_wrong_engines_fail_and_the_others_are_timed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = (short, outside, alike, never_greedy)
    for spoil in wrong:
        monkeypatch.setitem(ENGINES, spoil.__name__, lambda task, f=spoil: f(hf_generate(task)))
    rows = bench("--only", "sampler", folder=BENCHMARKS)
    found = {row["variant"]: row for row in rows if row["params"]["what"] == "judge"}
    for name in ("HF generate", "HF continuous batching", "ours"):
        assert found[name]["gate"]["ok"] and found[name]["seconds"], found[name]["gate"]
    assert VLLM_PYTHON in found["vLLM"]["skipped"]
    culprits = {"short": "lengths", "outside": "outside", "alike": "different"}
    for spoil in wrong:
        gate = found[spoil.__name__]["gate"]
        assert not gate["ok"]
        assert gate["errors"][culprits.get(spoil.__name__, "greedy")] != 0
    scores = {row["variant"]: row["gate"] for row in rows if row["params"]["what"] == "score"}
    assert scores.keys() == {"HF forwards", "ours"}
    assert all(gate["ok"] and gate["errors"]["logp"] < 1e-6 for gate in scores.values())


def test_every_call_has_new_prompts_and_all_engines_the_same(task: Task) -> None:
    workload = Workload("judge", prompts=3, length=40, n=2, new_tokens=5, shared=30)
    one, other = (Inputs(task.model, workload) for _ in range(2))
    assert one.prompts(0) == other.prompts(0) and one.completions(0) == other.completions(0)
    starts = {tuple(prompt[:30]) for turn in range(4) for prompt in one.prompts(turn)}
    assert len(starts) == 4
    ends = {tuple(prompt[30:]) for turn in range(4) for prompt in one.prompts(turn)}
    assert len(ends) == 12
    assert all(len(prompt) == 40 for prompt in one.prompts(0))
    assert torch.tensor(one.completions(0)).shape == (3, 2, 5)
    assert one.completions(0) != one.completions(1)


@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_cases_are_told_apart(suite: str) -> None:
    cases = load_cases("benchmarks.bench_sampler", suite)
    assert len({case.name for case in cases}) == len({str(c.params) for c in cases}) == len(cases)
    for case in cases:
        assert set(case.baselines) <= case.variants.keys() and "ours" in case.variants
        assert [n for n, v in case.variants.items() if v.elsewhere] == ["vLLM"] or (
            case.params["what"] == "score"
        )


def test_samples_depend_on_the_seed(task: Task) -> None:
    prompts: Prompts = [[5, 6, 7]]
    for engine in (ours, hf_generate):
        generate = engine(task)
        draws: list[Samples] = [generate(prompts, Request(2, 8, seed=seed)) for seed in (0, 0, 1)]
        assert draws[0] == draws[1] != draws[2]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that finds a package `vllm`, and names itself in the environment."""
    (tmp_path / "vllm.py").write_text(VLLM)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(VLLM_PYTHON, str(python))
    return tmp_path


def test_vllm_answers_through_its_pipe(stub: Path, task: Task) -> None:
    generate = vllm(task)
    for prompts in ([[5, 6], [7, 8]], [[9]]):
        expected = [[[i, *ids, 105, 6, 4] for i in range(2)] for ids in prompts]
        assert generate(prompts, Request(2, 4)) == expected


def test_what_vllm_said_last_is_the_reason(stub: Path, task: Task) -> None:
    with pytest.raises(RuntimeError, match=r"vLLM has ended; it wrote last: ValueError: no luck"):
        vllm(task)([[5]], Request(1, 13))
    (stub / "vllm.py").write_text("raise OSError('built for another torch')")
    with pytest.raises(Unavailable, match="OSError: built for another torch"):
        vllm(task)


def test_vllm_ends_with_its_engine(stub: Path, task: Task) -> None:
    (stub / "vllm.py").write_text(
        VLLM + f"open({str(stub / 'pid')!r}, 'w').write(str(__import__('os').getpid()))"
    )
    generate = vllm(task)
    process = Path("/proc", (stub / "pid").read_text())
    assert process.exists()
    del generate
    gc.collect()
    state = process / "stat"
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"
