"""A loss as text and tensors: what the schema of a custom op can carry through a compiled graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from torch import Tensor

from srlm_kernels.losses import LOSSES, spa, with_nll

_BY_NAME: dict[str, Callable[..., Any]] = {
    make.__name__: make for make in (*LOSSES.values(), spa, with_nll)
}


def is_builtin(loss: object) -> bool:
    """Whether `loss` and all that it is made of come from `losses`, so that `spec` can write it.

    Subclasses do not count: they may compute something else.
    """
    return _BY_NAME.get(type(loss).__name__) is type(loss) and all(
        isinstance(option, (int, float, Tensor)) or is_builtin(option) for option in _options(loss)
    )


def spec(loss: Any) -> tuple[str, list[Tensor]]:
    """`loss` as JSON, and its tensors in the order of their placeholders in the text.

    `["spa", 0.1, 0.2, "tensor", false]` is `spa(0.1, 0.2, threshold, False)`. Can be traced by
    `torch.compile(fullgraph=True)`, where the text is a constant. Raises TypeError for a loss that
    is not built in.
    """
    if not is_builtin(loss):
        raise TypeError(f"only losses of srlm_kernels.losses can be written down, got {loss!r}")
    return loss.text, _tensors(loss)


def from_spec(text: str, tensors: list[Tensor]) -> Callable[..., Tensor]:
    """The loss that `spec` wrote; its tensors are the very objects in `tensors`.

    Raises ValueError for what is not such a text, for an unknown name or options that the loss
    refuses, and when there are more or fewer tensors than placeholders.
    """
    if (places := text.count('"tensor"')) != len(tensors):
        raise ValueError(f"{text} has places for {places} tensors, got {len(tensors)}")
    loss: Callable[..., Tensor] = _build(json.loads(text), iter(tensors))
    return loss


def _options(loss: Any) -> list[Any]:
    return [getattr(loss, field.name) for field in fields(loss)]


def _tensors(loss: Any) -> list[Tensor]:
    found = []
    for option in _options(loss):
        if isinstance(option, Tensor):
            found.append(option)
        elif not isinstance(option, (int, float)):
            found += _tensors(option)
    return found


def _build(written: Any, tensors: Iterator[Tensor]) -> Any:
    if written == "tensor":
        return next(tensors)
    if not isinstance(written, list):
        return written
    name, *options = written
    if name not in _BY_NAME:
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(_BY_NAME)}")
    return _BY_NAME[name](*[_build(option, tensors) for option in options])
