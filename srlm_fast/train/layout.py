"""How a model is trained: prompts shared where its attention allows it, padded rows elsewhere."""

from __future__ import annotations

import warnings
from typing import Any

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.model.prefix import refusal
from srlm_fast.train.batches import Layout


def choose_layout(model: Any, config: TrainConfig) -> Layout:
    """What `config.layout` stands for with `model`.

    "auto" warns when it has to pad. Raises UserError when "shared" was asked for and cannot be.
    """
    if config.layout == "padded":
        return "padded"
    reason = refusal(model)
    if reason is None:
        return "shared"
    name = type(model).__name__
    if config.layout == "shared":
        raise UserError(f"layout: shared does not work for {name}: {reason}; use padded or auto")
    warnings.warn(f"{name} is trained on padded rows: {reason}", stacklevel=2)
    return "padded"
