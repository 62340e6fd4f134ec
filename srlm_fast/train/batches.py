"""Token-id rows as batches: what is trained on, in which order, and where the loss falls.

A row is (prompt ids, response ids). An item is what the loss is a sum over: one row (SFT), or the
chosen and the rejected row of a pair. Ids are trained on as they are: no EOS is added, none is cut.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError

Row = tuple[Sequence[int], Sequence[int]]
Item = tuple[Row, ...]


@dataclass(frozen=True)
class Batch:
    """One forward's input, and where in its hidden states the responses are predicted.

    input_ids, position_ids: int64, [B, S] padded on the right, or [1, T] packed. Neither has an
        attention mask: no token sees the padding on its right, and from positions that start again
        transformers knows which packed tokens see each other. (A mask would do harm: padding
        beyond a sliding window sees nothing, and a softmax over nothing is NaN.)
    rows: [N] int64, index into the flattened hidden states of the position that predicts each
        response token; the first one is predicted by the last prompt token.
    target: [N] int64, the response tokens, sequence after sequence.
    cu_seqlens: [sequences + 1] int32, where each sequence's targets begin and end in [N].
    num_tokens: prompt and response tokens, padding not counted.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    target: Tensor
    cu_seqlens: Tensor
    num_tokens: int


def collate(
    rows: Sequence[Row],
    *,
    pad_id: int,
    layout: Literal["padded", "packed"] = "padded",
    device: torch.device | str = "cpu",
) -> Batch:
    """The batch of `rows`, in their order; every prompt must have at least one token."""
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    width = max(lengths) if layout == "padded" else 0
    ids: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    target: list[int] = []
    ends = [0]
    for (prompt, response), length in zip(rows, lengths, strict=True):
        first = len(ids) + len(prompt) - 1
        predicting.extend(range(first, first + len(response)))
        target.extend(response)
        ends.append(len(target))
        ids.extend(prompt)
        ids.extend(response)
        if layout == "packed":
            positions.extend(range(length))
        else:
            ids.extend([pad_id] * (width - length))

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        host = torch.tensor(values, dtype=dtype)
        if torch.device(device).type == "cuda":
            host = host.pin_memory()  # an unpinned copy would wait for the device
        return host.to(device, non_blocking=True)

    if layout == "packed":
        position_ids = tensor(positions)[None]
    else:
        position_ids = torch.arange(width, device=device).expand(len(rows), width)
    return Batch(
        input_ids=tensor(ids).view(position_ids.shape),
        position_ids=position_ids,
        rows=tensor(predicting),
        target=tensor(target),
        cu_seqlens=tensor(ends, torch.int32),
        num_tokens=sum(lengths),
    )


def usable_items(items: Sequence[Item], max_length: int) -> tuple[list[int], Counter[str]]:
    """Indices of the items that can be trained on, and the number dropped by reason.

    `too_long`: a row exceeds `max_length` tokens. `empty`: a row has no prompt or no response, so
    nothing in it is predicted. Raises UserError when there were no items or none is left.
    """
    if not items:
        raise UserError("there is nothing to train on: the training set is empty")
    kept: list[int] = []
    dropped: Counter[str] = Counter()
    for index, item in enumerate(items):
        if any(not prompt or not response for prompt, response in item):
            dropped["empty"] += 1
        elif max(_lengths(item)) > max_length:
            dropped["too_long"] += 1
        else:
            kept.append(index)
    if not kept:
        cure = (
            f"use shorter prompts and responses, or raise max_length (now {max_length} tokens) as "
            "far as the model's context allows"
            if dropped["too_long"]
            else "give rows that have a prompt and a response"
        )
        raise UserError(f"all {len(items)} training rows were dropped ({dict(dropped)}): {cure}")
    return kept, dropped


def plan_steps(
    items: Sequence[Item], kept: Sequence[int], config: TrainConfig, seed: int
) -> list[list[list[int]]]:
    """Every optimiser step of a training as its micro-batches of item indices.

    Each epoch is a new shuffle of `kept`, drawn from `seed` and the epoch alone; the last step of
    an epoch may be smaller. Within a step the items are ordered by length, so that a micro-batch
    holds little padding; which items share a step stays random.
    """
    size = config.per_device_train_batch_size
    micro = config.micro_batch_size or size
    longest = {index: max(_lengths(items[index])) for index in kept}
    plan = []
    for epoch in range(config.num_train_epochs):
        order = list(kept)
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, len(order), size):
            step = sorted(order[start : start + size], key=longest.__getitem__)
            plan.append([step[i : i + micro] for i in range(0, len(step), micro)])
    return plan


def _lengths(item: Item) -> list[int]:
    return [len(prompt) + len(response) for prompt, response in item]
