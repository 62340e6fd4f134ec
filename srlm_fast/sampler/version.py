"""Has the model changed since the last call? Then cached keys and values are another model's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Version(NamedTuple):
    """What a model was: where its weights lie, what they add up to, which adapters are on."""

    identity: tuple[tuple[int, int], ...]
    sums: tuple[tuple[float, ...], ...]
    adapters: tuple[tuple[str, ...], ...]


def weights_version(model: Any) -> Version:
    """Equal for two calls only if the model computes the same.

    In-place changes count a tensor's version up, but not those through `.data` or from another
    process. So all weights are summed up too, as bits and as numbers, at the speed of memory.
    Adapters that were switched on or off change the model without changing a weight.
    """
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers())]
    identity = tuple((t.data_ptr(), t._version) for t in tensors)
    bits = [_sum_of_bits(t) for t in tensors]
    # Two changed signs can cancel in a sum of bits, but not in one of numbers.
    floats = [t.sum(dtype=torch.float32) for t in tensors if t.is_floating_point()]
    sums = tuple(tuple(torch.stack(some).tolist()) for some in (bits, floats) if some)
    return Version(identity, sums, _adapters(model))


def _adapters(model: Any) -> tuple[tuple[str, ...], ...]:
    """Which adapters are on, and how strong they are."""
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return tuple(
        tuple(str(getattr(module, name, None)) for name in names)
        for module in model.modules()
        if hasattr(module, "disable_adapters")
    )


# Numbers of different columns are weighted differently. No whole number of rows of a matrix has
# this many of them, so rows that change places change columns.
_WIDTH = 1021


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """The memory of `tensor` as 64-bit numbers, a weighted sum modulo 2^64."""
    flat = tensor.reshape(-1)
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
    whole = flat.numel() - flat.numel() % 8
    if flat.storage_offset() % 8:
        flat = flat.clone()
    words, rest = flat[:whole].view(torch.int64), flat[whole:].view(torch.uint8).sum()
    table = words[: len(words) - len(words) % _WIDTH].view(-1, _WIDTH)
    odd = torch.arange(1, 2 * _WIDTH, 2, device=words.device)
    tail = words[table.numel() :]
    return table.sum(0).mul_(odd).sum() + (tail * odd[: len(tail)]).sum() + rest
