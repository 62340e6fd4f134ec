"""The prompt that asks a model to judge a response: loading by name or file, and filling."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import yaml

from srlm_fast.data.jsonl import read_text
from srlm_fast.data.records import Prompt, prompt_text, user
from srlm_fast.errors import UserError
from srlm_fast.judge.parser import parse_score, through_score_line

INSTRUCTION = "<INSTRUCTION_HERE>"
RESPONSE = "<RESPONSE_HERE>"
_FOLDER = resources.files("srlm_fast") / "judge" / "prompts"


@dataclass(frozen=True)
class JudgePrompt:
    """A judge prompt with its two placeholders; raises UserError when one is missing.

    verdict: which score of a judgement counts. "first" is for prompts that ask for the score before
    its reasons, which may name other scores.
    """

    name: str
    text: str
    verdict: Literal["first", "last"] = "last"

    def __post_init__(self) -> None:
        check_placeholders(self.name, self.text, (INSTRUCTION, RESPONSE))
        if self.verdict not in ("first", "last"):
            raise UserError(f"judge prompt {self.name}: verdict must be first or last")

    def fill(self, prompt: Prompt, response: str) -> Prompt:
        """The single user turn that asks for a judgement of `response` to `prompt`."""
        return fill(self.text, {INSTRUCTION: prompt_text(prompt), RESPONSE: response})

    def parse(self, judgement: str) -> tuple[float | None, str | None]:
        """The score that a generated judgement gives, or None and the reason."""
        return parse_score(judgement, first=self.verdict == "first")

    def lesson(self, judgement: str) -> str:
        """What of a judgement is taught: not what rambles on behind a concluding score."""
        return judgement if self.verdict == "first" else through_score_line(judgement)


def check_placeholders(name: str, text: str, placeholders: tuple[str, ...]) -> None:
    """Raises UserError when one is missing."""
    for placeholder in placeholders:
        if placeholder not in text:
            raise UserError(f"judge prompt {name} has no {placeholder}; add it to the file")


def fill(text: str, values: dict[str, str]) -> Prompt:
    """The user turn of `text` with placeholders replaced, in one pass: one that is spelled inside a
    value stays as it is."""
    pattern = re.compile("|".join(map(re.escape, values)))
    return user(pattern.sub(lambda match: values[match[0]], text))


def judge_prompt_names() -> list[str]:
    """Names of the judge prompts that ship with the package."""
    return prompt_names(_FOLDER)


def load_judge_prompt(name: str) -> JudgePrompt:
    """The judge prompt of this name, or of this file: text, or YAML with `text` and `verdict`.

    Raises UserError on an unknown name (with the nearest one), a missing or unreadable file, a
    missing placeholder or a wrong key.
    """
    return JudgePrompt(name, **read_prompt(name, _FOLDER, ("text", "verdict")))


def prompt_names(folder: Traversable) -> list[str]:
    """Names of the prompts in a folder of the package."""
    return sorted(p.name.rpartition(".")[0] for p in folder.iterdir() if _is_prompt(p.name))


def read_prompt(name: str, folder: Traversable, keys: tuple[str, ...]) -> dict[str, Any]:
    """What a prompt's file says, of `keys`, by its name in `folder` or its own path.

    A text file is `text` alone. Raises UserError as `load_judge_prompt`.
    """
    path, names = Path(name), prompt_names(folder)
    if name in names:
        file = next(p for p in folder.iterdir() if p.name.rpartition(".")[0] == name)
        text, suffix = file.read_text("utf-8"), Path(file.name).suffix
    elif path.exists():
        text, suffix = read_text(path).replace("\r\n", "\n"), path.suffix
    elif path.suffix or len(path.parts) > 1:
        raise UserError(
            f"judge prompt file {name} does not exist; give a file or one of {', '.join(names)}"
        )
    else:
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"
        raise UserError(f"unknown judge prompt {name!r}; {hint}")
    said = _keys(text, name, keys) if suffix in (".yaml", ".yml") else {"text": text}
    return said | {"text": said["text"].removesuffix("\n")}


def _keys(text: str, name: str, keys: tuple[str, ...]) -> dict[str, str]:
    try:
        said = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an odd date
        raise UserError(f"judge prompt {name} is not YAML: {error}") from error
    known = isinstance(said, dict) and "text" in said and set(said) <= set(keys)
    if not known or not all(isinstance(value, str) for value in said.values()):
        raise UserError(
            f"judge prompt {name} must have the key text, and of {', '.join(keys)} no others, all "
            "of them strings"
        )
    return dict(said)


def _is_prompt(file: str) -> bool:
    return file.endswith((".txt", ".yaml"))
