"""Log-probabilities of rows and their gradients, chunk by chunk: what both ops are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srlm_kernels import row_stats as rs
from srlm_kernels.distributed import VocabShard
from srlm_kernels.head import Grads, Head
from srlm_kernels.plan import chunk_rows, scored_rows, slices
from srlm_kernels.tiles import Transform, VocabTiles

# What the default chunk is reckoned for where ranks share a vocabulary: their shares may differ in
# size, but all must cut the same chunks.
LARGE_VOCABULARY = 2**18


@dataclass(frozen=True)
class Options:
    """How hidden states become log-probabilities; plain values under `linear_logp`'s names."""

    extrapolation: float | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    ignore_index: int = -100
    outputs: Sequence[str] = ()
    logits_dtype: torch.dtype = torch.float32
    process_group: Any = None
    chunk_rows: int | None = None

    @property
    def transform(self) -> Transform:
        return Transform(self.softcap, self.logit_scale, self.temperature)


class Problem:
    """The scored rows of one call, their hidden states under policy and reference, and the heads.

    Rows are counted among the M scored ones, see `Scored`. `allocate` comes before any arithmetic.
    """

    def __init__(
        self,
        hidden: Tensor,
        policy: Head,
        target: Tensor,
        rows: Tensor | None,
        options: Options,
        *,
        ref_hidden: Tensor | None = None,
        reference: Head | None = None,
    ) -> None:
        self.hidden, self.ref_hidden, self.policy = hidden, ref_hidden, policy
        self.options, self.reference = options, reference
        weight = policy.weight
        columns = weight.shape[0] if options.process_group is None else LARGE_VOCABULARY
        self.limit = options.chunk_rows or chunk_rows(columns, weight.device)
        self.scored = scored_rows(target, rows, options.ignore_index)
        self.shard = None
        self.vocabulary: int | Tensor = weight.shape[0]
        self.target = self.scored.target
        if options.process_group is not None:
            self.shard = VocabShard(weight.shape[0], options.process_group, weight.device)
            self.vocabulary = self.shard.vocabulary
            # Counted from this rank's first row of the head; elsewhere it matches no column.
            self.target = self.target - self.shard.start
        self.size = self.target.shape[0]

    def allocate(self, *, rows: int, keep: bool) -> None:
        """Memory for chunks of at most `rows` rows; see `VocabTiles` for `keep`."""
        options = self.options
        self.tiles = VocabTiles(
            self.policy, self.reference, self.hidden, rows=min(rows, self.limit, self.size),
            keep=keep, transform=options.transform, extrapolation=options.extrapolation,
            outputs=options.outputs, logits_dtype=options.logits_dtype,
        )  # fmt: skip

    def score(self, lo: int, hi: int) -> Tensor:
        """The state [8 or 11, hi - lo] (see `row_stats`) of some rows, one chunk at most."""
        ref = self.ref_hidden
        x_ref = None if ref is None else self.scored.gather(ref, lo, hi)
        state = self.tiles.score(self.scored.gather(self.hidden, lo, hi), x_ref, self.target[lo:hi])
        return state if self.shard is None else self.shard.merge(state)

    def score_all(self) -> Tensor:
        """The state of all rows."""
        states = [self.score(lo, hi) for lo, hi in slices(0, self.size, self.limit)]
        return torch.cat(states, dim=1) if states else self.score(0, 0)

    def backward(
        self,
        lo: int,
        hi: int,
        lse: Tensor,
        upstream: Tensor,
        *,
        grad_x: Tensor | None,
        grads: Grads,
        recompute: bool = False,
    ) -> None:
        """Gradients of sum(upstream * logp) of rows lo..hi; `lse` and `upstream` are of those.

        Rows lo..hi of grad_x [M, D] are set, `grads` added to. Without `recompute` these rows must
        be the last that were scored.
        """
        self.tiles.backward(
            self.scored.gather(self.hidden, lo, hi), self.target[lo:hi], lse, upstream,
            recompute=recompute, grad_x=None if grad_x is None else grad_x[lo:hi], grads=grads,
        )  # fmt: skip

    def backward_all(
        self, lse: Tensor, upstream: Tensor, grad_x: Tensor | None, grads: Grads
    ) -> None:
        """The same for all rows, whose logits are computed again."""
        for lo, hi in slices(0, self.size, self.limit):
            self.backward(
                lo, hi, lse[lo:hi], upstream[lo:hi], grad_x=grad_x, grads=grads, recompute=True
            )

    @property
    def stats_dtype(self) -> torch.dtype:
        return torch.promote_types(self.options.logits_dtype, torch.float32)

    def new_grad_x(self) -> Tensor:
        shape = (self.size, self.hidden.shape[1])
        return torch.empty(shape, dtype=self.stats_dtype, device=self.hidden.device)

    def grad_hidden(self, grad_x: Tensor) -> Tensor:
        """[T, D] from the rows' gradients [M, D], summed over the ranks of a sharded vocabulary."""
        if self.shard is not None:
            self.shard.sum(grad_x)
        return self.scored.scatter(grad_x, self.hidden)

    def results(self, state: Tensor) -> dict[str, Tensor]:
        """Fields of `LinearLogp` by name, per row of `state`."""
        policy = state[rs.TARGET] - log_sum_exp(state)
        results = {"logp": policy}
        strength = self.options.extrapolation
        if self.reference is not None:
            results["ref_logp"] = state[rs.REF_TARGET] - log_sum_exp(state, rs.REF_MAX)
            if strength == 0:
                results["extrapolated_logp"] = policy.clone()
            elif strength is not None:
                mixed = rs.extrapolate(state[rs.TARGET], state[rs.REF_TARGET], strength)
                results["extrapolated_logp"] = mixed - log_sum_exp(state, rs.EXT_MAX)
        for name in self.options.outputs:
            results[name] = _output(name, state, self.vocabulary)
        return results


def log_sum_exp(state: Tensor, largest: int = rs.POLICY_MAX) -> Tensor:
    """Of one stream, [N]: the policy's, or the one whose maximum is in row `largest`."""
    return state[largest] + state[largest + 1].log()


def _output(name: str, state: Tensor, vocabulary: int | Tensor) -> Tensor:
    total = state[rs.POLICY_SUM]
    if name == "entropy":
        return total.log() - state[rs.WEIGHTED] / total
    if name == "mean_logit":
        return state[rs.TOTAL] / vocabulary
    if name == "is_top1":
        return state[rs.TARGET] == state[rs.POLICY_MAX]
    return state[rs.SQUARES].log() - 2 * total.log()
