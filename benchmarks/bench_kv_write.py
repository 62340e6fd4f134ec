"""New keys and values into their pages: a decoding step, and the prefill of a batch of prompts.

python -m benchmarks --suite cpu --only kv_write
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, Work
from srlm_kernels.kv_write import kv_write
from srlm_kernels.tree_attention import PAGE

# Tokens, heads, width; as in 0.5B and 8B models.
SHAPES = {
    "smoke": [(5, 2, 16, "cpu")],
    "cpu": [(16, 2, 64, "cpu"), (2048, 2, 64, "cpu")],
    "gpu": [(64, 8, 128, "cuda"), (8192, 8, 128, "cuda")],
}
IMPLEMENTATIONS = {"cpu": ("torch", "cpp"), "cuda": ("torch", "triton")}


@dataclass
class Batch:
    """Keys and values [T, H, D] as a model gives them, the pages, and the tokens' slots."""

    key: Tensor
    value: Tensor
    key_pages: Tensor
    value_pages: Tensor
    slot: Tensor


def cases(suite: str) -> Iterator[Case]:
    for tokens, heads, width, device in SHAPES[suite]:
        ours = {f"ours, {i}": Variant(partial(_ours, i)) for i in IMPLEMENTATIONS[device]}
        yield Case(
            op="kv_write",
            name=f"{tokens} tokens, heads {heads} x {width}, bfloat16",
            params={
                "tokens": tokens, "heads": heads, "width": width, "dtype": "bfloat16",
                "device": device,
            },
            make_inputs=partial(_batch, tokens, heads, width, device),
            variants={"torch": Variant(_plain), **ours},
            oracle=lambda batch, _: _written(batch),
            tolerance=0.0,
            work=Work(0.0, 2.0 * 2 * tokens * heads * width * 2, (64, 64, 64)),
            baselines=("torch",),
        )  # fmt: skip


def _batch(tokens: int, heads: int, width: int, device: str) -> Batch:
    generator = torch.Generator(device).manual_seed(0)
    key, value = (
        torch.randn(heads, tokens, width, generator=generator, device=device)
        .to(torch.bfloat16)
        .transpose(0, 1)
        for _ in range(2)
    )
    # A decoding row writes into a page of its own, a prompt fills one page after the other.
    stride = PAGE + 1 if tokens <= PAGE else 1
    slot = torch.arange(tokens, device=device) * stride
    pages = torch.zeros(
        2, tokens * stride // PAGE + 1, heads, PAGE, width, dtype=torch.bfloat16, device=device
    )
    keys = pages[0].mT.contiguous().mT if device == "cpu" else pages[0]
    return Batch(key, value, keys, pages[1], slot)


def _written(batch: Batch) -> Outputs:
    """The pages as [P * 64, H, D], in which a slot is a row."""
    pages = {"key_pages": batch.key_pages, "value_pages": batch.value_pages}
    for name, x in (("key_pages", batch.key), ("value_pages", batch.value)):
        flat = pages[name].transpose(1, 2).flatten(0, 1).double()
        flat[batch.slot] = x.double()
        pages[name] = flat.unflatten(0, (-1, PAGE)).transpose(1, 2)
    return pages


def _own_pages(batch: Batch) -> dict[str, Tensor]:
    """Pages that only one variant writes to, strides as they were."""
    return {"key_pages": batch.key_pages.clone(), "value_pages": batch.value_pages.clone()}


def _plain(batch: Batch) -> Call:
    pages = _own_pages(batch)
    page, offset = batch.slot // PAGE, batch.slot % PAGE

    def call() -> Outputs:
        pages["key_pages"][page, :, offset] = batch.key
        pages["value_pages"][page, :, offset] = batch.value
        return pages

    return call


def _ours(impl: str, batch: Batch) -> Call:
    from srlm_kernels.backends import refusal

    if reason := refusal(impl, batch.key):
        raise Unavailable(reason)
    pages = _own_pages(batch)

    def call() -> Outputs:
        kv_write(batch.key, batch.value, **pages, slot=batch.slot, impl=impl)
        return pages

    return call
