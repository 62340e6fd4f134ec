"""The configuration of a run: frozen dataclasses that refuse values which could only fail later.

Field names are TRL's and transformers' wherever the meaning is theirs. `srlm_fast.recipes` makes a
`Config` from a recipe and the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from srlm_fast.errors import UserError


def _require(holds: bool, rule: str) -> None:
    """`rule` begins with the field's name, to which the loader adds the group's."""
    if not holds:
        raise UserError(rule)


def _require_sampling(temperature: float, top_p: float) -> None:
    _require(temperature >= 0, "temperature must not be negative")
    _require(0 < top_p <= 1, "top_p must be above 0 and at most 1")


@dataclass(frozen=True)
class SandboxConfig:
    """The embedded world (when `model` is "sandbox"): how its base model M0 is made."""

    scale: Literal["smoke", "small", "full"] = "full"
    world: str = "W4"
    num_ift: int = 300  # seed trees whose best response is trained on
    num_eft: int = 120  # seed trees whose ranked responses are judged
    pretrain_steps: int = 1000
    min_exact: float = 0.75  # gate: share of perfect greedy copies on 100 prompts
    max_seconds: float = 270.0  # cap on pre-training, gate included
    cache_dir: str = ""  # default: $XDG_CACHE_HOME/srlm_fast

    def __post_init__(self) -> None:
        _require(self.pretrain_steps >= 1, "pretrain_steps must be at least 1")
        _require(self.num_ift >= 1, "num_ift must be at least 1")
        _require(self.num_eft >= 1, "num_eft must be at least 1")
        _require(0 <= self.min_exact <= 1, "min_exact must lie in 0..1")
        _require(self.max_seconds > 0, "max_seconds must be above 0")


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

    def __post_init__(self) -> None:
        shares = self.split
        _require(
            len(shares) == 3 and min(shares) > 0 and abs(sum(shares) - 1) < 1e-6,
            "split must be three positive shares (IFT, EFT, judge test) that sum to 1",
        )
        _require(self.num_gold >= 0, "num_gold must not be negative")
        _require(self.num_test_pairs >= 0, "num_test_pairs must not be negative")
        _require(self.num_test_prompts >= 0, "num_test_prompts must not be negative")


@dataclass(frozen=True)
class TrainConfig:
    """A training stage: AdamW, with a schedule that decays to `min_lr_ratio` of the rate."""

    learning_rate: float = 5.5e-6
    min_lr_ratio: float = 0.2
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.0
    num_train_epochs: int = 2
    per_device_train_batch_size: int = 16  # sequences (SFT) or pairs of one optimiser step
    micro_batch_size: int = 0  # sequences or pairs of one forward at most; 0: the whole batch
    micro_batch_tokens: int = 0  # tokens of one forward at most, but one item; 0: no limit
    gradient_checkpointing: bool = (
        False  # keep a layer's input only: a third more time, less memory
    )
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0  # 0: no clipping
    optim: Literal["adamw_torch", "adamw_torch_8bit"] = "adamw_torch"  # 8bit: torchao's
    bf16_stochastic_rounding: bool = False  # bf16 weights without fp32 masters
    max_length: int = 0  # prompt + response tokens, longer rows dropped; 0: the model's context
    layout: Literal["auto", "shared", "padded"] = "auto"  # shared: packed, a pair's prompt once
    # Of several processes: each has all weights, or a share of weights, gradients and optimiser.
    parallel: Literal["replicate", "shard"] = "replicate"
    logging_steps: int = 10
    eval_steps: int = 0  # steps between evaluations on held-out data, one at the end; 0: none
    save_steps: int = 0  # steps between checkpoints, from which a stopped training goes on; 0: none
    save_total_limit: int = 2  # checkpoints kept, the newest; 0: all

    def __post_init__(self) -> None:
        _require(
            not self.bf16_stochastic_rounding or self.optim == "adamw_torch_8bit",
            "bf16_stochastic_rounding needs optim adamw_torch_8bit",
        )
        _require(
            not self.save_steps or self.optim == "adamw_torch",
            "save_steps must be 0 with optim adamw_torch_8bit, whose state is no plain tensors",
        )
        _require(self.learning_rate > 0, "learning_rate must be above 0")
        _require(self.num_train_epochs >= 1, "num_train_epochs must be at least 1")
        _require(
            self.per_device_train_batch_size >= 1, "per_device_train_batch_size must be at least 1"
        )
        _require(self.micro_batch_size >= 0, "micro_batch_size must not be negative")
        _require(self.micro_batch_tokens >= 0, "micro_batch_tokens must not be negative")
        _require(0 <= self.warmup_ratio <= 1, "warmup_ratio must lie in 0..1")
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio must lie in 0..1")
        _require(self.weight_decay >= 0, "weight_decay must not be negative")
        _require(0 <= self.adam_beta1 < 1, "adam_beta1 must be at least 0 and below 1")
        _require(0 <= self.adam_beta2 < 1, "adam_beta2 must be at least 0 and below 1")
        _require(self.max_grad_norm >= 0, "max_grad_norm must not be negative (0: off)")
        _require(self.max_length >= 0, "max_length must not be negative")
        _require(self.logging_steps >= 1, "logging_steps must be at least 1")
        _require(self.eval_steps >= 0, "eval_steps must not be negative (0: no evaluation)")
        _require(self.save_steps >= 0, "save_steps must not be negative (0: no checkpoints)")
        _require(self.save_total_limit >= 0, "save_total_limit must not be negative (0: keep all)")


@dataclass(frozen=True)
class PreferenceConfig(TrainConfig):
    """Preference training (DPO and SPA)."""

    learning_rate: float = 1e-6
    min_lr_ratio: float = 0.1
    num_train_epochs: int = 1
    loss_type: str = "sigmoid"  # a name of srlm_kernels.losses.LOSSES; spa is set by the method
    beta: float = 0.1
    label_smoothing: float = 0.0  # of sigmoid (cDPO), robust, aot; exo_pair needs some
    simpo_gamma: float = 0.5
    rdpo_alpha: float = 0.01  # of r_dpo: nats that a token of difference in length counts
    rpo_alpha: float = 0.0  # weight of the chosen response's mean negative log-likelihood
    reference: Literal["previous", "fixed"] = "previous"
    reference_cache: Literal["none", "logps", "states"] = "none"  # run it once; spa needs states

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.beta > 0, "beta must be above 0")
        _require(self.rpo_alpha >= 0, "rpo_alpha must not be negative")
        _require(
            0 <= self.label_smoothing < 0.5, "label_smoothing must be at least 0 and below 0.5"
        )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in the place of full training, under PEFT's names."""

    r: int = 0  # rank; 0: off, all weights train
    lora_alpha: int = 32  # an adapter counts lora_alpha / r
    lora_dropout: float = 0.0
    use_rslora: bool = False  # lora_alpha / sqrt(r) instead
    target_modules: tuple[str, ...] = ("all-linear",)  # that, or ends of modules' names

    def __post_init__(self) -> None:
        _require(self.r >= 0, "r must not be negative (0: off)")
        _require(self.lora_alpha >= 1, "lora_alpha must be at least 1")
        _require(
            self.lora_dropout == 0,
            "lora_dropout must be 0: training runs without dropout, so that policy and reference"
            " are the same function",
        )
        _require(
            self.target_modules == ("all-linear",)
            or (bool(self.target_modules) and "all-linear" not in self.target_modules),
            "target_modules must be all-linear, or names of modules",
        )


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling of the candidates."""

    num_candidates: int = 4
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 1024
    keep_truncated: bool = False  # keep candidates that hit max_new_tokens

    def __post_init__(self) -> None:
        _require(self.num_candidates >= 2, "num_candidates must be at least 2: a pair needs two")
        _require(self.top_k >= 0, "top_k must not be negative (0: off)")
        _require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1")
        _require_sampling(self.temperature, self.top_p)


@dataclass(frozen=True)
class JudgeConfig:
    """Who scores the candidates, and how. `random` and `longest` are controls."""

    kind: Literal["prompted", "expected", "implicit", "random", "longest"] = "prompted"
    prompt: str = "additive"  # a name in judge/prompts, or a file with both placeholders
    num_samples: int = 3
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        _require(self.num_samples >= 1, "num_samples must be at least 1")
        _require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1")
        _require_sampling(self.temperature, self.top_p)


@dataclass(frozen=True)
class PairsConfig:
    """Which judged candidates become preference pairs."""

    selection: Literal["min_max", "max_chosen", "all"] = "min_max"
    length_control: float = 0.0  # Meta-Rewarding's rho, with min_max; 0: off
    length_penalty: float = 0.0  # DICE's alpha: taken from the score for every token
    balance_length: bool = False  # DICE's search for the penalty: lengths equal in the mean

    def __post_init__(self) -> None:
        _require(0 <= self.length_control < 0.5, "length_control must be at least 0 and below 0.5")
        known = ("min_max", "max_chosen", "all")
        _require(self.selection in known, f"selection must be one of {', '.join(known)}")
        _require(0 <= self.length_penalty < math.inf, "length_penalty must not be negative")
        _require(
            not (self.balance_length and self.length_penalty), "balance_length finds length_penalty"
        )
        _require(
            self.selection == "min_max" or self.length_control == 0,
            "length_control needs selection: min_max",
        )


@dataclass(frozen=True)
class EFTConfig:
    """Evaluation fine-tuning data (SRLM section 2.2)."""

    enabled: bool = True
    target: Literal["judge", "rank"] = "judge"
    max_tries: int = 1  # judgings per ranked group until its order agrees
    modal_cap: float = 1.0  # rows of the modal score at most this many times the runner-up; 0: off

    def __post_init__(self) -> None:
        _require(self.max_tries >= 1, "max_tries must be at least 1")
        _require(self.modal_cap >= 0, "modal_cap must not be negative (0: off)")


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

    def __post_init__(self) -> None:
        _require(self.num_prompts >= 1, "num_prompts must be at least 1")
        _require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1")
        _require(
            self.max_calls >= 0, "max_calls must not be negative (0: twenty times num_prompts)"
        )
        _require(self.num_seed_demos >= 0, "num_seed_demos must not be negative")
        _require(self.num_generated_demos >= 0, "num_generated_demos must not be negative")
        _require(
            self.num_seed_demos + self.num_generated_demos >= 1, "num_seed_demos: show one at least"
        )
        _require(0 <= self.rouge_l <= 1, "rouge_l must lie in 0..1")
        _require(0 <= self.min_words <= self.max_words, "min_words must lie in 0..max_words")
        _require_sampling(self.temperature, self.top_p)


@dataclass(frozen=True)
class SPAConfig:
    """Spread Preference Annotation (arXiv 2406.04412, section 5.1)."""

    alpha: float = 0.1
    k_percent: float = 10.0
    lambdas: tuple[float, ...] = (0.5, 0.25, 0.125)
    warmup_fraction: float = 0.2  # alpha is 0 in this first share of a round's steps
    tau: Literal["window", "dataset", "official"] = "window"
    tau_window: int = 0  # at most half of the pairs; 0: min(512, a quarter)
    tau_interval: int = 0  # dataset mode: steps between scoring passes; 0: once
    seed_epochs: int = 3
    seed_learning_rate: float = 0.0  # 0: that of `preference`
    num_seed_pairs: int = 48  # where the task annotates on-policy samples instead of giving gold

    def __post_init__(self) -> None:
        _require(0 <= self.alpha <= 1, "alpha must lie in 0..1")
        _require(0 <= self.k_percent <= 100, "k_percent must lie in 0..100")
        _require(min(self.lambdas, default=-1.0) >= 0, "lambdas needs one value, none negative")
        _require(0 <= self.warmup_fraction <= 1, "warmup_fraction must lie in 0..1")
        _require(self.tau_window >= 0, "tau_window must not be negative (0: by the round's pairs)")
        _require(self.tau_interval >= 0, "tau_interval must not be negative (0: once)")
        _require(self.seed_epochs >= 1, "seed_epochs must be at least 1")
        _require(self.seed_learning_rate >= 0, "seed_learning_rate must not be negative")
        _require(self.num_seed_pairs >= 1, "num_seed_pairs must be at least 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation after every model."""

    num_prompts: int = 200
    num_samples: int = 2
    temperature: float = 0.7
    top_p: float = 0.9
    num_judge_groups: int = 60
    greedy: bool = True

    def __post_init__(self) -> None:
        _require(self.num_prompts >= 1, "num_prompts must be at least 1")
        _require(self.num_samples >= 1, "num_samples must be at least 1")
        _require(self.num_judge_groups >= 0, "num_judge_groups must not be negative")
        _require_sampling(self.temperature, self.top_p)


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
    use_liger_kernel: bool = False  # norms and MLPs in Liger's kernels, on a GPU
    num_threads: int = 0  # CPU threads; 0: torch's default
    report_to: tuple[str, ...] = ()  # tensorboard, trackio, wandb, beside metrics.jsonl
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: TrainConfig = field(default_factory=TrainConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    eft: EFTConfig = field(default_factory=EFTConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    spa: SPAConfig = field(default_factory=SPAConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        _require(self.rounds >= 1, "rounds must be at least 1")
        _require(self.num_threads >= 0, "num_threads must not be negative (0: torch's default)")
        _require(
            not self.lora.r or "shard" not in (self.sft.parallel, self.preference.parallel),
            "lora trains with parallel: replicate only, in sft and preference",
        )

    def input_files(self) -> list[Path]:
        """The files of the user that the run reads; names of recipes and HF datasets are none."""
        return [Path(path) for path in self._paths().values() if Path(path).is_file()]

    def with_absolute_paths(self) -> Config:
        """This configuration with what exists here named absolutely: a run may be resumed from
        anywhere."""
        paths = {name: _absolute(path) for name, path in self._paths().items()}
        data: dict[str, Any] = {name: paths[name] for name in ("trees", "preferences", "prompts")}
        return replace(
            self,
            model=self.model if self.model == "sandbox" else _absolute(self.model),
            data=replace(self.data, **data),
            judge=replace(self.judge, prompt=paths["judge"]),
            prompts=replace(self.prompts, template=paths["template"]),
            sandbox=replace(self.sandbox, cache_dir=_absolute(self.sandbox.cache_dir)),
        )

    def _paths(self) -> dict[str, str]:
        return {
            "trees": self.data.trees,
            "preferences": self.data.preferences,
            "prompts": self.data.prompts,
            "judge": self.judge.prompt,
            "template": self.prompts.template,
        }


def _absolute(name: str) -> str:
    return str(Path(name).resolve()) if name and Path(name).exists() else name
