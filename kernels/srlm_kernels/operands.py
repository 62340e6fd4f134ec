"""What the caller's tensors become before an op sees them: whole heads, autocast's dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from srlm_kernels.distributed import is_sharded, whole_head


def ready_operands(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    *,
    process_group: object = None,
    grad_weight_out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The first six: heads gathered where FSDP2 sharded them, cast as autocast would.

    Inside an autocast region float tensors but fp64 become its dtype, as they would for `F.linear`.
    A reference head that is the policy's is gathered and cast once. The reference's come detached.

    Raises:
        TypeError: a DTensor head together with `process_group` or `grad_weight_out`.
        ValueError: an empty head.
    """
    heads = {"weight": weight, "bias": bias, "ref_weight": ref_weight, "ref_bias": ref_bias}
    for name, tensor in heads.items():
        if tensor is not None:
            _check_head(name, tensor, process_group, grad_weight_out)
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def ready(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        dtype = tensor.dtype
        if autocast is not None and dtype.is_floating_point and dtype != torch.float64:
            dtype = autocast
        return whole_head(tensor, dtype) if is_sharded(tensor) else tensor.to(dtype)

    def constant(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach()

    whole, whole_bias = ready(weight), ready(bias)
    ref_whole = constant(whole) if ref_weight is weight else ready(constant(ref_weight))
    ref_whole_bias = constant(whole_bias) if ref_bias is bias else ready(constant(ref_bias))
    return (
        ready(hidden), whole, whole_bias, ready(constant(ref_hidden)), ref_whole, ref_whole_bias,
    )  # fmt: skip


def _check_head(
    name: str, tensor: Tensor, process_group: object, grad_weight_out: Tensor | None
) -> None:
    if tensor.numel() == 0:
        raise ValueError(
            f"{name} is empty, shape {list(tensor.shape)}: call the op where all rows are there, "
            "inside deepspeed.zero.GatheredParameters (ZeRO-3) or the wrapped module's forward "
            "(FSDP); a rank of process_group needs one row or more"
        )
    if not is_sharded(tensor):
        return
    if process_group is not None:
        raise TypeError(
            f"with process_group {name} must be this rank's rows, got a DTensor; "
            f"pass {name}.to_local()"
        )
    if grad_weight_out is not None and name == "weight":
        raise TypeError(
            "grad_weight_out would miss the other ranks' gradients of a DTensor weight; leave it "
            "out, or pass weight.full_tensor().detach() and average the buffer over the ranks"
        )


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`tensors` in the dtype that autocast would give a product of them; fp64 ones as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def without_autocast(hidden: Tensor) -> AbstractContextManager[None]:
    """A region in which every product keeps the dtype that the op chose."""
    return torch.autocast(hidden.device.type, enabled=False)
