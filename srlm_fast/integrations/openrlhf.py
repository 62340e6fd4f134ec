"""OpenRLHF: its scripts with our head, started through this module.

    python -m srlm_fast.integrations.openrlhf openrlhf.cli.train_dpo --model.model_name_or_path ...
    deepspeed --module srlm_fast.integrations.openrlhf openrlhf.cli.train_dpo ...

OpenRLHF has no plugins. Its `Actor.forward` takes logits from the model, and log-probabilities and
entropies from them; `patch_actor` has the model hand out logits that are not formed (`Logits`), and
computes both from the hidden states. Nothing else of OpenRLHF changes.
"""

from __future__ import annotations

import functools
import inspect
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from srlm_fast.errors import UserError
from srlm_fast.integrations.entropy import linear_logp_with_entropy
from srlm_fast.model.forward import Head, decoder, lm_head
from srlm_kernels import LinearLogp


class Logits:
    """The logits of `hidden` [B, S, D] under `head`, to be asked for what depends on them.

    Like the tensor in whose place they stand they can be cast and scaled; they are fp32 anyway.
    """

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self.hidden, self.head, self.temperature = hidden, head, 1.0

    def to(self, *_: Any, **__: Any) -> Logits:
        return self

    def div_(self, temperature: float) -> Logits:
        self.temperature *= temperature
        return self

    def log_probs(self, labels: Tensor) -> Tensor:
        """[B, S] fp32 of `labels` [B, S]."""
        return self._score(labels).logp.view(labels.shape)

    def entropy(self) -> Tensor:
        """[B, S] fp32, nats; a pass over the vocabulary of its own."""
        shape = self.hidden.shape[:-1]
        nobody = torch.zeros(shape, dtype=torch.int64, device=self.hidden.device)
        found = self._score(nobody, "entropy").entropy
        assert found is not None
        return found.view(shape)

    def _score(self, labels: Tensor, *outputs: str) -> LinearLogp:
        head = self.head
        return linear_logp_with_entropy(
            self.hidden.flatten(0, -2), head.weight, labels.flatten(), bias=head.bias,
            softcap=head.softcap, logit_scale=head.logit_scale, temperature=self.temperature,
            outputs=outputs,
        )  # fmt: skip


def patch_actor() -> None:
    """Has OpenRLHF's Actor compute log-probabilities and entropies without logits, process-wide.

    Calls that return logits, images, and models with a router loss stay OpenRLHF's own.
    """
    from openrlhf.models import actor

    theirs = actor.Actor.forward
    if hasattr(theirs, "__wrapped__"):
        return
    names = inspect.signature(theirs)

    @functools.wraps(theirs)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = names.bind(self, *args, **kwargs).arguments
        if given.get("action_mask") is None and not given.get("return_logprobs"):
            return theirs(self, *args, **kwargs)
        model = _plain(self.model)
        config = model.config.get_text_config()
        if getattr(self, "is_vlm", False) or getattr(config, "output_router_logits", False):
            return theirs(self, *args, **kwargs)
        with _without_logits(model):
            return theirs(self, *args, **kwargs)

    log_probs_of, entropy_of = actor.log_probs_from_logits, actor.compute_entropy

    def log_probs_from_logits(logits: Any, labels: Tensor, temperature: float = 1.0) -> Any:
        if isinstance(logits, Logits):
            return logits.div_(temperature).log_probs(labels)
        return log_probs_of(logits, labels, temperature)

    def compute_entropy(logits: Any) -> Any:
        return logits.entropy() if isinstance(logits, Logits) else entropy_of(logits)

    actor.Actor.forward = forward
    actor.log_probs_from_logits = log_probs_from_logits
    actor.compute_entropy = compute_entropy


def _plain(model: Any) -> Any:
    """The causal LM inside DeepSpeed's engine and PEFT's wrapper."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def _without_logits(model: Any) -> Iterator[None]:
    """Inside, a forward of `model` ends at the hidden states; wrappers of it run as always."""

    def forward(*args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        states = decoder(model)(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        logits: Any = Logits(states, lm_head(model))
        return CausalLMOutputWithPast(logits=logits)

    had = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if had is None:
            del model.forward
        else:
            model.forward = had


def main() -> None:
    """Runs the module that the first argument names, with the patch."""
    if len(sys.argv) < 2:
        raise UserError(
            "name the OpenRLHF script to run: python -m srlm_fast.integrations.openrlhf "
            "openrlhf.cli.train_dpo ..."
        )
    if find_spec("openrlhf") is None:
        raise UserError("OpenRLHF is not installed: pip install openrlhf")
    patch_actor()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
