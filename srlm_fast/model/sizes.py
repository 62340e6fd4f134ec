"""Sizes of a model that is not there: its modules on the "meta" device, and what a pass allocates.

So that every family's own layers are measured, whatever they keep for themselves.
"""
# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, PretrainedConfig

from srlm_fast.config import LoraConfig
from srlm_fast.model.adapters import add_lora


def without_data(
    config: PretrainedConfig, dtype: torch.dtype, lora: LoraConfig | None = None
) -> Any:
    """The causal LM of `config`, with adapters where `lora` asks for them, without numbers.

    Raises UserError as `add_lora`, and what transformers raises where the configuration is wrong.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return add_lora(model, lora) if lora and lora.r else model


def count_parameters(model: nn.Module, *, trained: bool = False) -> int:
    """Numbers in the parameters of `model`; `trained`: in those that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


class PeakBytes(TorchDispatchMode):
    """Inside, `peak` grows to the most bytes that tensors made there held at once, `existing` ones
    apart. What an operation takes and gives back within itself is not seen."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._existing = {StorageWeakRef(t.untyped_storage()) for t in existing}
        self._held: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for thing in tree_iter(result):
            if isinstance(thing, Tensor):
                storage = thing.untyped_storage()
                self._held[StorageWeakRef(storage)] = storage.nbytes()
        self._held = {
            ref: size
            for ref, size in self._held.items()
            if ref not in self._existing and not ref.expired()
        }
        self.peak = max(self.peak, sum(self._held.values()))
        return result
