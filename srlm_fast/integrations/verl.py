"""verl: one more backend of its fused kernels, chosen in its configuration.

    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.fused_kernel_options.impl_backend=srlm_fast

verl imports this module by itself where srlm_fast is installed (entry points `verl.plugins`), and
until the configuration names the backend nothing is different.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from verl.models.transformers import monkey_patch
from verl.utils.experimental import torch_functional

from srlm_fast.errors import UserError
from srlm_fast.integrations.entropy import linear_logp_with_entropy

NAME = "srlm_fast"


def log_probs_and_entropy(
    hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What verl's `FusedLinearForPPO` returns: log-probs in fp32 and entropies, like `input_ids`.

    hidden_states: [..., D], each of which predicts the token of `input_ids` [...] at its place;
    vocab_weights: [V, D]. Gradients flow from both results.
    """
    found = linear_logp_with_entropy(
        hidden_states.flatten(0, -2), vocab_weights, input_ids.long().flatten(),
        temperature=temperature, outputs=["entropy"],
    )  # fmt: skip
    assert found.entropy is not None
    entropy = found.entropy.to(hidden_states.dtype)
    return found.logp.view(input_ids.shape), entropy.view(input_ids.shape)


def _register() -> None:
    """Has verl know the backend. Raises UserError for a verl whose fused kernels have no choice."""
    theirs, choose = torch_functional.FusedLinearForPPO, monkey_patch.patch_forward_with_backends
    if "impl_backend" not in inspect.signature(theirs).parameters:
        raise UserError("srlm_fast's backend needs verl 0.9: pip install 'verl>=0.9.1'")

    class FusedLinearForPPO(theirs):  # type: ignore[misc, valid-type]
        def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
            super().__init__(chunk_size, "torch" if impl_backend == NAME else impl_backend)
            self.impl_backend = impl_backend

        def forward(
            self,
            hidden_states: Tensor,
            vocab_weights: Tensor,
            input_ids: Tensor,
            temperature: float = 1.0,
        ) -> tuple[Tensor, Tensor]:
            run: Any = log_probs_and_entropy if self.impl_backend == NAME else super().forward
            found: tuple[Tensor, Tensor] = run(hidden_states, vocab_weights, input_ids, temperature)
            return found

    def patch_forward_with_backends(
        model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        # verl's forward for its torch backend, of whatever family, asks the model for the backend.
        ours = fused_kernels_backend == NAME
        choose(model, use_fused_kernels, "torch" if ours else fused_kernels_backend)
        if ours and use_fused_kernels:
            model._verl_fused_kernels_backend = NAME

    torch_functional.FusedLinearForPPO = FusedLinearForPPO
    monkey_patch.patch_forward_with_backends = patch_forward_with_backends


# At import, since an entry point is loaded and not called.
_register()
