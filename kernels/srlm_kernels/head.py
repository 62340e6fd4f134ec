"""An LM head and the sums of its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """[V, D] weight and [V] bias."""

    weight: Tensor
    bias: Tensor | None = None

    def rows(self, lo: int, hi: int, dtype: torch.dtype) -> Tensor:
        return self.weight[lo:hi].to(dtype)

    def bias_of(self, lo: int, hi: int) -> Tensor | None:
        return None if self.bias is None else self.bias[lo:hi].contiguous()


def shared_or_own(policy: Head, weight: Tensor | None, bias: Tensor | None) -> Head:
    """The reference's head: without a weight of its own the policy's, with its bias or its own."""
    if weight is not None:
        return Head(weight, bias)
    return Head(policy.weight, policy.bias if bias is None else bias)


@dataclass
class Grads:
    """Gradients of a head summed over chunks, fp32 or fp64; None: not wanted."""

    weight: Tensor | None
    bias: Tensor | None
    empty: bool = True
    """Nothing was added to `weight` yet, which holds whatever the memory held."""

    @classmethod
    def of(cls, head: Head, dtype: torch.dtype, *, weight: bool, bias: bool) -> Grads:
        w, b = head.weight, head.bias
        return cls(
            torch.empty(w.shape, dtype=dtype, device=w.device) if weight else None,
            torch.zeros(b.shape, dtype=dtype, device=b.device) if bias and b is not None else None,
        )

    def another(self) -> Grads:
        """An empty one that wants the same."""
        w, b = self.weight, self.bias
        return Grads(
            None if w is None else torch.empty_like(w), None if b is None else torch.zeros_like(b)
        )

    def add(self, other: Grads, factor: Tensor) -> None:
        """self += factor * other; `factor` is 0-d."""
        if self.weight is not None and other.weight is not None and not other.empty:
            if self.empty:
                torch.mul(other.weight, factor, out=self.weight)
            else:
                self.weight.addcmul_(other.weight, factor)
            self.empty = False
        if self.bias is not None and other.bias is not None:
            self.bias.addcmul_(other.bias, factor)

    def total(self) -> Tensor | None:
        """The gradient of the weight."""
        if self.weight is not None and self.empty:
            self.weight.zero_()
            self.empty = False
        return self.weight
