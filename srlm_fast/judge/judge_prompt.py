"""The prompt that asks a model to judge a response: loading by name or file, and filling."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from srlm_fast.data.jsonl import read_text
from srlm_fast.data.records import Prompt, prompt_text, user
from srlm_fast.errors import UserError

INSTRUCTION = "<INSTRUCTION_HERE>"
RESPONSE = "<RESPONSE_HERE>"
_PLACEHOLDER = re.compile(f"{INSTRUCTION}|{RESPONSE}")
_FOLDER = resources.files("srlm_fast") / "judge" / "prompts"


@dataclass(frozen=True)
class JudgePrompt:
    """A judge prompt with its two placeholders; raises UserError when one is missing."""

    name: str
    text: str

    def __post_init__(self) -> None:
        for placeholder in (INSTRUCTION, RESPONSE):
            if placeholder not in self.text:
                raise UserError(
                    f"judge prompt {self.name} has no {placeholder}; add it to the file"
                )

    def fill(self, prompt: Prompt, response: str) -> Prompt:
        """The single user turn that asks for a judgement of `response` to `prompt`.

        One pass: a placeholder spelled inside the instruction or the response stays as it is.
        """
        values = {INSTRUCTION: prompt_text(prompt), RESPONSE: response}
        return user(_PLACEHOLDER.sub(lambda match: values[match[0]], self.text))


def judge_prompt_names() -> list[str]:
    """Names of the judge prompts that ship with the package."""
    return sorted(p.name.removesuffix(".txt") for p in _FOLDER.iterdir() if p.name.endswith(".txt"))


def load_judge_prompt(name: str) -> JudgePrompt:
    """The judge prompt of this name, or of this text file.

    Raises UserError on an unknown name (with the nearest one), a missing or unreadable file, or a
    missing placeholder.
    """
    path = Path(name)
    if name in judge_prompt_names():
        text = (_FOLDER / f"{name}.txt").read_text("utf-8")
    elif path.exists():
        text = read_text(path).replace("\r\n", "\n")
    elif path.suffix or len(path.parts) > 1:
        known = ", ".join(judge_prompt_names())
        raise UserError(f"judge prompt file {name} does not exist; give a file or one of {known}")
    else:
        close = difflib.get_close_matches(name, judge_prompt_names(), n=1, cutoff=0.4)
        hint = (
            f"did you mean {close[0]}?" if close else f"known are {', '.join(judge_prompt_names())}"
        )
        raise UserError(f"unknown judge prompt {name!r}; {hint}")
    return JudgePrompt(name, text.removesuffix("\n"))
