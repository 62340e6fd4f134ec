"""Triton where it is installed, and the arithmetic that its kernels here share."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = [
    "EXACT",
    "INTERPRETED",
    "constant",
    "dense",
    "extrapolated",
    "final_logit",
    "jit",
    "tanh",
    "target_arch",
    "tl",
    "transform_factors",
    "triton",
]

try:
    import triton
    import triton.language as tl
except Exception:  # a broken installation raises more than ImportError
    triton = tl = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)

# Launch option of every kernel. Left alone, the compiler may fuse a product with a sum in one
# stream and not in the other, and equal models would no longer give equal bits. Where a kernel
# wants a fused multiply-add it says so.
EXACT = {"enable_fp_fusion": False}


def jit(kernel: Callable[..., Any], **options: Any) -> Any:
    """`triton.jit`; without Triton the function itself, which nobody can call."""
    return kernel if triton is None else triton.jit(kernel, **options)


def constant(value: Any) -> Any:
    """A module-level number that kernels may use."""
    return value if triton is None else tl.constexpr(value)


def dense(vector: Tensor | None) -> Tensor | None:
    """The vector without gaps between its elements, as every kernel reads it."""
    return None if vector is None else vector.contiguous()


def target_arch() -> int:
    """Compute capability of the current CUDA device, 90 for sm_90; 90 under the interpreter."""
    return 90 if INTERPRETED else int(triton.runtime.driver.active.get_current_target().arch)


def transform_factors(
    softcap: float | None, logit_scale: float, temperature: float
) -> tuple[float, float]:
    """(inner, outer) of `final_logit`: softcap(logit_scale * x) / temperature."""
    if softcap is None:
        return logit_scale / temperature, 1.0
    return logit_scale / softcap, softcap / temperature


@jit
def final_logit(x, inner, outer, CAPPED: tl.constexpr):
    """x * inner, or outer * tanh(x * inner)."""
    z = x * inner
    if CAPPED:
        z = outer * tanh(z)
    return z


@jit
def extrapolated(z, z_ref, strength):
    """(1+l) z - l z_ref, `z` itself where the two are equal; -inf where either is."""
    # -inf in z alone comes out as -inf by itself.
    return tl.where(z_ref == -float("inf"), z_ref, tl.fma(strength, z - z_ref, z))


@jit
def tanh(x):
    """fp32, to a few units in the last place; the hardware's is good to 5e-4 only."""
    # Near 0 the exponential's rounding is all that is left of 1 - 2 / (e^2x + 1): there a minimax
    # polynomial of (tanh(x) / x - 1) / x^2 on [0, 0.6], off by 3e-9.
    t = x * x
    p = tl.fma(t, -0.00589515765, 0.0207959713)
    p = tl.fma(t, p, -0.0537838302)
    p = tl.fma(t, p, 0.133319241)
    p = tl.fma(t, p, -0.33333298)
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.6, tl.fma(x * t, p, x), tl.where(x < 0, -far, far))
