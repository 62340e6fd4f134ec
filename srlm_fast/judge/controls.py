"""Judges that know nothing of quality: what a real judge has to beat."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from srlm_fast.data.records import Judgement, Prompt, Sample, Vote
from srlm_fast.judge.parser import MAX_SCORE


class RandomJudge:
    """A score uniform in [0, 5], fixed by the seed, the prompt and the response's token ids."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Sample]]
    ) -> list[list[Judgement]]:
        """One draw per candidate."""
        return [
            [_certain(MAX_SCORE * self._uniform(prompt, sample)) for sample in group]
            for prompt, group in zip(prompts, candidates, strict=True)
        ]

    def _uniform(self, prompt: Prompt, sample: Sample) -> float:
        key = json.dumps([self.seed, prompt, sample.response_ids]).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) / 2**64


class LongestJudge:
    """The score is the number of response tokens: the length bias that judges are suspected of."""

    name = "longest"

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Sample]]
    ) -> list[list[Judgement]]:
        """The length of each candidate."""
        return [[_certain(float(len(s.response_ids))) for s in group] for group in candidates]


def _certain(score: float) -> Judgement:
    return Judgement(score, (Vote("", score),))
