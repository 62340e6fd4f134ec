"""Does this model give its own logits when it is padded, cached and decoded step by step?

Position schemes, recurrent states and caches of their own make some families silently wrong in a
batched decoder; three short forwards at construction find out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.model.forward import decoder, lm_head
from srlm_fast.model.load import text_config
from srlm_fast.sampler.attention import decode_attention
from srlm_fast.sampler.cache import SlabCache
from srlm_fast.sampler.phase import inference

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_LONG, _SHORT = 5, 3  # tokens of the two rows; the last one of each is decoded alone


def check_model(model: Any) -> None:
    """Raises UserError when batched decoding does not reproduce the model's plain forward."""
    config = text_config(model)
    other = set(getattr(config, "layer_types", None) or ()) - _ATTENTION
    if other:
        raise UserError(
            f"cannot decode {config.model_type!r} models in batches: they have layers of type"
            f" {', '.join(sorted(other))}; use a model with attention layers only"
        )
    with inference(model):
        try:
            batched, plain = _batched(model), _plain(model)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"cannot decode {config.model_type!r} models in batches: {error}"
            ) from error
    if not bool(plain.isfinite().all()):
        raise UserError("the model's logits are not finite; its weights are damaged or diverged")
    # What rounding may move: the logits of a random bf16 model differ by a few per cent.
    tolerance = 1e-3 if plain.dtype == torch.float32 and _is_fp32(model) else 0.1
    error_size = (batched - plain).abs().max() / plain.abs().max().clamp(min=1e-6)
    if not error_size <= tolerance:
        raise UserError(
            f"{config.model_type!r} models do not give the same logits when they are padded and"
            f" cached (off by {float(error_size):.1%}), so this sampler cannot serve them"
        )


def _is_fp32(model: Any) -> bool:
    return bool(model.get_output_embeddings().weight.dtype == torch.float32)


def _rows(model: Any) -> tuple[Tensor, Tensor]:
    """Two rows of ids [2, 5], left-padded, and their mask."""
    head = lm_head(model)
    ids = (torch.arange(2 * _LONG) * 7 + 3) % len(head.weight)
    mask = torch.ones(2, _LONG, dtype=torch.bool)
    mask[1, : _LONG - _SHORT] = False
    return ids.view(2, _LONG).to(head.weight.device), mask.to(head.weight.device)


def _batched(model: Any) -> Tensor:
    """[2, V]: prefill of all but the last token, then one decoding step."""
    (ids, mask), config = _rows(model), text_config(model)
    cache = SlabCache(config.num_hidden_layers, _LONG)
    positions = (mask.cumsum(-1) - 1).clamp_(min=0)
    run, head = decoder(model), lm_head(model)
    run(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        past_key_values=cache,
        use_cache=True,
    )
    with decode_attention(config, ids.device):
        output = run(
            input_ids=ids[:, -1:],
            attention_mask=mask,
            position_ids=positions[:, -1:],
            past_key_values=cache,
            use_cache=True,
        )
    return head.logits(output.last_hidden_state[:, -1])


def _plain(model: Any) -> Tensor:
    """[2, V]: the model's own logits after each row alone."""
    ids, mask = _rows(model)
    return torch.stack(
        [model(row[keep][None]).logits[0, -1].float() for row, keep in zip(ids, mask, strict=True)]
    )
