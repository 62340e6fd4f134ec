"""What a model's attention layers ask for, found by one forward pass of a few tokens.

A second registered attention function looks at every call, and at the rule by which the model
would have masked keys: where a window or chunk is in the mask alone, a short test of the numbers
would pass and long prompts would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from srlm_fast.model.attention import attention_named
from srlm_fast.model.forward import decoder, lm_head
from srlm_fast.model.load import context_length, text_config
from srlm_fast.model.phase import inference

_NAME = "srlm_probe"
_TOKENS = 3
# Keywords of an attention function that change what is computed.
CHANGING = {"position_bias", "indices", "block_indices", "sinks"}
_ERRORS = (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError)


@dataclass(frozen=True)
class LayerShape:
    """KV heads and the sizes of keys and values of one attention layer."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass
class Layers:
    """The attention layers of a model, by `layer_idx`. `group`: most query heads of a KV head."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    dtypes: set[torch.dtype] = field(default_factory=set)
    group: int = 1
    context: int = _TOKENS
    oddities: list[str] = field(default_factory=list)


def probe(model: Any) -> Layers | str:
    """The layers of `model`, or why an attention function of ours cannot serve it."""
    config = text_config(model)
    if limit := moving_rope(config):
        return f"its rotary frequencies change when a row of the batch passes {limit} tokens"
    global _found
    _found = Layers(context=context_length(model))
    device = lm_head(model).weight.device
    ids = torch.arange(_TOKENS, device=device)[None]
    with inference(model), attention_named(config, _NAME):
        try:
            decoder(model)(input_ids=ids, position_ids=ids, use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except _ERRORS as error:
            return f"it does not run with an attention function of ours: {error}"
    layers = sorted(_found.shapes)
    if layers != list(range(config.num_hidden_layers)):
        return (
            f"{len(layers)} of its {config.num_hidden_layers} layers hand keys and values to the"
            " attention function"
        )
    if len(_found.dtypes) != 1:
        return "its layers differ in dtype"
    return _found.oddities[0] if _found.oddities else _found


def moving_rope(config: Any) -> int:
    """The length beyond which a model's rotary frequencies are others, for every token of a batch
    as soon as one row is longer ("longrope"); 0: they never change within the context."""
    parameters = getattr(config, "rope_parameters", None) or {}
    context = getattr(config, "max_position_embeddings", 0)
    for rope in [parameters, *(p for p in parameters.values() if isinstance(p, dict))]:
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if rope.get("rope_type") == "longrope" and original and original < context:
            return int(original)
    return 0


# Where the registered functions leave what they see; transformers calls them, not we.
_found = Layers()


def _probe_mask(
    *args: Any, mask_function: Callable[..., Tensor] | None = None, **kwargs: Any
) -> Tensor:
    """A stand-in for a mask, with the rule for making it."""
    mask = torch.zeros(1, 1, _TOKENS, _TOKENS, dtype=torch.bool)
    mask.rule = mask_function  # type: ignore[attr-defined]
    return mask


def _probe_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    layer, odd = module.layer_idx, _found.oddities
    if layer in _found.shapes:
        odd.append(f"layer {layer} attends twice")
    _found.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
    _found.dtypes |= {query.dtype, key.dtype, value.dtype}
    _found.group = max(_found.group, query.shape[1] // key.shape[1])
    rule = getattr(attention_mask, "rule", None)
    if rule is None:
        odd.append(f"layer {layer} makes a mask of its own")
    elif not _is_window(rule, sliding_window, _found.context):
        odd.append(f"the mask of layer {layer} is not its window ({sliding_window})")
    if strange := {name for name in CHANGING if extra.get(name) is not None}:
        odd.append(f"layer {layer} attends with {', '.join(sorted(strange))}")
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None


def _is_window(rule: Callable[..., Tensor], window: int | None, context: int) -> bool:
    """Whether `rule` shows a query its past, or the last `window` positions of it; looked at where
    powers of two, the window and the context begin and end."""
    edges = [1 << i for i in range(17)] + [window or 0, 2 * (window or 0), context]
    places = {edge + near for edge in edges for near in (-1, 0, 1)}
    place = torch.tensor(sorted(p for p in places if 0 <= p < min(context, 1 << 20)))
    query, key = place[None, None, :, None], place[None, None, None, :]
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    ahead = query - key
    expected = (ahead >= 0) & (ahead < (window or 1 << 30))
    shown = rule(zero, zero, query, key)
    return bool((shown.expand_as(expected) == expected).all())


ALL_ATTENTION_FUNCTIONS.register(_NAME, _probe_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _probe_mask)
