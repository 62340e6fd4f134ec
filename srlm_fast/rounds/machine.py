"""The device of a run, and what it has in memory: here, or of one that is only planned for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srlm_fast.config import Config
from srlm_fast.errors import UserError
from srlm_fast.model.load import resolve_device
from srlm_fast.parallel import ALONE, Ranks


@dataclass(frozen=True)
class Machine:
    """What a run has: its device, and the bytes there for one process (None: unknown)."""

    device: torch.device
    room: int | None


def machine_here(device: torch.device, ranks: Ranks = ALONE) -> Machine:
    """`device` as it is now. The processes of a machine share its memory, but not their GPUs."""
    if device.type == "cuda":
        return Machine(device, int(torch.cuda.mem_get_info(device)[0]))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return Machine(device, None)
    free = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return Machine(device, free[0] * 1024 // ranks.local_world if free else None)


def planned_machine(name: str, gigabytes: float | None, ranks: Ranks = ALONE) -> Machine:
    """The device called `name` with so many `gigabytes`, or here, with what it has.

    Raises UserError for one that is not here where nobody says what it has.
    """
    if gigabytes is None:
        try:
            return machine_here(resolve_device(name), ranks)
        except UserError as error:
            raise UserError(f"{error}, or give its --memory in GB to plan for it") from error
    kind = "cuda" if name.startswith("cuda") else resolve_device(name).type
    return Machine(torch.device(kind), int(gigabytes * 1e9))


def weights_dtype(config: Config, model_config: Any, device: torch.device) -> torch.dtype:
    """What `load_model` makes of `config.dtype` there."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    stored = getattr(model_config, "dtype", None)
    return stored if device.type == "cuda" and stored is not None else torch.float32
