"""Options of later work that contradict other settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srlm_fast.config.rules import require

if TYPE_CHECKING:
    from srlm_fast.config import Config, PreferenceConfig


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
    require(
        not config.pairs.anchored_rejection or config.rounds > 1,
        "pairs.anchored_rejection looks back at the first round's model from the second round on;"
        " set rounds to 2 or more, or leave it out",
    )
    require(
        not config.pairs.length_control or config.sampling.num_candidates > 2,
        "pairs.length_control chooses among candidates that score alike, and of two there are none;"
        " raise sampling.num_candidates, or leave it out",
    )
    if config.pairs.consistency != "off":
        _check_consistency(config)
    if config.online:
        _check_online(config)


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


def _check_online(config: Config) -> None:
    pairs = config.pairs
    require(
        pairs.consistency == "off" and not pairs.gold_replay and not pairs.anchored_rejection,
        "online makes the pairs of a step while it trains; pairs.consistency, gold_replay and"
        " anchored_rejection are for rounds that make all pairs first: leave them out",
    )
    require(
        config.srlm.training == "preference", "online needs pairs; set srlm.training to preference"
    )
    check_online_training(config.preference, config.spa.tau if config.refines_labels else None)


def check_online_training(train: PreferenceConfig, tau: str | None) -> None:
    """Raises UserError for what needs all pairs of a training beforehand, or whole weights in a
    sharded one. tau: of SPA's refinement, if there is one."""
    for name, off in (
        ("load_best_model_at_end", False), ("save_steps", 0), ("eval_steps", 0),
        ("parallel", "replicate"), ("reference_cache", "none"),
    ):  # fmt: skip
        require(
            getattr(train, name) == off,
            f"preference.{name} must be {off} where pairs are made while the training runs",
        )
    require(
        tau != "dataset",
        "spa.tau dataset scores all pairs of a round, which are not there while it trains online;"
        " set it to window",
    )
