"""Direct preference judgment: the implicit reward of the policy itself (SPA equation 7)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from srlm_fast.data.records import Judgement, Prompt, Sample, Vote
from srlm_fast.model.adapters import FrozenAdapter
from srlm_fast.sampler import Sampler


class Scorer(Protocol):
    """A `Sampler`, or what scores as one."""

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        progress: str = "",
    ) -> list[list[Tensor]]:
        """See `Sampler.score`."""
        ...


@dataclass(frozen=True)
class AdapterScorer:
    """The sampler's own model with a frozen adapter on, in the sampler's own KV memory."""

    sampler: Sampler
    adapter: FrozenAdapter

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        progress: str = "",
    ) -> list[list[Tensor]]:
        """See `Sampler.score`."""
        with self.adapter.active():
            return self.sampler.score(prompts, completions, progress)


class ImplicitJudge:
    """Scores log pi(y|x) - log pi_init(y|x), in nats, summed over the response ids as sampled.

    Without beta: the order is the same. Without a `reference` the score is log pi(y|x). What is
    longer than the model's context is not scored.

    Both terms come of `Sampler.score`, along one numerical path. But where `own_round`
    is given, `policy` has drawn the samples of that round with the weights that it has now, and
    what it found their tokens' log-probs to be then is not computed again.
    """

    name = "implicit"

    def __init__(
        self, policy: Sampler, reference: Scorer | None, *, own_round: int | None = None
    ) -> None:
        self.policy = policy
        self.reference = reference
        self.own_round = own_round

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Sample]]
    ) -> list[list[Judgement]]:
        """The implicit reward of each candidate."""
        if len(prompts) != len(candidates):
            raise ValueError(f"{len(prompts)} prompts but {len(candidates)} groups of candidates")
        scored = [[sample for sample in group if self._fits(sample)] for group in candidates]
        policy = self._policy_logp(scored)
        init = iter(sequence_logp(self.reference, scored)) if self.reference else None
        return [
            [
                _reward(next(policy), next(init) if init else None)
                if self._fits(sample)
                else Judgement(None, invalid="longer than the context")
                for sample in group
            ]
            for group in candidates
        ]

    def _policy_logp(self, groups: Sequence[Sequence[Sample]]) -> Iterator[float]:
        """log pi(y|x) of every sample, in order."""
        unknown = [[sample for sample in group if not self._drew(sample)] for group in groups]
        computed = iter(sequence_logp(self.policy, unknown))
        for group in groups:
            for sample in group:
                yield math.fsum(sample.logprobs) if self._drew(sample) else next(computed)

    def _drew(self, sample: Sample) -> bool:
        """Whether `policy` drew all of these ids: an EOS, say, may have been put behind them."""
        is_whole = len(sample.logprobs) == len(sample.response_ids)
        return sample.round == self.own_round and is_whole

    def _fits(self, sample: Sample) -> bool:
        length = len(sample.prompt_ids) + len(sample.response_ids)
        return length <= self.policy.context


def sequence_logp(sampler: Scorer, candidates: Sequence[Sequence[Sample]]) -> list[float]:
    """Summed log-prob of every candidate, flat, in order; sums in float64."""
    groups = [group for group in candidates if group]
    if not groups:
        return []
    logps = sampler.score(
        [list(group[0].prompt_ids) for group in groups],
        [[list(sample.response_ids) for sample in group] for group in groups],
        progress="judging",
    )
    return [token_logp.double().sum().item() for group in logps for token_logp in group]


def _reward(policy: float, init: float | None) -> Judgement:
    score = policy if init is None else policy - init
    text = f"log pi={policy:.4f}" + ("" if init is None else f" log pi_init={init:.4f}")
    if not math.isfinite(score):
        return Judgement(None, (Vote(text, None, "not finite"),), "not finite")
    return Judgement(score, (Vote(text, score),))
