"""What this machine reaches at best in products and copies, measured in the run that uses it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.timing import synchronize, time_call

_COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
_REPEATS, _ENOUGH_SECONDS = 5, 3.0


@functools.cache
def gemm(
    m: int, k: int, n: int, dtype: torch.dtype, device: str, fp32_out: bool = False
) -> float | None:
    """FLOP/s of [m, k] @ [n, k].T into an existing buffer; None where torch.mm refuses."""
    # Uniform values: all-zero operands draw less power and so run faster on a GPU.
    a, b = (torch.rand(rows, k, device=device).to(dtype) for rows in (m, n))
    options: dict[str, Any] = {"out_dtype": torch.float32} if fp32_out else {}
    out = torch.empty(m, n, dtype=torch.float32 if fp32_out else dtype, device=device)
    try:
        return 2.0 * m * k * n / _fastest(lambda: torch.mm(a, b.T, out=out, **options), device)
    except (RuntimeError, TypeError, NotImplementedError):
        if not fp32_out:
            raise
        return None


@functools.cache
def copy(device: str) -> float:
    """Bytes/s of a copy between two buffers, read and written bytes both counted."""
    source = torch.zeros(_COPY_BYTES[device] // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() / _fastest(lambda: target.copy_(source), device)


def _fastest(call: Callable[[], Any], device: str) -> float:
    call()
    synchronize(device)
    times: list[float] = []
    while len(times) < _REPEATS and (len(times) < 2 or sum(times) < _ENOUGH_SECONDS):
        times.append(time_call(call, device)[0])
    return min(times)


def ceiling(case: Case) -> dict[str, Any]:
    """The least time of the case's work at the measured rates, and those rates.

    `seconds` is the longer of work / GEMM rate and bytes / copy rate; `bound` says which.
    """
    rate = gemm(*case.work.gemm, case.dtype, case.device)
    assert rate is not None
    bounds = {"gemm": case.work.flop / rate, "copy": case.work.bytes / copy(case.device)}
    bound = max(bounds, key=bounds.__getitem__)
    found: dict[str, Any] = {
        "seconds": bounds[bound],
        "bound": bound,
        "gemm": list(case.work.gemm),
        "gemm_flop_per_s": rate,
        "copy_bytes_per_s": copy(case.device),
    }
    if case.device == "cuda" and case.dtype != torch.float32:
        found["gemm_fp32_out_flop_per_s"] = gemm(*case.work.gemm, case.dtype, "cuda", True)
    return found
