"""How models are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srlm_fast.config.rules import require


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
        require(
            not self.bf16_stochastic_rounding or self.optim == "adamw_torch_8bit",
            "bf16_stochastic_rounding needs optim adamw_torch_8bit",
        )
        require(
            not self.save_steps or self.optim == "adamw_torch",
            "save_steps must be 0 with optim adamw_torch_8bit, whose state is no plain tensors",
        )
        require(self.learning_rate > 0, "learning_rate must be above 0")
        require(self.num_train_epochs >= 1, "num_train_epochs must be at least 1")
        require(
            self.per_device_train_batch_size >= 1, "per_device_train_batch_size must be at least 1"
        )
        require(self.micro_batch_size >= 0, "micro_batch_size must not be negative")
        require(self.micro_batch_tokens >= 0, "micro_batch_tokens must not be negative")
        require(0 <= self.warmup_ratio <= 1, "warmup_ratio must lie in 0..1")
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio must lie in 0..1")
        require(self.weight_decay >= 0, "weight_decay must not be negative")
        require(0 <= self.adam_beta1 < 1, "adam_beta1 must be at least 0 and below 1")
        require(0 <= self.adam_beta2 < 1, "adam_beta2 must be at least 0 and below 1")
        require(self.max_grad_norm >= 0, "max_grad_norm must not be negative (0: off)")
        require(self.max_length >= 0, "max_length must not be negative")
        require(self.logging_steps >= 1, "logging_steps must be at least 1")
        require(self.eval_steps >= 0, "eval_steps must not be negative (0: no evaluation)")
        require(self.save_steps >= 0, "save_steps must not be negative (0: no checkpoints)")
        require(self.save_total_limit >= 0, "save_total_limit must not be negative (0: keep all)")


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
    # The round's start; the first round's; or their average, which moves to each start by
    # `ref_model_mixup_alpha`.
    reference: Literal["previous", "fixed", "ema"] = "previous"
    reference_cache: Literal["none", "logps", "states"] = "none"  # run it once; spa needs states
    sync_ref_model: bool = False  # TR-DPO: the reference follows the policy
    ref_model_mixup_alpha: float = 0.6  # by this share at a time; 1: it becomes the policy
    ref_model_sync_steps: int = 512  # optimiser steps between two times
    # The result is not the last step's but the best of the checkpoints kept, by `pairwise`.
    load_best_model_at_end: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, "beta must be above 0")
        require(self.rpo_alpha >= 0, "rpo_alpha must not be negative")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing must be at least 0 and below 0.5")
        require(
            0 < self.ref_model_mixup_alpha <= 1, "ref_model_mixup_alpha must be above 0, at most 1"
        )
        require(self.ref_model_sync_steps >= 1, "ref_model_sync_steps must be at least 1")
        require(
            self.loss_type != "simpo"
            or (self.reference == "previous" and self.reference_cache == "none"),
            "loss simpo has no reference; leave reference at previous and reference_cache at none",
        )
        if self.sync_ref_model:
            self._check_sync()
        else:
            self._check_unmoved()

    def _check_sync(self) -> None:
        require(
            self.reference == "previous",
            f"sync_ref_model moves the reference from the round's start; reference {self.reference}"
            " is another one: set it to previous",
        )
        require(
            self.reference_cache == "none",
            "sync_ref_model changes what reference_cache would keep; set it to none",
        )
        require(
            self.loss_type != "simpo", "sync_ref_model needs a reference, and loss simpo has none"
        )

    def _check_unmoved(self) -> None:
        same = PreferenceConfig
        require(
            self.ref_model_sync_steps == same.ref_model_sync_steps,
            "ref_model_sync_steps needs sync_ref_model: true",
        )
        require(
            self.reference == "ema" or self.ref_model_mixup_alpha == same.ref_model_mixup_alpha,
            "ref_model_mixup_alpha needs sync_ref_model: true, or reference: ema",
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
        require(self.r >= 0, "r must not be negative (0: off)")
        require(self.lora_alpha >= 1, "lora_alpha must be at least 1")
        require(
            self.lora_dropout == 0,
            "lora_dropout must be 0: training runs without dropout, so that policy and reference"
            " are the same function",
        )
        require(
            self.target_modules == ("all-linear",)
            or (bool(self.target_modules) and "all-linear" not in self.target_modules),
            "target_modules must be all-linear, or names of modules",
        )
