"""The loop that SFT and preference training share: backward, update, log."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from srlm_fast.config import TrainConfig
from srlm_fast.train.metrics import Log, Metrics, Micro
from srlm_fast.train.optim import Optimizer, lr_factor
from srlm_fast.train.plan import MicroBatches

# Called with the step's number and its micro-batches of item indices. It is resumed after each
# micro-batch's backward, and runs to its end before the update. When memory runs out it is dropped
# and called anew for the same step, with smaller micro-batches.
StepFunction = Callable[[int, Sequence[Sequence[int]]], Iterator[Micro]]


def fit(
    model: nn.Module,
    config: TrainConfig,
    plan: Sequence[Sequence[int]],
    micro_batches: MicroBatches,
    step_function: StepFunction,
    *,
    log: Log,
    name: str,
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
    """
    optimizer, metrics = Optimizer(model, config), Metrics()
    steps, num_tokens, out_of_memory = len(plan), 0, 0
    losses: list[Tensor] = []
    was_training = model.training
    model.eval()

    def gradients(step: int, items: Sequence[int]) -> int | None:
        """The tokens of a step whose gradients are collected; None: memory ran out."""
        tokens = 0
        try:
            for micro in step_function(step, micro_batches.split(items)):
                micro.loss.backward()  # type: ignore[no-untyped-call]
                optimizer.collect()
                metrics.add(micro)
                tokens += micro.num_tokens
        except torch.OutOfMemoryError:
            return None
        return tokens

    try:
        for step, items in enumerate(tqdm(plan, desc=name, unit="step", disable=None)):
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
            factor = lr_factor(config, step, steps)
            metrics.end_step(*optimizer.step(losses[-1], factor))
            if (step + 1) % config.logging_steps == 0 or step + 1 == steps:
                optimizer.check()
                place = {
                    "learning_rate": config.learning_rate * factor,
                    "epoch": config.num_train_epochs * (step + 1) / steps,
                    "step": step + 1,
                    "num_tokens": num_tokens,
                }
                log({**metrics.read(), **place})
    finally:
        model.train(was_training)
    first, last, skipped = torch.stack([losses[0], losses[-1], optimizer.skipped]).tolist()
    return {
        "steps": steps,
        "num_tokens": num_tokens,
        "loss_first": first,
        "loss_last": last,
        "skipped_steps": int(skipped),
        "out_of_memory": out_of_memory,
    }
