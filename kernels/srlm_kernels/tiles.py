"""One chunk of rows against the vocabulary, tile by tile: a GEMM, the row kernel, the next tile.

A tile of logits is still in the cache when the row kernel reads it, and the reference's logits
never outlive their tile. Policy and reference go through the same calls on the same shapes, so
equal models give equal bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from srlm_kernels.backends import row_kernel
from srlm_kernels.head import Grads, Head
from srlm_kernels.logits_grad import narrowed
from srlm_kernels.products import add_product, operand_dtype, product
from srlm_kernels.row_stats import new_state


@dataclass(frozen=True)
class Transform:
    """Final logits = softcap(logit_scale * (h W^T + bias)) / temperature."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0


def tile_width(logits_dtype: torch.dtype, device: torch.device) -> int:
    """Columns per tile: on a CPU few enough for the cache, on a GPU enough for the GEMM's speed."""
    return 8192 // logits_dtype.itemsize if device.type == "cpu" else 32768


def tile_bounds(columns: int, width: int) -> list[tuple[int, int]]:
    """Tiles of nearly equal width, about `width` at most, that start at multiples of 32."""
    count = -(-columns // width)
    width = min(_stride(-(-columns // max(count, 1))), columns) or 1
    return [(lo, min(lo + width, columns)) for lo in range(0, columns, width)]


class VocabTiles:
    """Buffers and options of all chunks of one call; a chunk has at most `rows` rows.

    `keep`: the policy's logits of a whole chunk have room, so that `backward` finds what `score`
    left there. Otherwise only a tile has.
    """

    def __init__(
        self,
        policy: Head,
        reference: Head | None,
        hidden: Tensor,
        *,
        rows: int,
        keep: bool,
        transform: Transform,
        extrapolation: float | None,
        outputs: Collection[str],
        logits_dtype: torch.dtype,
    ) -> None:
        self.policy, self.reference = policy, reference
        self.transform = dataclasses.asdict(transform)
        self.extrapolation, self.outputs, self.keep = extrapolation or None, outputs, keep
        self.dtype = operand_dtype(hidden, policy.weight, logits_dtype)
        self.stats_dtype = torch.promote_types(logits_dtype, torch.float32)
        narrow = self.dtype.itemsize <= logits_dtype.itemsize
        self.grad_dtype = self.dtype if narrow else logits_dtype
        columns = policy.weight.shape[0]
        self.bounds = tile_bounds(columns, tile_width(logits_dtype, hidden.device))
        width = _stride(self.bounds[0][1]) if self.bounds else 0
        options = {"dtype": logits_dtype, "device": hidden.device}
        self.buffer = torch.empty(rows * (_stride(columns) if keep else width), **options)  # type: ignore[call-overload]
        self.scratch = torch.empty(0 if reference is None else rows * width, **options)  # type: ignore[call-overload]
        self.row_stats = row_kernel("row_stats", "auto", self.buffer)
        self.logits_grad = row_kernel("logits_grad", "auto", self.buffer)

    def score(self, x: Tensor, x_ref: Tensor | None, target: Tensor) -> Tensor:
        """The state (see `row_stats`) of rows x [n, D] and x_ref [n, D'] over the vocabulary."""
        rows, device = x.shape[0], self.buffer.device
        state = new_state(rows, outputs=self.outputs, dtype=self.stats_dtype, device=device)
        for lo, hi in self.bounds if rows else ():
            logits = _logits(self.policy, x, lo, hi, self._tile(rows, lo, hi))
            ref_logits = ref_bias = None
            if self.reference is not None and x_ref is not None:
                scratch = _block(self.scratch, 0, rows, hi - lo)
                ref_logits = _logits(self.reference, x_ref, lo, hi, scratch)
                ref_bias = self.reference.bias_of(lo, hi)
            self.row_stats(
                state, logits, target, ref_logits=ref_logits, bias=self.policy.bias_of(lo, hi),
                ref_bias=ref_bias, first_column=lo, extrapolation=self.extrapolation,
                **self.transform,
            )  # fmt: skip
        return state

    def backward(
        self,
        x: Tensor,
        target: Tensor,
        lse: Tensor,
        upstream: Tensor,
        *,
        recompute: bool,
        grad_x: Tensor | None,
        grads: Grads,
    ) -> None:
        """Gradients of sum(upstream * logp) for rows x: grad_x [n, D] is set, `grads` added to.

        The logits are those of the last `score`, which must have had the same rows, or computed
        again by the same calls, hence the same bits that `lse` is of. They are destroyed.
        """
        x = x.to(self.dtype)
        rows = x.shape[0]
        for lo, hi in self.bounds if rows else ():
            logits = self._tile(rows, lo, hi)
            if recompute:
                _logits(self.policy, x, lo, hi, logits)
            self.logits_grad(
                logits, target, lse, upstream, bias=self.policy.bias_of(lo, hi), first_column=lo,
                grad_dtype=self.grad_dtype, **self.transform,
            )  # fmt: skip
            dz = narrowed(logits, self.grad_dtype).to(self.dtype)
            if grad_x is not None:
                add_product(grad_x, dz, self.policy.rows(lo, hi, self.dtype), first=lo == 0)
            if grads.weight is not None:
                add_product(grads.weight[lo:hi], dz.T, x, first=grads.empty)
            if grads.bias is not None:
                grads.bias[lo:hi] += dz.sum(0, dtype=grads.bias.dtype)
        grads.empty = grads.empty and not rows

    def _tile(self, rows: int, lo: int, hi: int) -> Tensor:
        return _block(self.buffer, rows * lo if self.keep else 0, rows, hi - lo)


def _logits(head: Head, x: Tensor, lo: int, hi: int, out: Tensor) -> Tensor:
    dtype = operand_dtype(x, head.weight, out.dtype)
    return product(x.to(dtype), head.rows(lo, hi, dtype).T, out)


def _stride(columns: int) -> int:
    """Elements from row to row: a multiple of 32, as fast GEMMs want it."""
    return -(-columns // 32) * 32


def _block(memory: Tensor, start: int, rows: int, columns: int) -> Tensor:
    stride = _stride(columns)
    block = memory[start : start + rows * stride].view(rows, stride)
    if stride > columns:
        # The CPU's bf16 GEMM reads on to a multiple of 32 columns and multiplies what it finds by
        # zero, which NaN survives: another row's, if the stride were any smaller.
        block[:, columns:] = 0
    return block[:, :columns]
