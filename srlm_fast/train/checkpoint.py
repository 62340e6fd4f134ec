"""Checkpoints inside a training: files that appear whole or not at all, and are checked when read.

A checkpoint is a folder of two files: tensors in safetensors, and everything else in JSON, whose
numbers keep every bit. Nothing is unpickled. What is in it, and that a training which goes on from
there is the one that was never stopped, is the matter of `fit` and of each `Stateful`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from torch import Tensor

from srlm_fast.config import TrainConfig
from srlm_fast.data.jsonl import write_text
from srlm_fast.errors import UserError
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train.plan import Item
from srlm_fast.train.reference import fingerprint

TENSORS, STATE = "state.safetensors", "state.json"


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

    rows: what was logged so far. states: of each rank, JSON values. tensors: the same on all ranks.
    """

    step: int
    rows: Sequence[dict[str, float]]
    states: Sequence[Any]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoints:
    """Those of one training, in a `folder` of its own; the newest `limit` are kept (0: all).

    The main one of several `ranks` writes, and all read: they must see the same folder.
    """

    folder: Path
    limit: int = 2
    ranks: Ranks = ALONE

    def write(self, checkpoint: Checkpoint) -> None:
        """Raises UserError when it cannot be written (disk full); what was there stays."""
        if not self.ranks.main:
            return
        path = self.folder / f"checkpoint-{checkpoint.step}"
        # One fixed name: what a killed run left behind is overwritten by the next one.
        partial = self.folder / ".partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file({k: t.contiguous() for k, t in checkpoint.tensors.items()}, partial / TENSORS)
            with (partial / TENSORS).open("rb") as file:
                os.fsync(file.fileno())
            facts = {name: getattr(checkpoint, name) for name in ("step", "rows", "states")}
            digest = _digest(facts, partial / TENSORS)
            write_text(partial / STATE, json.dumps({"sha256": digest, **facts}))
            shutil.rmtree(path, ignore_errors=True)  # one of this step was not fit to go on from
            os.replace(partial, path)
        except Exception as error:  # safetensors raises exceptions of its own
            full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
            why = "the disk is full; free some space" if full else str(error)
            raise UserError(f"cannot write the checkpoint {path}: {why}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        # Not those of later steps, which are damaged: they must not push out a sound one.
        older = [p for p in self._by_step() if _step(p) <= checkpoint.step]
        for path in older[: -self.limit] if self.limit else ():
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """The newest that is whole; why one is passed over is said in a warning.

        Its tensors are mapped from the file, so that they need no memory of their own.
        """
        sound = None
        if self.ranks.main:
            sound = next((p.name for p in reversed(self._by_step()) if self._is_sound(p)), None)
        name = self.ranks.from_main(sound)
        if name is None:
            return None
        path = self.folder / name
        facts = json.loads((path / STATE).read_text("utf-8"))
        tensors = load_file(path / TENSORS)
        return Checkpoint(facts["step"], facts["rows"], facts["states"], tensors)

    def _by_step(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"), key=_step)

    def _is_sound(self, path: Path) -> bool:
        try:
            facts = json.loads((path / STATE).read_text("utf-8"))
            if facts.pop("sha256") != _digest(facts, path / TENSORS):
                raise ValueError("its files are not as they were written")
            if len(facts["states"]) != self.ranks.world:
                raise ValueError(
                    f"{len(facts['states'])} processes wrote it, and now there are "
                    f"{self.ranks.world}"
                )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"{path} cannot be used ({error}); an earlier checkpoint is taken if there is one,"
                " or the training begins anew",
                stacklevel=3,
            )
            return False
        return True


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


def _step(path: Path) -> int:
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _digest(facts: Mapping[str, Any], tensors: Path) -> str:
    """Of the facts and of the file of tensors."""
    with tensors.open("rb") as file:
        start = json.dumps(facts).encode()
        return hashlib.file_digest(file, lambda: hashlib.sha256(start)).hexdigest()
