"""The configuration of a run: frozen dataclasses, YAML recipes, dotted overrides.

Field names are TRL's and transformers' wherever the meaning is theirs. A recipe is a YAML file with
the same nesting; `scales` in a recipe holds overlays that `sandbox.scale` selects. Precedence: the
dataclass defaults, the recipe, its scale overlay, the dotted overrides of the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from srlm_fast.errors import UserError


@dataclass(frozen=True)
class SandboxConfig:
    """The embedded world (when `model` is "sandbox"): how its base model M0 is made."""

    scale: Literal["smoke", "small", "full"] = "full"
    world: str = "W4"
    num_ift: int = 300  # seed trees whose best response is trained on
    num_eft: int = 120  # seed trees whose ranked responses are judged
    pretrain_steps: int = 1000
    min_exact: float = 0.75  # gate: share of perfect greedy copies on 100 prompts
    max_seconds: float = 240.0  # cap on pre-training, gate included
    cache_dir: str = ""  # default: $XDG_CACHE_HOME/srlm_fast


@dataclass(frozen=True)
class DataConfig:
    """Input files (or HF dataset names) and how they are split. Unused by the sandbox."""

    trees: str = ""  # OASST message trees: IFT, EFT and the judge's test set
    preferences: str = ""  # prompt, chosen, rejected rows: gold seed, test pairs, round prompts
    prompts: str = ""  # a prompt list: round prompts instead of generated ones
    lang: str = "en"
    split: tuple[float, ...] = (0.6, 0.25, 0.15)  # of the trees: IFT, EFT, judge test
    num_gold: int = 2000  # SPA's seed pairs
    num_test_pairs: int = 500
    num_test_prompts: int = 256


@dataclass(frozen=True)
class TrainConfig:
    """One training stage (SFT). Optimiser AdamW; the schedule decays to `min_lr_ratio`."""

    learning_rate: float = 5.5e-6
    min_lr_ratio: float = 0.2
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.0
    num_train_epochs: int = 2
    per_device_train_batch_size: int = 16  # sequences (SFT) or pairs of one optimiser step
    micro_batch_size: int = 0  # sequences or pairs of one forward; 0: the whole batch
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    max_length: int = 0  # prompt + response tokens, longer rows dropped; 0: the model's context
    layout: Literal["padded", "packed"] = "padded"
    logging_steps: int = 10


@dataclass(frozen=True)
class PreferenceConfig(TrainConfig):
    """Preference training (DPO and SPA)."""

    learning_rate: float = 1e-6
    min_lr_ratio: float = 0.1
    num_train_epochs: int = 1
    loss_type: str = "sigmoid"  # a name of srlm_kernels.losses.LOSSES; spa is set by the method
    beta: float = 0.1
    rpo_alpha: float = 0.0  # weight of the chosen response's mean negative log-likelihood
    reference: Literal["previous", "fixed"] = "previous"


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling of the candidates."""

    num_candidates: int = 4
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 1024
    keep_truncated: bool = False  # keep candidates that hit max_new_tokens


@dataclass(frozen=True)
class JudgeConfig:
    """Who scores the candidates, and how. `random` and `longest` are controls."""

    kind: Literal["prompted", "expected", "implicit", "random", "longest"] = "prompted"
    prompt: str = "additive"  # a name in judge/prompts, or a file with both placeholders
    num_samples: int = 3
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512


@dataclass(frozen=True)
class EFTConfig:
    """Evaluation fine-tuning data (SRLM section 2.2)."""

    enabled: bool = True
    target: Literal["judge", "rank"] = "judge"
    max_tries: int = 1  # judgings per ranked group until its order agrees
    modal_cap: float = 1.0  # rows of the modal score at most this many times the runner-up; 0: off


@dataclass(frozen=True)
class PromptsConfig:
    """New prompts of each round."""

    source: Literal["self_instruct", "dataset"] = "self_instruct"
    num_prompts: int = 500
    template: str = "tasks"  # a name in prompts/templates, or a file
    num_seed_demos: int = 6
    num_generated_demos: int = 2
    temperature: float = 0.6
    top_p: float = 0.9
    max_new_tokens: int = 512
    max_calls: int = 0  # generation calls a round at most; 0: twenty times num_prompts
    rouge_l: float = 0.7
    min_words: int = 4
    max_words: int = 150
    keyword_filter: bool = True


