"""CREAM: labels count as far as two generations of the model agree on them (arXiv 2410.12735).

The candidates of a prompt are ranked by the implicit rewards of the resident model M_t and of
M_{t-1}, the one that it was trained from; `tau` is Kendall's:

    r_t(y) = log pi_t(y|x) - log pi_0(y|x)        C = (tau(r_t, r_{t-1}) + 1) / 2
    L = C (-log sigmoid(beta m)) + (1 - C) (-log sigmoid(-beta m))

L is DPO with the label smoothing 1 - C of each pair, whoever judged it. C is the prompt's own
("dyn") or the mean over all prompts ("avg").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from srlm_fast.data.records import Pair, Sample
from srlm_fast.evaluate.correlation import kendall_tau, mean
from srlm_fast.judge.implicit import sequence_logp
from srlm_fast.rounds.engine import Engine

Rewards = list[list[float]]  # of each candidate of each prompt


def weighted(
    engine: Engine, pairs: Sequence[Pair], groups: Sequence[Sequence[Sample]]
) -> tuple[list[Pair], Counter[str], dict[str, Any]]:
    """`pairs`, made of the candidates `groups`, with their label smoothing; what was dropped; and
    C in mean, minimum and maximum over prompts.

    Dropped are pairs of a prompt whose candidates one of the models cannot rank, since it gives all
    the same reward.
    """
    groups = [group for group in groups if len(group) > 1]
    rates = [consistency(*both) for both in zip(*rewards(engine, groups), strict=True)]
    known = [rate for rate in rates if rate is not None]
    average = mean(known)
    if engine.config.pairs.consistency == "avg":
        rates = [None if rate is None else average for rate in rates]
    rate_of = {group[0].prompt_ids: rate for group, rate in zip(groups, rates, strict=True)}
    kept = [
        replace(pair, label_smoothing=1 - rate)
        for pair in pairs
        if (rate := rate_of[pair.prompt_ids]) is not None
    ]
    report = {"mean": average, "min": min(known, default=None), "max": max(known, default=None)}
    return kept, Counter({"no consistency": len(pairs) - len(kept)}), report


def consistency(current: Sequence[float], previous: Sequence[float]) -> float | None:
    """C of one prompt's rewards, in [0, 1]; None where either side does not rank them."""
    tau = kendall_tau(current, previous)
    return None if tau is None else (tau + 1) / 2


def rewards(engine: Engine, groups: Sequence[Sequence[Sample]]) -> tuple[Rewards, Rewards]:
    """r_t and r_{t-1} of all candidates, in nats, without beta.

    Where M_{t-1} is pi_0, the model that the run starts from, its reward is 0 for whatever it is
    given. There it ranks by its mean log-likelihood of a token, as in the authors' code.
    """
    first, previous = engine.lineage[0], engine.lineage[-2]
    policy = sequence_logp(engine.sampler, groups)
    start = sequence_logp(engine.scorer(first), groups)
    current = [a - b for a, b in zip(policy, start, strict=True)]
    if previous == first:
        lengths = [len(sample.response_ids) for group in groups for sample in group]
        before = [a / n for a, n in zip(start, lengths, strict=True)]
    else:
        earlier = sequence_logp(engine.scorer(previous), groups)
        before = [a - b for a, b in zip(earlier, start, strict=True)]
    return _in_groups(current, groups), _in_groups(before, groups)


def _in_groups(values: Sequence[float], groups: Sequence[Sequence[Sample]]) -> Rewards:
    rest = iter(values)
    return [[next(rest) for _ in group] for group in groups]
