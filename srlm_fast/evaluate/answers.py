"""Answers of one model to the questions of AlpacaEval or MT-bench, in the files they judge.

    python -m srlm_fast.evaluate.answers alpaca_eval --model runs/r/models/M3 \\
        --questions alpaca_eval.json --out M3.json
    python -m srlm_fast.evaluate.answers mt_bench --model runs/r/models/M3 \\
        --questions question.jsonl --out model_answer/M3.jsonl

The questions are the tools' own files, which they fetch or bring along.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

from srlm_fast.data.exports import alpaca_eval_row, mt_bench_row
from srlm_fast.data.jsonl import read_rows, write_json, write_jsonl
from srlm_fast.data.records import Message, Prompt
from srlm_fast.data.template import ChatTemplate
from srlm_fast.errors import UserError
from srlm_fast.model.load import eos_token_ids, load_model, load_tokenizer, resolve_device
from srlm_fast.sampler import Sampler, SamplingParams

# FastChat's temperature_config; a category that is not in it has 0.7.
MT_BENCH_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
    "reasoning": 0.0, "stem": 0.1, "humanities": 0.1, "arena-hard-200": 0.0,
}  # fmt: skip
_LOG = getLogger(__name__)

Replies = Sequence[Sequence[str]]  # of each question, one to each turn


@dataclass(frozen=True)
class Question:
    """What the user says, turn by turn; `row` is the question as its file has it."""

    turns: tuple[str, ...]
    temperature: float
    row: Mapping[str, Any]


def alpaca_eval_questions(path: Path, temperature: float | None) -> list[Question]:
    """A .json list of rows with `instruction`, at 0.7 unless a temperature is given.

    Raises UserError, as `mt_bench_questions` does, where a row is another.
    """
    at = 0.7 if temperature is None else temperature
    return [Question((_field(row, "instruction", str, path),), at, row) for row in _rows(path)]


def mt_bench_questions(path: Path, temperature: float | None) -> list[Question]:
    """FastChat's question.jsonl: `question_id`, `category`, `turns`; each at its category's
    temperature unless one is given."""
    questions = []
    for row in _rows(path):
        turns, category = _field(row, "turns", list, path), _field(row, "category", str, path)
        _field(row, "question_id", (int, str), path)
        at = MT_BENCH_TEMPERATURES.get(category, 0.7) if temperature is None else temperature
        questions.append(Question(tuple(map(str, turns)), at, row))
    return questions


def answer(
    sampler: Sampler,
    template: ChatTemplate,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[str]]:
    """The reply to each turn of each question; every question's turn is sampled in one call.

    A reply is cut where the context ends, and empty (with a warning) where it is full already.
    """
    talks: list[Prompt] = [()] * len(questions)
    replies: list[list[str]] = [[] for _ in questions]
    for turn in range(max((len(q.turns) for q in questions), default=0)):
        asked = [i for i, question in enumerate(questions) if turn < len(question.turns)]
        for i in asked:
            talks[i] = (*talks[i], Message("user", questions[i].turns[turn]))
        ids = {i: template.encode_prompt(talks[i]) for i in asked}
        room = {i: min(max_new_tokens, sampler.context - len(ids[i])) for i in asked}
        fits = [i for i in asked if room[i] > 0]
        params = [
            SamplingParams(
                temperature=questions[i].temperature, top_p=top_p, max_tokens=room[i], seed=seed
            )
            for i in fits
        ]
        outputs = sampler.generate([ids[i] for i in fits], params, progress="answering")
        texts = {i: o.outputs[0].text.strip() for i, o in zip(fits, outputs, strict=True)}
        if full := len(asked) - len(fits):
            _LOG.warning("turn %d: %d replies are empty, as the context was full", turn + 1, full)
        for i in asked:
            replies[i].append(texts.get(i, ""))
            talks[i] = (*talks[i], Message("assistant", replies[i][-1]))
    return replies


def _rows(path: Path) -> list[dict[str, Any]]:
    if not (rows := read_rows(path)):
        raise UserError(f"{path} has no questions")
    return rows


def _field(row: Mapping[str, Any], name: str, kind: Any, path: Path) -> Any:
    if not isinstance(row.get(name), kind) or row[name] in ("", []):
        raise UserError(
            f"{path}: a question has no usable {name!r}; give the tool's own file of questions"
        )
    return row[name]


def _write_alpaca_eval(path: Path, questions: Sequence[Question], replies: Replies) -> None:
    rows = [
        alpaca_eval_row(q.turns[0], r[0], path.stem, q.row.get("dataset", "alpaca_eval"))
        for q, r in zip(questions, replies, strict=True)
    ]
    write_json(path, rows)


def _write_mt_bench(path: Path, questions: Sequence[Question], replies: Replies) -> None:
    rows = [
        mt_bench_row(q.row["question_id"], r, path.stem)
        for q, r in zip(questions, replies, strict=True)
    ]
    write_jsonl(path, rows)


class Format(NamedTuple):
    """How a tool's questions are read, and the answers written to a file; the replies' limit."""

    read: Callable[[Path, float | None], list[Question]]
    write: Callable[[Path, Sequence[Question], Replies], None]
    max_new_tokens: int


FORMATS = {
    "alpaca_eval": Format(alpaca_eval_questions, _write_alpaca_eval, 2048),
    "mt_bench": Format(mt_bench_questions, _write_mt_bench, 1024),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 2 for a mistake of the user."""
    args = _parse(arguments)
    try:
        _run(args, FORMATS[args.format])
    except UserError as error:
        sys.stderr.write(f"srlm_fast: {error}\n")
        return 2
    return 0


def _run(args: argparse.Namespace, form: Format) -> None:
    limit = args.max_new_tokens or form.max_new_tokens
    try:  # what would fail after minutes otherwise
        SamplingParams(temperature=args.temperature or 0.0, top_p=args.top_p, max_tokens=limit)
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{error}; --help lists the options") from error
    questions = form.read(args.questions, args.temperature)
    model = load_model(args.model, device=resolve_device(args.device), dtype=args.dtype)
    tokenizer = load_tokenizer(args.model)
    template = ChatTemplate(tokenizer, args.template, eos_token_ids(model, tokenizer))
    sampler = Sampler(model, tokenizer, eos_ids=template.eos_ids)
    replies = answer(
        sampler, template, questions, max_new_tokens=limit, top_p=args.top_p, seed=args.seed
    )
    form.write(args.out, questions, replies)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m srlm_fast.evaluate.answers", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("format", choices=list(FORMATS))
    add("--model", required=True, help="folder or hub id; its chat template asks the questions")
    add("--questions", type=Path, required=True, help="the tool's own file")
    add("--out", type=Path, required=True, help="the file to write; its stem names the model")
    add("--max_new_tokens", type=int, default=0, help="default: 2048, with mt_bench 1024")
    add("--temperature", type=float, help="default: 0.7, with mt_bench that of the category")
    add("--top_p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--template", default="auto", help="a chat template instead of the model's own")
    add("--device", default="auto")
    add("--dtype", default="auto")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
