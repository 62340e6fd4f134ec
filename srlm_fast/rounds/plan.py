"""What a run would do: stages, counts, upper bounds of tokens and memory, backends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from srlm_fast.config import Config
from srlm_fast.data.task import Task
from srlm_fast.env import OPS
from srlm_kernels import explain

BYTES = {"float32": 4, "bfloat16": 2}


def plan(config: Config, task: Task, folder: Path | None) -> str:
    """The plan of a run as text; nothing is loaded or sampled for it."""
    lines = [f"method {config.method}, task {task.name}, {config.rounds} rounds", "", "stages"]
    lines += [f"  {name:<28} {what}" for name, what in _stages(config, task)]
    lines += ["", "memory (weights, gradients, optimiser; activations come on top)"]
    lines += [f"  {line}" for line in _memory(config, folder)]
    lines += ["", "backends"]
    lines += [f"  {explain(op)}" for op in OPS]
    lines += ["  sampler: batched decoder with preallocated KV; every prompt is computed once"]
    return "\n".join(lines)


def _stages(config: Config, task: Task) -> list[tuple[str, str]]:
    n, cfg = config.sampling.num_candidates, config.prompts
    count = cfg.num_prompts
    if cfg.source == "dataset":
        count = min(count, len(task.prompts))
    sampled = (
        f"{count} prompts x {n}, at most {count * n * config.sampling.max_new_tokens:,} tokens"
    )
    stages = []
    if config.model == "sandbox":
        stages = [("pretrain M0", f"{config.sandbox.pretrain_steps} steps, cached")]
    if config.method == "srlm":
        stages += [
            ("SFT baseline", f"{len(task.ift)} IFT rows x {config.sft.num_train_epochs} epochs"),
            ("EFT", f"{len(task.eft)} ranked groups, {config.eft.max_tries} tries at most"),
            ("M1", "IFT + EFT"),
        ]
    else:
        gold = len(task.gold) or config.spa.num_seed_pairs
        stages += [("SFT", f"{len(task.ift)} IFT rows")] if task.ift else []
        stages += [("seed DPO", f"{gold} gold pairs x {config.spa.seed_epochs} epochs")]
    votes = config.judge.num_samples if config.judge.kind == "prompted" else 1
    for t in range(1, config.rounds + 1):
        stages += [
            (f"round {t}: prompts", f"{count} by {cfg.source}"),
            (f"round {t}: candidates", sampled),
            (f"round {t}: judging", f"{config.judge.kind}, at most {count * n} x {votes} votes"),
            (f"round {t}: preference", f"at most {count} pairs, {config.preference.loss_type}"),
        ]
    return stages


def _memory(config: Config, folder: Path | None) -> list[str]:
    if folder is None:
        return ["under 0.1 GB: the sandbox's model has 0.8M parameters"]
    weights = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    settings: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    stored = BYTES.get(str(settings.get("dtype") or settings.get("torch_dtype")), 4)
    size = weights // stored * BYTES.get(config.dtype, stored)
    return [
        f"policy {size / 1e9:.2f} GB, reference {size / 1e9:.2f} GB",
        f"gradients {size / 1e9:.2f} GB, AdamW {2 * size / 1e9:.2f} GB",
        f"training peak about {5 * size / 1e9:.2f} GB",
    ]
