"""The loop that SFT and preference training share: backward, update, log, evaluate, save."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from srlm_fast.config import TrainConfig
from srlm_fast.model.checkpointing import checkpointed
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train.checkpoint import Checkpoint, Checkpoints, Stateful
from srlm_fast.train.metrics import Log, Metrics, Micro
from srlm_fast.train.moving import MovingReference
from srlm_fast.train.optim import Optimizer, lr_factor
from srlm_fast.train.plan import MicroBatches
from srlm_fast.train.sharded import check_replicas

# Called with the step's number, its items on all ranks, and the micro-batches of this rank. It is
# resumed after each micro-batch's backward, and runs to its end before the update. When memory runs
# out on any rank it is dropped and called anew for the same step, with smaller micro-batches: after
# the first of them is yielded, it must not wait for another rank.
StepFunction = Callable[[int, Sequence[int], Sequence[Sequence[int]]], Iterator[Micro]]
# Means over held-out data by name, the same on all ranks. It must leave everything as it was.
Evaluate = Callable[[], dict[str, float]]


class Plan(Protocol):
    """The items of every step, asked for when it is their turn; a step may have none."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: int, /) -> Sequence[int]: ...


def fit(
    model: nn.Module,
    config: TrainConfig,
    plan: Plan,
    micro_batches: MicroBatches,
    step_function: StepFunction,
    *,
    log: Log,
    name: str,
    ranks: Ranks = ALONE,
    evaluate: Evaluate | None = None,
    checkpoints: Checkpoints | None = None,
    parts: Mapping[str, Stateful] | None = None,
    moving: MovingReference | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains `model` in place over the optimiser steps of `plan` (see `plan_steps`). One without
    items passes without an update.

    Dropout is off throughout, so that a result depends on its seeds alone and policy and reference
    are the same function. `log` gets means over the steps since its last call, with TRL's names,
    every `logging_steps` and at the end; only then is the device waited for.
    A step that runs out of the device's memory is done again from the start in half as large
    micro-batches, which then stay; the result is the same to rounding.
    `seed` decides how weights are rounded, where that is left to chance.
    Returns steps, num_tokens, loss_first, loss_last (of single steps, skipped or not),
    skipped_steps, whose loss or gradient was not finite, and out_of_memory, the steps done again.
    Raises UserError when there are too many of the former, see `Optimizer`, or when a single item
    does not fit into memory.

    `evaluate` is called, and logged with names that begin with eval_, every `eval_steps` and at the
    end. With `checkpoints`, one is written every `save_steps`, and a training that finds one goes
    on from there: `log` gets the rows from before it again, and all that follows is as if the
    training had not been stopped. `model` comes with its start weights then too. `parts` is what
    else the steps change, and `moving` a reference that is moved after them.

    Each of several `ranks` computes its share of every step, on the whole model or, where `ranks`
    are sharded, on its share of one. All get the same log and summary, and the result is that of
    one rank, to rounding. With a sharded model memory that runs out ends the training, with a
    UserError on that rank only; its process must end then, as the others wait for it. Called again,
    with `micro_batches` of the same folder, it does everything in smaller parts.
    """
    training = _Training(
        model, config, plan, micro_batches, step_function, log, ranks, parts or {}, moving, seed
    )
    if not ranks.sharded:
        check_replicas(model, ranks)
    with _prepared(model, config):
        if found := checkpoints and checkpoints.newest():
            training.restore(found)
        del found  # it maps a file, which will be deleted as later ones are written
        bar = tqdm(
            range(training.step, len(plan)), name, len(plan), unit="step", initial=training.step,
            disable=None if ranks.main else True,
        )  # fmt: skip
        for step in bar:
            training.update(plan[step])
            if training.is_due(config.logging_steps, at_the_end=True):
                training.report()
            if evaluate and training.is_due(config.eval_steps, at_the_end=config.eval_steps > 0):
                training.tell({f"eval_{key}": value for key, value in evaluate().items()})
            if checkpoints and training.is_due(config.save_steps):
                checkpoints.write(training.checkpoint())
    if not ranks.sharded:
        check_replicas(model, ranks)
    return training.summary()


class _Training:
    """A training and how far it is."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        plan: Plan,
        micro_batches: MicroBatches,
        step_function: StepFunction,
        log: Log,
        ranks: Ranks,
        parts: Mapping[str, Stateful],
        moving: MovingReference | None,
        seed: int,
    ) -> None:
        self._config, self._steps, self._micro_batches = config, len(plan), micro_batches
        self._step_function, self._log, self._ranks = step_function, log, ranks
        self._upstream = ranks.world if ranks.sharded else 1  # makes sums of averages over ranks
        self._zero = _zero(model)
        self._optimizer = Optimizer(model, config, ranks, seed)
        self._metrics = Metrics(self._zero, ranks)
        self._parts, self._moving = {**parts, "metrics": self._metrics}, moving
        self.step = 0
        """Steps that are done."""
        self._num_tokens, self._out_of_memory = 0, 0
        self._losses: list[Tensor] = []  # of the first step and of the last
        self._rows: list[dict[str, float]] = []

    def update(self, items: Sequence[int]) -> None:
        """One step on `items`."""
        if items:
            self._learn(items)
        self.step += 1
        if self._moving:
            self._moving.after_step(self.step)

    def _learn(self, items: Sequence[int]) -> None:
        while (tokens := self._gradients(items)) is None:
            self._optimizer.discard()
            self._metrics.discard_step()
            self._micro_batches.halve(items)
            self._out_of_memory += 1
            warnings.warn(
                f"out of memory in step {self.step + 1}: it is done again, and from now on with at"
                f" most {self._micro_batches.max_tokens} tokens in a forward",
                stacklevel=3,
            )
        self._num_tokens += tokens
        loss = self._metrics.step_loss()
        self._optimizer.reduce(loss)
        self._losses = [*self._losses[:1], loss]
        factor = lr_factor(self._config, self.step, self._steps)
        self._metrics.end_step(*self._optimizer.step(loss, factor))

    def _gradients(self, items: Sequence[int]) -> int | None:
        """The tokens of a step whose gradients are collected; None: some rank's memory ran out."""
        tokens, memory_ran_out = 0, False
        try:
            mine = self._micro_batches.mine(items)
            for micro in self._step_function(self.step, items, mine):
                (micro.loss * self._upstream).backward()  # type: ignore[no-untyped-call]
                self._optimizer.collect()
                self._metrics.add(micro)
                tokens += micro.num_tokens
        except torch.OutOfMemoryError:
            if self._ranks.sharded:  # in the midst of what all ranks do together
                self._micro_batches.halve(items)
                raise self._micro_batches.end() from None
            memory_ran_out = True
        return None if self._ranks.any(memory_ran_out) else tokens

    def is_due(self, interval: int, *, at_the_end: bool = False) -> bool:
        """Whether it is time for what is done after every `interval` steps (0: never)."""
        is_last = at_the_end and self.step == self._steps
        return is_last or (interval > 0 and self.step % interval == 0)

    def report(self) -> None:
        """Logs the means since the last report, if the training is sound."""
        self._optimizer.check()
        factor = lr_factor(self._config, self.step - 1, self._steps)
        rate = {"learning_rate": self._config.learning_rate * factor}
        num_tokens = sum(self._ranks.gather([self._num_tokens]))
        self.tell({**self._metrics.read(), **rate}, num_tokens=num_tokens)

    def tell(self, row: dict[str, float], **more: float) -> None:
        """Logs `row` with the place in the training."""
        epoch = self._config.num_train_epochs * self.step / self._steps
        self._rows.append({**row, "epoch": epoch, "step": self.step, **more})
        self._log(dict(self._rows[-1]))

    def checkpoint(self) -> Checkpoint:
        """Everything that steps have changed, on all ranks."""
        own = {
            "num_tokens": self._num_tokens,
            "out_of_memory": self._out_of_memory,
            "max_tokens": self._micro_batches.max_tokens,
            "losses": [float(loss) for loss in self._losses],
        }
        mine = {name: part.state() for name, part in self._parts.items()}
        states = self._ranks.gather([{"training": own, **mine}])
        moved = self._moving.state() if self._moving else {}
        return Checkpoint(self.step, self._rows, states, {**self._optimizer.state(), **moved})

    def restore(self, found: Checkpoint) -> None:
        """Becomes what `found` was made of, and logs its rows again."""
        state = found.states[self._ranks.rank]
        self.step, own = found.step, state["training"]
        self._num_tokens, self._out_of_memory = own["num_tokens"], own["out_of_memory"]
        self._micro_batches.limit(own["max_tokens"])
        self._losses = [self._zero.new_tensor(loss) for loss in own["losses"]]
        for name, part in self._parts.items():
            part.restore(state[name])
        self._optimizer.restore(dict(found.tensors))
        if self._moving:
            self._moving.restore(found.tensors)
        for row in found.rows:
            self._rows.append(row)
            self._log(dict(row))

    def summary(self) -> dict[str, Any]:
        """What `fit` returns."""
        losses = self._losses or [self._zero * math.nan]
        first, last, skipped = torch.stack(
            [losses[0], losses[-1], self._optimizer.skipped]
        ).tolist()
        return {
            "steps": self._steps,
            "num_tokens": sum(self._ranks.gather([self._num_tokens])),
            "loss_first": first,
            "loss_last": last,
            "skipped_steps": int(skipped),
            "out_of_memory": self._out_of_memory,
        }


def _zero(model: nn.Module) -> Tensor:
    """Of the dtype of losses, which is not narrower than fp32."""
    weight = next(model.parameters())
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros((), device=weight.device, dtype=dtype)


@contextmanager
def _prepared(model: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Without dropout, and with layers that are computed again where that is asked for."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with checkpointed(model) if config.gradient_checkpointing else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True
