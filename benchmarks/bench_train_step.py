"""One optimiser step of preference training, reference included.

python -m benchmarks --suite cpu --only train_step

Ours is the whole of `train_preference` for one step, with its self-test and a new optimiser; TRL's
is the bare loss, backward and AdamW of its DPOTrainer: as it is, with our head (`accelerate`) and
as `SrlmDPOTrainer`. The rate is so small that no weight moves, so that every call computes the
same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.bench_sampler import MODELS
from benchmarks.case import Call, Case, Outputs, Variant, Work
from benchmarks.train_engines import policy_and_reference, random_pairs, trl_trainer
from srlm_fast.config import PreferenceConfig
from srlm_fast.data.records import Pair
from srlm_fast.train.noise import Refinement
from srlm_fast.train.preference import train_preference

RATE = 1e-30
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
# Pairs, prompt and response tokens: the main one first.
SIZES = {
    "smoke": ((2, 9, 7),),
    "cpu": ((4, 256, 256), (4, 128, 512), (4, 512, 128)),
    "gpu": ((16, 512, 512), (16, 1024, 256)),
}
SETTINGS = {  # model, device, dtypes
    "smoke": ("tiny", "cpu", ("float32",)),
    "cpu": ("11M", "cpu", ("float32", "bfloat16")),
    "gpu": ("1.5B", "cuda", ("bfloat16",)),
}
CONFIG = PreferenceConfig(learning_rate=RATE, max_grad_norm=0.0, logging_steps=1)


@dataclass
class Inputs:
    """Two models and the pairs of the step."""

    policy: Any
    reference: Any
    pairs: list[Pair]


def cases(suite: str) -> Iterator[Case]:
    model, device, dtypes = SETTINGS[suite]
    for size in SIZES[suite]:
        for dtype in dtypes:
            yield _case(model, device, dtype, *size)


def _case(model: str, device: str, dtype: str, pairs: int, prompt: int, response: int) -> Case:
    shape = MODELS[model]
    ours = replace(CONFIG, per_device_train_batch_size=pairs)
    variants = {
        "ours": Variant(partial(_ours, ours, None)),
        "ours, SPA": Variant(partial(_ours, ours, Refinement(warmup_fraction=0.0)), "SPA"),
        "ours, checkpointed": Variant(
            partial(_ours, replace(ours, gradient_checkpointing=True), None)
        ),
        "ours, padded": Variant(partial(_ours, replace(ours, layout="padded"), None)),
    }
    if device == "cpu":
        variants |= {
            "TRL": Variant(partial(_trl, "plain")),
            "TRL, accelerated": Variant(partial(_trl, "accelerated")),
            "TRL, SrlmDPOTrainer": Variant(partial(_trl, "packed")),
        }
    return Case(
        op="train_step",
        name=f"{pairs} pairs of {prompt} + 2 x {response} tokens, {model}, {dtype}",
        params={
            "model": model, "pairs": pairs, "prompt": prompt, "response": response, "dtype": dtype,
            "device": device,
        },
        make_inputs=partial(_inputs, shape, dtype, device, pairs, prompt, response),
        variants=variants,
        oracle=_plain,
        tolerance=TOLERANCE[dtype],
        work=_work(shape, getattr(torch, dtype), pairs, prompt, response),
        baselines=("ours", "TRL"),
    )  # fmt: skip


def _work(
    shape: dict[str, Any], dtype: torch.dtype, pairs: int, prompt: int, response: int
) -> Work:
    """Layers three times (reference, policy, and twice for its backward: four) over every token
    once, the head over every response token; attention is left out."""
    d, inner, layers = (shape[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    shared = shape["num_key_value_heads"] / shape["num_attention_heads"]
    weights = layers * (2 * d * d * (1 + shared) + 3 * d * inner)
    head = shape["vocab_size"] * d
    tokens, scored = pairs * (prompt + 2 * response), 2 * pairs * response
    flop = 2.0 * 4 * (weights * tokens + head * scored)
    return Work(flop, 4.0 * (weights + head) * dtype.itemsize, (tokens, d, inner))


def _inputs(
    shape: dict[str, Any], dtype: str, device: str, pairs: int, prompt: int, response: int
) -> Inputs:
    models = policy_and_reference(shape | {"tie_word_embeddings": True}, getattr(torch, dtype))
    policy, reference = (model.to(device) for model in models)
    return Inputs(policy, reference, random_pairs(pairs, prompt, response, shape["vocab_size"]))


def _ours(config: PreferenceConfig, refine: Refinement | None, inputs: Inputs) -> Call:
    def call() -> Outputs:
        logs: list[dict[str, float]] = []
        train_preference(
            inputs.policy, inputs.reference, inputs.pairs, config, refine=refine, seed=0, pad_id=0,
            log=logs.append, reference_is_start=False,
        )  # fmt: skip
        return {name: torch.tensor(logs[-1][name]) for name in ("loss", "grad_norm")}

    return call


def _trl(way: str, inputs: Inputs) -> Call:
    # Trainers change the forward of the models that they are given: each has its own.
    policy, reference = _copies(inputs)
    trainer, batch = trl_trainer(
        policy, reference, inputs.pairs, way=way, beta=CONFIG.beta, learning_rate=RATE
    )
    optimizer = trainer.create_optimizer()

    def call() -> Outputs:
        optimizer.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in policy.parameters() if p.grad is not None]
        )
        optimizer.step()
        return {"loss": loss.detach(), "grad_norm": norm}

    return call


def _plain(inputs: Inputs, computes: str) -> Outputs:
    """DPO by transformers alone, one row at a time; SPA's with flags from its own logits."""
    policy, ref = (m.float() if m.dtype != torch.float64 else m for m in _copies(inputs))
    total = torch.zeros(())
    for pair in inputs.pairs:
        margin, mixed_margin = torch.zeros(()), torch.zeros(())
        for sign, response in ((1, pair.chosen_ids), (-1, pair.rejected_ids)):
            ids = torch.tensor([[*pair.prompt_ids, *response]], device=policy.device)
            rows = slice(len(pair.prompt_ids) - 1, -1)
            logits = policy(ids).logits[0, rows]
            with torch.no_grad():
                ref_logits = ref(ids).logits[0, rows]
                mixed = 1.5 * logits - 0.5 * ref_logits
            picked = [
                z.log_softmax(-1).gather(1, ids[0, len(pair.prompt_ids) :, None]).sum()
                for z in (logits, ref_logits, mixed)
            ]
            margin = margin + sign * (picked[0] - picked[1]).cpu()
            mixed_margin = mixed_margin + sign * (picked[2] - picked[1]).cpu()
        logit, flagged = CONFIG.beta * margin, bool(computes) and bool(mixed_margin < 0)
        smoothing = Refinement().alpha if flagged else 0.0
        loss = -(1 - smoothing) * torch.nn.functional.logsigmoid(logit)
        loss = (loss - smoothing * torch.nn.functional.logsigmoid(-logit)) / len(inputs.pairs)
        loss.backward()  # type: ignore[no-untyped-call]  # the logits of all would not fit
        total += loss.detach()
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    return {"loss": total, "grad_norm": norm.cpu()}


def _copies(inputs: Inputs) -> list[Any]:
    import copy

    return [copy.deepcopy(m) for m in (inputs.policy, inputs.reference)]
