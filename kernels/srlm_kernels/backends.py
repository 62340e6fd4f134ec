"""Which code runs a kernel on a device: torch everywhere, C++ on the CPU, Triton on CUDA."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SUFFIX = {"torch": "ref", "cpp": "cpp", "triton": "triton"}
_NATIVE = {
    "invariant_linear": "native_linear",
    "kv_write": "native_attention",
    "tree_attention": "native_attention",
    "sample": "native_sample",
}
# What an op lacks, and why.
_LACKS = {
    ("merge_states", "cpp"): "in C++ it is a part of tree_attention",
    ("invariant_linear", "triton"): "it is for CPUs",
    ("layers", "triton"): "on a GPU Liger has such kernels",
}


def best_backend(logits: Tensor) -> str:
    """What "auto" would take where `logits` is, if that can run."""
    return "triton" if logits.is_cuda else "cpp"


def row_backend(impl: str, logits: Tensor, op: str = "") -> str:
    """What `impl` of `op` stands for where `logits` is: torch, cpp or triton.

    Raises ValueError when a named implementation cannot run here.
    """
    if impl == "auto":
        best = best_backend(logits)
        return best if refusal(best, logits, op) is None else "torch"
    if impl not in _SUFFIX:
        raise ValueError(f"no kernels with impl={impl!r}; known: auto, {', '.join(_SUFFIX)}")
    if reason := refusal(impl, logits, op):
        raise ValueError(f"impl={impl!r} cannot run here: {reason}")
    return impl


def refusal(name: str, logits: Tensor, op: str = "") -> str | None:
    """Why the kernels called `name` cannot take `logits`, or have no `op`; None: they can."""
    if (op, name) in _LACKS:
        return _LACKS[op, name]
    if name == "torch":
        return None
    if logits.dtype == torch.float64:
        return "float64 is for impl='torch'"
    if name == "triton":
        from srlm_kernels.triton_support import INTERPRETED, triton

        if triton is None:
            return "triton is not installed"
        if not logits.is_cuda and not INTERPRETED:
            return f"Triton kernels run on CUDA, not on {logits.device.type}"
        return None
    from srlm_kernels import native

    if logits.device.type != "cpu":
        return f"the C++ kernels run on the CPU, not on {logits.device.type}"
    if logits.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernels take float32 and bfloat16, not {logits.dtype}"
    if not native.available():
        return native.why()
    if op == "invariant_linear" and not native.has(op):
        return "it was built without AVX-512, where a BLAS is faster"
    if op == "layers" and not native.has("rms_norm"):
        return "the C++ library is of before they were there; build it again"
    return None


@functools.cache
def _function(op: str, backend: str) -> Callable[..., Any]:
    module = {"torch": op, "cpp": _NATIVE.get(op, "native"), "triton": f"{op}_triton"}[backend]
    found: Callable[..., Any] = getattr(
        importlib.import_module(f"srlm_kernels.{module}"), f"{op}_{_SUFFIX[backend]}"
    )
    return found


def row_kernel(op: str, impl: str, logits: Tensor) -> Callable[..., Any]:
    """The function behind `op` ("row_stats", "kv_write" and so on) for `impl` and `logits`.

    Raises ValueError when a named implementation cannot run here.
    """
    return _function(op, row_backend(impl, logits, op))
