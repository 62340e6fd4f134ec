"""Where training metrics go beside `metrics.jsonl`: tensorboard, wandb, trackio."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from srlm_fast.data.jsonl import write_json
from srlm_fast.errors import UserError

# Module, and what installs it.
_PACKAGES = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is unknown or does not load."""
    for name in names:
        _module(name)


class Trackers:
    """The trackers `names` of one run; a resumed run goes on with its own. Close it at the end.

    Metrics are named "<stage>/<metric>", for example "train/M1/loss".

    A stage that a resumed run does again gives the same rows, from its first one. wandb and trackio
    would show them twice, so how many they have of each stage is written down; tensorboard shows
    one of each step.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self._path = folder / "trackers.json"
        self._given: Counter[str] = Counter()
        self._sent: dict[str, int] = _read(self._path)
        self._writers: list[Any] = []
        self._services: list[Any] = []
        self._exit = ExitStack()
        for name in names:
            module = _module(name)
            if name == "tensorboard":
                writer = module.SummaryWriter(str(folder / "tensorboard"))
                self._exit.callback(writer.close)
                self._writers.append(writer)
            else:
                options = {"dir": str(folder), "id": folder.name} if name == "wandb" else {}
                module.init(
                    project="srlm_fast", name=folder.name, config=dict(config), resume="allow",
                    **options,
                )  # fmt: skip
                self._exit.callback(module.finish)
                self._services.append(module)

    def log(self, stage: str, row: Mapping[str, float]) -> None:
        """One row of a stage's metrics; its `step` counts from the stage's start."""
        named = {f"{stage}/{key}": value for key, value in row.items()}
        for writer in self._writers:
            for key, value in named.items():
                writer.add_scalar(key, value, int(row["step"]))
        self._given[stage] += 1
        if self._services and self._given[stage] > self._sent.get(stage, 0):
            for service in self._services:
                service.log(named)
            self._sent[stage] = self._given[stage]
            write_json(self._path, self._sent)

    def close(self) -> None:
        """Writes out what is left."""
        self._exit.close()


def _read(path: Path) -> dict[str, int]:
    found: dict[str, int] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found


def _module(name: str) -> Any:
    if name not in _PACKAGES:
        raise UserError(f"report_to knows {', '.join(_PACKAGES)}, not {name!r}")
    module, package = _PACKAGES[name]
    try:
        return importlib.import_module(module)
    except Exception as error:  # RuntimeError and OSError happen at import too
        raise UserError(
            f"report_to {name} does not load ({type(error).__name__}: {error}); "
            f"pip install {package}, or leave it out"
        ) from None
