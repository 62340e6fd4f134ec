"""Settings of different groups that make no sense together, whatever the data."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from srlm_fast.config.judge import EFTConfig
from srlm_fast.config.rules import require
from srlm_fast.config.spa import OF_THE_SEED

if TYPE_CHECKING:
    from srlm_fast.config import Config


def check_methods(config: Config) -> None:
    """Raises UserError, with the cure."""
    is_spa, spa = config.method == "spa", config.spa
    require(
        config.rounds >= 1 or (config.rounds == 0 and is_spa and not spa.no_seed),
        "rounds must be at least 1 (or 0: the seed DPO alone, with method spa)",
    )
    require(
        not spa.no_seed or is_spa, "spa.no_seed needs method spa: srlm has no gold pairs anyway"
    )
    require(
        not (spa.refine_srlm and is_spa),
        "spa.refine_srlm is for method srlm; spa refines unless spa.self_refinement is false",
    )
    require(
        spa.self_refinement or not spa.refine_srlm,
        "spa.refine_srlm asks for what spa.self_refinement false turns off; set one of them",
    )
    require(
        not (spa.refine_srlm and config.srlm.training == "positives"),
        "spa.refine_srlm refines labels of pairs, and srlm.training positives makes none",
    )
    require(
        not (config.refines_labels and config.preference.label_smoothing),
        "preference.label_smoothing must be 0 where SPA's refinement smooths the labels it"
        " suspects; set it to 0, or spa.self_refinement to false",
    )
    require(
        config.data.slices == "prompts" or is_spa,
        "data.slices says how spa cuts preference rows, and srlm has none; leave it at prompts",
    )
    _check_unused(config)
    _check_reference(config)


def _check_unused(config: Config) -> None:
    """What is set and would change nothing: the other method's groups and files."""
    spa, data, is_spa = config.spa, config.data, config.method == "spa"
    used = {field.name for field in fields(spa)} if is_spa or spa.refine_srlm else set()
    used -= set() if is_spa else set(OF_THE_SEED)
    cure = "" if spa.refine_srlm else ", or for srlm with spa.refine_srlm true"
    for field in fields(spa):
        require(
            field.name in used or getattr(spa, field.name) == field.default,
            f"spa.{field.name} is for method spa{cure}; leave it out",
        )
    require(
        not is_spa or config.eft == EFTConfig(),
        "eft makes srlm's seed data, and spa has none of it; leave it out, or set method to srlm",
    )
    require(
        config.model != "sandbox" or not (data.trees or data.preferences or data.prompts),
        "the sandbox makes its own data; leave data.trees, data.preferences and data.prompts out",
    )
    require(
        not (is_spa and data.trees),
        "data.trees is what srlm learns from; give spa its pairs as data.preferences",
    )
    require(
        is_spa or not data.preferences,
        "data.preferences is what spa learns from; give srlm its message trees as data.trees",
    )


def _check_reference(config: Config) -> None:
    """The implicit reward of a model against its own equal is 0, and orders nothing."""
    sandbox, reference = config.model == "sandbox", config.judge.reference
    require(
        not (sandbox and config.judge.reference_model),
        f"judge.reference {reference} is no model of the sandbox: use base, its M0",
    )
    if config.judge.kind != "implicit":
        return
    own = ("sft", "previous") if sandbox else ("sft", "previous", "base")
    require(
        not config.spa.no_seed or reference not in own,
        f"judge.reference {reference} is, without a seed, the first judge itself: set it to the"
        f" model that this one was trained from{' (base)' if sandbox else ''}, or to none",
    )
    require(
        config.method == "spa" or config.eft.enabled or reference not in ("sft", "previous"),
        f"judge.reference {reference} is, without eft, M1 itself: set it to base or none",
    )
