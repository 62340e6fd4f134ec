"""Readers of the files and HF datasets that runs start from.

A `source` is a file (.jsonl or .json, and .txt for prompts; gzipped or not) or, where `datasets` is
installed, the name of an HF dataset, `owner/name` or `owner/name:split`. Every reader raises
UserError for a missing file, wrong columns, a broken row, and when nothing usable is left. It adds
what it left out, by reason, to the Counter `dropped`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from srlm_fast.data.jsonl import read_rows, read_text
from srlm_fast.data.records import Message, Preference, Prompt, RankedGroup, user
from srlm_fast.errors import UserError

Row = Mapping[str, Any]
T = TypeVar("T")

FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".gz")
ROLES = ("system", "user", "assistant")
SCORE_COLUMNS = ("{}_score", "score_{}", "{}-rating")


def read_trees(
    source: str, lang: str = "en", dropped: Counter[str] | None = None
) -> list[RankedGroup]:
    """The first turns of Open Assistant message trees: a prompt and its replies, best first.

    Reads message trees (a row is `{"prompt": {"text": ..., "replies": [...]}}`) and flat messages
    as in `OpenAssistant/oasst1`. Deleted messages, other languages and replies without a rank are
    left out, and then every tree that has no reply left.
    """
    left_out: Counter[str] = Counter()
    rows = _rows(source)
    if "parent_id" in rows[0]:
        rows = _grow_trees(rows, source)
    groups = []
    for number, row in enumerate(rows, start=1):
        root = row.get("prompt")
        if not isinstance(root, dict) or "replies" not in root:
            raise _wrong_columns(source, number, row, "a message tree: prompt with replies")
        try:
            group = _ranked_group(root, lang, left_out)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{source}, row {number}: broken message tree: {error!r}") from error
        groups += [group] if group else []
    return _some(groups, source, left_out, dropped)


def read_preferences(source: str, dropped: Counter[str] | None = None) -> list[Preference]:
    """Rows of `prompt, chosen, rejected`: strings, or message lists, which may hold the prompt too.

    Scores are `chosen_score`, `score_chosen` or `chosen-rating`, and their like of `rejected`. Rows
    with an empty reply, equal replies, or other than one turn after the prompt are left out.
    """
    return [row for row in read_preference_rows(source, dropped) if row]


def read_preference_rows(
    source: str, dropped: Counter[str] | None = None
) -> list[Preference | None]:
    """Every row that `read_preferences` reads, with None in the place of one that it leaves out."""
    left_out: Counter[str] = Counter()
    pairs: list[Preference | None] = []
    for number, row in enumerate(_rows(source), start=1):
        if "chosen" not in row or "rejected" not in row:
            raise _wrong_columns(source, number, row, "prompt, chosen and rejected")
        where = f"{source}, row {number}"
        given = _turns(row["prompt"], "user", where) if row.get("prompt") is not None else ()
        chosen = _turns(row["chosen"], "assistant", where)
        rejected = _turns(row["rejected"], "assistant", where)
        shared = _shared_start(chosen, rejected)
        prompt = shared or given
        if not prompt:
            expected = "prompt, or else chosen and rejected as message lists that begin with it"
            raise _wrong_columns(source, number, row, expected)
        replies = chosen[len(shared) :], rejected[len(shared) :]
        if reason := _unfit_replies(*replies):
            left_out[f"pair: {reason}"] += 1
            pairs.append(None)
            continue
        better, worse = (turns[0].content for turns in replies)
        scores = (_score(row, side, where) for side in ("chosen", "rejected"))
        pairs.append(Preference(prompt, better, worse, *scores))
    _some([row for row in pairs if row], source, left_out, dropped)
    return pairs


def read_prompts(source: str, dropped: Counter[str] | None = None) -> list[Prompt]:
    """Prompts: one a line (.txt), or rows with `prompt`, `instruction` (and `input`) or `messages`.

    Of a conversation, the turns up to the last one of the user.
    """
    left_out: Counter[str] = Counter()
    if source.removesuffix(".gz").endswith(".txt"):
        lines = map(str.strip, read_text(source).split("\n"))
        return _some([user(line) for line in lines if line], source)
    prompts: list[Prompt] = []
    for number, row in enumerate(_rows(source), start=1):
        key = next((k for k in ("prompt", "instruction", "messages") if k in row), "")
        if not key:
            raise _wrong_columns(source, number, row, "prompt, instruction or messages")
        turns = _turns(row[key], "user", f"{source}, row {number}")
        if key == "instruction" and row.get("input") and turns:
            turns = user(f"{turns[0].content}\n\n{row['input']}")
        asked = max((i for i, m in enumerate(turns) if m.role == "user"), default=-1)
        if asked >= 0 and turns[asked].content.strip():
            prompts.append(turns[: asked + 1])
        else:
            left_out["prompt: empty"] += 1
    return _some(prompts, source, left_out, dropped)


def _rows(source: str) -> Sequence[Row]:
    is_file = Path(source).exists() or source.endswith(FILE_SUFFIXES)
    return _some(read_rows(source) if is_file else _hub_rows(source), source)


def _hub_rows(source: str) -> list[dict[str, Any]]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{source} is no file; if it names an HF dataset, pip install datasets to read it"
        )
    datasets: Any = importlib.import_module("datasets")
    name, _, split = source.partition(":")
    try:
        return list(datasets.load_dataset(name, split=split or "train"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the HF dataset {source}: {error}") from error


def _some(
    found: list[T],
    source: str,
    left_out: Mapping[str, int] | None = None,
    dropped: Counter[str] | None = None,
) -> list[T]:
    """`found`, which must not be empty; what this source left out is added to `dropped`, which
    counts for other sources too and so cannot say why this one is empty."""
    left_out = left_out or {}
    if dropped is not None:
        dropped.update(left_out)
    if not found:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in left_out.items())
        raise UserError(f"{source} has no usable row: {reasons or 'it is empty'}")
    return found


def _wrong_columns(source: str, number: int, row: Row, expected: str) -> UserError:
    found = ", ".join(row) or "none"
    return UserError(f"{source}, row {number}: expected {expected}; found the columns {found}")


def _grow_trees(messages: Sequence[Row], source: str) -> list[Row]:
    """Trees of depth one from flat messages."""
    replies = defaultdict(list)
    for number, message in enumerate(messages, start=1):
        for key in ("parent_id", "message_id"):
            if not isinstance(message.get(key), str | int | None):
                raise UserError(f"{source}, row {number}: {key} is {message[key]!r}, not text")
        replies[message.get("parent_id")].append(message)
    return [
        {"prompt": {**r, "replies": replies[r.get("message_id")]}} for r in replies.pop(None, [])
    ]


def _ranked_group(root: Row, lang: str, dropped: Counter[str]) -> RankedGroup | None:
    if reason := _unfit_message(root, lang):
        dropped[f"tree: {reason}"] += 1
        return None
    ranked = []
    for reply in root["replies"]:
        reason = _unfit_message(reply, lang) or ("no rank" if reply.get("rank") is None else "")
        if reason:
            dropped[f"reply: {reason}"] += 1
        else:
            ranked.append((float(reply["rank"]), reply["text"]))
    if not ranked:
        dropped["tree: no ranked reply"] += 1
        return None
    ranked.sort(key=lambda reply: reply[0])
    ranks, texts = zip(*ranked, strict=True)
    return RankedGroup(user(root["text"]), texts, ranks)


def _unfit_message(message: Row, lang: str) -> str:
    """Why an Open Assistant message cannot be used, or nothing."""
    if message.get("deleted"):
        return "deleted"
    if message.get("lang", lang) != lang:
        return "other language"
    return "" if message["text"].strip() else "empty"


def _turns(value: Any, role: str, where: str) -> Prompt:
    """The turns of a column that holds text, said by `role`, or a list of messages."""
    if isinstance(value, str):
        return (Message(role, value),)
    try:
        turns = tuple(Message(m["role"], m["content"]) for m in value)
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: expected text or a list of role, content messages") from error
    for turn in turns:
        if turn.role not in ROLES or not isinstance(turn.content, str):
            raise UserError(f"{where}: a message needs text and a role of {', '.join(ROLES)}")
    return turns


def _shared_start(chosen: Prompt, rejected: Prompt) -> Prompt:
    """The prompt that both conversations begin with; their last turns are replies in any case."""
    length = 0
    for ours, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
        if ours != theirs:
            break
        length += 1
    return chosen[:length]


def _unfit_replies(chosen: Prompt, rejected: Prompt) -> str:
    for turns in (chosen, rejected):
        if len(turns) != 1 or turns[0].role != "assistant":
            return "not one reply after the prompt"
        if not turns[0].content.strip():
            return "empty reply"
    return "equal replies" if chosen == rejected else ""


def _score(row: Row, side: str, where: str) -> float | None:
    value = next((row[c] for n in SCORE_COLUMNS if (c := n.format(side)) in row), None)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: the score of {side} is {value!r}, not a number") from error
