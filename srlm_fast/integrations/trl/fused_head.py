"""What a model of TRL's returns for `fused_lm_head=True`, computed by `linear_logp`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from srlm_fast.errors import UserError
from srlm_fast.integrations.entropy import linear_logp_with_entropy
from srlm_fast.integrations.trl.packed import Packed
from srlm_fast.model.forward import decoder, lm_head
from srlm_kernels import LinearLogp

# TRL's names of what `linear_logp` calls in the singular.
OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}


@dataclass(frozen=True)
class Options:
    """The arguments that TRL gave to its own `add_fused_lm_head`."""

    temperature: float
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, forward: Callable[..., Any]) -> Options:
        """Those of a forward that TRL has patched. Raises UserError for any other."""
        function = getattr(forward, "__func__", forward)
        found = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
        try:
            return cls(*(found[name] for name in cls.__dataclass_fields__))
        except KeyError:
            raise UserError(
                "this model has no fused LM head of TRL's: call accelerate(trainer) right after "
                "constructing a DPO, KTO, SFT, GRPO or RLOO trainer, before train()"
            ) from None


def fused_output(
    model: Any,
    options: Options,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: Any,
    packed: Packed | None = None,
) -> FusedCausalLMOutput:
    """See `trl.trainer.utils.add_fused_lm_head`, whose contract this is.

    With `packed`, the tokens of `input_ids` and `labels` packed, a shared prompt runs once.
    """
    kwargs["use_cache"] = False
    # The decoder is looked up on each call: FSDP and PEFT replace modules after patching.
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    backbone = None
    if packed is not None:
        assert labels is not None
        target = labels[:, 1:]
        hidden = packed.to(target.device).states(model)
    else:
        backbone = decoder(model)(*args, **kwargs)
        hidden, target = _predicting(backbone.last_hidden_state, labels, shift_labels)
    # A model that is split over devices has its labels with its first layer. Not asked before the
    # decoder has run: weights that FSDP keeps on the CPU come with it.
    target = target.to(model.get_output_embeddings().weight.device)
    shape, mask = target.shape, target != -100
    logp = _logp(model, options, hidden, target, packed)
    fields = {name: getattr(logp, ours) for name, ours in OUTPUTS.items()}
    fields = {"log_probs": logp.logp, **fields}
    if packed is not None:
        places = packed.places.to(target.device)
        fields = {name: _at(places, mask.numel(), x) for name, x in fields.items()}
    fields = {name: None if x is None else x.view(shape) for name, x in fields.items()}
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -fields["log_probs"].sum() / count
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = _aux_loss(model, backbone, kwargs.get("attention_mask"))
        coefficient = getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0)
        loss = loss + coefficient * aux_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **fields)


def _predicting(
    hidden: Tensor, labels: Tensor | None, shift_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Hidden states and the label that each of them predicts."""
    if shift_labels is not None:
        return hidden, shift_labels
    assert labels is not None
    return hidden[:, :-1], labels[:, 1:]


def _logp(
    model: Any, options: Options, hidden: Tensor, target: Tensor, packed: Packed | None
) -> LinearLogp:
    """By row: of all of `target`, or of the packed responses."""
    head = lm_head(model)
    weight, bias, region = head.weight, head.bias, nullcontext()
    hidden = hidden.to(weight.device)
    if options.cast_lm_head_to_fp32:
        region = torch.autocast(hidden.device.type, enabled=False)  # type: ignore[assignment]
        hidden, weight = hidden.float(), weight.float()
        bias = None if bias is None else bias.float()
    rows = packed.rows if packed is not None else None
    with region:
        return linear_logp_with_entropy(
            hidden if rows is not None else hidden.flatten(0, -2),
            weight,
            packed.target.to(weight.device) if packed is not None else target.flatten(),
            rows=None if rows is None else rows.to(weight.device),
            bias=bias,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            temperature=options.temperature,
            outputs=[ours for theirs, ours in OUTPUTS.items() if theirs in options.outputs],
        )


def _at(places: Tensor, count: int, x: Tensor | None) -> Tensor | None:
    """The packed rows `x` where they stand in the padded batch, and 0 elsewhere."""
    return None if x is None else x.new_zeros(count).index_copy(0, places, x)


def _aux_loss(model: Any, backbone: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss that every family of experts takes from Mixtral."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    loss: Tensor = load_balancing_loss_func(  # type: ignore[assignment]
        backbone.router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
    )
    return loss
