"""Which items are trained on, in which order, and which of them share a forward.

An item is what the loss is a sum over: one row (SFT), or the chosen and the rejected row of a pair.
"""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch

from srlm_fast.config import TrainConfig
from srlm_fast.data.jsonl import write_text
from srlm_fast.errors import UserError
from srlm_fast.model.load import context_length
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train.batches import Layout, Row

T = TypeVar("T")
Item = tuple[Row, ...]


def longest_row(model: Any, config: TrainConfig) -> int:
    """Tokens of a row at most: `config.max_length`, and what the model's positions allow."""
    context = context_length(model)
    return min(config.max_length or context, context)


def usable_items(
    items: Sequence[Item], max_length: int, what: str = "training"
) -> tuple[list[int], Counter[str]]:
    """Indices of the items that can be trained on, and the number dropped by reason.

    `too_long`: a row exceeds `max_length` tokens. `empty`: a row has no prompt or no response, so
    nothing in it is predicted. Raises UserError when there were no items or none is left;
    `what` they are for is said then.
    """
    if not items:
        raise UserError("there is nothing to train on: the training set is empty")
    kept, dropped = sort_out(items, max_length)
    if not kept:
        cure = (
            f"use shorter prompts and responses, or raise max_length (now {max_length} tokens) as "
            "far as the model's context allows"
            if dropped["too_long"]
            else "give rows that have a prompt and a response"
        )
        raise UserError(f"all {len(items)} {what} rows were dropped ({dict(dropped)}): {cure}")
    return kept, dropped


def sort_out(items: Sequence[Item], max_length: int) -> tuple[list[int], Counter[str]]:
    """`usable_items`, of which there may be none."""
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    for index, item in enumerate(items):
        if any(not prompt or not response for prompt, response in item):
            dropped["empty"] += 1
        elif max(_lengths(item)) > max_length:
            dropped["too_long"] += 1
        else:
            kept.append(index)
    return kept, dropped


def plan_steps(kept: Sequence[int], config: TrainConfig, seed: int) -> list[list[int]]:
    """Every optimiser step of a training as its item indices.

    Each epoch is a new shuffle of `kept`, drawn from `seed` and the epoch alone; the last step of
    an epoch may be smaller.
    """
    size = config.per_device_train_batch_size
    plan = []
    for epoch in range(config.num_train_epochs):
        order = list(kept)
        random.Random(f"{seed}/{epoch}").shuffle(order)
        plan += [order[start : start + size] for start in range(0, len(order), size)]
    return plan


