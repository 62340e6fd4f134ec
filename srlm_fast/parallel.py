"""The processes of one run, as `torchrun` starts them, and what they tell each other.

One process is the usual case: nothing here touches torch.distributed then. Between several, objects
and flags go over gloo whatever the device is, so that agreeing on them never waits for a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from srlm_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# A process that dies is noticed at once. This bounds how far apart living ones may be: one makes a
# base model or saves a large one while the others wait.
_PATIENCE = timedelta(hours=2)
_BUCKET = 1 << 26  # elements of one all-reduce; its copy of them is all the memory that it takes
_NOTHING = object()


@dataclass(frozen=True)
class Ranks:
    """This process (`rank`) among all `world` processes of the run; by default the only one.

    local_rank: its number on its machine, that of its GPU; local_world: how many run there.
    Every method but `share` and `check_device` is collective: all ranks must call it, in the same
    order.
    sharded: each rank holds a share of the weights of what is trained. Forwards and backwards are
    collective then: all ranks must make as many, if need be of nothing.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: Any = field(default=None, repr=False, compare=False)
    local_world: int = 1
    sharded: bool = False

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    def share(self, items: Sequence[T], *filling: T) -> list[T]:
        """This rank's share of `items`: every `world`-th one, so that none has two more. Where
        weights are sharded, a `filling` is what ranks with one less get instead."""
        mine = list(items[self.rank :: self.world])
        short = -(-len(items) // self.world) - len(mine)
        return mine + short * list(filling) if self.sharded else mine

    def gather(self, objects: Sequence[T]) -> list[T]:
        """The objects of all ranks, dealt round: what comes of `share`s is in their order again."""
        if self.world == 1:
            return list(objects)
        lists: list[Any] = [None] * self.world
        _distributed().all_gather_object(lists, list(objects))
        rounds = zip_longest(*lists, fillvalue=_NOTHING)
        return [item for item in chain.from_iterable(rounds) if item is not _NOTHING]

    def from_main(self, thing: T) -> T:
        """The main rank's `thing`; what the others give is ignored."""
        if self.world == 1:
            return thing
        box = [thing]
        _distributed().broadcast_object_list(box)
        return box[0]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Adds up each tensor over the ranks, in place, in as few messages as can be.

        Every rank must give the same shapes and dtypes, and gets the same sums to the last bit.
        """
        if self.world == 1:
            return
        import torch

        with torch.no_grad():
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.flatten() for tensor in bucket])
                _distributed().all_reduce(flat)
                parts = torch.split(flat, [tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return self.any_of_each([flag])[0]

    def any_of_each(self, flags: Sequence[bool]) -> list[bool]:
        """For each of `flags` whether it is set on any rank."""
        if self.world == 1:
            return list(flags)
        import torch

        told = torch.tensor(list(flags), dtype=torch.uint8)
        _distributed().all_reduce(told, op=_distributed().ReduceOp.MAX)
        return [bool(flag) for flag in told.tolist()]

    @contextmanager
    def running_out_together(self) -> Iterator[None]:
        """torch.OutOfMemoryError of one rank is raised on all of them, at the end of the block, in
        which none may wait for another. Where weights are sharded they do, and only that one."""
        import torch

        memory_ran_out = False
        try:
            yield
        except torch.OutOfMemoryError:
            if self.sharded:
                raise
            memory_ran_out = True
        if not self.sharded and self.any(memory_ran_out):
            raise torch.OutOfMemoryError("on one of the ranks")

    def barrier(self) -> None:
        """Waits until every rank is here."""
        self.any(False)

    def check_device(self, name: str) -> None:
        """Raises UserError where the configured `device` does not give each rank its own GPU."""
        if self.world == 1 or name == "cpu":
            return
        import torch

        if ":" in name:
            raise UserError(
                f"device {name} would be shared by {self.world} processes; use auto, cuda or cpu"
            )
        gpus = torch.cuda.device_count()
        if gpus and self.local_rank >= gpus:
            raise UserError(
                f"more processes than the {gpus} GPUs that are visible: start fewer with "
                "--nproc-per-node, or use --device cpu"
            )

    @contextmanager
    def speaker(self) -> Iterator[bool]:
        """True on the first rank to come here, which says for all why the run ends; the others wait
        until it is said, since the first process to exit takes the rest down. Once a run."""
        if self.world == 1:
            yield True
            return
        first = False
        with suppress(Exception):  # the store went with its process, and that one has spoken
            first = self.store.add("speaker", 1) == 1
        yield first
        with suppress(Exception):
            if first:
                self.store.set("spoken", "")
            else:
                self.store.wait(["spoken"], timedelta(seconds=10))

    def close(self) -> None:
        """Leaves the group, all ranks together. A run that failed must not: it would wait."""
        if self.world > 1:
            self.barrier()
            _distributed().destroy_process_group()


ALONE = Ranks()


def start() -> Ranks:
    """This process's place in the run, from the environment that torchrun sets; joins the others.

    Collectives run on gloo for the CPU and, where there are GPUs, on NCCL for them; the current GPU
    becomes the one of the process's number. Raises UserError when the others cannot be joined.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    import torch

    # Its functions have the group that there is at their import as a default, and would keep ours:
    # gloo's threads would go on when Python ends, and abort the process now and then.
    import torch.distributed.nn.functional

    dist, cuda = _distributed(), torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        store, rank, world = next(dist.rendezvous("env://"))
        store.set_timeout(_PATIENCE)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=_PATIENCE,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"cannot join the other processes ({str(error).splitlines()[0]}); start them all with "
            "torchrun, or unset WORLD_SIZE"
        ) from error
    if cuda and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(rank, world, local_rank, dist.PrefixStore("run", store), local_world)


def _distributed() -> Any:
    """torch.distributed, imported late: the command line answers without torch."""
    import torch.distributed

    return torch.distributed


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, in order, up to `_BUCKET` elements or a single one."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for kind in kinds.values():
        bucket: list[Tensor] = []
        for tensor in kind:
            if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket
