"""Does a model give its own logits on pages? Recurrent states and position biases make some
families silently wrong there; a few short forwards at construction find out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.model.forward import lm_head
from srlm_fast.model.load import context_length
from srlm_fast.model.phase import inference
from srlm_fast.model.probe import Layers
from srlm_fast.sampler.forest import PrefixForest
from srlm_fast.sampler.plan import PlanBuilder, decode_items, slot_of
from srlm_fast.sampler.pool import PagePool
from srlm_fast.sampler.prefill import prompt_stretch, run
from srlm_fast.sampler.runner import Runner
from srlm_kernels.tree_attention import PAGE

_SHARED, _LONG, _SHORT = PAGE, 5, 3  # tokens that both rows begin with, and those of each alone


def check(model: Any, layers: Layers, impl: str) -> str | None:
    """Why paged logits of `model` are not its own; None: they are.

    Two rows that share a page are computed in one pass, then the last token of each in another.
    Raises UserError when the model's logits are not finite.
    """
    with inference(model):
        ids = _ids(model, _SHARED + _LONG + _SHORT)
        rows = [ids[: _SHARED + _LONG], torch.cat([ids[:_SHARED], ids[_SHARED + _LONG :]])]
        rows = [row[-context_length(model) :] for row in rows]
        plain = torch.stack([model(row[None]).logits[0, -1].float() for row in rows])
        if not bool(plain.isfinite().all()):
            raise UserError("the model's logits are not finite; its weights are damaged")
    runner = Runner(model, layers, impl)
    try:
        with runner.borrowed_model():
            paged = _paged(runner, [row.tolist() for row in rows])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # shapes that no op takes, kernels that do not compile
        return f"its attention cannot read pages: {type(error).__name__}: {error}"
    # What rounding may move: the logits of a random bf16 model differ by a few per cent.
    tolerance = 1e-3 if lm_head(model).weight.dtype.itemsize >= 4 else 0.1
    error_size = float((paged - plain).abs().max() / plain.abs().max().clamp(min=1e-6))
    if error_size <= tolerance:
        return None
    return f"its logits there are off by {error_size:.1%}"


def _paged(runner: Runner, rows: list[list[int]]) -> Tensor:
    """[2, V]: all but the last token of each row in one pass, then the last of each."""
    pages = sum(len(row) // PAGE + 1 for row in rows) + len(rows)
    runner.memory.resize(pages)
    forest = PrefixForest(PagePool(pages))
    paths = [forest.take(row[:-1]) for row in rows]
    for _ in run(runner, [prompt_stretch(path) for path in paths]):
        pass
    own = [forest.take_pages(1) for _ in rows]
    builder = PlanBuilder(runner.group)
    lengths = [len(row) - 1 for row in rows]
    decode_items(builder, list(zip(paths, own, lengths, strict=True)))
    slots = [slot_of(p, n // PAGE, n) for p, n in zip(own, lengths, strict=True)]
    last = [row[-1] for row in rows]
    ids, position, slot = torch.tensor([last, lengths, slots]).to(runner.device)
    plan = builder.build(len(rows), runner.device)
    return runner.logits(runner.forward(ids, position, slot, plan))


def _ids(model: Any, count: int) -> Tensor:
    head = lm_head(model)
    return ((torch.arange(count) * 7 + 3) % len(head.weight)).to(head.weight.device)
