"""What a run would do: stages, counts, upper bounds of tokens and memory, backends."""

from __future__ import annotations

import torch

from srlm_fast.config import Config
from srlm_fast.data.task import Task
from srlm_fast.errors import UserError
from srlm_fast.installed import OPS, SAMPLER_OPS, require, sampler_backend
from srlm_fast.model.liger import check_liger
from srlm_fast.rounds.disk import pairs_of
from srlm_fast.rounds.memory import RunMemory
from srlm_kernels import explain


def plan(config: Config, task: Task, memory: RunMemory) -> str:
    """The plan of a run as text; nothing is loaded or sampled for it."""
    lines = [f"method {config.method}, task {task.name}, {config.rounds} rounds"]
    if (world := memory.ranks.world) > 1:
        held = "a share" if config.preference.parallel == "shard" else "the whole"
        lines.append(f"{world} processes; in preference training each holds {held}")
    lines += ["", "stages"]
    lines += [f"  {name:<28} {what}" for name, what in _stages(config, task)]
    lines += ["", "memory" if world == 1 else "memory of each process"]
    lines += [f"  {line}" for line in memory.lines()]
    lines += ["", "backends"]
    lines += [f"  {explain(op)}" for op in OPS]
    lines += [f"  sampler: pages of KV memory; {SAMPLER_OPS} in {sampler_backend()}"]
    return "\n".join(lines)


def _stages(config: Config, task: Task) -> list[tuple[str, str]]:
    cfg = config.prompts
    stages = []
    if config.model == "sandbox":
        stages = [("pretrain M0", f"{config.sandbox.pretrain_steps} steps, cached")]
    if config.method == "srlm":
        stages += [
            ("SFT baseline", f"{len(task.ift)} IFT rows x {config.sft.num_train_epochs} epochs"),
            ("EFT", _eft(config, task)),
            *([("M1", "IFT + EFT")] if config.eft.enabled else []),
        ]
    else:
        gold = len(task.gold) or config.spa.num_seed_pairs
        seed = ("seed DPO", f"{gold} gold pairs x {config.spa.seed_epochs} epochs")
        stages += [("SFT", f"{len(task.ift)} IFT rows")] if task.ift else []
        stages += [] if config.spa.no_seed else [seed]
    loss = "spa" if config.refines_labels else config.preference.loss_type
    chosen = ", the best of its checkpoints" if config.preference.load_best_model_at_end else ""
    votes = config.judge.num_samples if config.judge.kind == "prompted" else 1
    for t in range(1, config.rounds + 1):
        n = config.sampling.num_candidates
        if config.pairs.anchored_rejection and t > 1:
            n *= 2  # the first model's as well
        count = task.round_sizes[t - 1] if task.round_sizes else cfg.of_round(t)
        if cfg.source == "dataset":
            count = min(count, len(task.prompts))
        pairs = pairs_of(config, count, n)
        if config.online:  # which samples anew in every epoch
            n *= config.preference.num_train_epochs
        tokens = count * n * config.sampling.max_new_tokens
        pairs = round(pairs / (1 - config.pairs.gold_replay))
        learned = "preference", f"at most {pairs} pairs, {loss}{chosen}"
        if config.srlm.training == "positives":
            learned = "SFT", f"of the base model, at most {count * n} rows more by each round"
        if config.online:
            size = config.preference.per_device_train_batch_size
            learned = "online", f"{loss}, sampling and judging {size} prompts a step"
        judged = f"{count * n} x {votes} votes"
        if config.judge.kind == "prompted":
            judged += f", {count * n * votes * config.judge.max_new_tokens:,} tokens"
        stages += [
            (f"round {t}: prompts", f"{count} by {cfg.model or cfg.source}"),
            (f"round {t}: candidates", f"{count} prompts x {n}, at most {tokens:,} tokens"),
            (f"round {t}: judging", f"{config.judge.kind}, at most {judged}"),
            (f"round {t}: {learned[0]}", learned[1]),
        ]
    return stages


def _eft(config: Config, task: Task) -> str:
    if not config.eft.enabled:
        return "off"
    if config.eft.target == "rank":
        return f"{len(task.eft)} ranked groups, scores from the ranks"
    return f"{len(task.eft)} ranked groups, {config.eft.max_tries} tries at most"


def check_training(config: Config, dtype: torch.dtype, device: torch.device) -> None:
    """Raises UserError where packages are asked for that are not there, or weights that are to be
    rounded, and are none of `dtype`."""
    if config.lora.r:
        require("peft")
    if config.use_liger_kernel:
        check_liger(device)
    trainings = (config.sft, config.preference)
    if any(train.optim == "adamw_torch_8bit" for train in trainings):
        require("torchao")
    is_bf16 = dtype == torch.bfloat16
    if any(train.bf16_stochastic_rounding for train in trainings) and not is_bf16:
        raise UserError(
            "bf16_stochastic_rounding is for bf16 weights, and this run's are fp32; leave it off,"
            " or set --dtype bfloat16"
        )
