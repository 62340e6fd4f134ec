"""Packed rows whose responses share one prompt, through the modules of any HF model.

A group of tokens is [prompt | response 1 | ... | response K]; a response sees the prompt and
itself, and its positions go on where the prompt ends. The prompt is computed once, not K times.
Source: "Accelerating Direct Preference Optimization with Prefix Sharing", arXiv 2410.20305.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from srlm_fast.model.attention import attention_named
from srlm_fast.model.forward import hidden_states, lm_head
from srlm_fast.model.layers import fused_layers
from srlm_fast.model.load import context_length, text_config
from srlm_fast.model.phase import inference
from srlm_fast.model.probe import probe
from srlm_kernels import PrefixPlan, prefix_attention

_NAME = "srlm_prefix"
# Not a keyword of the model's forward: some families do not pass those on. Of each thread its own.
_PLAN: ContextVar[PrefixPlan] = ContextVar("plan of the forward pass")


def packed_states(model: Any, input_ids: Tensor, position_ids: Tensor, plan: PrefixPlan) -> Tensor:
    """The last hidden states [1, T, D] of packed tokens [1, T]; gradients flow."""
    with _attending(model, plan):
        return hidden_states(model, input_ids, position_ids=position_ids)


@contextmanager
def _attending(model: Any, plan: PrefixPlan) -> Iterator[None]:
    token = _PLAN.set(plan)
    try:
        with attention_named(text_config(model), _NAME), fused_layers(model):
            yield
    finally:
        _PLAN.reset(token)


def checkpoint_contexts(
    model: Any,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For torch.utils.checkpoint's `context_fn`: backward computes a layer again when the pass is
    long over, maybe in another thread and with another micro-batch under way; it must find the plan
    that its forward had."""
    plan = _PLAN.get(None)
    return nullcontext(), nullcontext() if plan is None else _Again(model, plan)


class _Again(AbstractContextManager[None]):
    """`_attending` as often as backward comes: more than once with retain_graph."""

    def __init__(self, model: Any, plan: PrefixPlan) -> None:
        self._arguments = (model, plan)

    def __enter__(self) -> None:
        self._attending = _attending(*self._arguments)
        self._attending.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._attending.__exit__(*error)


def refusal(model: Any) -> str | None:
    """Why responses of `model` cannot share their prompt; None: they can, to rounding.

    Two responses behind one prompt are compared with the two rows on their own.
    """
    found = probe(model)
    if isinstance(found, str):
        return found
    prompt, lengths = 6, (4, 3)
    if context_length(model) < prompt + max(lengths):
        return "its context is too short for a self-test"
    head = lm_head(model).weight
    ids = ((torch.arange(prompt + sum(lengths)) * 7 + 3) % len(head)).to(head.device)
    ends = torch.tensor([prompt, prompt + lengths[0], len(ids)])
    tails = [ids[ends[i] : ends[i + 1]] for i in range(2)]
    positions = [torch.arange(prompt), *(torch.arange(prompt, prompt + n) for n in lengths)]
    with inference(model):
        rows = [torch.cat([ids[:prompt], tail]) for tail in tails]
        alone = torch.cat([hidden_states(model, row[None])[0, prompt:] for row in rows])
        try:
            plan = PrefixPlan.of([(prompt, lengths)])
            place = torch.cat(positions).to(head.device)
            shared = packed_states(model, ids[None], place[None], plan)[0, prompt:]
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            return f"its attention does not run packed: {type(error).__name__}: {error}"
    if not bool(alone.isfinite().all()):
        return None  # nothing to compare; the first step of a training says what is broken
    tolerance = 1e-3 if head.dtype.itemsize >= 4 else 0.1  # what rounding may move
    off = float((shared - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
    return None if off <= tolerance else f"its hidden states are off by {off:.1%}"


def _prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """[1, T, H, Dv] from query [1, H, T, Dk], key [1, Hkv, T, Dk] and value [1, Hkv, T, Dv]."""
    plan = _PLAN.get(None)
    if plan is None:
        raise RuntimeError("the model's attention is set to packed training, but nothing is packed")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    mixed = prefix_attention(
        query, key, value, plan, scale=scaling, window=sliding_window or None, softcap=softcap,
        sinks=s_aux,
    )  # fmt: skip
    return mixed[None], None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _prefix_attention)
