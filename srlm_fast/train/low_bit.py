"""AdamW with 8-bit moments, and bf16 weights that are rounded at random: torchao's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.installed import require


def adamw_8bit(groups: list[dict[str, Any]], config: TrainConfig) -> Any:
    """torchao's AdamW over `groups`; its learning rates are tensors, to be filled.

    Raises UserError without torchao.
    """
    require("torchao")
    from torchao.optim import AdamW8bit

    return AdamW8bit(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        bf16_stochastic_round=config.bf16_stochastic_rounding,
    )


def rounds(param: Tensor) -> bool:
    """Whether `param` can do without an fp32 master.

    Others (torchao's `_new_buffer`) have moments that are no 8-bit ones, but of their own dtype,
    and in bf16 the second moment soon stands still.
    """
    has_8bit_moments = param.numel() >= 4096 and param.numel() % 256 == 0
    return param.dtype == torch.bfloat16 and param.ndim >= 2 and has_8bit_moments


def update(adamw: Any, seed: int) -> None:
    """A step of `adamw`, whose roundings depend on `seed` and on how many steps were taken: a
    training that goes on rounds as one that was not stopped.

    Raises UserError where the step, which torch.compile makes, does not run.
    """
    device = next(p for group in adamw.param_groups for p in group["params"]).device
    taken = max((int(state["step"]) for state in adamw.state.values()), default=0)
    try:
        with _drawn_from(f"{seed}/{taken}", device):
            adamw.step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers of all kinds
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"optim adamw_torch_8bit: the step of torchao {_version()}, compiled for {device} by"
            f" torch {torch.__version__}, failed: {why[0]}; set optim to adamw_torch"
        ) from error


def _version() -> str:
    import torchao

    return str(torchao.__version__)


@contextmanager
def _drawn_from(seed: str, device: torch.device) -> Iterator[None]:
    """torchao draws from the device's global generator, which is as before afterwards."""
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    before = generator.get_state()
    try:
        generator.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) >> 1)
        yield
    finally:
        generator.set_state(before)
