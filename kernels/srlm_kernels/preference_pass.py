"""One pass over packed pairs: a chunk holds whole pairs, so its slopes are known at once.

Per chunk: policy logits (kept) and reference logits, statistics, sums and `loss_fn`, then dLogits
over the logits, dX and dW: 4 units of 2 N D V FLOP, 3 without a reference, nothing computed twice.
Only a `coupled` loss, whose pairs wait for one another, computes the policy's logits again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from srlm_kernels.head import Grads
from srlm_kernels.pair_grad import PairGrad, pair_grad
from srlm_kernels.plan import Chunk, plan_pairs, slices
from srlm_kernels.problem import Problem, log_sum_exp


class PreferencePass:
    """One forward call: results per row and per pair, and the gradients if they are wanted."""

    def __init__(
        self,
        problem: Problem,
        cu_seqlens: Tensor,
        loss_fn: Callable[..., Tensor],
        *,
        pair: Mapping[str, Tensor],
        scale: float | Tensor,
        ref_sums: Tensor | None,
        grad_x: Tensor | None,
        grads: Grads | None,
    ) -> None:
        self.problem, self.loss_fn, self.pair, self.scale = problem, loss_fn, pair, scale
        self.ref_sums, self.grad_x, self.grads = ref_sums, grad_x, grads
        self.counts = problem.scored.counts
        self.offsets = problem.scored.offsets(cu_seqlens)
        self.host_offsets = self.offsets.tolist()
        ends = (self.host_offsets[0], self.host_offsets[-1])
        if ends != (0, problem.size) or self.host_offsets != sorted(self.host_offsets):
            raise ValueError("cu_seqlens must rise from 0 to the number of rows of target")
        self.offsets = self.offsets.to(problem.target.device, non_blocking=True)
        self.fields: list[dict[str, Tensor]] = []
        self.pairs: list[PairGrad] = []

    def run(self) -> None:
        if getattr(self.loss_fn, "coupled", False):
            self._all_pairs()
            return
        chunks = list(plan_pairs(self.host_offsets, self.problem.limit))
        longest = max((chunk.hi - chunk.lo for chunk in chunks), default=0)
        self.problem.allocate(rows=longest, keep=self.grads is not None)
        for chunk in chunks:
            if chunk.hi - chunk.lo <= self.problem.limit:
                self._whole_pairs(chunk)
            else:
                self._long_pair(chunk)

    def _whole_pairs(self, chunk: Chunk) -> None:
        lo, hi = chunk.lo, chunk.hi
        state = self.problem.score(lo, hi)
        found = self._losses(self._results(state, lo, hi), chunk)
        if self.grads is not None:
            slopes = self._per_row(found.slopes, chunk)
            self.problem.backward(
                lo, hi, log_sum_exp(state), slopes, grad_x=self.grad_x, grads=self.grads
            )

    def _long_pair(self, chunk: Chunk) -> None:
        """A pair with more rows than a chunk: its slopes are numbers that everything is scaled by.

        Gradients of the two summed log-probabilities are built unscaled, each for itself, or of
        their difference where the loss is antisymmetric and one slope serves both.
        """
        problem, one = self.problem, getattr(self.loss_fn, "antisymmetric", False)
        ends = self.host_offsets[2 * chunk.first : 2 * chunk.first + 3]
        sides: list[Grads] = []
        results = []
        for role, (start, stop) in enumerate(pairwise(ends)):
            if self.grads is not None and (role == 0 or not one):
                sides.append(self.grads.another())
            for lo, hi in slices(start, stop, problem.limit):
                state = problem.score(lo, hi)
                results.append(self._results(state, lo, hi))
                if sides:
                    sign = torch.full_like(state[0], -1.0 if one and role else 1.0)
                    sign = sign * self.counts[lo:hi]
                    lse = log_sum_exp(state)
                    problem.backward(lo, hi, lse, sign, grad_x=self.grad_x, grads=sides[-1])
        together = {name: torch.cat([r[name] for r in results]) for name in results[0]}
        slopes = self._losses(together, chunk).slopes
        if self.grads is None:
            return
        for slope, side in zip(slopes, sides, strict=False):
            self.grads.add(side, slope)
        if self.grad_x is not None:
            signs = slopes[0].expand(2) if one else slopes
            self.grad_x[chunk.lo : chunk.hi] *= self._per_row(signs, chunk)[:, None]

    def _all_pairs(self) -> None:
        problem = self.problem
        problem.allocate(rows=problem.size, keep=False)
        chunk = Chunk(0, problem.size, 0, len(self.host_offsets) // 2)
        state = problem.score_all()
        found = self._losses(self._results(state, 0, problem.size), chunk)
        if self.grads is not None:
            slopes = self._per_row(found.slopes, chunk)
            problem.backward_all(log_sum_exp(state), slopes, self.grad_x, self.grads)

    def _results(self, state: Tensor, lo: int, hi: int) -> dict[str, Tensor]:
        results = self.problem.results(state)
        results = {k: v.masked_fill(~self.counts[lo:hi], 0) for k, v in results.items()}
        self.fields.append(results)
        return results

    def _losses(self, rows: dict[str, Tensor], chunk: Chunk) -> PairGrad:
        part = slice(2 * chunk.first, 2 * chunk.last)
        found = pair_grad(
            rows["logp"],
            self.counts[chunk.lo : chunk.hi],
            self.offsets[2 * chunk.first : 2 * chunk.last + 1] - chunk.lo,
            self.loss_fn,
            scale=self.scale,
            pair={k: v[chunk.first : chunk.last] for k, v in self.pair.items()},
            ref_logp=rows.get("ref_logp"),
            extrapolated_logp=rows.get("extrapolated_logp"),
            ref_sums=None if self.ref_sums is None else self.ref_sums[part],
        )
        self.pairs.append(found)
        return found

    def _per_row(self, per_sequence: Tensor, chunk: Chunk) -> Tensor:
        lengths = self.offsets[2 * chunk.first : 2 * chunk.last + 1].diff()
        rows = per_sequence.repeat_interleave(lengths, output_size=chunk.hi - chunk.lo)
        # Not a product: the slope of a sequence that holds NaN is NaN.
        return rows.masked_fill(~self.counts[chunk.lo : chunk.hi], 0)

    def gradients(self, folded: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight (None when it was added to a buffer of the caller) and bias."""
        if self.grads is None:
            return None, None, None
        del self.problem.tiles  # before the copies that rounding and scattering need
        total = self.grads.total()
        hidden = None if self.grad_x is None else self.problem.grad_hidden(self.grad_x)
        return hidden, None if folded else total, self.grads.bias

    def per_row(self) -> dict[str, Tensor]:
        """Fields of `LinearLogp` by name, [N]."""
        fields = self.fields or [self.problem.results(self.problem.score(0, 0))]
        spread = self.problem.scored.spread
        return {name: spread(torch.cat([f[name] for f in fields])) for name in fields[0]}

    def per_pair(self, name: str) -> Tensor:
        """A field of `PairGrad` over all pairs."""
        if self.pairs:
            return torch.cat([getattr(p, name) for p in self.pairs])
        return self.offsets.new_empty(0, dtype=self.problem.stats_dtype)
