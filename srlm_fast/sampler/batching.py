"""How much may be held at once, so that memory is bounded."""

from __future__ import annotations

import torch

from srlm_kernels.tree_attention import PAGE

_CPU_BYTES = 1 << 30
_GPU_SHARE = 0.4  # of the memory that is free
_LOGIT_BYTES = 1 << 28
_LONG_ROW = 1 << 17


def default_pages(page_bytes: int, device: torch.device, context: int) -> int:
    """Pages of KV memory: a gibibyte on the CPU, 0.4 of what is free on a GPU, and in any case one
    row of up to `context` tokens."""
    room = float(_CPU_BYTES)
    if device.type == "cuda":
        room = _GPU_SHARE * torch.cuda.mem_get_info(device)[0]
    row = pages_of(min(context, _LONG_ROW)) + 1  # a prompt's last page and the first own one
    return max(row, int(room / page_bytes))


def pages_of(tokens: int) -> int:
    """Pages that `tokens` tokens fill."""
    return -(-tokens // PAGE)


def max_rows(vocab: int) -> int:
    """How many rows may be decoded at once: a quarter of a gibibyte of float32 logits."""
    return max(1, _LOGIT_BYTES // (4 * vocab))
