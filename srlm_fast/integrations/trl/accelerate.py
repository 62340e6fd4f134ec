"""Our head in the models of a trainer that exists already."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import trl.trainer.utils
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.integrations.entropy import linear_logp_with_entropy
from srlm_fast.integrations.trl.fused_head import OUTPUTS, Options, fused_output
from srlm_fast.integrations.trl.packed import Packed

Trainer = TypeVar("Trainer")


def accelerate(trainer: Trainer, *, packed: Callable[[], Packed | None] = lambda: None) -> Trainer:
    """Has the policy and the reference of a TRL trainer score tokens with `linear_logp`.

    Call it right after construction: `trainer = accelerate(DPOTrainer(...))`. For DPO, KTO, SFT,
    GRPO and RLOO; losses, metrics and everything else stay TRL's own code. Only these model
    instances change, and only in `fused_lm_head=True` calls. Calling it again changes nothing.
    packed: gives the batch of the call under way in packed form; `SrlmDPOTrainer` uses it.

    Returns `trainer`. Raises UserError for what is no trainer, for one without TRL's fused head,
    with torch_compile, and with DeepSpeed ZeRO-3.
    """
    owner: Any = trainer
    if not (hasattr(owner, "model") and hasattr(owner, "accelerator")):
        raise UserError(f"accelerate takes a trainer of TRL's, not a {type(trainer).__name__}")
    args = getattr(owner, "args", None)
    if getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", 0) == 3:
        raise UserError(
            "DeepSpeed ZeRO-3 keeps the head's rows elsewhere, and srlm_fast gathers none: "
            "use ZeRO-2 or FSDP2"
        )
    if getattr(args, "torch_compile", False):
        raise UserError(
            "srlm_fast's head is called by the model's forward, which torch_compile would compile: "
            "set torch_compile to False"
        )
    for model in (owner.model, getattr(owner, "ref_model", None)):
        if model is None:
            continue
        model = owner.accelerator.unwrap_model(model)
        # Not told by `peft_config`: a model with adapters of transformers' own has that too.
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        _patch(base, owner.accelerator, packed)
    return trainer


def _patch(model: Any, accelerator: Any, packed: Callable[[], Packed | None]) -> None:
    # accelerate has wrapped the reference's forward in autocast already, and will the policy's.
    theirs, prepared = model.forward, getattr(model, "_original_forward", None)
    if any(getattr(forward, "srlm_fast", False) for forward in (theirs, prepared)):
        return
    options = Options.of(prepared or theirs)
    region: Callable[[], AbstractContextManager[Any]] = (
        accelerator.autocast if prepared else nullcontext
    )

    # The signature is the model's own: `generate` checks its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        inside: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if inside is not None:  # `SrlmDPOTrainer`'s whole pass, within whatever wraps the model
            with region():
                return inside(self)
        if fused_lm_head:
            with region():
                return fused_output(
                    self, options, args, kwargs, labels, shift_labels, num_items_in_batch, packed()
                )
        given = {
            "labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch
        }  # fmt: skip
        return theirs(*args, **kwargs, **{k: v for k, v in given.items() if v is not None})

    forward.srlm_fast = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


@contextmanager
def patch_logprobs() -> Iterator[None]:
    """Inside, every TRL trainer scores tokens with `linear_logp`, existing ones included.

    It stands in for TRL's own kernel, process-wide, where a trainer cannot be had before it trains.
    On a CPU TRL scores prompts too then; `accelerate` does not. Not with DeepSpeed ZeRO-3.
    """
    with _LOCK:
        _BEFORE.append(trl.trainer.utils._ChunkedLogProbFunction)
        trl.trainer.utils._ChunkedLogProbFunction = _LogProbs
    try:
        yield
    finally:
        with _LOCK:
            trl.trainer.utils._ChunkedLogProbFunction = _BEFORE.pop()


# What each open block found. Threads may leave theirs in any order; the last one restores TRL's.
_BEFORE: list[Any] = []
_LOCK = threading.Lock()


class _LogProbs:
    """Has the signature and the results of TRL's `ChunkedLogProbFunction`."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        found = linear_logp_with_entropy(
            hidden, weight, targets, bias=bias, softcap=final_logit_softcapping,
            logit_scale=logit_scale, temperature=temperature,
            outputs=[ours for theirs, ours in OUTPUTS.items() if theirs in outputs],
        )  # fmt: skip
        return found.logp, found.entropy, found.log_sum_sq_probs, found.mean_logit, found.is_top1