@dataclass(frozen=True)
class SPAConfig:
    """Spread Preference Annotation (papers.md 1.2)."""

    alpha: float = 0.1
    k_percent: float = 10.0
    lambdas: tuple[float, ...] = (0.5, 0.25, 0.125)
    warmup_fraction: float = 0.2  # alpha is 0 in this first share of a round's steps
    tau: Literal["window", "dataset", "official"] = "window"
    tau_window: int = 0  # 0: min(512, a quarter of the round's pairs)
    tau_interval: int = 0  # dataset mode: steps between scoring passes; 0: once
    seed_epochs: int = 3
    seed_learning_rate: float = 0.0  # 0: that of `preference`
    num_seed_pairs: int = 48  # where the task annotates on-policy samples instead of giving gold


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation after every model."""

    num_prompts: int = 200
    num_samples: int = 2
    temperature: float = 0.7
    top_p: float = 0.9
    num_judge_groups: int = 60
    greedy: bool = True


@dataclass(frozen=True)
class Config:
    """Everything that determines a run's result."""

    method: Literal["srlm", "spa"] = "srlm"
    model: str = ""  # HF folder or hub id, or "sandbox": the embedded world and its own model
    template: str = "auto"  # chat template: the tokenizer's own, or a name in data/chat_templates
    seed: int = 0
    rounds: int = 2
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    num_threads: int = 0  # CPU threads; 0: torch's default
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: TrainConfig = field(default_factory=TrainConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    eft: EFTConfig = field(default_factory=EFTConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    spa: SPAConfig = field(default_factory=SPAConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("srlm_fast") / "recipes"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def load_config(recipe: str, overrides: Mapping[str, str] | None = None) -> Config:
    """The configuration of a recipe (name or YAML file) with dotted overrides applied.

    Raises UserError on an unknown recipe, an unknown key (with the nearest name) or a wrong value.
    """
    tree = _read_recipe(recipe)
    scales = tree.pop("scales", {})
    changes = {
        key: yaml.safe_load(value) if value else "" for key, value in (overrides or {}).items()
    }
    scale = changes.get("sandbox.scale") or tree.get("sandbox", {}).get("scale", "full")
    _merge(tree, scales.get(scale, {}))
    for key, value in changes.items():
        _set(tree, key.split("."), value)
    config: Config = _build(Config, tree, "")
    _check(config)
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as a recipe file that gives it back."""
    plain = yaml.safe_load(yaml.safe_dump(_lists(dataclasses.asdict(config))))
    return yaml.safe_dump(plain, sort_keys=False)


def _check(config: Config) -> None:
    """Refuse values that could only fail later, or do nothing."""
    c = config
    rules = {
        "rounds must be at least 1": c.rounds >= 1,
        "sampling.num_candidates must be at least 2, or there is no pair": c.sampling.num_candidates
        > 1,
        "sampling.max_new_tokens must be at least 1": c.sampling.max_new_tokens >= 1,
        "judge.num_samples must be at least 1": c.judge.num_samples >= 1,
        "judge.max_new_tokens must be at least 1": c.judge.max_new_tokens >= 1,
        "preference.beta must be above 0": c.preference.beta > 0,
        "sandbox.num_ift and num_eft must be at least 1": min(c.sandbox.num_ift, c.sandbox.num_eft)
        > 0,
        "prompts.num_prompts must be at least 1": c.prompts.num_prompts >= 1,
        "prompts.rouge_l must lie in 0..1": 0 <= c.prompts.rouge_l <= 1,
        "spa.lambdas needs at least one value, none negative": min(c.spa.lambdas, default=-1) >= 0,
        "eft.max_tries must be at least 1": c.eft.max_tries >= 1,
        "evaluate.num_prompts and num_samples must be at least 1": min(
            c.evaluate.num_prompts, c.evaluate.num_samples
        )
        >= 1,
        "data.split needs three shares (IFT, EFT, judge test) that sum to at most 1": len(
            c.data.split
        )
        == 3
        and min(c.data.split) >= 0
        and sum(c.data.split) < 1 + 1e-9,
    }
    for name, train in (("sft", c.sft), ("preference", c.preference)):
        rules[f"{name}.learning_rate must be above 0"] = train.learning_rate > 0
        rules[f"{name}.num_train_epochs must be at least 1"] = train.num_train_epochs >= 1
        batch = train.per_device_train_batch_size
        rules[f"{name}.per_device_train_batch_size must be at least 1"] = batch >= 1
        rules[f"{name}.warmup_ratio and min_lr_ratio must lie in 0..1"] = (
            0 <= train.warmup_ratio <= 1 and 0 <= train.min_lr_ratio <= 1
        )
    for name, draw in (("sampling", c.sampling), ("judge", c.judge), ("prompts", c.prompts)):
        rules[f"{name}.temperature must not be negative"] = draw.temperature >= 0
        rules[f"{name}.top_p must be above 0 and at most 1"] = 0 < draw.top_p <= 1
    for rule, holds in rules.items():
        if not holds:
            raise UserError(rule)


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if not path.is_file():
            raise UserError(
                f"recipe file {recipe} does not exist; give a file or one of {recipe_names()}"
            )
        text = path.read_text(encoding="utf-8")
    elif recipe in recipe_names():
        text = (resources.files("srlm_fast") / "recipes" / f"{recipe}.yaml").read_text("utf-8")
    else:
        raise UserError(f"unknown recipe {recipe!r}{_nearest(recipe, recipe_names())}")
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"recipe {recipe} is not valid YAML: {error}".replace("\n", " ")) from error
    if not isinstance(tree, dict):
        raise UserError(f"recipe {recipe} must be a mapping of keys to values")
    return tree


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"--{'.'.join(path)}: {key} is a value, not a group of settings")
    tree[path[-1]] = value


def _build(cls: type[Any], tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(
            f"{prefix.rstrip('.') or 'the recipe'} must be a group of settings, not {tree!r}"
        )
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise UserError(f"unknown setting {prefix}{key}{_nearest(str(key), list(hints))}")
    return cls(**{key: _value(hints[key], value, prefix + key) for key, value in tree.items()})


def _value(hint: Any, value: Any, name: str) -> Any:
    """`value` as the field's type; YAML reads 1e-4 as a string, and lists where we hold tuples."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, name + ".")
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{name} must be one of {', '.join(args)}, not {value!r}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_value(args[0], item, name) for item in items)
    if origin is types.UnionType:
        return None if value is None else _value(args[0], value, name)
    try:
        if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
        if hint is int and isinstance(value, str | float) and float(value) == int(float(value)):
            return int(float(value))
    except ValueError:
        pass
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if type(value) is not hint:
        raise UserError(f"{name} must be of type {hint.__name__}, not {value!r}")
    return value


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, tuple | list) else value


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
