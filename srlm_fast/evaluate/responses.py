"""How good a model's responses are: true score, lengths, win rates.

Responses come in groups, one for each prompt; a score of a prompt is the mean over its group, and
standard errors are over prompts, since samples of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from srlm_fast.data.records import Prompt, Sample
from srlm_fast.evaluate.correlation import mean, standard_error

Oracle = Callable[[Prompt, str], Mapping[str, int]]

# Means of the same votes in another order differ in the last bits; that is no win.
TIE = 1e-9


def oracle_metrics(
    oracle: Oracle, groups: Sequence[Sequence[Sample]]
) -> tuple[dict[str, Any], list[float]]:
    """The true score of the responses, its standard error, the rate of each criterion.

    Returns the metrics and each prompt's mean score.
    """
    marks = [[oracle(s.prompt, s.response) for s in group] for group in groups]
    per_prompt = [sum(sum(m.values()) for m in group) / len(group) for group in marks]
    every = [m for group in marks for m in group]
    metrics = {
        "oracle_score": mean(per_prompt),
        "oracle_se": standard_error(per_prompt),
        "criteria": {name: mean([m[name] for m in every]) for name in every[0]} if every else {},
    }
    return metrics, per_prompt


def mean_scores(scores: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Each prompt's mean over the scores it has; None where it has none."""
    return [mean([s for s in group if s is not None]) for group in scores]


def length_metrics(groups: Sequence[Sequence[Sample]]) -> dict[str, float | None]:
    """Mean lengths (tokens with the EOS, and characters); shares of finished and distinct ones.

    distinct_share: distinct responses over samples of a prompt, averaged over prompts.
    """
    samples = [s for group in groups for s in group]
    return {
        "mean_length": mean([len(s.response_ids) for s in samples]),
        "mean_length_chars": mean([len(s.response) for s in samples]),
        "finished_share": mean([s.finish_reason == "stop" for s in samples]),
        "distinct_share": mean([len({s.response_ids for s in g}) / len(g) for g in groups]),
    }


def win_rate(
    scores: Sequence[float | None], others: Sequence[float | None]
) -> dict[str, float | None]:
    """Shares of prompts where `scores` wins, ties or loses against `others`, prompt by prompt.

    A prompt that either side has no score for is left out, and counted in `unscored`.
    """
    both = [(a, b) for a, b in zip(scores, others, strict=True) if a is not None and b is not None]
    return {
        "win": mean([a > b + TIE for a, b in both]),
        "tie": mean([abs(a - b) <= TIE for a, b in both]),
        "lose": mean([a < b - TIE for a, b in both]),
        "prompts": len(both),
        "unscored": len(scores) - len(both),
    }
