"""A vocabulary sharded over ranks, and heads sharded by FSDP2."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from srlm_kernels.row_stats import merge_states


class VocabShard:
    """This rank's block of vocabulary rows: ranks hold consecutive blocks of one row or more.

    Every rank passes the same hidden states, targets and options and wants the gradient of the
    hidden states or does not; results are equal on all of them, and so is that gradient. The
    gradient of the head stays local.

    Collectives: one when a call begins (forward and backward), one per chunk that is scored, one
    for the gradient of the hidden states. A rank that raises, or that leaves a call out, keeps the
    others waiting until the group's timeout.
    """

    def __init__(self, rows: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        sizes = torch.empty(ranks, 1, dtype=torch.int64, device=device)
        own = torch.full((1,), rows, dtype=torch.int64, device=device)
        dist.all_gather(list(sizes), own, group=group)
        # Left on the device: reading them would wait for it.
        self.start = sizes[:rank].sum()
        self.vocabulary = sizes.sum()

    def merge(self, state: Tensor) -> Tensor:
        """The state over the whole vocabulary from this rank's; same shape, equal on all ranks."""
        ranks = dist.get_world_size(self.group)
        states = state.new_empty(ranks, *state.shape)
        dist.all_gather(list(states), state, group=self.group)
        return merge_states(states)

    def sum(self, partial: Tensor) -> Tensor:
        """Adds up a gradient of the hidden states over the blocks, in place."""
        dist.all_reduce(partial, group=self.group)
        return partial


class _GatherHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sharded: Any, dtype: torch.dtype) -> Tensor:
        ctx.mesh, ctx.placements, ctx.dtype = sharded.device_mesh, sharded.placements, sharded.dtype
        whole: Tensor = sharded.to(dtype).full_tensor()
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        # Every rank has seen other data: sum, and divide as FSDP does for the other parameters;
        # never in 16 bits, where many ranks would round as often.
        # `DTensor.full_tensor()` would keep this rank's gradient alone.
        wide = torch.promote_types(ctx.dtype, torch.float32)
        mean = grad.to(wide) / ctx.mesh.size()
        parts = [Partial()] * ctx.mesh.ndim
        whole = DTensor.from_local(mean, ctx.mesh, parts, run_check=False)
        return whole.redistribute(ctx.mesh, ctx.placements).to(ctx.dtype), None


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 leaves parameters outside of their module's forward."""
    if type(tensor) in (Tensor, torch.nn.Parameter) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole_head(sharded: Tensor, dtype: torch.dtype) -> Tensor:
    """The gathered tensor of a DTensor, in `dtype`; its gradient is averaged over the mesh.

    So FSDP treats every other parameter. Both directions are collectives of all ranks of the mesh.
    """
    gathered: Tensor = _GatherHead.apply(sharded, dtype)  # type: ignore[no-untyped-call]
    return gathered


def group_of(name: str) -> dist.ProcessGroup | None:
    """The process group of that name, as a custom op's schema carries it; "": none."""
    if not name:
        return None
    from torch._C._distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]
