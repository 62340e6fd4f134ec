"""TR-DPO: a reference that follows the policy (arXiv 2404.09656, section 3).

Every `ref_model_sync_steps` steps, once the optimiser has made the last of them,

    pi_ref <- a pi_theta + (1 - a) pi_ref        with a = `ref_model_mixup_alpha`

weight by weight; a = 1 is the paper's hard update. Names, defaults and the moment are TRL's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from srlm_fast.config import PreferenceConfig
from srlm_fast.errors import UserError
from srlm_fast.model.adapters import POLICY, ROUND_START, FrozenAdapter
from srlm_fast.train.sharded import own_share

NEVER = (
    "the reference will not move in this training of {steps} steps: ref_model_sync_steps is {every}"
)
_PREFIX = "reference."  # without a slash, by which the optimiser knows its own


class MovingReference:
    """The weights of `reference`, a frozen model or a `FrozenAdapter`, and those of `policy` that
    they follow; both change in place. Of sharded weights each rank moves its share.

    steps: of the training; that it has too few is said in a warning.
    Raises UserError for an adapter that is to move by less than all of the way.
    """

    def __init__(self, reference: Any, policy: Any, config: PreferenceConfig, steps: int) -> None:
        self._alpha, self._every = config.ref_model_mixup_alpha, config.ref_model_sync_steps
        if steps < self._every:
            warnings.warn(NEVER.format(steps=steps, every=self._every), stacklevel=3)
        weights = dict(policy.named_parameters())
        if isinstance(reference, FrozenAdapter):
            followed = _adapters(reference, weights, config)
        else:
            followed = {name: (w, weights[name]) for name, w in reference.named_parameters()}
        self._pairs = {name: (own_share(w), other) for name, (w, other) in followed.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Moves the reference if `step`, the number of steps that are done, is one of those."""
        if step % self._every == 0:
            for reference, policy in self._pairs.values():
                reference.lerp_(own_share(policy), self._alpha)

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs, of this rank; not copied."""
        return {_PREFIX + name: reference for name, (reference, _) in self._pairs.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes up what `state` gave."""
        for name, (reference, _) in self._pairs.items():
            reference.copy_(state[_PREFIX + name])


def _adapters(
    reference: FrozenAdapter, weights: Mapping[str, Tensor], config: PreferenceConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    if reference.name != ROUND_START:
        raise ValueError("only the adapter of the round's start may be changed")
    if config.ref_model_mixup_alpha != 1:
        raise UserError(
            "the mean of two LoRA adapters is none of the same rank: set"
            " preference.ref_model_mixup_alpha to 1"
        )
    mark = f".{ROUND_START}."
    return {
        name: (weight, weights[name.replace(mark, f".{POLICY}.")])
        for name, weight in weights.items()
        if mark in name
    }
