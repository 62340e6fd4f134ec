"""Copies of a model's weights: in memory, into another model, and on disk."""

from __future__ import annotations

import copy
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from srlm_fast.errors import UserError
from srlm_fast.model.load import load_model, quiet_transformers


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A second copy of `model` (same device and dtype) in eval mode that takes no gradients."""
    twin = copy.deepcopy(model)
    twin.train(False).requires_grad_(False)
    twin.zero_grad(set_to_none=True)  # deepcopy brings the gradients along
    return twin


class FullWeights:
    """A run's model of which all weights train: what it was before is a second copy of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def load(self, folder: Path) -> None:
        """Puts the weights of `folder` into the model, in place."""
        load_weights(self.model, folder)

    def save(self, tokenizer: Any, folder: Path) -> None:
        """Writes the model as an ordinary HF folder."""
        save_model(self.model, tokenizer, folder)

    def frozen(self, folder: Path | None = None) -> PreTrainedModel:
        """The model of `folder`, or this one as it is now, beside the one that trains."""
        return frozen_copy(self.model) if folder is None else frozen_twin(self.model, folder)


def frozen_twin(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """The model of `folder` as a `frozen_copy` of `model`, with all that was done to its modules.

    There is never a third copy of the weights. Raises UserError as `load_weights`.
    """
    source = _state(folder, model, model.device)
    own = model.state_dict(keep_vars=True)
    twin = copy.deepcopy(model, {id(tensor): source[name] for name, tensor in own.items()})
    twin.train(False).requires_grad_(False)
    return twin


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Overwrites the weights of `model` in place with those saved in `folder`.

    The tensors stay the same objects, so optimisers and samplers that hold them see the new
    values. Raises UserError when the folder's model has other tensors or shapes.
    """
    source = _state(folder, model, torch.device("cpu"))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(source[name])


def move_weights(model: PreTrainedModel, folder: str | Path, alpha: float) -> None:
    """Each parameter w of `model` becomes alpha w' + (1 - alpha) w, in place, w' being that of
    `folder`. Raises UserError as `load_weights`."""
    source = _state(folder, model, torch.device("cpu"))
    with torch.no_grad():
        for name, weight in model.named_parameters():  # of tied ones there is one
            weight.lerp_(source[name].to(weight.device), alpha)


def _state(folder: str | Path, model: PreTrainedModel, device: torch.device) -> dict[str, Tensor]:
    """The parameters and buffers of `folder`, on `device`, which must be those of `model`."""
    loaded = load_model(str(folder), device=device, dtype=model.dtype)
    source: dict[str, Tensor] = loaded.state_dict(keep_vars=True)
    shapes = [{name: t.shape for name, t in s.items()} for s in (source, model.state_dict())]
    if shapes[0] != shapes[1]:
        odd = min(set(shapes[0].items()) ^ set(shapes[1].items()))[0]
        raise UserError(f"the model in {folder} does not fit this one: {odd} differs")
    return source


def save_model(model: PreTrainedModel, tokenizer: Any, folder: str | Path) -> None:
    """Writes an ordinary HF folder: safetensors, configuration, tokenizer with chat template.

    It is written under a temporary name beside `folder` and renamed when complete; an older folder
    of that name is replaced. Raises UserError when it cannot be written (disk full).
    """
    save_folder(folder, tokenizer, model.save_pretrained)


def save_folder(folder: str | Path, tokenizer: Any, write: Callable[[Path], Any]) -> None:
    """`save_model` for a model that `write` puts into a folder that is there and empty."""
    folder = Path(folder)
    work = folder.with_name(f".{folder.name}.saving")
    try:
        shutil.rmtree(work, ignore_errors=True)
        (work / "new").mkdir(parents=True)
        with quiet_transformers():
            write(work / "new")
            tokenizer.save_pretrained(work / "new")
        if folder.exists():
            os.replace(folder, work / "old")
        os.replace(work / "new", folder)
    # Of many kinds: safetensors and tokenizers raise exceptions of their own.
    except Exception as error:
        if (work / "old").exists() and not folder.exists():
            os.replace(work / "old", folder)
        full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
        why = "the disk is full; free some space" if full else str(error)
        raise UserError(f"cannot save the model to {folder}: {why}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
