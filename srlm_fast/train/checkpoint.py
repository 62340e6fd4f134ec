"""Checkpoints inside a training: files that appear whole or not at all, and are checked when read.

A checkpoint is a folder: tensors in safetensors, one file or, where weights are sharded, one of
each rank, and everything else in JSON, whose numbers keep every bit. Nothing is unpickled. What is
in it, and that a training which goes on from there is the one that was never stopped, is the matter
of `fit` and of each `Stateful`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from srlm_fast.config import TrainConfig
from srlm_fast.data.jsonl import write_text
from srlm_fast.errors import UserError
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train.plan import Item
from srlm_fast.train.reference import fingerprint

T = TypeVar("T")

STATE = "state.json"


class Stateful(Protocol):
    """A part of a training that steps change. JSON must hold its state; between steps only."""

    def state(self) -> Any:
        """What `restore` needs, of this rank."""
        ...

    def restore(self, state: Any) -> None:
        """Become what gave `state`; only ever called on a new one."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """Where a training is after `step` steps.

    rows: what was logged so far. states: of each rank, JSON values. tensors: the same on all ranks,
    or this rank's share.
    """

    step: int
    rows: Sequence[dict[str, float]]
    states: Sequence[Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoints:
    """Those of one training, in a `folder` of its own; the newest `limit` are kept (0: all).

    The main one of several `ranks` writes, or each its share, and all read: they must see the same
    folder.
    """

    folder: Path
    limit: int = 2
    ranks: Ranks = ALONE

    def write(self, checkpoint: Checkpoint) -> None:
        """Raises UserError when it cannot be written (disk full); what was there stays.

        Where weights are sharded all ranks write together, and an error of one is raised by all.
        """
        main = self.ranks.main
        if not (main or self.ranks.sharded):
            return
        path = self.folder / f"checkpoint-{checkpoint.step}"
        # One fixed name: what a killed run left behind is overwritten by the next one.
        partial = self.folder / ".partial"
        try:
            self._together(path, lambda: _make_empty(partial) if main else None)
            files = self._together(path, lambda: _save(partial / self._tensors, checkpoint.tensors))
            facts = {name: getattr(checkpoint, name) for name in ("step", "rows", "states")}
            facts["files"] = dict(files)
            self._together(path, lambda: _finish(partial, path, facts) if main else None)
        finally:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
        # Not those of later steps, which are damaged: they must not push out a sound one.
        older = [p for p in self._by_step() if _step(p) <= checkpoint.step]
        for path in older[: -self.limit] if main and self.limit else ():
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """The newest that is whole on all ranks, which must all ask; why one is passed over is said
        in a warning.

        Its tensors are mapped from the file, so that they need no memory of their own.
        """
        for name in self.ranks.from_main([path.name for path in reversed(self._by_step())]):
            path = self.folder / name
            if self._is_sound(path):
                facts = json.loads((path / STATE).read_text("utf-8"))
                tensors = load_file(path / self._tensors)
                return Checkpoint(facts["step"], facts["rows"], facts["states"], tensors)
        return None

    @property
    def _tensors(self) -> str:
        """The file of this rank's tensors."""
        return f"state-{self.ranks.rank}.safetensors" if self.ranks.sharded else "state.safetensors"

    def _together(self, path: Path, act: Callable[[], T]) -> list[T]:
        """What `act` gives on each rank that writes; where it fails on one, all raise UserError."""
        results: list[T] = []
        why = ""
        try:
            results = [act()]
        except Exception as error:  # safetensors raises exceptions of its own
            full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
            why = "the disk is full; free some space" if full else str(error) or repr(error)
        told = [(results, why)]
        if self.ranks.sharded:
            told = self.ranks.gather(told)
        if whys := [why for _, why in told if why]:
            raise UserError(f"cannot write the checkpoint {path}: {whys[0]}")
        return [result for results, _ in told for result in results]

    def _by_step(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"), key=_step)

    def _is_sound(self, path: Path) -> bool:
        faults = [fault for fault in self.ranks.gather([self._fault(path)]) if fault]
        if faults and self.ranks.main:
            warnings.warn(
                f"{path} cannot be used ({faults[0]}); an earlier checkpoint is taken if there is"
                " one, or the training begins anew",
                stacklevel=3,
            )
        return not faults

    def _fault(self, path: Path) -> str:
        """Why this rank cannot go on from there, or nothing; one of several replicas looks."""
        if not (self.ranks.main or self.ranks.sharded):
            return ""
        try:
            facts = json.loads((path / STATE).read_text("utf-8"))
            if facts.pop("sha256") != _digest(facts):
                raise ValueError(f"{STATE} is not as it was written")
            if (world := len(facts["states"])) != self.ranks.world:
                raise ValueError(
                    f"{world} processes wrote it, and now there are {self.ranks.world}"
                )
            if facts["files"][self._tensors] != _file_digest(path / self._tensors):
                raise ValueError(f"{self._tensors} is not as it was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return str(error) or repr(error)
        return ""


def checkpoints_of(
    folder: Path | None,
    config: TrainConfig,
    items: Sequence[Item],
    weights: Sequence[Any],
    *others: Any,
    ranks: Ranks = ALONE,
) -> Checkpoints | None:
    """Where in `folder` the checkpoints are of the training that these determine; None: it has
    none. Another training has another place, and neither sees the other.

    weights: the models that it starts from and is compared with, as they are now. others: what has
    a repr that says it all.
    """
    if folder is None or not config.save_steps:
        return None
    # When it is saved does not matter to the result.
    settings = replace(config, save_steps=0, save_total_limit=0)
    digest = hashlib.sha256(f"{settings}/{others}".encode())
    for item in items:
        digest.update(repr([(list(prompt), list(response)) for prompt, response in item]).encode())
    for model in dict.fromkeys(weights):
        digest.update(fingerprint(model).encode())
    return Checkpoints(
        folder / f"training-{digest.hexdigest()[:16]}", config.save_total_limit, ranks
    )


def saved_weights(folder: Path, limit: int) -> dict[int, Path]:
    """The files of the newest `limit` checkpoints (0: of all) in `checkpoints_of`'s folder, in the
    order of their steps; of the training that wrote there last. Not where weights are sharded."""
    trainings = sorted(folder.glob("training-*"), key=lambda path: path.stat().st_mtime)
    paths = trainings[-1].glob("checkpoint-*") if trainings else ()
    # Of older ones, whose removal was cut short, there may be remains.
    kept = sorted(paths, key=_step)[-limit:]
    return {_step(path): path / "state.safetensors" for path in kept}


@torch.no_grad()
def load_saved_weights(model: nn.Module, file: Path) -> None:
    """Puts the trained weights of a checkpoint into `model`, in place; those that no training
    changes are not in it."""
    with safe_open(file, framework="pt") as saved:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved.get_tensor(f"weight/{name}"))


def _step(path: Path) -> int:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """The name and the hash of the file."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.name, _file_digest(path)


def _finish(partial: Path, path: Path, facts: Mapping[str, Any]) -> None:
    write_text(partial / STATE, json.dumps({"sha256": _digest(facts), **facts}))
    shutil.rmtree(path, ignore_errors=True)  # one of this step was not fit to go on from
    os.replace(partial, path)


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
