"""TRL's padded batch of pairs, packed: every token once, a pair's prompt shared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from srlm_fast.errors import UserError
from srlm_fast.model.prefix import checkpoint_contexts
from srlm_fast.train.batches import Batch, collate


@dataclass(frozen=True)
class Packed:
    """A batch whose sequences 2p and 2p+1 are the chosen and the rejected response of pair p.

    places: int64 [N], where each response token's label stands in TRL's flattened [2P, S - 1].
    padded_tokens: those of TRL's batch, the prompt counted twice, as TRL logs them.
    """

    batch: Batch
    places: Tensor
    padded_tokens: int

    @property
    def rows(self) -> Tensor:
        return self.batch.rows

    @property
    def target(self) -> Tensor:
        return self.batch.target

    @property
    def cu_seqlens(self) -> Tensor:
        return self.batch.cu_seqlens

    def to(self, device: Any, **options: Any) -> Packed:
        """With its tensors on `device`: accelerate's data loaders call this. `cu_seqlens` stays on
        the host, where the loss wants it."""
        names = ("input_ids", "position_ids", "rows", "target")
        moved = {name: getattr(self.batch, name).to(device, **options) for name in names}
        return replace(
            self, batch=replace(self.batch, **moved), places=self.places.to(device, **options)
        )

    def states(self, model: Any) -> Tensor:
        """Hidden states [T, D], with gradient checkpointing where it is on."""
        with _checkpoints_with_plans(model):
            return self.batch.states(model)


@dataclass(frozen=True)
class PackingCollator:
    """Adds the `packed` form to what TRL's collator returns."""

    padded: Any

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = self.padded(examples)
        return batch | {"packed": pack(batch)}


def pack(batch: dict[str, Any]) -> Packed:
    """The `input_ids`, `attention_mask` and `completion_mask` [2P, S] of TRL's collator, packed.

    A response may be empty. Where a prompt is, the response's first token stands in for it: nothing
    predicts that one. Raises UserError for other batches than that collator's.
    """
    try:
        ids, present, scored = (
            batch[name].tolist() for name in ("input_ids", "attention_mask", "completion_mask")
        )
    except KeyError as missing:
        raise UserError(
            f"SrlmDPOTrainer needs batches of TRL's collator, and {missing} is not in them; leave "
            "data_collator out"
        ) from None
    width, count = len(ids[0]), len(ids)
    order = [half + pair for pair in range(count // 2) for half in (0, count // 2)]
    rows, places = [], []
    for i in order:
        tokens = [s for s in range(width) if present[i][s]]
        response = [s for s in tokens if scored[i][s] and s != tokens[0]]
        prompt = tokens[: len(tokens) - len(response)]
        if not prompt or response != tokens[len(prompt) :]:
            raise UserError("a pair has no tokens, or its completion does not end the row")
        rows.append(([ids[i][s] for s in prompt], [ids[i][s] for s in response]))
        places += [i * (width - 1) + s - 1 for s in response]
    return Packed(
        collate(rows, pad_id=0, layout="shared"),
        torch.tensor(places, dtype=torch.int64),
        sum(map(sum, present)),
    )


@contextmanager
def _checkpoints_with_plans(model: Any) -> Iterator[None]:
    """Layers that transformers recomputes in backward find the plan of their forward."""
    layers: list[Any] = [
        m
        for m in model.modules()
        if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing
    ]
    before = [layer._gradient_checkpointing_func for layer in layers]
    contexts = partial(checkpoint_contexts, model)
    try:
        for layer, function in zip(layers, before, strict=True):
            layer._gradient_checkpointing_func = partial(function, context_fn=contexts)
        yield
    finally:
        for layer, function in zip(layers, before, strict=True):
            layer._gradient_checkpointing_func = function
