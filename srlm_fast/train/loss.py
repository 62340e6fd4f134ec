"""The preference loss that a configuration names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from srlm_fast.config import PreferenceConfig
from srlm_fast.errors import UserError
from srlm_kernels import losses

# Of losses, by the settings that they are.
_OPTIONS = {"label_smoothing": "label_smoothing", "gamma": "simpo_gamma", "alpha": "rdpo_alpha"}


def pair_loss(config: PreferenceConfig) -> Callable[..., Tensor]:
    """The loss that `config.loss_type` names, without the likelihood term.

    Raises UserError when there is no such loss, when it refuses its options, or when an option is
    set that it does not have.
    """
    if config.loss_type not in losses.LOSSES:
        known = ", ".join(losses.LOSSES)
        raise UserError(f"unknown preference.loss_type {config.loss_type!r}; use one of {known}")
    kind: Any = losses.LOSSES[config.loss_type]
    taken, options = {field.name for field in dataclasses.fields(kind)}, {}
    for option, setting in _OPTIONS.items():
        value = getattr(config, setting)
        if option in taken:
            options[option] = value
        elif value != getattr(PreferenceConfig, setting):
            raise UserError(
                f"preference.{setting} is nothing to loss_type {config.loss_type}; leave it out"
            )
    try:
        loss = kind(beta=config.beta, **options)
    except ValueError as refusal:
        raise UserError(f"preference.loss_type {config.loss_type}: {refusal}") from None
    return cast(Callable[..., Tensor], loss)
