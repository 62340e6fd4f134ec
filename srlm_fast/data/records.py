"""The records that travel between the stages of a round, and are written to disk as jsonl.

Token ids are the truth: what was sampled is what is judged and trained on. Text is kept beside
the ids for people and for judges, and is never tokenised again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, cast


class Message(NamedTuple):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


# A prompt is the conversation up to the turn that the model writes. Hashable, so it can be a key.
Prompt = tuple[Message, ...]


def user(text: str) -> Prompt:
    """The single-turn prompt that says `text`."""
    return (Message("user", text),)


def prompt_text(prompt: Prompt) -> str:
    """What the user said last: the instruction that a judge and a report show."""
    return next((m.content for m in reversed(prompt) if m.role == "user"), "")


class Record:
    """Mixin of frozen dataclasses that are jsonl rows: nested records, messages and tuples."""

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON values, in field order."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(cast(Any, self))}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """The record of one parsed line; raises KeyError or TypeError on a wrong one."""
        return cls(**row)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, Message):
        return {"role": value.role, "content": value.content}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _prompt(value: Any) -> Prompt:
    """A prompt from JSON: a string, or a list of {role, content}."""
    if isinstance(value, str):
        return user(value)
    return tuple(m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in value)


@dataclass(frozen=True)
class PromptRow(Record):
    """One prompt of a round."""

    prompt: Prompt

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _prompt(self.prompt))


@dataclass(frozen=True)
class Example(Record):
    """One supervised row (IFT or EFT): the loss falls on `response` only."""

    prompt: Prompt
    response: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _prompt(self.prompt))


@dataclass(frozen=True)
class RankedGroup(Record):
    """Responses to one prompt, best first by human (or oracle) rank.

    `ranks` holds each response's rank, 0 = best; equal ranks are ties. `scores`, where the source
    has them, are the absolute scores behind the ranks.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    ranks: tuple[float, ...]
    scores: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _prompt(self.prompt))
        object.__setattr__(self, "responses", tuple(self.responses))
        object.__setattr__(self, "ranks", tuple(self.ranks))
        if self.scores is not None:
            object.__setattr__(self, "scores", tuple(self.scores))


@dataclass(frozen=True)
class Preference(Record):
    """One labelled pair as text: the row format of HF preference datasets."""

    prompt: Prompt
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _prompt(self.prompt))


@dataclass(frozen=True)
class Sample(Record):
    """One sampled response.

    `logprobs` are the model's raw log-probs (T = 1) of `response_ids`, EOS included if it was
    sampled. `finish_reason` is "stop" (EOS, stop id or stop string) or "length".
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    response: str
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    index: int
    seed: int
    round: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _prompt(self.prompt))
        for name in ("prompt_ids", "response_ids", "logprobs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


@dataclass(frozen=True)
class Vote(Record):
    """One judgement that was sampled or computed: its text, and its score or why it has none."""

    text: str
    score: float | None
    invalid: str | None = None


@dataclass(frozen=True)
class Judgement(Record):
    """What a judge says of one candidate: the mean over its parsable votes.

    `score` is None when no vote counts, and `invalid` then says why. Prompted judges score 0 to 5;
    the implicit judge gives log pi(y|x) - log pi_init(y|x) in nats, without beta. On disk, `sample`
    is the row of the candidate in the round's samples.jsonl.
    """

    score: float | None
    votes: tuple[Vote, ...] = ()
    invalid: str | None = None
    sample: int | None = None

    def __post_init__(self) -> None:
        votes = tuple(v if isinstance(v, Vote) else Vote(**v) for v in self.votes)
        object.__setattr__(self, "votes", votes)


@dataclass(frozen=True)
class Pair(Record):
    """One preference pair as it is trained on: token ids, with the text beside them.

    label_smoothing: how likely the label is wrong, in [0, 1]; None: as the loss's settings say.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    chosen: str
    chosen_ids: tuple[int, ...]
    rejected: str
    rejected_ids: tuple[int, ...]
    chosen_score: float | None
    rejected_score: float | None
    round: int
    label_smoothing: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _prompt(self.prompt))
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
