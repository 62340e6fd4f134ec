"""How well a judge's scores agree with a known ranking (arXiv 2401.10020, section 3.1).

The paper does not say what it does with tied scores, nor whether it averages over prompts or pools
them, and its numbers fit no single convention. So each one is computed and named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from srlm_fast.evaluate.correlation import kendall_tau, mean, sign, spearman

PERFECT_SCORE = 5.0


class PairCounts(NamedTuple):
    """The pairs of responses that humans order strictly, by what the judge makes of them."""

    agree: int = 0
    tie: int = 0
    disagree: int = 0
    lost: int = 0  # a response has no score

    def accuracy(self) -> dict[str, float | None]:
        """Share of agreeing pairs; the judge's ties count as wrong, half, not at all, or right.

        Lost pairs are wrong, or with `drop` not counted either.
        """
        return {
            "wrong": _ratio(self.agree, sum(self)),
            "half": _ratio(self.agree + self.tie / 2, sum(self)),
            "drop": _ratio(self.agree, self.agree + self.disagree),
            "right": _ratio(self.agree + self.tie, sum(self)),
        }


class Group(NamedTuple):
    """The scored responses to one prompt."""

    scores: list[float]
    goodness: list[float]  # minus the human rank: higher is better, as for scores
    best: float  # the highest goodness in the prompt, unscored responses included
    lost: int  # strictly ranked pairs in which a response has no score
    complete: bool  # every response has a score


def reward_model_metrics(
    scores: Sequence[Sequence[float | None]],
    ranks: Sequence[Sequence[float]],
    perfect: float | None = PERFECT_SCORE,
) -> dict[str, Any]:
    """Agreement of `scores` (higher is better) with `ranks` (0 is best), a row for each prompt.

    A response whose score is None (unparsable) is counted in `unscored`, and earns the judge
    nothing: its pairs and its prompt's ordering count as wrong, and correlations are those of
    the scored responses, 0 where there are fewer than two. Whatever has no defined value is None.

    pairwise_accuracy: over the strictly ranked pairs of all prompts, by tie policy (`wrong`,
        `half`, `drop`, `right`); `_per_prompt`: the mean of each prompt's own accuracy.
    five_best: share of the responses with the `perfect` score (None: the judge's scale has none)
        that share their prompt's best human rank;
        `_per_prompt`: the mean over prompts that have such a response. `fives` counts them.
    exact_match: share of prompts whose whole ordering, ties included, is the human one. Prompts
        whose human ranks are all equal are not asked.
    spearman, kendall_tau (tau-b): mean over the prompts with some human order. A judge who scores
        a whole prompt alike earns 0 there, and `constant_prompts` counts it. `_pooled`: one
        correlation over the responses of all prompts.
    """
    groups = [_group(s, r) for s, r in zip(scores, ranks, strict=True)]
    ranked = [g for g, r in zip(groups, ranks, strict=True) if len(set(r)) > 1]
    counts = [_count_pairs(g) for g in ranked]
    pairs = PairCounts(*map(sum, zip(*counts, strict=True)))
    fives = [_fives(g, perfect) for g in groups]
    pooled = [s for g in groups for s in g.scores], [r for g in groups for r in g.goodness]
    return {
        "prompts": len(ranked),
        "responses": len(pooled[0]),
        "unscored": sum(score is None for row in scores for score in row),
        "pairs": sum(pairs),
        "tied_pairs": pairs.tie,
        "fives": sum(map(len, fives)),
        "constant_prompts": sum(len(set(g.scores)) == 1 for g in ranked),
        "pairwise_accuracy": pairs.accuracy(),
        "pairwise_accuracy_per_prompt": {
            policy: _mean_defined([c.accuracy()[policy] for c in counts])
            for policy in pairs.accuracy()
        },
        "five_best": mean([best for row in fives for best in row]),
        "five_best_per_prompt": _mean_defined([mean(row) for row in fives]),
        "exact_match": mean([g.complete and _same_order(g) for g in ranked]),
        "spearman": _mean_correlation(spearman, ranked),
        "spearman_pooled": spearman(*pooled),
        "kendall_tau": _mean_correlation(kendall_tau, ranked),
        "kendall_tau_pooled": kendall_tau(*pooled),
    }


def length_bias(
    scores: Sequence[Sequence[float | None]], lengths: Sequence[Sequence[int]]
) -> float | None:
    """Spearman's correlation of scores with lengths, a mean over the prompts whose scored responses
    differ in length; 0 for a prompt whose scores are all equal."""
    scored = [
        [(s, n) for s, n in zip(row, sizes, strict=True) if s is not None]
        for row, sizes in zip(scores, lengths, strict=True)
    ]
    known = [tuple(zip(*row, strict=True)) for row in scored if len({n for _, n in row}) > 1]
    return mean([spearman(row, sizes) or 0.0 for row, sizes in known])


def _group(scores: Sequence[float | None], ranks: Sequence[float]) -> Group:
    kept = [(s, -r) for s, r in zip(scores, ranks, strict=True) if s is not None]
    ordered = sum(a != b for a, b in combinations(ranks, 2))
    return Group(
        lost=ordered - sum(a != b for (_, a), (_, b) in combinations(kept, 2)),
        scores=[s for s, _ in kept],
        goodness=[g for _, g in kept],
        best=-min(ranks, default=0.0),
        complete=len(kept) == len(scores),
    )


def _count_pairs(group: Group) -> PairCounts:
    agreements = [
        sign(group.scores[i] - group.scores[j]) * sign(group.goodness[i] - group.goodness[j])
        for i, j in combinations(range(len(group.scores)), 2)
        if group.goodness[i] != group.goodness[j]
    ]
    return PairCounts(agreements.count(1), agreements.count(0), agreements.count(-1), group.lost)


def _fives(group: Group, perfect: float | None) -> list[bool]:
    """Of each response with a perfect score: is it (one of) the best by human rank?"""
    pairs = zip(group.scores, group.goodness, strict=True)
    return [g == group.best for score, g in pairs if score == perfect]


def _same_order(group: Group) -> bool:
    return all(
        sign(group.scores[i] - group.scores[j]) == sign(group.goodness[i] - group.goodness[j])
        for i, j in combinations(range(len(group.scores)), 2)
    )


def _mean_correlation(
    correlation: Callable[[Sequence[float], Sequence[float]], float | None], groups: Sequence[Group]
) -> float | None:
    return mean([correlation(g.scores, g.goodness) or 0.0 for g in groups])


def _mean_defined(values: Sequence[float | None]) -> float | None:
    return mean([v for v in values if v is not None])


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None
