"""Means over held-out items during a training, which does not see them."""

from __future__ import annotations

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
) -> list[int]:
    """Which of `items[start:]` can be evaluated on, and none where `eval_steps` is 0.

    Raises UserError where there are some and none can be used.
    """
    if not config.eval_steps or start == len(items):
        return []
    usable, _ = usable_items(items[start:], max_length, "evaluation")
    return [start + index for index in usable]


def held_out_means(
    model: Any,
    indices: Sequence[int],
    config: TrainConfig,
    micro_batches: MicroBatches,
    sums: Sums,
    ranks: Ranks,
) -> dict[str, float]:
    """What `sums` gives over what it counts, without gradients; all ranks share the forwards and
    get the same."""
    # No more at once than a training step has on one rank, and so no more memory.
    size = max(1, config.per_device_train_batch_size // ranks.world)
    with inference(model):
        mine = [sums(micro) for micro in ranks.share(micro_batches.forwards(indices, size), [])]
    told = [(count, list(row), torch.stack([*row.values()]).tolist()) for count, row in mine]
    rows = ranks.gather(told)
    total = sum(count for count, _, _ in rows)
    names = rows[0][1]
    return {name: sum(row[i] for _, _, row in rows) / total for i, name in enumerate(names)}
