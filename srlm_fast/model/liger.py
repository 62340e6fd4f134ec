"""Liger's layer kernels (RMSNorm, SwiGLU, GeGLU) in one model, for sampling and training alike."""

from __future__ import annotations

import sys
from typing import Any

import torch

from srlm_fast.errors import UserError
from srlm_fast.installed import require


def check_liger(device: torch.device) -> None:
    """Raises UserError where Liger's kernels cannot run."""
    require("liger")
    if device.type != "cuda":
        raise UserError(f"use_liger_kernel needs a GPU, and the model is on {device}; leave it off")


def use_liger_kernels(model: Any) -> None:
    """Has the norms and MLPs of `model`, and of no other, run in Liger's kernels.

    Not rotary embeddings, which Liger replaces for all models of a family, nor its losses: the head
    is ours. Copies of the model keep them. Raises UserError as `check_liger`, and for families that
    Liger does not have.
    """
    check_liger(model.device)
    _apply(model)


def _apply(model: Any) -> None:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance as apply

    family = model.config.model_type
    if family not in KNOWN:
        raise UserError(f"Liger has no kernels for {family} models; leave use_liger_kernel off")
    # It replaces the classes of the family too, which models that come later would be made of.
    names = vars(sys.modules[type(model).__module__])
    before = dict(names)
    try:
        apply(
            model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False,
            rms_norm=True, swiglu=True, geglu=True,
        )  # fmt: skip
    finally:
        names.update(before)
