"""Means over held-out items during a training, which does not see them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from srlm_fast.config import TrainConfig
from srlm_fast.model.phase import inference
from srlm_fast.parallel import Ranks
from srlm_fast.train.plan import Item, MicroBatches, usable_items

# Of one forward over the items of these numbers: what is counted, and 0-d sums over that.
Sums = Callable[[Sequence[int]], tuple[int, dict[str, Tensor]]]


def held_out_items(
    items: Sequence[Item], start: int, config: TrainConfig, max_length: int
) -> tuple[list[int], dict[str, int]]:
    """Which of `items[start:]` can be evaluated on, none where `eval_steps` is 0; and the number
    dropped by reason.

    Raises UserError where there are some and none can be used.
    """
    if not config.eval_steps or start == len(items):
        return [], {}
    usable, dropped = usable_items(items[start:], max_length, "evaluation")
    return [start + index for index in usable], dict(dropped)


def held_out_means(
    model: Any,
    indices: Sequence[int],
    config: TrainConfig,
    micro_batches: MicroBatches,
    sums: Sums,
    ranks: Ranks,
) -> dict[str, float]:
    """What `sums` gives over what it counts, without gradients; all ranks share the forwards and
    get the same.

    Where memory runs out it is done again in half as large forwards, of this evaluation alone: what
    the training does later must not depend on it. Raises UserError when a single item does not fit,
    and where weights are sharded, of `MicroBatches.end`.
    """
    # No more at once than a training step has on one rank, and so no more memory for as long items.
    size = max(1, config.per_device_train_batch_size // ranks.world)
    own = copy.copy(micro_batches)
    with inference(model):
        while (mine := _sums_of_mine(own.forwards(indices, size), sums, ranks)) is None:
            own.halve_forwards(indices, size)
            if ranks.sharded:  # in the midst of what all ranks do together
                raise own.end()
            warnings.warn(
                "out of memory in an evaluation: it is done again with at most"
                f" {own.max_tokens} tokens in a forward",
                stacklevel=2,
            )
    told = [(count, list(row), torch.stack([*row.values()]).tolist()) for count, row in mine]
    rows = ranks.gather(told)
    total = sum(count for count, _, _ in rows)
    names = rows[0][1]
    return {name: sum(row[i] for _, _, row in rows) / total for i, name in enumerate(names)}


def _sums_of_mine(
    micros: Sequence[Sequence[int]], sums: Sums, ranks: Ranks
) -> list[tuple[int, dict[str, Tensor]]] | None:
    """Of this rank's share of `micros`; None: some rank's memory ran out."""
    mine, memory_ran_out = [], False
    try:
        for micro in ranks.share(micros, []):
            mine.append(sums(micro))
    except torch.OutOfMemoryError:
        memory_ran_out = True
    if ranks.sharded:  # the others wait elsewhere
        return None if memory_ran_out else mine
    return None if ranks.any(memory_ran_out) else mine
