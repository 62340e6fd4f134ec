"""`attn_implementation="srlm_fast"`: rows of packed sequences, in any model and any `Trainer`.

Where positions start again inside a row, transformers knows that another sequence begins
(padding-free collators, TRL's `padding_free` and packing), and has sdpa and eager attend through a
mask of all pairs of tokens. Here that mask is read as the list of sequences that it stands for, and
`srlm_kernels.prefix_attention` computes each of them alone. Everything else that a model may ask
for (rows with padding, a cache, masks of another kind) is transformers' own sdpa, mask and all.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from srlm_fast.errors import UserError
from srlm_fast.model.attention import attention_named
from srlm_fast.model.forward import hidden_states, lm_head
from srlm_fast.model.load import text_config
from srlm_fast.model.phase import inference
from srlm_fast.model.probe import CHANGING
from srlm_kernels import PrefixPlan, prefix_attention

NAME = "srlm_fast"

# (batch, head, query, key), indices that broadcast -> whether that query sees that key.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def register_attention() -> None:
    """Makes `attn_implementation="srlm_fast"` known to transformers, in this process.

    Call it before the model is loaded, or before `model.set_attn_implementation("srlm_fast")`.
    Packed rows need `use_cache=False` in the forward, which trainers set, and no `attention_mask`:
    otherwise transformers does not look for sequences, whatever the attention.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


def check_packing(model: Any) -> None:
    """Raises UserError if `model` mixes up the sequences of a packed row under this attention.

    Some families do, with any attention of transformers: those that make their masks without
    positions, and those with layers whose state runs through a row (Mamba, convolutions). Two short
    sequences in one row are compared with each on its own.
    """
    register_attention()
    weight = lm_head(model).weight
    ids = ((torch.arange(9) * 7 + 3) % len(weight)).to(weight.device)
    parts = ids[:4], ids[4:]
    place = torch.cat([torch.arange(len(part)) for part in parts]).to(weight.device)
    config = text_config(model)
    with inference(model):
        try:
            with attention_named(config, "eager"):
                alone = torch.cat([hidden_states(model, part[None])[0] for part in parts])
            with attention_named(config, NAME):
                packed = hidden_states(model, ids[None], position_ids=place[None])[0]
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"this model does not run on packed rows with attn_implementation {NAME}, pad them "
                f"instead: {type(error).__name__}: {error}"
            ) from error
    off = float((packed - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
    if off > (1e-3 if weight.dtype.itemsize >= 4 else 0.1):  # what rounding may move
        raise UserError(
            f"this model mixes up the sequences of a packed row (its hidden states are off by "
            f"{off:.1%}): pad them instead"
        )


class Sequences:
    """Stands where a mask would: the sequences of all rows of a batch, one row behind the other.

    window: a token sees that many up to itself; None: all of its sequence that came before.
    """

    # No dataclass: FSDP takes those apart on their way into a layer, and makes them anew.
    def __init__(self, plan: PrefixPlan, window: int | None) -> None:
        self.plan, self.window = plan, window


def sequences(rule: Rule, rows: int, length: int, device: torch.device | str) -> Sequences | None:
    """The packed sequences that `rule` masks, of rows [rows, length].

    None where it masks anything else: no row with two sequences, tokens that see what comes after
    them, gaps. The rule is asked about some keys of each query: where its sequence and its window
    begin, and neighbours at distances that double. Waits for the device once.
    """
    row = torch.arange(rows, device=device)[:, None]
    token = torch.arange(length, device=device)[None]
    head = torch.zeros_like(row)

    def sees(key: Tensor) -> Tensor:
        return rule(row, head, token, key.clamp(0, length - 1)).expand(rows, length)

    begins = ~sees(token - 1) | (token == 0)
    first = torch.where(begins, token, 0).cummax(1).values
    before = token - first
    # The window is the distance at which a token no longer sees how its sequence began.
    window = torch.where(sees(first), length, before).min()

    def is_right(distance: Tensor | int) -> Tensor:
        key = token - distance
        expected = (key <= token) & (key >= first) & (distance < window)
        return (sees(key) == expected) | (key < 0) | (key >= length)

    doubling = [1 << i for i in range(length.bit_length())]
    distances: list[Tensor | int] = [-1, 0, before, before + 1, window - 1, window, *doubling]
    right = torch.stack([is_right(distance).all() for distance in distances]).all()
    *cuts, fits, reach = torch.cat([begins.flatten(), right[None], window[None]]).tolist()
    starts = [i for i, begin in enumerate(cuts) if begin]
    if not fits or len(starts) == rows:
        return None
    lengths = [after - start for start, after in pairwise([*starts, rows * length])]
    plan = PrefixPlan.of([(n, ()) for n in lengths])
    return Sequences(plan, None if reach >= length else reach)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Rule,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Sequences | Tensor | None:
    """What transformers calls once a forward for each kind of layer, to mask its attention.

    allow_is_causal_skip is false where sequences are packed, but not only there.
    """
    is_plain = allow_is_causal_skip or attention_mask is not None
    offsets = options.get("q_offset", 0), options.get("kv_offset", 0)  # tensors with a static cache
    has_cache = q_length != kv_length or any(type(x) is not int or x for x in offsets)
    # `use_vmap`: a rule that takes no tensors. A graph under compilation cannot hold host lengths.
    if not (is_plain or has_cache or use_vmap or torch.compiler.is_compiling()):
        found = sequences(mask_function, batch_size, q_length, device)
        if found is not None:
            return found
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, mask_function=mask_function,
        attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip,
        use_vmap=use_vmap, device=device, **options,
    )  # fmt: skip
    return mask


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sequences | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[B, S, H, Dv] from query [B, H, S, Dk], key [B, Hkv, S, Dk] and value [B, Hkv, S, Dv]."""
    if not isinstance(attention_mask, Sequences):
        for name, given in (("a softcap", softcap), ("sinks", s_aux)):
            if given is not None:
                raise UserError(
                    f"attn_implementation {NAME} has {name} for packed rows only, and "
                    "transformers does not take these for packed: set it to eager"
                )
        out: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )[0]
        return out, None
    if dropout:
        raise UserError(
            f"attn_implementation {NAME} has no dropout for packed rows: set the model's attention "
            "dropout to 0"
        )
    if strange := {name for name in CHANGING if options.get(name) is not None}:
        raise UserError(
            f"this model attends with {', '.join(sorted(strange))}, which attn_implementation "
            f"{NAME} does not have for packed rows: pad them, or choose another"
        )
    length = query.shape[2]
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    mixed = prefix_attention(
        query, key, value, attention_mask.plan, scale=scaling, window=attention_mask.window,
        softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    rows: Tensor = mixed.unflatten(0, (-1, length))  # type: ignore[no-untyped-call]
    return rows, None
