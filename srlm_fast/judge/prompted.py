"""LLM-as-a-Judge: the model reads a judge prompt and writes its verdict (SRLM section 2.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from srlm_fast.config import JudgeConfig
from srlm_fast.data.records import Judgement, Prompt, Sample, Vote
from srlm_fast.data.template import ChatTemplate
from srlm_fast.judge.base import TOO_LONG
from srlm_fast.judge.judge_prompt import load_judge_prompt
from srlm_fast.sampler import Sampler, SamplingParams


class PromptedJudge:
    """Samples `config.num_samples` judgements of each candidate and averages those that parse.

    `context` is the model's context length in tokens. `seed` makes the votes of one round differ
    from those of the next. Scores are 0 to 5.
    """

    name = "prompted"

    def __init__(
        self,
        sampler: Sampler,
        template: ChatTemplate,
        config: JudgeConfig,
        *,
        seed: int,
        context: int,
    ) -> None:
        self.sampler = sampler
        self.template = template
        self.config = config
        self.seed = seed
        self.max_prompt_tokens = context - config.max_new_tokens
        self.prompt = load_judge_prompt(config.prompt)

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Sample]]
    ) -> list[list[Judgement]]:
        """The mean of the parsable votes of each candidate; invalid where no vote parses."""
        requests = [
            self.prompt.fill(prompt, sample.response)
            for prompt, group in zip(prompts, candidates, strict=True)
            for sample in group
        ]
        judged = iter(self.judge(requests, num_samples=self.config.num_samples, seed=self.seed))
        return [[next(judged) for _ in group] for group in candidates]

    def judge(self, requests: Sequence[Prompt], *, num_samples: int, seed: int) -> list[Judgement]:
        """`num_samples` votes on each filled judge prompt, all sampled in one call."""
        encoded = [self.template.encode_prompt(request) for request in requests]
        fits = [len(ids) <= self.max_prompt_tokens for ids in encoded]
        params = SamplingParams(
            n=num_samples,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            max_tokens=self.config.max_new_tokens,
            seed=seed,
        )
        asked = [ids for ids, fit in zip(encoded, fits, strict=True) if fit]
        outputs = iter(self.sampler.generate(asked, params, progress="judging") if asked else [])
        return [
            self._mean([c.text for c in next(outputs).outputs])
            if fit
            else Judgement(None, invalid=TOO_LONG)
            for fit in fits
        ]

    def _mean(self, texts: Sequence[str]) -> Judgement:
        votes = tuple(Vote(text, *self.prompt.parse(text)) for text in texts)
        scores = [vote.score for vote in votes if vote.score is not None]
        if not scores:
            return Judgement(None, votes, "no vote has a score")
        # fsum: the mean must not depend on the order of the votes, or equal votes would break ties.
        return Judgement(math.fsum(scores) / len(scores), votes)
