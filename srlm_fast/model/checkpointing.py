"""Gradient checkpointing: a decoder layer keeps its input and is computed again in backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from srlm_fast.errors import UserError
from srlm_fast.model.prefix import checkpoint_contexts


def layers_of(model: Any) -> list[nn.Module]:
    """What transformers computes again as one, outer modules before those inside them."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Layers called inside are recomputed by the backward of what they return, which may run later.

    Transformers' own switch asks for training mode, which would turn dropout on. Raises UserError
    when the model has no layers that can be recomputed.
    """
    layers = layers_of(model)
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layers that gradient checkpointing can recompute; set"
            " gradient_checkpointing to false"
        )
    contexts = partial(checkpoint_contexts, model)
    patched = {layer: layer.__dict__.get("forward") for layer in layers}
    try:
        for layer in layers:
            # Nothing is random in a layer, so there is no generator's state to restore.
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False,
                context_fn=contexts,
            )  # fmt: skip
        yield
    finally:
        for layer, forward in patched.items():
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward
