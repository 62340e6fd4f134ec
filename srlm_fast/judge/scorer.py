"""A judge that is a function: a reward model, a ranker such as PairRM, a service."""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srlm_fast.data.records import Judgement, Prompt, Sample, Vote
from srlm_fast.errors import UserError
from srlm_fast.parallel import ALONE, Ranks

Messages = list[dict[str, str]]
# From prompts and each one's candidates to each one's scores, where higher is better, and only
# within a prompt comparable; None: this candidate has no score.
ScoreFunction = Callable[[list[Messages], list[list[str]]], Sequence[Sequence[float | None]]]


@dataclass(frozen=True)
class ScorerJudge:
    """Scores candidates by `function`, which gets conversations (role, content) and texts.

    Each of several `ranks` gives it its share of the prompts. Raises UserError where it does not
    return a score, or None, for each candidate.
    """

    function: ScoreFunction
    ranks: Ranks = ALONE

    name = "scorer"

    def score(
        self, prompts: Sequence[Prompt], candidates: Sequence[Sequence[Sample]]
    ) -> list[list[Judgement]]:
        """The function's score of each candidate; invalid where it is None or not finite."""
        mine = self.ranks.share(list(zip(prompts, candidates, strict=True)))
        return self.ranks.gather(self._score(mine) if mine else [])

    def _score(self, groups: list[tuple[Prompt, Sequence[Sample]]]) -> list[list[Judgement]]:
        conversations = [[message._asdict() for message in prompt] for prompt, _ in groups]
        texts = [[sample.response for sample in group] for _, group in groups]
        found: Any = self.function(conversations, texts)
        try:
            judged = [[_judgement(score) for score in scores] for scores in found]
        except (TypeError, ValueError) as error:
            raise UserError(f"judge.scorer must return numbers in lists: {error}") from error
        wanted, given = [len(group) for group in texts], [len(scores) for scores in judged]
        if wanted != given:
            raise UserError(
                f"judge.scorer must return one score per candidate: of {_sizes(wanted)} it made"
                f" {_sizes(given)}"
            )
        return judged


def load_scorer(path: str) -> ScoreFunction:
    """The function that `path`, module:function, names. Raises UserError when there is none."""
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module can do anything when it is imported
        raise UserError(
            f"judge.scorer: cannot import {path}: {error}; run where Python finds the module, or"
            " set PYTHONPATH"
        ) from error
    if not callable(found):
        raise UserError(f"judge.scorer: {path} is no function but a {type(found).__name__}")
    function: ScoreFunction = found
    return function


def scorer_file(path: str) -> Path | None:
    """The file of the module of `path`, which a run must not see change; None: no file."""
    file = getattr(sys.modules.get(path.partition(":")[0]), "__file__", None)
    return Path(file) if file else None


def _judgement(score: Any) -> Judgement:
    if score is None or not math.isfinite(value := float(score)):
        why = "no score" if score is None else "not finite"
        return Judgement(None, (Vote("", None, why),), why)
    return Judgement(value, (Vote("", value),))


def _sizes(sizes: Sequence[int]) -> str:
    """Group sizes in short: "3 x 2, 1 x 4"."""
    return ", ".join(f"{count} x {size}" for size, count in sorted(Counter(sizes).items())) or "0"
