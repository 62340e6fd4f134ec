"""`sample` in C++ for the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from srlm_kernels import native
from srlm_kernels.sample import Draw, SampleParams


def sample_cpp(
    logits: Tensor,
    seed: Tensor,
    step: Tensor,
    params: SampleParams,
    *,
    bias: Tensor | None = None,
    seen: Tensor | None = None,
    is_stop: Tensor | None = None,
) -> Draw:
    """`sample_ref` for fp32 or bf16 `logits` [R, V] on the CPU.

    A row is drawn by one thread, so that it is the same, bit for bit, on any number of threads and
    beside any other rows.

    Raises:
        RuntimeError: no library (`native.why` says why), or tensors that do not fit together.
    """
    native.require()
    rows = logits.shape[0]
    token = torch.empty(rows, dtype=torch.int64)
    numbers = torch.empty(3, rows, dtype=torch.float32)
    stopped = torch.empty(rows, dtype=torch.bool)
    torch.ops.srlm_kernels_c.sample.default(
        token, numbers, stopped, logits, seed, step, *params, bias, seen, is_stop
    )
    logprob, sample_logprob, kept_mass = numbers.unbind()
    return Draw(token, logprob, sample_logprob, kept_mass, stopped)
