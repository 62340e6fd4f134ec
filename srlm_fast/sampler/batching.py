"""Which rows go through the model together, so that memory is bounded and little is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from srlm_fast.model.load import text_config

_CPU_BYTES = 1 << 30
_GPU_SHARE = 0.4  # of the memory that is free
_LOGIT_BYTES = 1 << 28


def default_batch_tokens(model: Any) -> int:
    """Tokens whose KV may live at once: a gibibyte on the CPU, 0.4 of what is free on a GPU."""
    config, weight = text_config(model), model.get_output_embeddings().weight
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * head_dim * weight.element_size()
    room = float(_CPU_BYTES)
    if weight.is_cuda:
        room = _GPU_SHARE * torch.cuda.mem_get_info(weight.device)[0]
    return max(1, int(room / token_bytes))


def max_rows(vocab: int) -> int:
    """How many rows may be decoded at once: a quarter of a gibibyte of float32 logits."""
    return max(1, _LOGIT_BYTES // (4 * vocab))


def plan(
    lengths: Sequence[int], *, rows: int, extra: int, tokens: int, most: int
) -> list[list[int]]:
    """Splits items into batches of similar length, longest first; their indices.

    An item of `lengths` has `rows` rows of its length + `extra` tokens. A batch has at most
    `tokens` tokens, padding included, and `most` rows; a single item may exceed both.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches: list[list[int]] = []
    for index in order:
        size = len(batches[-1]) + 1 if batches else 0
        width = lengths[batches[-1][0]] + extra if batches else 0
        if batches and size * rows <= most and size * rows * width <= tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
