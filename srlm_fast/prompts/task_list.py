"""The list that a model is asked to continue with new tasks: writing it, and reading it back."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path

import yaml

from srlm_fast.data.jsonl import read_text
from srlm_fast.data.records import Prompt, user
from srlm_fast.errors import UserError

_FOLDER = resources.files("srlm_fast") / "prompts" / "templates"


@dataclass(frozen=True)
class TaskList:
    """The form of the list; the fields are explained in templates/tasks.yaml."""

    heading: str
    item: str
    separator: str
    place: str

    def start(self, demos: Sequence[str]) -> tuple[Prompt, str]:
        """The user turn, and the start of the answer: up to where the text of a new task begins."""
        items = [self._item(number, demo) for number, demo in enumerate(demos, 1)]
        opening = self._item(len(demos) + 1, "")
        if self.place == "user":
            listed = self.heading.rstrip() + "\n\n" + self.separator.join(items)
            return user(listed), opening.rstrip()
        return user(self.heading.strip()), self.separator.join([*items, opening]).rstrip()

    def stop(self, number: int) -> tuple[str, ...]:
        """What the model must not begin: item `number`. Nothing where items are not numbered."""
        mark = self.item.partition("{task}")[0].rstrip()
        numbered = self.separator + mark.replace("{number}", str(number))
        return (numbered,) if "{number}" in mark else ()

    def tasks(self, completion: str) -> list[str]:
        """The tasks of what the model wrote after `start`, each on one line; the first may be ''.

        A task ends where the next item or a blank line begins.
        """
        mark = _spaced(self.separator + self.item.partition("{task}")[0].rstrip())
        pieces = re.split(rf"{mark}(?:\s+|\Z)", completion)
        return [
            one_line(re.split(r"\n\s*\n", piece.strip())[0], self.separator) for piece in pieces
        ]

    def _item(self, number: int, task: str) -> str:
        return self.item.replace("{number}", str(number)).replace("{task}", task)


def one_line(text: str, separator: str = "") -> str:
    """`text` with runs of white space made single spaces, and without a separator at its end."""
    return " ".join(text.split()).removesuffix(separator.strip()).rstrip()


def _spaced(literal: str) -> str:
    """A pattern for `literal` with white space free, except that a line break must be one."""
    parts = (
        re.escape(part) if part.strip() else r"[^\S\n]*\n\s*+" if "\n" in part else r"\s*"
        for part in re.split(r"(\s+)", literal)
        if part
    )
    return "".join(parts).replace(re.escape("{number}"), r"\d+")


def task_list_names() -> list[str]:
    """Names of the task lists that ship with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in _FOLDER.iterdir() if p.name.endswith(".yaml")
    )


def load_task_list(name: str) -> TaskList:
    """The task list of this name, or of this YAML file.

    Raises UserError on an unknown name (with the nearest one), a missing or unreadable file, or
    a wrong key.
    """
    path = Path(name)
    if name in task_list_names():
        text = (_FOLDER / f"{name}.yaml").read_text("utf-8")
    elif path.exists():
        text = read_text(path)
    elif path.suffix or len(path.parts) > 1:
        known = ", ".join(task_list_names())
        raise UserError(
            f"prompt template file {name} does not exist; give a file or one of {known}"
        )
    else:
        close = difflib.get_close_matches(name, task_list_names(), n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(task_list_names())}"
        raise UserError(f"unknown prompt template {name!r}; {hint}")
    return _parse(name, text)


def _parse(name: str, text: str) -> TaskList:
    try:
        tree = yaml.safe_load(text)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: 2024-13-45 is no day
        why = " ".join(str(error).split())
        raise UserError(f"prompt template {name} is not YAML: {why}") from error
    keys = [f.name for f in fields(TaskList)]
    if not isinstance(tree, dict) or set(tree) != set(keys):
        raise UserError(f"prompt template {name} must have exactly the keys {', '.join(keys)}")
    if not all(isinstance(value, str) for value in tree.values()):
        raise UserError(f"prompt template {name}: the values of all keys must be strings")
    if tree["item"].count("{task}") != 1 or not tree["item"].partition("{task}")[0].strip():
        raise UserError(f"prompt template {name}: item needs a mark and then one {{task}}")
    if tree["place"] not in ("user", "assistant"):
        raise UserError(f"prompt template {name}: place must be user or assistant")
    return TaskList(**tree)
