"""Forward passes of the trainer's own modules over packed tokens and paged memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srlm_fast.model.forward import decoder, lm_head
from srlm_fast.sampler.attention import Pass, attending
from srlm_fast.sampler.linears import head_products
from srlm_fast.sampler.pool import KVMemory
from srlm_fast.sampler.probe import Layers
from srlm_kernels.tree_attention import TreePlan


class Runner:
    """`model` over KV memory of the shapes that its layers were found to have.

    `impl` is that of the ops. Use it inside `inference` and `attention_named`.
    """

    def __init__(self, model: Any, layers: Layers, impl: str) -> None:
        self.model, self.impl = model, impl
        self.head = lm_head(model)
        self.device: torch.device = self.head.weight.device
        self.group = layers.group
        (dtype,) = layers.dtypes
        shapes = [layers.shapes[layer] for layer in range(len(layers.shapes))]
        self.memory = KVMemory(shapes, dtype=dtype, device=self.device)

    def forward(self, ids: Tensor, position: Tensor, slot: Tensor, plan: TreePlan) -> Tensor:
        """Hidden states [T, D] of the tokens `ids` at `position` (both [T] int64), whose keys and
        values go to `slot` [T] int64."""
        with attending(Pass(self.memory, plan, position.int(), slot, self.impl)):
            output = decoder(self.model)(
                input_ids=ids[None],
                attention_mask=None,
                position_ids=position[None],
                use_cache=False,
            )
        states: Tensor = output.last_hidden_state[0]
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V] float32 logits of hidden states [R, D]."""
        return self.head.finish(head_products(self.head, hidden))
