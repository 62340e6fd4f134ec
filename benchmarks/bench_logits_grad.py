"""Gradients of target log-probabilities in a block of logits.

python -m benchmarks --suite cpu --only logits_grad

Ours writes over the logits, so that every call but the first works on earlier gradients; what it
does depends on no value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench_row_stats import IMPLEMENTATIONS, SHAPES
from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, Work
from srlm_kernels.logits_grad import logits_grad


@dataclass
class Block:
    """Logits [N, C]; per row the target, the log-sum-exp and the upstream gradient."""

    logits: Tensor
    target: Tensor
    lse: Tensor
    upstream: Tensor


def cases(suite: str) -> Iterator[Case]:
    rows, columns, device = SHAPES[suite]
    for name in ("float32", "bfloat16"):
        dtype: torch.dtype = getattr(torch, name)
        ours = {f"ours, {i}": Variant(partial(_ours, i)) for i in IMPLEMENTATIONS[device]}
        peers = {
            "torch": Variant(partial(_plain, lambda f: f)),
            "torch, compiled": Variant(partial(_plain, torch.compile), compiles=True),
        }
        yield Case(
            op="logits_grad",
            name=f"[{rows}, {columns}], {name}",
            params={"rows": rows, "columns": columns, "dtype": name, "device": device},
            make_inputs=partial(_block, rows, columns, dtype, device),
            variants={**peers, **ours},
            oracle=lambda b, _: _gradient(b.logits.double(), b.target, b.lse, b.upstream),
            tolerance=1e-5 if name == "float32" else 1e-2,
            work=Work(0.0, 2.0 * rows * columns * dtype.itemsize, (64, 64, 64)),
            baselines=("torch", "torch, compiled"),
        )


def _block(rows: int, columns: int, dtype: torch.dtype, device: str) -> Block:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    logits = (3 * draw(rows, columns)).to(dtype)
    target = torch.arange(rows, device=device) * 7919 % columns
    return Block(logits, target, logits.float().logsumexp(1), draw(rows))


def _gradient(logits: Tensor, target: Tensor, lse: Tensor, upstream: Tensor) -> Outputs:
    z = logits if logits.dtype == torch.float64 else logits.float()
    onehot = torch.arange(z.shape[1], device=z.device) == target[:, None]
    d = (onehot.to(z.dtype) - (z - lse[:, None]).exp()) * upstream[:, None]
    return {"grad": d.to(logits.dtype)}


def _plain(compiled: Callable[..., Callable[..., Outputs]], block: Block) -> Call:
    run = compiled(_gradient)
    return lambda: run(block.logits, block.target, block.lse, block.upstream)


def _ours(impl: str, block: Block) -> Call:
    from srlm_kernels.backends import refusal

    if reason := refusal(impl, block.logits):
        raise Unavailable(reason)
    logits = block.logits.clone()
    return lambda: {"grad": logits_grad(logits, block.target, block.lse, block.upstream, impl=impl)}
