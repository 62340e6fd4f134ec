"""Weights, gradients and optimiser state shared out over the ranks while a training lasts (FSDP2).

Sampling and judging need whole weights, training does not: a twin of the model is sharded, and the
model itself, whose parameters stay the same objects, is empty until it gets the twin's weights.

FSDP and the ops' gathered head average gradients over the ranks, and `fit` makes sums of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.model.checkpointing import layers_of
from srlm_fast.model.forward import decoder
from srlm_fast.parallel import Ranks
from srlm_kernels.distributed import is_sharded


@contextmanager
def placed(
    config: TrainConfig, ranks: Ranks, *models: Any
) -> Iterator[tuple[Ranks, Sequence[Any]]]:
    """`ranks` and `models` as `config.parallel` wants them for a training; on a single rank a share
    is the whole. A model that is given twice stays one."""
    if config.parallel == "replicate" or ranks.world == 1:
        yield ranks, models
        return
    with ExitStack() as stack:
        once = {id(model): model for model in models}
        twins = {key: stack.enter_context(sharded(m, ranks)) for key, m in once.items()}
        yield replace(ranks, sharded=True), [twins[id(model)] for model in models]


@contextmanager
def sharded(model: Any, ranks: Ranks) -> Iterator[Any]:
    """A twin of `model` of whose parameters each rank has a share, for trainings and forwards that
    all `ranks` make together. Afterwards `model` has its weights, whole, on every rank.

    Inside, and when an exception leaves it, `model` has no weights: with a rank missing they cannot
    be gathered. Raises UserError where a parameter that trains cannot be shared out.
    """
    check_replicas(model, ranks)
    model.zero_grad(set_to_none=True)
    twin = _twin(model)
    _shard(twin, ranks)
    shares = dict(twin.named_parameters())
    pairs = [(p, shares[name]) for name, p in model.named_parameters() if p is not shares[name]]
    for whole, _ in pairs:
        whole.data = whole.data.new_empty(0)
    yield twin
    for whole, share in pairs:
        whole.data = gathered(share)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor of a sharded model, without gradients; of any other, itself. All ranks
    must call it."""
    whole: Tensor = tensor.detach()
    return whole.full_tensor() if is_sharded(whole) else whole  # type: ignore[attr-defined]


def own_share(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, without gradients, in the same memory."""
    share: Tensor = tensor.detach()
    return share.to_local() if is_sharded(share) else share  # type: ignore[attr-defined]


def check_replicas(model: Any, ranks: Ranks) -> None:
    """Raises RuntimeError where the weights of the ranks differ: nothing else would show it."""
    if ranks.world > 1:
        # In stretches: in float64 a large embedding would be a second model.
        parts = [p.detach().flatten().split(1 << 22) for p in model.parameters()]
        sums = [torch.stack([x.double().sum() for x in some]).sum() for some in parts]
        found = ranks.gather([str(torch.stack(sums).tolist())])
        if len(set(found)) > 1:
            raise RuntimeError("the weights differ between the processes that train them")


def _twin(model: Any) -> Any:
    """Modules of its own around the tensors of `model`."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _shard(model: Any, ranks: Ranks) -> None:
    """Each layer is gathered as it is needed, and so is the rest of what is below the head.

    That is a root of its own: forwards begin there. The head is gathered by the ops that read its
    weight. One that is tied is the embedding's share, to which both give their gradients; its bias
    is shared out all the same.
    """
    # Here, because a torch may be built without.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    # Gradients of 16-bit weights are summed in fp32, as those of replicas are.
    narrow = model.dtype.itemsize < 4
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if narrow else None)
    mesh = init_device_mesh(model.device.type, (ranks.world,))
    for module in (*reversed(layers_of(model)), decoder(model), *([] if tied else [head])):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if tied:
        if getattr(head, "bias", None) is not None:  # which is the head's own
            fully_shard(
                head, mesh=mesh, mp_policy=policy, reshard_after_forward=True,
                ignored_params={head.weight},
            )  # fmt: skip
        head.weight = embedding.weight
    # The gradient of a whole one would not be summed over the ranks, and nothing would show it.
    whole = [n for n, p in model.named_parameters() if p.requires_grad and not is_sharded(p)]
    if whole:
        raise UserError(
            f"parallel: shard cannot share out {whole[0]} of this model, which is in no layer and"
            " not in its head; set parallel to replicate"
        )
