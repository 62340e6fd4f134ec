"""Which of two responses is better: asked in both orders, since judges prefer a place.

The rule of SRLM's head-to-head evaluation (arXiv 2401.10020, section 3.1): only a verdict that both
orders give is one, and anything else is a tie.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from math import isclose

from srlm_fast.config import PairwiseConfig
from srlm_fast.data.records import Prompt, Record, Sample, Vote, prompt_text
from srlm_fast.data.template import ChatTemplate
from srlm_fast.judge.base import TOO_LONG, Judge
from srlm_fast.judge.judge_prompt import INSTRUCTION, check_placeholders, fill, read_prompt
from srlm_fast.judge.parser import own_words
from srlm_fast.sampler import Sampler, SamplingParams

WIN, TIE, LOSS = 1.0, 0.5, 0.0
NO_VERDICT = "no verdict"
RESPONSE_A, RESPONSE_B = "<RESPONSE_A_HERE>", "<RESPONSE_B_HERE>"
_FOLDER = resources.files("srlm_fast") / "judge" / "prompts" / "pairwise"

_VERDICT = re.compile(
    r"""
    \b verdict [\s*_"'`\u201d\u2019]*+ [:\uff1a] [\s*_"'`\u201c\u2018<(]*+
    (?: (?: response | answer | assistant ) \s++ )?
    (?: \[\[? (?P<boxed> [abc] | tie ) \]
      | (?P<word> b | tie | a (?! [^\S\n]+ (?! (?: is | wins | because | since | as ) \b ) \w ) )
        \b (?! [\s*_"'\u201d\u2019]* (?: [,/|&] | (?: or | and ) \b )
                [\s*_"'\u201c\u2018]* (?: [ab] | tie ) \b )
    )
    | \[\[ (?P<code> [abc] ) \]\]                          # MT-Bench's, C for a tie
    """,
    re.VERBOSE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Comparison(Record):
    """The first response against the second: 1 is better, 1/2 as good, 0 worse.

    `votes` are those of the two orders, each scored as the outcome. Without a verdict in one of
    them `outcome` is None.
    """

    outcome: float | None
    votes: tuple[Vote, ...] = ()


@dataclass(frozen=True)
class PairwisePrompt:
    """A prompt that shows two responses; raises UserError when a placeholder is missing."""

    name: str
    text: str

    def __post_init__(self) -> None:
        check_placeholders(self.name, self.text, (INSTRUCTION, RESPONSE_A, RESPONSE_B))

    def fill(self, prompt: Prompt, a: str, b: str) -> Prompt:
        """The single user turn that asks which response to `prompt` is better."""
        return fill(self.text, {INSTRUCTION: prompt_text(prompt), RESPONSE_A: a, RESPONSE_B: b})


def load_pairwise_prompt(name: str) -> PairwisePrompt:
    """The pairwise prompt of this name or file. Raises UserError as `load_judge_prompt`."""
    return PairwisePrompt(name, **read_prompt(name, _FOLDER, ("text",)))


class PromptedPairwiseJudge:
    """The model reads a pairwise prompt in both orders and writes its verdicts.

    `context` is the model's context length in tokens. Equal responses tie unasked.
    """

    name = "pairwise"

    def __init__(
        self,
        sampler: Sampler,
        template: ChatTemplate,
        config: PairwiseConfig,
        *,
        seed: int,
        context: int,
    ) -> None:
        self.sampler = sampler
        self.template = template
        self.prompt = load_pairwise_prompt(config.prompt)
        self.room = context - config.max_new_tokens
        self.params = SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_new_tokens,
            seed=seed,
        )

    def compare(
        self, prompts: Sequence[Prompt], ones: Sequence[Sample], others: Sequence[Sample]
    ) -> list[Comparison]:
        """One comparison for each prompt, of its response in `ones` with that in `others`."""
        rows = list(zip(prompts, ones, others, strict=True))
        differ = [one.response != other.response for _, one, other in rows]
        asked = [
            (
                self.prompt.fill(p, a.response, b.response),
                self.prompt.fill(p, b.response, a.response),
            )
            for (p, a, b), differs in zip(rows, differ, strict=True)
            if differs
        ]
        votes = iter(self._votes(list(chain.from_iterable(asked))))
        return [
            _agreed(next(votes), _turned(next(votes))) if differs else Comparison(TIE)
            for differs in differ
        ]

    def _votes(self, requests: Sequence[Prompt]) -> list[Vote]:
        """Of each request: does A win? All are sampled in one call."""
        encoded = [self.template.encode_prompt(request) for request in requests]
        fitting = [ids for ids in encoded if len(ids) <= self.room]
        outputs = iter(
            self.sampler.generate(fitting, self.params, progress="comparing") if fitting else []
        )
        return [
            _vote(next(outputs).outputs[0].text)
            if len(ids) <= self.room
            else Vote("", None, TOO_LONG)
            for ids in encoded
        ]


@dataclass(frozen=True)
class ScoreComparison:
    """Any judge of single responses as a pairwise one: the higher score wins, equal ones tie."""

    judge: Judge

    @property
    def name(self) -> str:
        """The name of the judge that scores."""
        return self.judge.name

    def compare(
        self, prompts: Sequence[Prompt], ones: Sequence[Sample], others: Sequence[Sample]
    ) -> list[Comparison]:
        """As above, without `votes`, as nobody was asked to compare."""
        pairs = [list(pair) for pair in zip(ones, others, strict=True)]
        scored = [[v.score for v in group] for group in self.judge.score(prompts, pairs)]
        return [Comparison(_outcome(one, other)) for one, other in scored]


def parse_verdict(text: str) -> float | None:
    """The outcome for A by the last verdict in a generated text; None without one.

    `Verdict: A`, `Verdict: B`, `Verdict: tie`, with markdown and quotes, or `[[A]]`, `[[B]]`,
    `[[C]]`. Not the article in "Verdict: A good answer", nor the choice in "Verdict: A or B".
    """
    last = deque(_VERDICT.finditer(own_words(text)), maxlen=1)
    if not last:
        return None
    found = last[0]["boxed"] or last[0]["word"] or last[0]["code"]
    return {"a": WIN, "b": LOSS}.get(found.lower(), TIE)


def _vote(text: str) -> Vote:
    outcome = parse_verdict(text)
    return Vote(text, outcome, NO_VERDICT if outcome is None else None)


def _turned(vote: Vote) -> Vote:
    """The vote of the other order, as the outcome for the same response."""
    return Vote(vote.text, None if vote.score is None else 1.0 - vote.score, vote.invalid)


def _agreed(one: Vote, other: Vote) -> Comparison:
    if one.score is None or other.score is None:
        return Comparison(None, (one, other))
    return Comparison(one.score if one.score == other.score else TIE, (one, other))


def _outcome(one: float | None, other: float | None) -> float | None:
    if one is None or other is None:
        return None
    # Means of the same votes in another order differ in the last bits.
    return TIE if isclose(one, other, abs_tol=1e-9) else float(one > other)
