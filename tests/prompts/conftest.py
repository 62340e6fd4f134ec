"""A sampler that answers self-instruction calls with scripted texts."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from srlm_fast.data.records import Prompt
from srlm_fast.sampler import Completion, Output, SamplingParams


class CharTemplate:
    """One token per character, so that scripted texts survive encoding and decoding exactly."""

    def encode_prompt(self, prompt: Prompt, prefill: str = "") -> list[int]:
        return [ord(c) for c in prompt[0].content + "\n<assistant>" + prefill]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids)


@dataclass
class ScriptedSampler:
    """The n-th call of its life gets `answer(n, text)`: a text, or (text, finish reason)."""

    answer: Callable[[int, str], str | tuple[str, str]]
    context: int = 100_000
    asked: list[str] = field(default_factory=list)
    batches: list[tuple[int, SamplingParams]] = field(default_factory=list)

    def generate(self, prompts, params, progress=""):
        self.batches.append((len(prompts), params))
        return [Output(ids, [self._completion(ids)]) for ids in prompts]

    def _completion(self, ids):
        asked = "".join(map(chr, ids))
        answer = self.answer(len(self.asked), asked)
        self.asked.append(asked)
        text, reason = answer if isinstance(answer, tuple) else (answer, "stop")
        return Completion(0, [*map(ord, text)], text, reason, None, 0.0, [], [], [], 0)


@pytest.fixture
def char_template():
    return CharTemplate()


@pytest.fixture
def scripted():
    return ScriptedSampler
