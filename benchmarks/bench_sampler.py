"""Sampling and scoring: tokens from prompts, against other engines on the same weights.

SRLM_VLLM_PYTHON=.../bin/python python -m benchmarks --suite cpu --only sampler

Weights are random, which changes no engine's work. Every call gets prompts that no call before it
had, the same ones for all engines in one round, so that no cache of prefixes helps across calls.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Outputs, Variant, Work
from benchmarks.sampler_engines import ENGINES, Generate, Prompts, Request, Task
from srlm_fast.sampler import Sampler

GREEDY_TOKENS, GREEDY_PROMPTS = 16, 2
SCORE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
# Of HF's configuration of a Llama. "11M": what a CPU samples from in seconds; "1.5B": as Qwen2.5's.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
    },
    "11M": {
        "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096,
    },
    "1.5B": {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """`n` samples of `new_tokens` tokens for each prompt, or the score of n completions.

    The first `shared` of the `length` tokens of all prompts are the same.
    """

    what: str
    prompts: int
    length: int
    n: int
    new_tokens: int
    shared: int = 0

    @property
    def name(self) -> str:
        common = f" that begin with the same {self.shared}" if self.shared else ""
        return (
            f"{self.what}, {self.n} x {self.new_tokens} tokens for {self.prompts} "
            f"prompt{'s' * (self.prompts > 1)} of {self.length}{common}"
        )

    @property
    def rows(self) -> int:
        return self.prompts * self.n

    @property
    def prompt_tokens(self) -> int:
        """That have to be computed."""
        return self.shared + self.prompts * (self.length - self.shared)


JUDGE = Workload("judge", prompts=16, length=500, n=3, new_tokens=64, shared=300)
# The main one first; then other lengths, other numbers of samples, and the other phases of a round.
WORKLOADS = {
    "smoke": (
        Workload("judge", prompts=3, length=100, n=2, new_tokens=5, shared=70),
        Workload("score", prompts=1, length=70, n=2, new_tokens=9),
    ),
    "cpu": (
        *(Workload("sample", 2, length, 8, 64) for length in (512, 64, 2048)),
        *(Workload("sample", 2, 512, n, 64) for n in (1, 4, 16)),
        JUDGE,
        Workload("score", prompts=1, length=2048, n=8, new_tokens=256),
    ),
    "gpu": (
        *(Workload("sample", 256 // n, 512, n, 256) for n in (8, 1)),
        Workload("sample", prompts=16, length=2048, n=16, new_tokens=256),
        Workload("judge", prompts=64, length=500, n=4, new_tokens=128, shared=300),
        Workload("score", prompts=8, length=2048, n=8, new_tokens=256),
    ),
}
SETTINGS = {  # model, device, dtypes
    "smoke": ("tiny", "cpu", ("float32",)),
    "cpu": ("11M", "cpu", ("float32", "bfloat16")),
    "gpu": ("1.5B", "cuda", ("bfloat16",)),
}


@dataclass
class Inputs:
    """The model, and prompts without end."""

    model: Any
    workload: Workload

    @property
    def task(self) -> Task:
        return Task(self.model, self.workload.rows, self.workload.length + self.workload.new_tokens)

    def prompts(self, turn: int) -> Prompts:
        """Those of one call; other turns have others."""
        w, draw = self.workload, partial(self._draw, torch.Generator().manual_seed(turn))
        common = draw(1, w.shared).expand(w.prompts, -1)
        return torch.cat([common, draw(w.prompts, w.length - w.shared)], 1).tolist()

    def completions(self, turn: int) -> list[Prompts]:
        """n for each prompt."""
        w, generator = self.workload, torch.Generator().manual_seed(2**40 + turn)
        return self._draw(generator, w.prompts, w.n, w.new_tokens).tolist()

    def _draw(self, generator: torch.Generator, *size: int) -> Tensor:
        return torch.randint(3, self.model.config.vocab_size, size, generator=generator)


def cases(suite: str) -> Iterator[Case]:
    model, device, dtypes = SETTINGS[suite]
    for workload in WORKLOADS[suite]:
        for dtype in dtypes:
            make = _score_case if workload.what == "score" else _sample_case
            yield make(
                op="sampler",
                name=f"{workload.name}, {model}, {dtype}",
                params={
                    "model": model, **vars(workload), "dtype": dtype, "device": device,
                },
                make_inputs=partial(_inputs, model, workload, dtype, device),
                work=_work(model, workload, getattr(torch, dtype), device),
            )  # fmt: skip


def _sample_case(**case: Any) -> Case:
    return Case(
        **case,
        variants={
            name: Variant(
                partial(_samples, engine), "fp32" if case["params"]["dtype"] == "float32" else "",
                elsewhere=name == "vLLM",
            )
            for name, engine in ENGINES.items()
        },
        oracle=_expected_samples,
        tolerance=0.0,
        baselines=("HF generate", "vLLM"),
    )  # fmt: skip


def _score_case(**case: Any) -> Case:
    return Case(
        **case,
        variants={"HF forwards": Variant(_hf_scores), "ours": Variant(_our_scores)},
        oracle=_expected_scores,
        tolerance=SCORE_TOLERANCE[case["params"]["dtype"]],
        baselines=("HF forwards",),
    )


@functools.cache
def model_of(name: str, dtype: str, device: str) -> Any:
    """A Llama of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **MODELS[name], tie_word_embeddings=True, bos_token_id=None, eos_token_id=None
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def _inputs(model: str, workload: Workload, dtype: str, device: str) -> Inputs:
    return Inputs(model_of(model, dtype, device), workload)


