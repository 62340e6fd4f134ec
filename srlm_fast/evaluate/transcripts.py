"""What was said: candidates with their judgements, and the models' answers side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import TypeVar

from srlm_fast.data.records import Judgement, Pair, Prompt, Record, Sample
from srlm_fast.evaluate.markup import Markup, tag

R = TypeVar("R", bound=Record)


def round_transcripts(folder: Path, limit: int) -> list[Markup]:
    """The first `limit` prompts of a round's folder: not selected, so failures show too."""
    numbered = enumerate(_records(folder / "samples.jsonl", Sample))
    by_prompt = groupby(numbered, key=lambda item: item[1].prompt)
    groups = [list(group) for _, group in islice(by_prompt, limit)]
    if not groups:
        return []
    last = groups[-1][-1][0]
    judged = takewhile(
        lambda verdict: verdict.sample is not None and verdict.sample <= last,
        _records(folder / "judgements.jsonl", Judgement),
    )
    verdicts = {verdict.sample: verdict for verdict in judged}
    # Pairs stand in the order of their prompts, one for each at most.
    pairs = {pair.prompt: pair for pair in islice(_records(folder / "pairs.jsonl", Pair), limit)}
    made = (folder / "pairs.jsonl").is_file()
    return [_transcript(group, verdicts, pairs.get(group[0][1].prompt), made) for group in groups]


def answers_by_model(folder: Path, models: Sequence[str], limit: int) -> list[Markup]:
    """The first sample of every model for the first `limit` test prompts."""
    answers: dict[Prompt, list[tuple[str, Sample]]] = {}
    for name in models:
        by_prompt = groupby(_records(folder / f"{name}.jsonl", Sample), key=lambda s: s.prompt)
        for prompt, samples in islice(by_prompt, limit):
            answers.setdefault(prompt, []).append((name, next(samples)))
    return [
        _article(
            prompt,
            [_response(s, [tag("strong", name)], Markup("")) for name, s in given],
        )
        for prompt, given in islice(answers.items(), limit)
    ]


def _records(path: Path, cls: type[R]) -> Iterator[R]:
    """Row by row, since a report needs the first few of what may be a large file."""
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield cls.from_json(json.loads(line))


def _transcript(
    group: Sequence[tuple[int, Sample]],
    verdicts: Mapping[int | None, Judgement],
    pair: Pair | None,
    makes_pairs: bool,
) -> Markup:
    responses = []
    for row, sample in group:
        verdict = verdicts.get(row)
        role = _role(sample, pair) if verdict else None
        marks = [tag("span", role, class_=f"mark {role}")] if role else []
        responses.append(_response(sample, [*marks, _score(verdict)], _votes(verdict)))
    text = "No pair was made of this prompt."
    note = [tag("p", text, class_="quiet")] if makes_pairs and not pair else []
    return _article(group[0][1].prompt, [*responses, *note])


def _role(sample: Sample, pair: Pair | None) -> str | None:
    if pair and sample.response_ids == pair.chosen_ids:
        return "chosen"
    return "rejected" if pair and sample.response_ids == pair.rejected_ids else None


def _score(verdict: Judgement | None) -> Markup:
    if verdict is None:
        return tag("span", "not judged", class_="quiet")
    if verdict.score is None:
        return tag("span", f"no score: {verdict.invalid or 'unparsable'}", class_="quiet")
    return tag("strong", f"{verdict.score:.2f}")


def _votes(verdict: Judgement | None) -> Markup:
    if verdict is None or not verdict.votes:
        return Markup("")
    rows = [
        tag("li", tag("strong", f"{v.score:g}" if v.score is not None else f"{v.invalid}"),
            tag("pre", v.text, dir="auto"))
        for v in verdict.votes
    ]  # fmt: skip
    noun = "judgement" if len(rows) == 1 else "judgements"
    return tag("details", tag("summary", f"{len(rows)} {noun}"), tag("ul", *rows), class_="votes")


def _article(prompt: Prompt, responses: Sequence[Markup]) -> Markup:
    turns = [
        tag("div", tag("span", m.role, class_="role"), tag("pre", m.content, dir="auto"))
        for m in prompt
    ]
    return tag("article", tag("div", *turns, class_="prompt"), *responses, class_="transcript")


def _response(sample: Sample, heading: Sequence[Markup], votes: Markup) -> Markup:
    length = f"{len(sample.response_ids)} tokens"
    ending = "" if sample.finish_reason == "stop" else ", cut off at the limit"
    return tag(
        "div",
        tag("p", *heading, tag("span", length + ending, class_="quiet"), class_="heading"),
        tag("pre", sample.response, dir="auto"),
        votes,
        class_="response",
    )
