"""The optimiser step: AdamW, schedule, clipping, and the non-finite policy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from srlm_fast.config import TrainConfig
from srlm_fast.errors import UserError
from srlm_fast.parallel import ALONE, Ranks
from srlm_fast.train import low_bit
from srlm_fast.train.sharded import own_share
from srlm_kernels.distributed import is_sharded

MAX_STREAK = 5


def lr_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Multiple of the learning rate at `step` (from 0) of `steps`.

    A linear warm-up over ceil(warmup_ratio * steps) steps, whose first step already moves, then a
    decay from 1 towards `min_lr_ratio`, which it would reach at `step == steps` (as transformers').
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.lr_scheduler_type]
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape


class Optimizer:
    """AdamW over the trainable parameters of `model`; nothing in a step waits for the device, but
    with 8-bit moments whether it is to be taken.

    16-bit parameters have fp32 masters, into which gradients accumulate too: an update of 1e-6 is
    below the resolution of a bf16 weight and would be lost. With `bf16_stochastic_rounding` bf16
    matrices with 8-bit moments have none: weights are right on average, and `seed` decides how they
    are rounded. Vectors (norms, biases) do not decay. A step whose loss or gradient is not finite
    changes nothing and is counted.

    Each of several `ranks` has the same weights, and gradients of its own items; after `reduce` all
    have the same gradients, and so take the same step. Where weights are sharded, each rank steps
    its share, whose gradients come summed; norm, clipping and skipping are those of the whole.

    Raises UserError where the configuration's optimiser cannot be had, or nothing is to be rounded.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, ranks: Ranks = ALONE, seed: int = 0
    ) -> None:
        self._ranks, self._seed = ranks, seed
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._names, self.params = [name for name, _ in named], [p for _, p in named]
        if not self.params:
            raise ValueError("the model has no trainable parameters")
        self.masters = [_master(p, config) for p in self.params]
        pairs = zip(self.params, self.masters, strict=True)
        self._apart = [(p, m) for p, m in pairs if p is not m]
        self._config = config
        # A rank's share may have nothing to round where another's has.
        is_rounded = any(_is_rounded(master) for master in self.masters)
        if config.bf16_stochastic_rounding and not ranks.any(is_rounded):
            is_bf16 = any(p.dtype == torch.bfloat16 for p in self.params)
            raise UserError(
                "bf16_stochastic_rounding is for bf16 matrices of 4096 numbers or more, each or its"
                " share on a process, and none are trained here; leave it off"
                + ("" if is_bf16 else ", or set dtype to bfloat16")
            )
        self._adamw = _adamw(self.masters, config)
        self._fused = bool(self._adamw.defaults.get("fused"))
        zero = torch.zeros((), device=self.params[0].device)
        self._streak, self._worst, self.skipped = zero, zero.clone(), zero.clone()

    def collect(self) -> None:
        """Takes the gradients of one backward; call it after each micro-batch."""
        for param, master in self._apart:
            if param.grad is None:
                continue
            grad = own_share(param.grad)
            if master.grad is None:
                master.grad = grad.to(torch.promote_types(master.dtype, torch.float32))
            else:
                master.grad += grad
            param.grad = None

    def discard(self) -> None:
        """Forgets the gradients collected since the last step."""
        for tensor in (*self.params, *self.masters):
            tensor.grad = None

    def reduce(self, loss: Tensor) -> None:
        """Sums the collected gradients and `loss` (0-d) over the ranks, in place, before a step."""
        if self._ranks.sharded:
            self._ranks.sum_([loss])
            return
        # What no rank has a gradient for stays without: the optimiser leaves it as it is.
        wanted = self._ranks.any_of_each([m.grad is not None for m in self.masters])
        masters = [m for m, is_wanted in zip(self.masters, wanted, strict=True) if is_wanted]
        for master in masters:
            if master.grad is None:
                dtype = torch.promote_types(master.dtype, torch.float32)
                master.grad = torch.zeros_like(master, dtype=dtype)
        self._ranks.sum_([loss, *(m.grad for m in masters if m.grad is not None)])

    @torch.no_grad()
    def step(self, loss: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """One update at learning_rate * factor from the collected gradients, which are cleared.

        Returns the gradient norm before clipping and whether the step was taken, both 0-d on the
        device. `loss` (0-d) is only looked at for being finite.
        """
        norm = nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None])
        if self._ranks.sharded:
            square = norm.double().square()
            self._ranks.sum_([square])
            norm = square.sqrt().to(norm.dtype)
        if self._config.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.masters, self._config.max_grad_norm, norm)
        taken = norm.isfinite() & loss.isfinite()
        self._set_rate(self._config.learning_rate * factor)
        if self._fused:
            self._adamw.found_inf = (~taken).float()
            self._adamw.step()
        elif bool(taken):
            if self._config.optim == "adamw_torch_8bit":
                low_bit.update(self._adamw, self._seed)
            else:
                self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._copy_to_params()
        skipped = (~taken).float()
        self.skipped = self.skipped + skipped
        self._streak = (self._streak + 1) * skipped
        self._worst = torch.maximum(self._worst, self._streak)
        return norm, taken

    def _set_rate(self, rate: float) -> None:
        for group in self._adamw.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _copy_to_params(self) -> None:
        for param, master in self._apart:
            if param.dtype != master.dtype:  # or else it is the same memory
                own_share(param).copy_(master)

    def state(self) -> dict[str, Tensor]:
        """All that steps change, by what it is and the parameter's name; not copied. Of sharded
        weights it is this rank's share. Not for 8-bit moments."""
        found = {"skipped": self.skipped, "streak": self._streak, "worst": self._worst}
        for name, master in zip(self._names, self.masters, strict=True):
            found[f"weight/{name}"] = master.detach()
            for kind, value in self._adamw.state.get(master, {}).items():
                found[f"{kind}/{name}"] = value
        return found

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state` gave, weights of the model included; `state` is neither changed nor
        kept, since it may map a file."""
        moments: dict[str, dict[str, Tensor]] = {}
        on_cpu = self.masters[0].device.type == "cpu"  # elsewhere it is copied to the device
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if name and kind != "weight":
                moments.setdefault(name, {})[kind] = value.clone() if on_cpu else value
        name_of = {}
        for name, master in zip(self._names, self.masters, strict=True):
            master.copy_(state[f"weight/{name}"])
            name_of[master] = name
        self._copy_to_params()
        groups = self._adamw.state_dict()["param_groups"]
        order = [name_of[p] for group in self._adamw.param_groups for p in group["params"]]
        numbered = {i: moments[name] for i, name in enumerate(order) if name in moments}
        self._adamw.load_state_dict({"state": numbered, "param_groups": groups})
        self.skipped, self._streak, self._worst = (
            state[name].to(self.skipped.device, copy=True)
            for name in ("skipped", "streak", "worst")
        )

    def check(self) -> None:
        """Waits for the device; raises UserError if MAX_STREAK steps in a row were not finite."""
        if float(self._worst) >= MAX_STREAK:
            raise UserError(
                f"training diverged: {MAX_STREAK} steps in a row had a loss or gradient that is "
                f"not finite; lower learning_rate (now {self._config.learning_rate:g})"
            )


def _master(param: Tensor, config: TrainConfig) -> Tensor:
    """What the optimiser changes for `param`: itself, its memory, or an fp32 copy."""
    if param.element_size() >= 4:
        return own_share(param) if is_sharded(param) else param
    share = own_share(param)
    if not (config.bf16_stochastic_rounding and low_bit.rounds(share)):
        return share.float()
    share.grad_dtype = torch.float32
    return share


def _is_rounded(master: Tensor) -> bool:
    return master.dtype == torch.bfloat16


def _adamw(params: list[Tensor], config: TrainConfig) -> Any:
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optim == "adamw_torch_8bit":
        return low_bit.adamw_8bit(groups, config)
    settings = {"lr": config.learning_rate, "betas": (config.adam_beta1, config.adam_beta2)}
    try:
        return torch.optim.AdamW(groups, fused=True, **settings)  # type: ignore[arg-type]
    except RuntimeError:  # the device has no fused kernel
        return torch.optim.AdamW(groups, foreach=True, **settings)  # type: ignore[arg-type]
