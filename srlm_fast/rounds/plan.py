"""What a run would do: stages, counts, upper bounds of tokens and memory, backends."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig

from srlm_fast.config import Config, PreferenceConfig, TrainConfig
from srlm_fast.data.task import Task
from srlm_fast.env import OPS, SAMPLER_OPS, require, sampler_backend
from srlm_fast.errors import UserError
from srlm_fast.model.liger import check_liger
from srlm_fast.model.load import resolve_device
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train.memory import TrainMemory, lora_parameters, optimizer_bytes, train_memory
from srlm_kernels import explain


def plan(config: Config, task: Task, folder: Path | None, ranks: Ranks = ALONE) -> str:
    """The plan of a run as text; nothing is loaded or sampled for it."""
    lines = [f"method {config.method}, task {task.name}, {config.rounds} rounds"]
    if ranks.world > 1:
        held = "a share" if config.preference.parallel == "shard" else "the whole"
        lines.append(f"{ranks.world} processes; in preference training each holds {held}")
    lines += ["", "stages"]
    lines += [f"  {name:<28} {what}" for name, what in _stages(config, task)]
    lines += ["", "memory" if ranks.world == 1 else "memory of each process"]
    lines += [f"  {line}" for line in _memory(config, folder, ranks)]
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
    votes = config.judge.num_samples if config.judge.kind == "prompted" else 1
    for t in range(1, config.rounds + 1):
        n = config.sampling.num_candidates
        if config.pairs.anchored_rejection and t > 1:
            n *= 2  # the first model's as well
        count = task.round_sizes[t - 1] if task.round_sizes else cfg.of_round(t)
        if cfg.source == "dataset":
            count = min(count, len(task.prompts))
        if config.online:  # which samples anew in every epoch
            n *= config.preference.num_train_epochs
        tokens = count * n * config.sampling.max_new_tokens
        pairs = round(count / (1 - config.pairs.gold_replay))
        learned = "preference", f"at most {pairs} pairs, {loss}"
        if config.srlm.training == "positives":
            learned = "SFT", f"of the base model, at most {count * n} rows more by each round"
        if config.online:
            size = config.preference.per_device_train_batch_size
            learned = "online", f"{loss}, sampling and judging {size} prompts a step"
        judged = f"{count * n} x {votes} votes"
        if config.judge.kind == "prompted":
            judged += f", {count * n * votes * config.judge.max_new_tokens:,} tokens"
        stages += [
            (f"round {t}: prompts", f"{count} by {cfg.source}"),
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


def _memory(config: Config, folder: Path | None, ranks: Ranks = ALONE) -> list[str]:
    """Of the phases of a run, where every row is as long as it may be."""
    if folder is None:
        return ["under 0.1 GB: the sandbox's model has 0.8M parameters"]
    count = _parameters(folder)
    if count is None:
        return ["unknown: the folder has no safetensors to count parameters in"]
    bf16 = _is_bf16(config, folder)
    lines = [
        f"{count / 1e6:,.1f}M parameters in {'bf16' if bf16 else 'fp32'}",
        f"sampling and judging {count * (2 if bf16 else 4) / 1e9:.2f} GB, plus keys and values",
    ]
    if config.lora.r:
        adapter = lora_parameters(AutoConfig.from_pretrained(folder), config.lora)
        lines.append(f"adapters of {adapter / 1e6:,.1f}M parameters, which alone train")
    for name, train in (("sft", config.sft), ("preference", config.preference)):
        lines.append(f"{name}: {_peak(*training_memory(config, folder, name, ranks))}")
        if isinstance(train, PreferenceConfig) and train.reference_cache == "states":
            width = AutoConfig.from_pretrained(folder).get_text_config().hidden_size
            most = max(config.prompts.of_round(t) for t in range(1, max(config.rounds, 1) + 1))
            rows = 2 * most * config.sampling.max_new_tokens
            size = rows * width * (2 if bf16 else 4)
            lines.append(f"states of the reference: at most {size / 1e9:.2f} GB on disk")
    return lines


def _peak(memory: TrainMemory, tokens: int) -> str:
    names = ("weights", "reference", "optimizer", "gradients", "activations", "head")
    sizes = {name: getattr(memory, name) for name in names}
    parts = ", ".join(
        f"{name} unknown" if size is None else f"{name} {size / 1e9:.2f}"
        for name, size in sizes.items()
    )
    bound = "at least" if memory.activations is None else "at most"
    return f"{bound} {memory.peak / 1e9:.2f} GB in forwards of {tokens:,} tokens ({parts})"


def check_memory(config: Config, folder: Path, ranks: Ranks = ALONE) -> None:
    """Raises UserError where a training cannot fit, however short its rows are.

    What rows add is known with the data only, and a step is cut where a GPU has no room for it.
    """
    device = resolve_device(config.device)
    room, count = _room(device), _parameters(folder)
    if room is None or count is None:
        return
    if device.type == "cpu":  # of which the processes of a machine take a copy each
        room //= ranks.local_world
    live = _runs_a_reference(config.preference) and not config.lora.r
    dtype = torch.bfloat16 if _is_bf16(config, folder) else torch.float32
    trained = count
    if config.lora.r:
        trained = lora_parameters(AutoConfig.from_pretrained(folder), config.lora)
    # Gradients are fp32.
    each = 4 + optimizer_bytes(config.preference, dtype)
    whole = count * dtype.itemsize * (1 + live)  # which is there before it is shared out
    need = max(whole, (whole + trained * each) // _shares(config.preference, ranks))
    if need > room:
        cure = "take a smaller model or a larger device"
        if not config.lora.r:
            cure += ", or train adapters (lora.r)"
        if ranks.world > 1 and config.preference.parallel == "replicate" and not config.lora.r:
            cure += ", or set preference.parallel to shard"
        if live and config.preference.reference == "previous":
            cure += ", or set preference.reference_cache, which spares the reference's copy"
        raise UserError(
            f"training takes {need / 1e9:.1f} GB for weights, gradients and"
            f" optimiser alone, and {room / 1e9:.1f} GB are free: {cure}"
        )


def check_training(config: Config, folder: Path | None) -> None:
    """Raises UserError where packages are asked for that are not there, modules that are to have
    adapters, or weights that are to be rounded. `folder`: None in the sandbox, whose model is made
    later, in fp32."""
    if config.lora.r:
        require("peft")
        if folder:
            lora_parameters(AutoConfig.from_pretrained(folder), config.lora)
    if config.use_liger_kernel:
        check_liger(resolve_device(config.device))
    trainings = (config.sft, config.preference)
    if any(train.optim == "adamw_torch_8bit" for train in trainings):
        require("torchao")
    is_bf16 = _is_bf16(config, folder) if folder else config.dtype == "bfloat16"
    if any(train.bf16_stochastic_rounding for train in trainings) and not is_bf16:
        raise UserError(
            "bf16_stochastic_rounding is for bf16 weights, and this run's are fp32; leave it off,"
            " or set --dtype bfloat16"
        )


def _shares(train: TrainConfig, ranks: Ranks) -> int:
    """Into how many the weights of a training are cut."""
    return ranks.world if train.parallel == "shard" else 1


def _runs_a_reference(train: TrainConfig) -> bool:
    """Whether a frozen copy is there beside the model."""
    return isinstance(train, PreferenceConfig) and (
        train.reference_cache == "none" or train.reference != "previous"
    )


def training_memory(
    config: Config, folder: Path, name: str, ranks: Ranks = ALONE
) -> tuple[TrainMemory, int]:
    """The peak of the training `name` on one of `ranks` with the longest rows that it takes, and
    the tokens of its largest forward."""
    model = AutoConfig.from_pretrained(folder)
    train: TrainConfig = getattr(config, name)
    context = int(getattr(model.get_text_config(), "max_position_embeddings", 0) or 2048)
    longest = min(train.max_length or context, context)
    pairs = isinstance(train, PreferenceConfig)
    response = min(config.sampling.max_new_tokens, longest)
    item = longest + response if pairs else longest
    step = -(-train.per_device_train_batch_size // ranks.world)
    items = min(train.micro_batch_size or step, step)
    if train.micro_batch_tokens:
        items = max(1, min(items, train.micro_batch_tokens // item))
    memory = train_memory(
        model,
        train,
        dtype=torch.bfloat16 if _is_bf16(config, folder) else torch.float32,
        device=resolve_device(config.device),
        tokens=items * item,
        rows=items * (2 * response if pairs else longest),
        longest=item,
        forwards=-(-step // items),
        reference=_runs_a_reference(train),
        lora=config.lora,
        shares=_shares(train, ranks),
    )
    return memory, items * item


def _room(device: torch.device) -> int | None:
    """Bytes that a run can have; None: unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


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
