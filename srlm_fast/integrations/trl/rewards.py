"""A judge as the reward function of TRL's online trainers (GRPO, RLOO, online DPO)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from srlm_fast.data.records import Message, Prompt, Sample, user
from srlm_fast.data.template import ChatTemplate
from srlm_fast.judge.base import Judge

Reward = Callable[..., list[float | None]]


def judge_reward(judge: Judge, template: ChatTemplate) -> Reward:
    """The scores of `judge` under TRL's signature of a reward function.

    Prompts and completions may be strings or messages; for the judge a string is a user's turn,
    while TRL samples behind the bare string: give messages where an implicit judge scores.
    `completion_ids`, which TRL passes too, are what that judge scores. A completion without a score
    has the reward None, which TRL leaves out. Completions of one prompt that follow each other are
    judged together.
    """

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float | None]:
        ids: Sequence[Any] = completion_ids or [None] * len(prompts)
        rows = [
            (_prompt(prompt), _text(completion), tokens)
            for prompt, completion, tokens in zip(prompts, completions, ids, strict=True)
        ]
        groups = [list(group) for _, group in groupby(rows, key=lambda row: row[0])]
        samples = [[_sample(*row, template) for row in group] for group in groups]
        verdicts = judge.score([group[0][0] for group in groups], samples)
        return [verdict.score for group in verdicts for verdict in group]

    reward.__name__ = f"{judge.name}_judge"  # TRL logs rewards by it
    return reward


def _prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return user(prompt)
    return tuple(Message(m["role"], _text(m["content"])) for m in prompt)


def _text(content: Any) -> str:
    """Of a string, of the parts of a message, or of the last of several messages; a message that
    only calls tools has none."""
    if not content or isinstance(content, str):
        return content or ""
    if "role" in content[-1]:
        return _text(content[-1]["content"])
    return "".join(part.get("text", "") for part in content)


def _sample(prompt: Prompt, text: str, ids: Sequence[int] | None, template: ChatTemplate) -> Sample:
    given = template.encode_response(prompt, text) if ids is None else ids
    return Sample(
        prompt=prompt, prompt_ids=tuple(template.encode_prompt(prompt)), response=text,
        response_ids=tuple(given), logprobs=(), finish_reason="stop", index=0, seed=0, round=0,
    )  # fmt: skip
