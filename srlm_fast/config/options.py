"""Options of later work that contradict other settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srlm_fast.config.rules import require

if TYPE_CHECKING:
    from srlm_fast.config import Config


def check_options(config: Config) -> None:
    """Raises UserError, with the cure."""
    loss = config.preference
    moves = loss.reference == "ema" or loss.sync_ref_model
    copied = loss.reference != "ema" and loss.ref_model_mixup_alpha == 1
    require(
        not (config.lora.r and moves) or copied,
        "the mean of two LoRA adapters is none of the same rank: with lora, reference cannot be ema"
        " and sync_ref_model needs ref_model_mixup_alpha 1",
    )
    require(
        config.pairs.gold_replay == 0 or (config.method == "spa" and not config.spa.no_seed),
        "pairs.gold_replay needs gold pairs, which only method spa has, in its seed; set it to 0",
    )
    if config.pairs.consistency != "off":
        _check_consistency(config)


def _check_consistency(config: Config) -> None:
    loss = config.preference
    require(
        loss.loss_type == "sigmoid" and loss.label_smoothing == 0,
        "pairs.consistency is the label smoothing of DPO; set preference.loss_type to sigmoid and"
        " preference.label_smoothing to 0",
    )
    require(
        not config.refines_labels,
        "pairs.consistency and SPA's self-refinement both smooth labels; leave one off",
    )
    require(
        not config.spa.no_seed or config.model == "sandbox",
        "pairs.consistency compares a model with the one before, and without a seed the first has"
        " none; set it to off, or spa.no_seed to false",
    )
