"""From token ids to hidden states, and the head that turns them into logits.

Logits are never made here: losses and scores fuse the head (`srlm_kernels`), the sampler projects
only the rows it samples from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from srlm_fast.errors import UserError
from srlm_fast.model.load import text_config


@dataclass(frozen=True)
class Head:
    """The language-model head: logits = softcap(logit_scale * (hidden @ weight.T + bias)).

    `weight` [V, D] and `bias` [V] or None are the model's own parameters. `softcap` c means
    c * tanh(logits / c).
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] float32 logits of `hidden` [..., D]; the product runs in the weight's dtype."""
        return self.finish(F.linear(hidden, self.weight, self.bias))

    def finish(self, products: Tensor) -> Tensor:
        """[..., V] float32 logits from `products` = hidden @ weight.T + bias."""
        logits = products.float()
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def lm_head(model: Any) -> Head:
    """The head of `model`, with the scale and softcap that its family applies to the logits.

    `logit_scale` (Cohere), `output_multiplier` (Muse) and `lm_head_multiplier` (Falcon-H1)
    multiply, `logits_scaling` divides (Granite) or multiplies (HyperCLOVA X), and
    `final_logit_softcapping` (Gemma) caps.

    Raises UserError while adapters are on in the head itself: they are no part of its weight.
    """
    layer, config = model.get_output_embeddings(), text_config(model)
    if hasattr(layer, "base_layer") and not (layer.disable_adapters or layer.merged):
        raise UserError(
            "the language-model head has LoRA adapters of its own, which are not supported; leave"
            " it out of target_modules, train it whole (modules_to_save), or merge the adapters"
        )
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = next((x for name in names if (x := getattr(config, name, None)) is not None), 1.0)
    if divisor := getattr(config, "logits_scaling", None):
        scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    return Head(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=float(scale),
    )


def hidden_states(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The last hidden states [B, S, D] (after the final norm) of `input_ids` [B, S].

    `attention_mask` [B, S] is 1 on real tokens; `position_ids` [B, S]. Right-padded rows need
    neither: attention is causal. Gradients flow; no logits are computed.
    """
    output = decoder(model)(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
    )
    states: Tensor = output.last_hidden_state
    return states


def decoder(model: Any) -> Any:
    """The module below the head: takes token ids, returns `last_hidden_state`."""
    if hasattr(model, "get_base_model"):  # a PEFT wrapper; its adapters live inside the modules
        model = model.get_base_model()
    # Llama 4's text model is called `model`, not what its prefix says.
    return model.model if model.base_model is model else model.base_model
