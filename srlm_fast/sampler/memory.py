"""How much memory sampling and scoring will need beside the weights, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from srlm_fast.model.attention import attention_named
from srlm_fast.model.forward import hidden_states, lm_head
from srlm_fast.model.load import context_length, text_config
from srlm_fast.model.probe import LayerShape, moving_rope
from srlm_fast.model.sizes import PeakBytes
from srlm_fast.sampler.batching import max_rows, pages_of, pages_within
from srlm_fast.sampler.pool import KVMemory
from srlm_fast.sampler.prefill import PASS_TOKENS, pass_tokens
from srlm_fast.sampler.rows import own_pages
from srlm_fast.sampler.scheduler import LOOKAHEAD

_ON_CPU, _ON_GPU = "srlm_sized_pages", "srlm_sized_pages_on_gpu"
_shapes: ContextVar[dict[int, LayerShape]] = ContextVar("shapes of layers")


@dataclass(frozen=True)
class Call:
    """A call of a sampler: so many different prompts of so many tokens, and `rows` responses of
    each, which are drawn, or known and scored; "next" has none."""

    kind: Literal["generate", "score", "next"]
    prompts: int
    prompt_tokens: int
    rows: int = 1
    response_tokens: int = 1
    again: bool = False
    """The prompts are those of the call before."""

    @property
    def prompt_pages(self) -> int:
        """Of all prompts; they stay when the call is over."""
        return self.prompts * pages_of(self.prompt_tokens)

    @property
    def own_pages(self) -> int:
        """Of one response."""
        return own_pages(self.prompt_tokens, self.response_tokens - 1)


@dataclass(frozen=True)
class SamplerMemory:
    """Bytes that a sampler takes at its peak, beside the weights, by what they are for."""

    pages: int | None
    """Keys and values; None: unknown, the model does not run on pages or without data."""
    work: int | None
    """What a forward or logits take at the worst time; None: unknown."""


def sampler_memory(
    model: Any, calls: Sequence[Call], *, device: torch.device, free: int | None = None
) -> SamplerMemory:
    """The peak of `calls`, which a sampler of `model` makes one after the other on `device`.

    model: without data ("meta"). free: bytes of a GPU that are free when the sampler is made;
    None: unknown, there are as many pages as are asked for.
    """
    size = _page_bytes(model)
    if size is None:
        return SamplerMemory(None, None)
    limit = pages_within(size, device, context_length(model), free)
    most = max_rows(len(lm_head(model).weight))
    forward = cache(partial(_forward, model, device))
    pool = kept = peak = 0
    for call in calls:
        if call.again and device.type == "cpu":  # a GPU has pages for them once more
            kept = max(0, kept - call.prompt_pages)
        before, pool = pool, max(pool, min(limit, kept + _pages(call, most, device)))
        rows = _rows_at_once(call, most, pool)
        kept = min(pool, kept + call.prompt_pages)
        # On a CPU there is memory behind a page once it is written: first prompts are.
        first = call.kind == "generate" and rows == call.prompts * call.rows
        filled = max(before, kept) if first and device.type == "cpu" else pool
        known = filled * size + forward(_tokens_at_once(call, rows, device))
        peak = max(peak, known, pool * size + _logits(model, call, rows))
    return SamplerMemory(pool * size, peak - pool * size)


def _page_bytes(model: Any) -> int | None:
    """None: the model does not run on pages, or not without data."""
    shapes: dict[int, LayerShape] = {}
    _shapes.set(shapes)
    try:
        _forward(model, torch.device("cpu"), 1)
    except Exception:  # a layer that needs data, whatever it raises then
        return None
    config = text_config(model)
    if moving_rope(config) or sorted(shapes) != list(range(config.num_hidden_layers)):
        return None
    layers = [shapes[layer] for layer in range(len(shapes))]
    return KVMemory(layers, dtype=model.dtype, device=torch.device("meta")).page_bytes


def _pages(call: Call, most: int, device: torch.device) -> int:
    """What `call` takes where there are enough. A GPU's are allocated when it begins, for all its
    rows; on a CPU rows that come later write where others have ended."""
    rows, spare = call.prompts * call.rows, 0
    if device.type == "cpu":
        rows = min(rows, _scored_at_once(call) if call.kind == "score" else most)
    elif call.kind == "score":
        spare = 2  # which are never used
    return call.prompt_pages + (call.kind != "next") * rows * (call.own_pages + spare)


def _scored_at_once(call: Call) -> int:
    """Responses of a batch, which ends with the one that fills it."""
    return int(-(-PASS_TOKENS // (call.response_tokens + call.prompt_tokens / call.rows)))


def _rows_at_once(call: Call, most: int, pages: int) -> int:
    """Of "generate" as many are admitted as there are pages for, with the tokens that they are
    promised."""
    if call.kind == "generate":
        promised = own_pages(call.prompt_tokens, min(call.response_tokens - 1, LOOKAHEAD))
        most = min(most, int(pages / (pages_of(call.prompt_tokens) / call.rows + promised)))
    return max(1, min(call.prompts * call.rows, most))


def _tokens_at_once(call: Call, rows: int, device: torch.device) -> int:
    """Of the largest pass."""
    if call.kind == "score":
        tokens = call.prompts * (call.prompt_tokens + call.rows * (call.response_tokens - 1))
    else:
        tokens = -(-rows // call.rows) * call.prompt_tokens
    return min(tokens, pass_tokens(device))


def _forward(model: Any, device: torch.device, tokens: int) -> int:
    """Bytes of a pass over so many tokens."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    weights = [*model.parameters(), *model.buffers()]
    name = _ON_CPU if device.type == "cpu" else _ON_GPU
    with torch.no_grad(), attention_named(text_config(model), name), PeakBytes(weights) as found:
        hidden_states(model, ids, position_ids=ids)
    return int(found.peak)


def _logits(model: Any, call: Call, rows: int) -> int:
    """Bytes of the logits of so many rows, and of what a scale or a cap takes on the way."""
    if call.kind == "score":  # they come a tile at a time
        return 0
    head = lm_head(model)
    vocab = len(head.weight)
    with PeakBytes() as found:
        head.finish(torch.empty(rows, vocab, dtype=torch.float32, device="meta"))
    # A log-sum-exp takes a copy; first tokens are drawn from the logits of prompts, repeated.
    more = rows if call.kind == "next" else -(-rows // call.rows)
    return int(max(found.peak, (rows + more) * vocab * 4))


def _sized_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Notes the shapes of the layer."""
    _shapes.get()[module.layer_idx] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
    heads, tokens = query.shape[1:3]
    return query.new_empty(1, tokens, heads, value.shape[3]), None


def _sized_on_gpu(module: Any, query: Tensor, *rest: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """There, sums of each token come in fp32 first."""
    out = _sized_attention(module, query, *rest, **kwargs)[0]
    sums = out.new_empty(out.shape, dtype=torch.float32)
    del sums
    return out, None


ALL_ATTENTION_FUNCTIONS.register(_ON_CPU, _sized_attention)
ALL_ATTENTION_FUNCTIONS.register(_ON_GPU, _sized_on_gpu)
