"""What every judge does, and how given texts come before a judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from srlm_fast.data.records import Judgement, Prompt, Sample
from srlm_fast.data.template import ChatTemplate

TOO_LONG = "judge prompt too long"


class Judge(Protocol):
    """Scores candidate responses; higher is better, and only within one prompt comparable."""

    @property
    def name(self) -> str:
        """The judge's `judge.kind` in the configuration."""

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Sample]]
    ) -> list[list[Judgement]]:
        """One judgement per candidate, in the shape of `candidates`, `[prompt][candidate]`."""


def text_samples(prompt: Prompt, responses: Sequence[str], template: ChatTemplate) -> list[Sample]:
    """Given responses (human ones, say) as finished samples, so that a judge can score them."""
    prompt_ids = tuple(template.encode_prompt(prompt))
    return [
        Sample(
            prompt=prompt,
            prompt_ids=prompt_ids,
            response=response,
            response_ids=tuple(template.encode_response(prompt, response)),
            logprobs=(),
            finish_reason="stop",
            index=index,
            seed=0,
            round=0,
        )
        for index, response in enumerate(responses)
    ]
