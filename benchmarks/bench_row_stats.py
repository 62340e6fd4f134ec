"""Three log-sum-exps and the targets' logits from a block of policy and reference logits.

python -m benchmarks --suite cpu --only row_stats
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Call, Case, Outputs, Unavailable, Variant, Work
from srlm_kernels import row_stats as op

STRENGTH = 0.5
SHAPES = {"smoke": (8, 61, "cpu"), "cpu": (512, 32000, "cpu"), "gpu": (4096, 128256, "cuda")}
IMPLEMENTATIONS = {"cpu": ("torch", "cpp"), "cuda": ("torch", "triton")}


@dataclass
class Blocks:
    """Policy and reference logits [N, C] and a target per row."""

    logits: Tensor
    ref_logits: Tensor
    target: Tensor


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
            op="row_stats",
            name=f"[{rows}, {columns}], {name}",
            params={"rows": rows, "columns": columns, "dtype": name, "device": device},
            make_inputs=partial(_blocks, rows, columns, dtype, device),
            variants={**peers, **ours},
            oracle=lambda blocks, _: _three_streams(
                blocks.logits.double(), blocks.ref_logits.double(), blocks.target
            ),
            tolerance=1e-4,
            work=Work(0.0, 2.0 * rows * columns * dtype.itemsize, (64, 64, 64)),
            baselines=("torch", "torch, compiled"),
        )


def _blocks(rows: int, columns: int, dtype: torch.dtype, device: str) -> Blocks:
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, rows, columns, generator=generator, device=device)
    target = torch.arange(rows, device=device) * 7919 % columns
    return Blocks((3 * draw()).to(dtype), (3 * draw()).to(dtype), target)


def _three_streams(logits: Tensor, ref_logits: Tensor, target: Tensor) -> Outputs:
    z, z_ref = (x if x.dtype == torch.float64 else x.float() for x in (logits, ref_logits))
    mixed = (1 + STRENGTH) * z - STRENGTH * z_ref
    index = target[:, None]
    return {
        "lse": torch.stack([x.logsumexp(1) for x in (z, z_ref, mixed)]),
        "targets": torch.stack([x.gather(1, index)[:, 0] for x in (z, z_ref)]),
    }


def _plain(compiled: Callable[..., Callable[..., Outputs]], blocks: Blocks) -> Call:
    run = compiled(_three_streams)
    return lambda: run(blocks.logits, blocks.ref_logits, blocks.target)


def _ours(impl: str, blocks: Blocks) -> Call:
    from srlm_kernels.backends import refusal

    if reason := refusal(impl, blocks.logits):
        raise Unavailable(reason)

    def call() -> Outputs:
        rows, device = blocks.logits.shape[0], blocks.logits.device
        state = op.new_state(rows, dtype=torch.float32, device=device)
        op.row_stats(
            state, blocks.logits, blocks.target, ref_logits=blocks.ref_logits,
            extrapolation=STRENGTH, impl=impl,
        )  # fmt: skip
        lse = state[[op.POLICY_MAX, op.REF_MAX, op.EXT_MAX]]
        lse = lse + state[[op.POLICY_SUM, op.REF_SUM, op.EXT_SUM]].log()
        return {"lse": lse, "targets": state[[op.TARGET, op.REF_TARGET]]}

    return call
