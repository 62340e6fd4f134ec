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
    model: Any, indices: Sequence[int], micro_batches: MicroBatches, sums: Sums, ranks: Ranks
) -> dict[str, float]:
    """What `sums` gives over what it counts, without gradients; all ranks share the forwards and
    get the same. For memory that runs out see `MicroBatches.in_passing`."""

    def sums_of_mine(micros: Sequence[Sequence[int]]) -> list[tuple[int, dict[str, Tensor]]]:
        with ranks.running_out_together():
            return [sums(micro) for micro in ranks.share(micros, [])]

    with inference(model):
        mine = micro_batches.in_passing(sums_of_mine, indices, what="an evaluation")
    told = [(count, list(row), torch.stack([*row.values()]).tolist()) for count, row in mine]
    rows = ranks.gather(told)
    total = sum(count for count, _, _ in rows)
    names = rows[0][1]
    return {name: sum(row[i] for _, _, row in rows) / total for i, name in enumerate(names)}