class MicroBatches:
    """Cuts the items of a step into forwards of at most `micro_batch_size` items and
    `micro_batch_tokens` tokens (padding counts; 0: no limit), an item at least.

    Items are ordered by length, so that a forward holds little padding; which of them share a step
    stays random. Each of several `ranks` has its own items of a step.

    folder: of the training. Where weights are sharded, what `end` left there is the limit.
    """

    def __init__(
        self,
        items: Sequence[Item],
        config: TrainConfig,
        layout: Layout,
        ranks: Ranks = ALONE,
        folder: Path | None = None,
    ) -> None:
        self._items, self._layout, self._ranks = items, layout, ranks
        self.max_items, self.max_tokens = config.micro_batch_size, config.micro_batch_tokens
        self._step = config.per_device_train_batch_size
        self._folder = folder if ranks.sharded else None
        if self._folder:
            for tokens in ranks.from_main(_left(self._folder)):
                self.limit(tokens)

    def limit(self, tokens: int) -> None:
        """At most so many tokens from now on (0: as before)."""
        if tokens:
            self.max_tokens = min(self.max_tokens or tokens, tokens)

    def end(self) -> UserError:
        """That memory ran out where a training cannot go on: one that is called again with the same
        folder begins with this limit."""
        text = "out of memory, from which a training whose weights are sharded cannot go on"
        if self._folder is None:
            return UserError(f"{text}: set micro_batch_tokens to {self.max_tokens}")
        path = self._folder / f"forwards-{self._ranks.rank}.json"  # another's may run out, too
        write_text(path, json.dumps(self.max_tokens))
        return UserError(
            f"{text}: resume it, and it has at most {self.max_tokens} tokens in a forward"
        )

    def mine(self, step: Sequence[int]) -> list[list[int]]:
        """The micro-batches of `step` that this rank computes; there may be none. Where weights
        are sharded all ranks have as many: the last ones may be empty."""
        micros = [self.split(share) for share in self.shares(step)]
        mine = micros[self._ranks.rank]
        if self._ranks.sharded:
            mine += [[] for _ in range(max(map(len, micros)) - len(mine))]
        return mine

    def shares(self, step: Sequence[int]) -> list[list[int]]:
        """The items of `step` by the rank that trains on them, with about as many tokens each: the
        longest that is left goes to whoever has least. All ranks find the same."""
        loads, owner = [0] * self._ranks.world, {}
        for index in sorted(step, key=lambda i: self.tokens([i]), reverse=True):
            owner[index] = loads.index(min(loads))
            loads[owner[index]] += self.tokens([index])
        return [[i for i in step if owner[i] == rank] for rank in range(self._ranks.world)]

    def in_order(self, step: Sequence[int]) -> list[int]:
        """The items of `step` in the order in which a single rank sees them."""
        return sorted(step, key=lambda i: max(_lengths(self._items[i])))

    def split(self, step: Sequence[int]) -> list[list[int]]:
        """The micro-batches of `step` on one rank."""
        micros: list[list[int]] = []
        for index in self.in_order(step):
            if micros and self._fits([*micros[-1], index]):
                micros[-1].append(index)
            else:
                micros.append([index])
        return micros

    def forwards(self, *sets: Sequence[int], kept: bool = False) -> list[list[int]]:
        """The micro-batches of sets of items, for a pass without training: no more at once than a
        training step has on one rank, and so no more memory for as long items.

        kept: as a single rank cuts them, so that any number of ranks finds what is kept of them.
        """
        size = self._step if kept else max(1, self._step // self._ranks.world)
        parts = [items[i : i + size] for items in sets for i in range(0, len(items), size)]
        return [micro for part in parts for micro in self.split(part)]

    def in_passing(
        self,
        act: Callable[[list[list[int]]], T],
        *sets: Sequence[int],
        what: str,
        kept: bool = False,
    ) -> T:
        """What `act` gives for the `forwards` of these sets, without gradients.

        Where it raises torch.OutOfMemoryError, on all ranks, it is done again in half as large
        forwards, of this pass alone: what the training does later must not depend on it. `what` it
        is for is said then. Raises UserError when a single item does not fit, and where weights are
        sharded, of `end`.
        """
        own = copy.copy(self)
        while True:
            try:
                return act(own.forwards(*sets, kept=kept))
            except torch.OutOfMemoryError:
                own._halve(lambda: own.forwards(*sets, kept=kept))
                if self._ranks.sharded:  # in the midst of what all ranks do together
                    raise own.end() from None
            warnings.warn(
                f"out of memory in {what}: it is done again with at most {own.max_tokens} tokens in"
                " a forward",
                stacklevel=3,
            )

    def halve(self, step: Sequence[int]) -> None:
        """Half the tokens or fewer from now on, on every rank, since those of `step` were too many
        for the memory of one; the step has more forwards then.

        Raises UserError when they hold one item each already.
        """
        self._halve(lambda: self._of_all_ranks(step), "set gradient_checkpointing to true, ")

    def _halve(self, cut: Callable[[], list[list[int]]], cure: str = "") -> None:
        before = cut()
        # An item may be longer than the limit, and does not move with it.
        largest = max(map(self.tokens, before))
        if all(len(micro) == 1 for micro in before):
            raise UserError(
                f"out of memory with a single item of {largest} tokens: {cure}lower max_length, or"
                " train adapters (lora.r)"
            )
        self.max_tokens = min(self.max_tokens or largest, largest)
        while len(cut()) == len(before):
            self.max_tokens //= 2

    def _of_all_ranks(self, step: Sequence[int]) -> list[list[int]]:
        return [micro for share in self.shares(step) for micro in self.split(share)]

    def tokens(self, micro: Sequence[int]) -> int:
        """That one forward of these items computes."""
        if self._layout == "padded":
            lengths = [length for index in micro for length in _lengths(self._items[index])]
            return len(lengths) * max(lengths)
        return sum(_shared_tokens(self._items[index]) for index in micro)

    def _fits(self, micro: Sequence[int]) -> bool:
        enough = self.max_items and len(micro) > self.max_items
        return not enough and not (self.max_tokens and self.tokens(micro) > self.max_tokens)


def _left(folder: Path) -> list[int]:
    """The limits that ranks left there."""
    found = []
    for path in folder.glob("forwards-*.json"):
        with suppress(OSError, ValueError):  # cut short: the next one to run out writes it again
            found.append(int(json.loads(path.read_text("utf-8"))))
    return found


def _lengths(item: Item) -> list[int]:
    return [len(prompt) + len(response) for prompt, response in item]


def _shared_tokens(item: Item) -> int:
    """Of an item whose neighbouring rows share equal prompts."""
    prompts = [tuple(prompt) for prompt, _ in item]
    repeated = sum(len(b) for a, b in pairwise(prompts) if a == b)
    return sum(_lengths(item)) - repeated
