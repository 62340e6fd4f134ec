"""The prompted judge without decoding: the expected score, from the next-token distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from srlm_fast.config import JudgeConfig
from srlm_fast.data.records import Judgement, Prompt, Sample, Vote
from srlm_fast.data.template import ChatTemplate
from srlm_fast.errors import UserError
from srlm_fast.judge.base import TOO_LONG
from srlm_fast.judge.judge_prompt import load_judge_prompt
from srlm_fast.sampler import Sampler

DIGITS = range(6)
# The digits' mass is the share of sampled judgements that would parse. Below one in a hundred the
# ratio of the six is noise, and calling it a judgement would flatter the report.
MIN_MASS = 0.01


class ExpectedJudge:
    """Starts the judge's turn with `Score:` and takes sum_d d p(d) / sum_d p(d) over d = 0..5.

    One forward pass per candidate and no randomness. `context` is the model's context length in
    tokens. Raises UserError when the tokenizer does not write the six digits as one token each.
    """

    name = "expected"

    def __init__(
        self, sampler: Sampler, template: ChatTemplate, config: JudgeConfig, *, context: int
    ) -> None:
        self.sampler = sampler
        self.template = template
        self.context = context
        self.prompt = load_judge_prompt(config.prompt)
        self.verdict, self.digit_ids = verdict_tokens(template, self.prompt.fill((), ""))

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Sample]]
    ) -> list[list[Judgement]]:
        """The expected score of each candidate; invalid where the digits have no mass."""
        encoded = [
            self._encode(self.prompt.fill(prompt, sample.response))
            for prompt, group in zip(prompts, candidates, strict=True)
            for sample in group
        ]
        asked = [ids for ids in encoded if len(ids) <= self.context]
        rows: Iterator[Tensor] = iter(self.sampler.next_logprobs(asked, self.digit_ids))
        judged = iter(
            _expectation(next(rows))
            if len(ids) <= self.context
            else Judgement(None, invalid=TOO_LONG)
            for ids in encoded
        )
        return [[next(judged) for _ in group] for group in candidates]

    def _encode(self, request: Prompt) -> list[int]:
        """The judge prompt and the start of its answer, up to where the digit comes next."""
        return self.template.encode_prompt(request, prefill=self.verdict.format(0))[:-1]


def verdict_tokens(template: ChatTemplate, request: Prompt) -> tuple[str, list[int]]:
    """The spelling of the verdict, and the ids of the digits 0 to 5 where it ends.

    Tokenizers write " 3" as one token or as a space and "3"; with the digit's own token cut off,
    whatever they share is part of the prefix either way. Raises UserError where a digit is no
    token of its own.
    """
    for verdict in ("Score: {}", "Score:{}"):
        encoded = [template.encode_prompt(request, prefill=verdict.format(d)) for d in DIGITS]
        stems = {tuple(ids[:-1]) for ids in encoded}
        digit_ids = [ids[-1] for ids in encoded]
        if len(stems) == 1 and len(set(digit_ids)) == len(DIGITS):
            return verdict, digit_ids
    raise UserError(
        "this tokenizer does not write the digits 0 to 5 as one token each after 'Score:'; "
        "use judge.kind=prompted"
    )


def _expectation(logprobs: Tensor) -> Judgement:
    """The judgement of one row of log-probs [6]."""
    probs: list[float] = logprobs.double().exp().tolist()
    mass = sum(probs)
    text = " ".join(f"p({d})={p:.4f}" for d, p in zip(DIGITS, probs, strict=True))
    text += f" mass={mass:.4f}"
    if not mass >= MIN_MASS:
        reason = "no mass on digits"
        return Judgement(None, (Vote(text, None, reason),), reason)
    score = sum(d * p for d, p in zip(DIGITS, probs, strict=True)) / mass
    return Judgement(score, (Vote(text, score),))
