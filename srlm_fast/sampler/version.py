"""Has the model changed since the last call? Then cached keys and values are another model's."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor


def weights_version(model: Any) -> Hashable:
    """Equal for two calls only if the model computes the same.

    In-place changes count a tensor's version up, but not those through `.data` or from another
    process. So the bits of all weights are summed up too, in one read of them at the speed of
    memory. Adapters that were switched on or off change the model without changing a weight.
    """
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers())]
    identity = tuple((t.data_ptr(), t._version) for t in tensors)
    sums = torch.stack([_sum_of_bits(t) for t in tensors]).tolist() if tensors else []
    switches = tuple(
        (str(module.active_adapters), module.disable_adapters, str(module.merged_adapters))
        for module in model.modules()
        if hasattr(module, "disable_adapters") and hasattr(module, "merged_adapters")
    )
    return identity, tuple(sums), switches


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """The memory of `tensor` as 64-bit numbers, added up modulo 2^64."""
    flat = tensor.reshape(-1)
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
    whole = flat.numel() - flat.numel() % 8
    if flat.storage_offset() % 8:
        flat = flat.clone()
    rest = flat[whole:].view(torch.uint8).sum()
    return flat[:whole].view(torch.int64).sum() + rest
