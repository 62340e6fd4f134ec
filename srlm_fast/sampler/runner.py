"""Forward passes of the trainer's own modules over packed tokens and paged memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.model.attention import attention_named
from srlm_fast.model.forward import Head, decoder, lm_head
from srlm_fast.model.layers import fused_layers
from srlm_fast.model.load import text_config
from srlm_fast.model.phase import inference
from srlm_fast.model.probe import Layers
from srlm_fast.sampler.attention import PAGED, Pass, attending
from srlm_fast.sampler.linears import head_products, invariant_linears
from srlm_fast.sampler.pool import KVMemory
from srlm_kernels.tree_attention import TreePlan


class Runner:
    """`model` over KV memory of the shapes that its layers were found to have.

    `impl` is that of the ops: "auto" or "torch". Use it inside `borrowed_model`.
    """

    def __init__(self, model: Any, layers: Layers, impl: str) -> None:
        self.model, self.impl = model, impl
        self.device: torch.device = self.head.weight.device
        self.group = layers.group
        (dtype,) = layers.dtypes
        shapes = [layers.shapes[layer] for layer in range(len(layers.shapes))]
        self.memory = KVMemory(shapes, dtype=dtype, device=self.device)
        self._dtype = self.head.weight.dtype

    @contextmanager
    def borrowed_model(self) -> Iterator[None]:
        """The model in eval mode, with our attention and, on the CPU, our products; restored in any
        case. Raises UserError when it was moved or cast since the runner was made."""
        weight = self.head.weight
        if (weight.device, weight.dtype) != (self.device, self._dtype):
            raise UserError(
                f"the model was moved or cast from {self._dtype} on {self.device} to"
                f" {weight.dtype} on {weight.device}; make a new Sampler for it"
            )
        ours = self.impl == "auto" and self.device.type == "cpu"
        with (
            inference(self.model),
            attention_named(text_config(self.model), PAGED),
            ExitStack() as own,
        ):
            if ours:
                own.enter_context(invariant_linears(self.model))
                own.enter_context(fused_layers(self.model))
            yield

    @property
    def head(self) -> Head:
        """Looked up every time: loading a checkpoint may have put another one into the model."""
        return lm_head(self.model)

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
        head = self.head
        if self.impl == "torch":
            return head.logits(hidden)
        return head.finish(head_products(head, hidden))
