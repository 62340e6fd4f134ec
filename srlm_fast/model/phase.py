"""Borrow the trainer's model for a phase of sampling or scoring, and give it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def inference(model: Any) -> Iterator[None]:
    """Eval mode (no dropout, no gradient checkpointing) without gradients; every module's mode is
    restored, also after an exception or an interrupt.

    no_grad, not inference_mode: buffers that a module makes on its way (rotary frequencies) would
    be inference tensors, which the next training step cannot use.
    """
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
