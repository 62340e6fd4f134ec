"""The loop that SFT and preference training share: backward, update, log."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.model.checkpointing import checkpointed
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train.metrics import Log, Metrics, Micro
from srlm_fast.train.optim import Optimizer, lr_factor
from srlm_fast.train.plan import MicroBatches
from srlm_fast.train.sharded import check_replicas

# Called with the step's number, its items on all ranks, and the micro-batches of this rank. It is
# resumed after each micro-batch's backward, and runs to its end before the update. When memory runs
# out on any rank it is dropped and called anew for the same step, with smaller micro-batches: after
# the first of them is yielded, it must not wait for another rank.
StepFunction = Callable[[int, Sequence[int], Sequence[Sequence[int]]], Iterator[Micro]]

OUT_OF_MEMORY = (
    "out of memory: a training whose weights are sharded cannot go on from there; set a lower"
    " micro_batch_tokens or gradient_checkpointing to true"
)


def fit(
    model: nn.Module,
    config: TrainConfig,
    plan: Sequence[Sequence[int]],
    micro_batches: MicroBatches,
    step_function: StepFunction,
    *,
    log: Log,
    name: str,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Trains `model` in place over the optimiser steps of `plan` (see `plan_steps`).

    Dropout is off throughout, so that a result depends on its seeds alone and policy and reference
    are the same function. `log` gets means over the steps since its last call, with TRL's names,
    every `logging_steps` and at the end; only then is the device waited for.
    A step that runs out of the device's memory is done again from the start in half as large
    micro-batches, which then stay; the result is the same to rounding.
    Returns steps, num_tokens, loss_first, loss_last (of single steps, NaN if that one was skipped),
    skipped_steps, whose loss or gradient was not finite, and out_of_memory, the steps done again.
    Raises UserError when there are too many of the former, see `Optimizer`, or when a single item
    does not fit into memory.

    Each of several `ranks` computes its share of every step, on the whole model or, where `ranks`
    are sharded, on its share of one. All get the same log and summary, and the result is that of
    one rank, to rounding. With a sharded model memory that runs out ends the training, with a
    UserError on that rank only; its process must end then, as the others wait for it.
    """
    optimizer, metrics = Optimizer(model, config, ranks), Metrics(_zero(model), ranks)
    steps, num_tokens, out_of_memory = len(plan), 0, 0
    losses: list[Tensor] = []
    upstream = ranks.world if ranks.sharded else 1  # makes sums of averages over the ranks

    def gradients(step: int, items: Sequence[int]) -> int | None:
        """The tokens of a step whose gradients are collected; None: some rank's memory ran out."""
        tokens, memory_ran_out = 0, False
        try:
            for micro in step_function(step, items, micro_batches.mine(items)):
                (micro.loss * upstream).backward()  # type: ignore[no-untyped-call]
                optimizer.collect()
                metrics.add(micro)
                tokens += micro.num_tokens
        except torch.OutOfMemoryError:
            if ranks.sharded:  # in the midst of what all ranks do together
                raise UserError(OUT_OF_MEMORY) from None
            memory_ran_out = True
        return None if ranks.any(memory_ran_out) else tokens

    if not ranks.sharded:
        check_replicas(model, ranks)
    with _prepared(model, config):
        bar = tqdm(plan, desc=name, unit="step", disable=None if ranks.main else True)
        for step, items in enumerate(bar):
            while (tokens := gradients(step, items)) is None:
                optimizer.discard()
                metrics.discard_step()
                micro_batches.halve(items)
                out_of_memory += 1
                warnings.warn(
                    f"out of memory in step {step + 1}: it is done again, and from now on with at"
                    f" most {micro_batches.max_tokens} tokens in a forward",
                    stacklevel=2,
                )
            num_tokens += tokens
            losses.append(metrics.step_loss())
            optimizer.reduce(losses[-1])
            factor = lr_factor(config, step, steps)
            metrics.end_step(*optimizer.step(losses[-1], factor))
            if (step + 1) % config.logging_steps == 0 or step + 1 == steps:
                optimizer.check()
                place = {
                    "learning_rate": config.learning_rate * factor,
                    "epoch": config.num_train_epochs * (step + 1) / steps,
                    "step": step + 1,
                    "num_tokens": sum(ranks.gather([num_tokens])),
                }
                log({**metrics.read(), **place})
    if not ranks.sharded:
        check_replicas(model, ranks)
    first, last, skipped = torch.stack([losses[0], losses[-1], optimizer.skipped]).tolist()
    return {
        "steps": steps,
        "num_tokens": sum(ranks.gather([num_tokens])),
        "loss_first": first,
        "loss_last": last,
        "skipped_steps": int(skipped),
        "out_of_memory": out_of_memory,
    }


def _zero(model: nn.Module) -> Tensor:
    """Of the dtype of losses, which is not narrower than fp32."""
    weight = next(model.parameters())
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros((), device=weight.device, dtype=dtype)


@contextmanager
def _prepared(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Without dropout, and with layers that are computed again where that is asked for."""
    was_training = model.training
    model.eval()
    try:
        with checkpointed(model) if config.gradient_checkpointing else nullcontext():
            yield
    finally:
        model.train(was_training)
