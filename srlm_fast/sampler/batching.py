"""How much may be held at once, so that memory is bounded."""

from __future__ import annotations

import torch

from srlm_kernels.tree_attention import PAGE

_CPU_BYTES = 1 << 30
_GPU_SHARE = 0.4  # of the memory that is free
_LOGIT_BYTES = 1 << 28
_LONG_ROW = 1 << 17
_NO_LIMIT = 1 << 60


def default_pages(page_bytes: int, device: torch.device, context: int) -> int:
    """Pages of KV memory that a sampler may have here, see `pages_within`."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return pages_within(page_bytes, device, context, free)


def pages_within(page_bytes: int, device: torch.device, context: int, free: int | None) -> int:
    """A gibibyte on the CPU, 0.4 of the `free` bytes of a GPU (None: no limit), and in any case one
    row of up to `context` tokens."""
    row = pages_of(min(context, _LONG_ROW)) + 1  # a prompt's last page and the first own one
    if device.type == "cpu":
        return max(row, _CPU_BYTES // page_bytes)
    return _NO_LIMIT if free is None else max(row, int(_GPU_SHARE * free / page_bytes))


def pages_of(tokens: int) -> int:
    """Pages that `tokens` tokens fill."""
    return -(-tokens // PAGE)


def max_rows(vocab: int) -> int:
    """How many rows may be decoded at once: a quarter of a gibibyte of float32 logits."""
    return max(1, _LOGIT_BYTES // (4 * vocab))
