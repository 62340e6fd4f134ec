"""Which implementation of an op runs, and why: one table, no silent fallback."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Need:
    """What a call asks for, as far as the choice depends on it."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    outputs: Collection[str] = ()
    logits_dtype: torch.dtype | None = None
    sharded: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.hidden is None else self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.hidden is None else self.hidden.dtype

    @property
    def trains(self) -> bool:
        tensors = (self.hidden, self.weight, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@dataclass(frozen=True)
class Implementation:
    """`refuses`: why it cannot serve a need; `yields`: why "auto" looks further. None: neither."""

    what: str
    refuses: Callable[[Need], str | None] = lambda need: None
    yields: Callable[[Need], str | None] = lambda need: None


def _reference_refuses(need: Need) -> str | None:
    return "a vocabulary sharded over ranks needs impl='chunked'" if need.sharded else None


def _tiled_refuses(need: Need) -> str | None:
    if need.trains:
        return "it computes no gradients"
    if need.sharded:
        return "the vocabulary is sharded over ranks"
    if need.outputs:
        return f"it does not compute {', '.join(need.outputs)}"
    if need.logits_dtype not in (None, torch.float32):
        return f"its logits are float32, not {need.logits_dtype}"
    if need.hidden is None or need.weight is None:
        return "it has to see hidden and weight"
    from srlm_kernels.linear_logp_tiled import takes

    if need.ref_hidden is None:
        return takes(need.hidden, need.weight)
    ref_weight = need.weight if need.ref_weight is None else need.ref_weight
    if need.ref_hidden.dtype != need.dtype:
        return f"the policy is {need.dtype} and the reference {need.ref_hidden.dtype}"
    return takes(need.hidden, need.weight) or takes(need.ref_hidden, ref_weight)


def _tiled_yields(need: Need) -> str | None:
    if need.device.type == "cpu":
        return "it runs on CUDA"
    if need.dtype == torch.float32:
        return "its float32 products use no tensor cores"
    return "it is no single node of a compiled graph" if torch.compiler.is_compiling() else None


def _slow_in_gemm(need: Need) -> str | None:
    if need.device.type == "cpu" and need.dtype == torch.float16 and not need.sharded:
        return "float16 GEMMs are slow on a CPU"
    return None


_CHUNKED = Implementation("GEMMs over vocabulary tiles, row kernels between", yields=_slow_in_gemm)
_REFERENCE = Implementation("plain torch, logits in memory", refuses=_reference_refuses)

# Per op, best first.
_TABLE: dict[str, dict[str, Implementation]] = {
    "linear_logp": {
        "tiled": Implementation(
            "fused scoring, no logits in memory", _tiled_refuses, _tiled_yields
        ),
        "chunked": _CHUNKED,
        "reference": _REFERENCE,
    },
    "linear_preference_loss": {"chunked": _CHUNKED, "reference": _REFERENCE},
}


def implementations(op: str) -> tuple[str, ...]:
    """The names that `impl` of an op with a head can take beside "auto", best first."""
    return tuple(_TABLE[op])


def description(op: str, name: str) -> str:
    """What an implementation is."""
    return _TABLE[op][name].what


def choose(op: str, impl: str, need: Need) -> str:
    """The name of the implementation that `impl` (a name or "auto") stands for here.

    Raises ValueError for an unknown implementation, or one that cannot serve the call.
    """
    known = implementations(op)
    if impl != "auto":
        if impl not in known:
            raise ValueError(f"{op} has no impl={impl!r}; known: auto, {', '.join(known)}")
        if reason := _TABLE[op][impl].refuses(need):
            raise ValueError(f"{op} cannot run with impl={impl!r} here: {reason}")
        return impl
    return next(name for name in known if passed_over(op, name, need) is None)


def passed_over(op: str, name: str, need: Need) -> str | None:
    """Why "auto" does not take the implementation called `name`; None: it would."""
    entry = _TABLE[op][name]
    return entry.yields(need) or entry.refuses(need)