def _samples(engine: Any, inputs: Inputs) -> Call:
    generate: Generate = engine(inputs.task)
    w, greedy, turn = inputs.workload, _greedy(generate, inputs), -1

    def call() -> Outputs:
        nonlocal turn
        turn += 1
        samples = generate(inputs.prompts(turn), Request(w.n, w.new_tokens, seed=turn))
        lengths = torch.tensor([[len(ids) for ids in group] for group in samples])
        ids = torch.tensor([token for group in samples for row in group for token in row])
        different = torch.tensor([len(set(map(tuple, group))) for group in samples])
        outside = ((ids < 0) | (ids >= inputs.model.config.vocab_size)).sum()
        return {"lengths": lengths, "different": different, "outside": outside, "greedy": greedy}

    return call


def _greedy(generate: Generate, inputs: Inputs) -> Tensor:
    """The most probable tokens, one sample for each of some prompts that are never timed."""
    prompts = inputs.prompts(2**40)[:GREEDY_PROMPTS]
    most = min(GREEDY_TOKENS, inputs.workload.new_tokens)
    return torch.tensor(generate(prompts, Request(1, most, greedy=True)))


def _expected_samples(inputs: Inputs, computes: str) -> Outputs:
    """What all calls give, and in fp32 the greedy tokens, where no engine's rounding decides."""
    w = inputs.workload
    expected = {
        "lengths": torch.full((w.prompts, w.n), w.new_tokens),
        "different": torch.full((w.prompts,), w.n),
        "outside": torch.tensor(0),
    }
    if computes == "fp32":
        expected["greedy"] = _greedy(ENGINES["HF generate"](inputs.task), inputs)
    return expected


def _hf_scores(inputs: Inputs) -> Call:
    turn = -1

    def call() -> Outputs:
        nonlocal turn
        turn += 1
        return {"logp": _forward_scores(inputs.model, inputs, turn)}

    return call


@torch.no_grad()
def _forward_scores(model: Any, inputs: Inputs, turn: int) -> Tensor:
    """Log-probabilities [prompts, n, new_tokens], one plain forward for each completion."""
    w, logps = inputs.workload, []
    for prompt, group in zip(inputs.prompts(turn), inputs.completions(turn), strict=True):
        for completion in group:
            ids = torch.tensor([prompt + completion], device=model.device)
            logits = model(ids, logits_to_keep=w.new_tokens + 1).logits[0, :-1]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            logp = logits.log_softmax(-1)
            logps.append(logp.gather(1, ids[0, -w.new_tokens :, None])[:, 0].cpu())
    return torch.stack(logps).view(w.prompts, w.n, w.new_tokens)


def _our_scores(inputs: Inputs) -> Call:
    sampler, turn = Sampler(inputs.model), -1

    def call() -> Outputs:
        nonlocal turn
        turn += 1
        scores = sampler.score(inputs.prompts(turn), inputs.completions(turn))
        return {"logp": torch.stack([torch.stack(group) for group in scores])}

    return call


def _expected_scores(inputs: Inputs, computes: str) -> Outputs:
    model = copy.deepcopy(inputs.model).double()
    return {"logp": _forward_scores(model, inputs, 0)}


def _work(model: str, w: Workload, dtype: torch.dtype, device: str) -> Work:
    """Every prompt token once, every weight and every key and value once in a step."""
    c = MODELS[model]
    hidden, layers = c["hidden_size"], c["num_hidden_layers"]
    kv = hidden * c["num_key_value_heads"] // c["num_attention_heads"]
    layer = 2 * hidden * (hidden + kv) + 3 * hidden * c["intermediate_size"]
    head = hidden * c["vocab_size"]
    steps = w.new_tokens - 1
    own = w.rows * steps
    scored = w.rows * w.new_tokens if w.what == "score" else w.prompts + own
    seen = w.prompt_tokens * w.length / 2 + own * (w.length + steps / 2)
    flop = 2.0 * (layers * (layer * (w.prompt_tokens + own) + 2 * hidden * seen) + head * scored)
    cached = 2 * layers * kv * (w.prompt_tokens + own / 2)
    passes = 1 if w.what == "score" else steps
    side = 1024 if device == "cpu" else 4096
    moved = passes * (layers * layer + head + cached) * dtype.itemsize
    return Work(flop, float(moved), (side, side, side))
