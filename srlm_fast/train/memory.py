"""How much memory a training will need, before anything is loaded: from the shapes of its tensors.

Weights and optimiser are counted; activations are what one forward of a copy of the model without
data ("meta" tensors) keeps for its backward, so that every family's own layers are measured.
"""

from __future__ import annotations

from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from srlm_fast.config import TrainConfig
from srlm_fast.model.attention import attention_named
from srlm_fast.model.checkpointing import checkpointed, layers_of
from srlm_fast.model.forward import hidden_states
from srlm_fast.model.load import text_config
from srlm_fast.model.sizes import count_parameters
from srlm_kernels.plan import chunk_rows
from srlm_kernels.prefix_attention_cpp import refusal as cpp_refusal

_NAME = "srlm_sized"
_TOKENS = 256  # of the forward that is measured
_keys: ContextVar[int] = ContextVar("keys of a query", default=0)


@dataclass(frozen=True)
class TrainMemory:
    """Bytes of a training step at its peak, by what they are for."""

    weights: int
    reference: int
    optimizer: int
    """AdamW's moments, and fp32 weights behind 16-bit ones; see `optimizer_bytes`."""
    gradients: int
    activations: int | None
    """None: they could not be measured."""
    head: int
    """Logits of a chunk of rows, and the gradients of head and hidden states."""
    accumulates: bool
    """Several forwards a step: gradients are there from the one before."""
    start: int = 0
    """Before weights are shared out, when model and reference are whole."""

    @property
    def least(self) -> int:
        """Of the start and of an update, however little is computed."""
        held = self.weights + self.reference + self.optimizer + self.gradients
        return max(held, self.start)

    @property
    def peak(self) -> int:
        """The largest of the start, an update, and the loss with all activations."""
        held = self.weights + self.reference + self.optimizer
        before = self.gradients if self.accumulates else 0
        return max(self.least, held + before + (self.activations or 0) + self.head)


def train_memory(
    model: Any,
    train: TrainConfig,
    *,
    device: torch.device,
    tokens: int,
    rows: int,
    longest: int,
    forwards: int = 1,
    reference: bool = False,
    shares: int = 1,
) -> TrainMemory:
    """The peak of training `model`, which is without data, adapters included, on `device`.

    tokens, rows: computed and scored (response) tokens of the largest forward; longest: tokens of a
    prompt with its responses; forwards: in a step; reference: a frozen copy of what trains is
    there; shares: into so many the weights are cut, of which one is held (`train.parallel`).
    """
    count, trained = count_parameters(model), count_parameters(model, trained=True)
    size = model.dtype.itemsize
    weights = model.get_output_embeddings().weight
    vocab, width = weights.shape
    half = size < 4
    chunk = min(rows, chunk_rows(vocab, device))
    logits = size if device.type == "cpu" else 4
    whole = count * size + (trained * size if reference else 0)
    return TrainMemory(
        weights=count * size // shares + (_gathered(model) * size if shares > 1 else 0),
        reference=trained * size // shares if reference else 0,
        optimizer=trained * optimizer_bytes(train, model.dtype) // shares,
        gradients=trained * (6 if half else 4) // shares,
        activations=_activations(
            model, train.gradient_checkpointing, tokens, longest if device.type == "cpu" else 0
        ),
        head=chunk * vocab * logits
        + weights.requires_grad * vocab * width * (4 + (size if half else 0))
        + rows * width * 4 + tokens * width * size * (3 if reference else 2),
        accumulates=forwards > 1,
        start=whole + whole // shares if shares > 1 else 0,
    )  # fmt: skip


def optimizer_bytes(train: TrainConfig, dtype: torch.dtype) -> int:
    """That the optimiser keeps for a weight of `dtype`."""
    moments = 2 if train.optim == "adamw_torch_8bit" else 8
    has_master = dtype.itemsize < 4 and not train.bf16_stochastic_rounding
    return moments + (4 if has_master else 0)


def _gathered(model: Any) -> int:
    """Weights that are whole at once where they are sharded: a layer, the embedding, the head."""
    layers = [sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)]
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return int(max(layers, default=0) + sum(weight.numel() for weight in ends))


def _activations(model: nn.Module, checkpointing: bool, tokens: int, longest: int) -> int | None:
    try:
        return _saved(model, checkpointing, tokens, longest)
    except Exception:  # a layer that cannot run without data, whatever it raises then
        return None


def _saved(model: nn.Module, checkpointing: bool, tokens: int, longest: int) -> int:
    """Bytes that a forward of so many tokens keeps for its backward; in proportion to them.

    longest: keys for which scores are kept where attention cannot do without them.
    """
    weights = {id(p) for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # held, so that no two share an identity

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights:
            kept[id(base)] = base
        return tensor

    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    layers: Any = checkpointed(model) if checkpointing else nullcontext()
    _keys.set(longest)
    with (
        attention_named(text_config(model), _NAME),
        layers,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        hidden_states(model, ids, position_ids=ids)
    total = sum(base.numel() * base.dtype.itemsize for base in kept.values())
    if checkpointing:  # and, while it is computed again, what one layer keeps
        count = int(text_config(model).num_hidden_layers)
        whole = _saved(model, False, _TOKENS, longest)
        total += whole // count
    return total * tokens // _TOKENS


class _Sized(torch.autograd.Function):
    """Keeps what attention keeps: its operands, its result and fp32 numbers of each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, numbers: int) -> Tensor:
        heads, tokens = query.shape[1:3]
        out = query.new_empty(1, tokens, heads, value.shape[3])
        kept = query.new_empty(heads, tokens, numbers, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, kept)
        return out


def _sized_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """A log-sum-exp, or where `prefix_attention` takes its reference on this CPU, scores: under the
    softmax, and under the cap."""
    keys = _keys.get()
    cut = sliding_window is not None and sliding_window < keys
    special = cut or softcap is not None or s_aux is not None or key.shape[3] != value.shape[3]
    dense = special and cpp_refusal(torch.empty(0, dtype=query.dtype)) is not None
    numbers = 1 + keys * dense * (1 + (softcap is not None))
    return _Sized.apply(query, key, value, numbers), None  # type: ignore[no-untyped-call]


ALL_ATTENTION_FUNCTIONS.register(_NAME, _sized_attention)
