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
    """`outcome_rates` of `scores` against `others`, prompt by prompt: the higher score wins."""
    return outcome_rates([_outcome(a, b) for a, b in zip(scores, others, strict=True)])


def outcome_rates(outcomes: Sequence[float | None]) -> dict[str, float | None]:
    """Shares of prompts won (an outcome of 1), tied (1/2) and lost (0).

    A prompt without an outcome, None, is left out and counted in `unscored`.
    """
    known = [outcome for outcome in outcomes if outcome is not None]
    return {
        "win": mean([outcome == 1 for outcome in known]),
        "tie": mean([0 < outcome < 1 for outcome in known]),
        "lose": mean([outcome == 0 for outcome in known]),
        "prompts": len(known),
        "unscored": len(outcomes) - len(known),
    }


def _outcome(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    return 0.5 if abs(a - b) <= TIE else float(a > b)
