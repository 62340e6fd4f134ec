"""Which implementation of an op runs, and why: one table, no silent fallback."""

from __future__ import annotations

from torch import Tensor

# Per op, best first: implementation -> what it is. `impl="auto"` takes the first.
_TABLE: dict[str, dict[str, str]] = {
    op: {"reference": "plain torch, any float dtype, logits in memory"}
    for op in ("linear_logp", "linear_preference_loss")
}


def _implementations(op: str) -> dict[str, str]:
    if op not in _TABLE:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(_TABLE)}")
    return _TABLE[op]


def choose(op: str, impl: str) -> str:
    """The name of the implementation that `impl` (a name or "auto") stands for.

    Raises ValueError for an unknown op or implementation; the message lists the known ones.
    """
    known = _implementations(op)
    if impl == "auto":
        return next(iter(known))
    if impl not in known:
        raise ValueError(f"{op} has no impl={impl!r}; known: auto, {', '.join(known)}")
    return impl


def explain(op: str, **tensors: Tensor | None) -> str:
    """One line that says which implementation of `op` runs here, and why.

    `tensors`: any of the op's tensor arguments by name; their device, dtype and shape are shown.
    Raises ValueError for an unknown op.
    """
    known = _implementations(op)
    name = choose(op, "auto")
    reason = "the only implementation" if len(known) == 1 else f"first of {', '.join(known)}"
    seen = ", ".join(
        f"{key} {str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}"
        for key, t in tensors.items()
        if t is not None
    )
    return f"{op}: {name} ({known[name]}; {reason})" + (f" for {seen}" if seen else "")
