"""What a run would do: stages, counts, upper bounds of tokens and memory, backends."""

from __future__ import annotations

import json
import math
from pathlib import Path

from safetensors import safe_open

from srlm_fast.config import Config
from srlm_fast.data.task import Task
from srlm_fast.env import OPS, SAMPLER_OPS, sampler_backend
from srlm_fast.model.load import resolve_device
from srlm_kernels import explain


def plan(config: Config, task: Task, folder: Path | None) -> str:
    """The plan of a run as text; nothing is loaded or sampled for it."""
    lines = [f"method {config.method}, task {task.name}, {config.rounds} rounds", "", "stages"]
    lines += [f"  {name:<28} {what}" for name, what in _stages(config, task)]
    lines += ["", "memory (weights, gradients, optimiser; activations come on top)"]
    lines += [f"  {line}" for line in _memory(config, folder)]
    lines += ["", "backends"]
    lines += [f"  {explain(op)}" for op in OPS]
    lines += [f"  sampler: pages of KV memory; {SAMPLER_OPS} in {sampler_backend()}"]
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
            ("EFT", _eft(config, task)),
            ("M1", "IFT + EFT"),
        ]
    else:
        gold = len(task.gold) or config.spa.num_seed_pairs
        stages += [("SFT", f"{len(task.ift)} IFT rows")] if task.ift else []
        stages += [("seed DPO", f"{gold} gold pairs x {config.spa.seed_epochs} epochs")]
    loss = "spa" if config.method == "spa" else config.preference.loss_type
    votes = config.judge.num_samples if config.judge.kind == "prompted" else 1
    judged = f"{count * n} x {votes} votes"
    if config.judge.kind == "prompted":
        judged += f", {count * n * votes * config.judge.max_new_tokens:,} tokens"
    for t in range(1, config.rounds + 1):
        stages += [
            (f"round {t}: prompts", f"{count} by {cfg.source}"),
            (f"round {t}: candidates", sampled),
            (f"round {t}: judging", f"{config.judge.kind}, at most {judged}"),
            (f"round {t}: preference", f"at most {count} pairs, {loss}"),
        ]
    return stages


def _eft(config: Config, task: Task) -> str:
    if not config.eft.enabled:
        return "off"
    if config.eft.target == "rank":
        return f"{len(task.eft)} ranked groups, scores from the ranks"
    return f"{len(task.eft)} ranked groups, {config.eft.max_tries} tries at most"


def _memory(config: Config, folder: Path | None) -> list[str]:
    """Weights, gradients and AdamW's state: 20 bytes a parameter while a preference loss trains.

    fp32: policy 4, reference 4, gradient 4, moments 8. bf16: policy 2, reference 2, and in fp32
    master weights 4, gradient 4, moments 8.
    """
    if folder is None:
        return ["under 0.1 GB: the sandbox's model has 0.8M parameters"]
    count = _parameters(folder)
    if count is None:
        return ["unknown: the folder has no safetensors to count parameters in"]
    size = 2 if _is_bf16(config, folder) else 4
    return [
        f"{count / 1e6:,.1f}M parameters in {'bf16' if size == 2 else 'fp32'}",
        f"sampling and judging {count * size / 1e9:.2f} GB, plus keys and values",
        f"training {count * 20 / 1e9:.2f} GB, plus activations",
    ]


def _parameters(folder: Path) -> int | None:
    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            shapes |= {name: file.get_slice(name).get_shape() for name in names}
    return sum(math.prod(shape) for shape in shapes.values()) or None


def _is_bf16(config: Config, folder: Path) -> bool:
    if config.dtype != "auto":
        return config.dtype == "bfloat16"
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    stored = str(settings.get("dtype") or settings.get("torch_dtype"))
    return resolve_device(config.device).type == "cuda" and stored == "bfloat16"
