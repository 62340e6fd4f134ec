"""Peak memory of one call over what was there before it; outputs and gradients count.

python -m benchmarks.memory MODULE SUITE CASE VARIANT THREADS    # the child process of a CPU case
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import load_cases, one_line
from benchmarks.rows import ROOT

Peak = tuple[int | None, str | None]
"""Bytes, or None and the reason."""


def peak_on_gpu(call: Callable[[], Any]) -> Peak:
    """By PyTorch's allocator, after the call was warmed up. What others allocate is not seen."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - base, None


def peak_on_cpu(module: str, suite: str, case: str, variant: str, timeout: float | None) -> Peak:
    """By the kernel's high-water mark of a child process that does nothing else.

    Raises subprocess.TimeoutExpired after `timeout` seconds; the child is ended then.
    """
    words = [module, suite, case, variant, str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *words],
        # The child must find the very modules that this process found.
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True, text=True, check=False, timeout=timeout,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return None, f"the child process failed: {lines[-1][:300]}"
    peak, reason = json.loads(done.stdout.splitlines()[-1])
    return peak, reason


def measure_here(call: Callable[[], Any]) -> Peak:
    """High-water mark of one warmed-up call over the resident memory before it."""
    call()
    gc.collect()
    # Freed memory that the C library keeps would hide the same amount of the peak.
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the mark falls to the present size
    except OSError as error:
        return None, f"the kernel's high-water mark cannot be reset: {one_line(error)}"
    base = _status("VmRSS")
    call()
    return _status("VmHWM") - base, None


def _status(field: str) -> int:
    """A size in bytes from /proc/self/status, where it stands in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main() -> None:
    module, suite, name, variant, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case = next(c for c in load_cases(module, suite) if c.name == name)
    inputs = case.make_inputs()
    print(json.dumps(measure_here(case.variants[variant].build(inputs))))


if __name__ == "__main__":
    main()
