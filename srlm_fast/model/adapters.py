"""LoRA adapters (PEFT) on the resident model: one that trains, and frozen ones beside it.

The base weights are there once. What the model was before, the reference of a training or of a
judge, is another adapter of the same modules, or none; nothing is ever merged into the base.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srlm_fast.config import LoraConfig
from srlm_fast.errors import UserError
from srlm_fast.installed import require
from srlm_fast.model.weights import save_folder

POLICY, ROUND_START, _UNTRAINED = "policy", "round_start", "untrained"
ALL_LINEAR = "all-linear"


def add_lora(model: Any, config: LoraConfig, *, seed: int = 0) -> Any:
    """`model`, changed in place, as a PEFT model whose only trainable weights are `POLICY`'s, in
    the model's dtype (the optimiser has fp32 masters of them). They change nothing before they are
    trained. Models without data will do.

    Raises UserError without PEFT, for modules that the model does not have, and for its head.
    """
    require("peft")
    import peft

    wanted = config.target_modules
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=ALL_LINEAR if wanted == (ALL_LINEAR,) else list(wanted),
        task_type="CAUSAL_LM",
    )
    try:
        with _drawn_from(seed), warnings.catch_warnings():
            # Of GPT-2's transposed layers, which it then treats rightly.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            adapted: Any = peft.get_peft_model(
                model, settings, POLICY, autocast_adapter_dtype=False
            )
    except ValueError as error:
        why = str(error).splitlines()[0].removesuffix(".")
        raise UserError(f"lora.target_modules: {why}; name modules of this model") from error
    found = [*adapted.base_model.targeted_module_names, ALL_LINEAR]
    for name in wanted:
        if not any(f".{place}".endswith(f".{name}") for place in found):
            raise UserError(f"lora.target_modules: no module of this model is called {name!r}")
    if hasattr(adapted.get_output_embeddings(), "base_layer"):
        raise UserError(
            "lora.target_modules: the language-model head cannot have an adapter, since the loss"
            f" reads its weight directly; leave it out, as {ALL_LINEAR} does"
        )
    return adapted


@dataclass(frozen=True)
class FrozenAdapter:
    """`model` with the adapter `name` on instead of its own; None: with none, the base model."""

    model: Any
    name: str | None

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The model as this adapter makes it; its own is on again after the block, in any case.

        What is computed inside takes no gradients: a layer that backward computes again would find
        the other adapter.
        """
        own = self.model.active_adapter
        try:
            if self.name is None:
                self.model.base_model.disable_adapter_layers()
            else:
                self.model.set_adapter(self.name, inference_mode=True)
            with torch.no_grad():
                yield self.model
        finally:
            if self.name is None:
                self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(own)


class Adapters:
    """The adapters of a run's model: what `FullWeights` is where all weights train.

    base: the model's folder, for which an untrained adapter stands. name: what saved adapters call
    it. The untrained adapter is drawn from `seed`.
    """

    def __init__(
        self, model: Any, config: LoraConfig, *, base: Path, name: str = "", seed: int = 0
    ) -> None:
        self.model, self.base, self._seed = add_lora(model, config, seed=seed), base, seed
        self._settings = self.model.peft_config[POLICY]
        self._settings.base_model_name_or_path = name or str(base.resolve())

    def load(self, folder: Path) -> None:
        """Puts what `folder` holds into the adapter that trains, in place."""
        if folder != self.base:
            return self._fill(POLICY, _read(folder), folder)
        self._add(_UNTRAINED, self._seed)
        self._fill(POLICY, self._state(_UNTRAINED))
        self.model.delete_adapter(_UNTRAINED)
        return None

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Writes a PEFT folder of the adapter that trains, under PEFT's default name, with the
        tokenizer. Raises UserError as `save_model`."""
        save_folder(folder, tokenizer, self._write)

    def frozen(self, folder: Path | None = None) -> FrozenAdapter:
        """The model of `folder`, or the one that trains as it is now, beside the one that trains.

        Of the latter there is one at a time: the next call overwrites it.
        """
        if folder is None:
            self._fill(ROUND_START, self._state(POLICY))
            return FrozenAdapter(self.model, ROUND_START)
        if folder == self.base:
            return FrozenAdapter(self.model, None)
        if folder.name not in self.model.peft_config:  # a finished model's folder never changes
            self._fill(folder.name, _read(folder), folder)
        return FrozenAdapter(self.model, folder.name)

    def _state(self, name: str) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        state: dict[str, Tensor] = get_peft_model_state_dict(
            self.model, adapter_name=name, save_embedding_layers=False
        )
        return state

    def _fill(self, name: str, state: dict[str, Tensor], folder: Path | None = None) -> None:
        """Puts `state` into the adapter `name`, which is added if it is not there."""
        from peft import set_peft_model_state_dict

        if name not in self.model.peft_config:
            self._add(name, 0)  # and overwritten below
        shapes = [{k: t.shape for k, t in s.items()} for s in (self._state(POLICY), state)]
        if shapes[0] != shapes[1]:
            odd = min(set(shapes[0].items()) ^ set(shapes[1].items()))[0]
            raise UserError(f"the adapter in {folder} does not fit this run's: {odd} differs")
        set_peft_model_state_dict(self.model, state, adapter_name=name)

    def _add(self, name: str, seed: int) -> None:
        with _drawn_from(seed):
            self.model.add_adapter(name, self._settings, autocast_adapter_dtype=False)
        self.model.set_adapter(POLICY)  # which freezes all others

    def _write(self, folder: Path) -> None:
        self.model.save_pretrained(folder, selected_adapters=[POLICY], save_embedding_layers=False)
        for file in (folder / POLICY).iterdir():  # PEFT keeps the top for the name "default"
            os.replace(file, folder / file.name)
        (folder / POLICY).rmdir()


def active_state(model: Any) -> dict[str, Tensor]:
    """The weights that `model` computes with: not those of adapters that are off."""
    state: dict[str, Tensor] = model.state_dict()
    if not hasattr(model, "peft_config"):
        return state
    layers = [m for m in model.modules() if hasattr(m, "base_layer")]
    on = {name for m in layers if not m.disable_adapters for name in m.active_adapters}
    off = [f".{name}." for name in {*model.peft_config} - on]
    return {key: t for key, t in state.items() if not any(name in f"{key}." for name in off)}


def active_scaling(model: Any) -> dict[str, float]:
    """By what the product of each adapter that is on is multiplied: alpha and rank decide it."""
    return {
        f"{place}.{name}": layer.scaling[name]
        for place, layer in model.named_modules()
        if hasattr(layer, "base_layer") and not layer.disable_adapters
        for name in layer.active_adapters
        if name in getattr(layer, "scaling", {})
    }


def _read(folder: Path) -> dict[str, Tensor]:
    from peft import load_peft_weights

    try:
        state: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # safetensors has kinds of its own
        raise UserError(f"cannot load the adapter of {folder}: {error}; copy it again") from error
    return state


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """PEFT draws from the CPU's global generator, which is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
