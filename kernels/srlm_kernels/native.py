"""The kernels in C++ for the CPU: `srlm_kernels._C`, which an install may have or lack."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from srlm_kernels.logits_grad import narrowed

_OPS = (
    "row_stats", "logits_grad", "gemm", "sample", "kv_write", "tree_attention", "invariant_linear",
    "prefix_attention", "prefix_attention_backward", "rms_norm", "rms_norm_backward", "swiglu",
    "swiglu_backward", "rotary",
)  # fmt: skip


@functools.cache
def _load() -> tuple[bool, str]:
    """Whether the library is loaded, and `why`. The first call loads it."""
    found = sorted(Path(__file__).parent.glob("_C.*"))
    if not found:
        return False, "not built: install with SRLM_BUILD_EXT=1 to build it, or to see why it fails"
    try:
        torch.ops.load_library(found[0])  # type: ignore[no-untyped-call]
        for op in _OPS:  # they write to arguments and return nothing
            if hasattr(torch.ops.srlm_kernels_c, op):
                torch.library.register_fake(f"srlm_kernels_c::{op}", lambda *args: None)
    # One built for another torch fails as RuntimeError or AttributeError as often as OSError.
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        return False, f"{found[0].name} does not load: {type(error).__name__}: {reason}"
    return True, f"built: {found[0]}"


def has(op: str) -> bool:
    """Whether `op` can be called here: some ops are built for some CPUs only."""
    return available() and hasattr(torch.ops.srlm_kernels_c, op)


def available() -> bool:
    """Whether the C++ kernels can be called here."""
    return _load()[0]


def why() -> str:
    """The file of the library in use, or in one line why there is none."""
    return _load()[1]


def require() -> None:
    """Raises RuntimeError unless `available`."""
    if not available():
        raise RuntimeError(f"the C++ kernels cannot be used: {why()}")


def fp32(bias: Tensor | None) -> Tensor | None:
    """The vector as the C++ kernels take it: fp32, without gaps."""
    return None if bias is None else bias.to(torch.float32).contiguous()


def row_stats_cpp(
    state: Tensor,
    logits: Tensor,
    target: Tensor,
    *,
    ref_logits: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    first_column: int = 0,
    extrapolation: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> None:
    """`row_stats_ref` for fp32 or bf16 `logits` [N, C] on the CPU and fp32 `state` [8 or 11, N].

    Each logit is read once. A row is folded by one thread in a fixed order, so that equal policy
    and reference rows have equal statistics, bit for bit, on any number of threads.

    Raises:
        RuntimeError: no library (`why` says the reason), or tensors that do not fit together.
    """
    require()
    torch.ops.srlm_kernels_c.row_stats.default(
        state, logits, target, ref_logits, fp32(bias), fp32(ref_bias), first_column,
        extrapolation, softcap, logit_scale, temperature,
    )  # fmt: skip


def logits_grad_cpp(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    upstream: Tensor,
    *,
    bias: Tensor | None = None,
    first_column: int = 0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    grad_dtype: torch.dtype | None = None,
) -> Tensor:
    """`logits_grad_ref` for fp32 or bf16 `logits` [N, C] on the CPU, fp32 `lse` and `upstream` [N].

    `grad_dtype`: that of the logits, or bf16 for fp32 logits.

    Raises:
        RuntimeError: no library (`why` says the reason), or tensors that do not fit together.
        TypeError: another `grad_dtype`.
    """
    require()
    grad_dtype = grad_dtype or logits.dtype
    if grad_dtype not in (logits.dtype, torch.bfloat16):
        raise TypeError(
            f"the C++ row kernels write {logits.dtype} or bfloat16 here, not {grad_dtype}"
        )
    torch.ops.srlm_kernels_c.logits_grad.default(
        logits, target, lse, upstream, fp32(bias), first_column, softcap, logit_scale,
        temperature, grad_dtype != logits.dtype,
    )  # fmt: skip
    return narrowed(logits, grad_dtype)
