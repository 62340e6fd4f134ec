"""Evaluation fine-tuning data: rows that teach a model to judge (SRLM section 2.2)."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from srlm_fast.config import EFTConfig
from srlm_fast.data.records import Example, Judgement, RankedGroup
from srlm_fast.judge.judge_prompt import JudgePrompt
from srlm_fast.judge.parser import MAX_SCORE
from srlm_fast.judge.prompted import PromptedJudge

Row = tuple[Example, float]


@dataclass
class _Harvest:
    """Rows of each kept group, the reasons of the others, how many each try kept, and every score
    that was given on the way."""

    rows: dict[int, list[Row]]
    dropped: Counter[str]
    kept_by_try: list[int]
    judged: list[float]


def build_eft(
    judge: PromptedJudge | None,
    groups: Sequence[RankedGroup],
    config: EFTConfig,
    prompt: JudgePrompt,
    *,
    seed: int,
) -> tuple[list[Example], dict[str, Any]]:
    """The EFT rows of human-ranked groups, and a report of what became of the groups and rows.

    Target "judge": `judge` writes one judgement per response; a group is kept when its scores are
    strictly in the human order (equal ranks ask for nothing), tried up to `config.max_tries` times.
    With `config.allow_ties` equal scores contradict no order, but must not be all there is.
    Target "rank": the row says `Score: n` alone, with n from the human rank, and `judge` is unused.
    Either way the most frequent score then keeps at most `config.modal_cap` times as many rows as
    the runner-up. Groups without a strict order teach nothing and are dropped.

    The report's histograms are of scores: `scores_judged` of all judgements that parsed, in every
    try; `scores_before` of the rows of the groups kept; `scores_after` of the rows returned.
    """
    ranked = [group for group in groups if len(set(group.ranks)) > 1]
    if config.target == "rank":
        harvest = _from_ranks(ranked, prompt)
    elif judge is None:
        raise ValueError("target 'judge' needs a judge")
    else:
        harvest = _from_judge(judge, ranked, config, prompt, seed)
    harvest.dropped["no strict order"] += len(groups) - len(ranked)
    rows = [row for index in sorted(harvest.rows) for row in harvest.rows[index]]
    balanced = _cap_modal_score(rows, config.modal_cap, random.Random(f"{seed}/modal score"))
    report = {
        "target": config.target,
        "groups": len(groups),
        "groups_kept": len(harvest.rows),
        "groups_dropped": dict(+harvest.dropped),
        "groups_kept_by_try": harvest.kept_by_try,
        "rows": len(balanced),
        "rows_dropped": {"modal score": len(rows) - len(balanced)},
        "scores_judged": _histogram(harvest.judged),
        "scores_before": _histogram([score for _, score in rows]),
        "scores_after": _histogram([score for _, score in balanced]),
    }
    return [example for example, _ in balanced], report


def _from_judge(
    judge: PromptedJudge,
    groups: Sequence[RankedGroup],
    config: EFTConfig,
    prompt: JudgePrompt,
    seed: int,
) -> _Harvest:
    """Judges all groups that have not agreed yet, once per try."""
    requests = [[prompt.fill(group.prompt, r) for r in group.responses] for group in groups]
    rows: dict[int, list[Row]] = {}
    reasons: dict[int, str] = {}
    kept_by_try, scores = [], []
    for attempt in range(config.max_tries):
        waiting = [index for index in range(len(groups)) if index not in rows]
        if not waiting:
            break
        judged = iter(
            judge.judge(
                [request for index in waiting for request in requests[index]],
                num_samples=1,
                seed=random.Random(f"{seed}/eft try {attempt}").getrandbits(32),
            )
        )
        for index in waiting:
            verdicts = [next(judged) for _ in requests[index]]
            scores += [verdict.score for verdict in verdicts if verdict.score is not None]
            reason = _disagreement(verdicts, groups[index].ranks, config.allow_ties)
            if reason is None:
                rows[index] = [
                    (Example(request, prompt.lesson(verdict.votes[0].text)), verdict.score)
                    for request, verdict in zip(requests[index], verdicts, strict=True)
                    if verdict.score is not None
                ]
            else:
                reasons[index] = reason
        kept_by_try.append(sum(index in rows for index in waiting))
    dropped = Counter(reason for index, reason in reasons.items() if index not in rows)
    return _Harvest(rows, dropped, kept_by_try, scores)


def _disagreement(
    verdicts: Sequence[Judgement], ranks: Sequence[float], allow_ties: bool
) -> str | None:
    """Why the scores do not give the human order (rank 0 is best), or None when they do."""
    for verdict in verdicts:
        if verdict.score is None:
            reason = verdict.votes[0].invalid if verdict.votes else verdict.invalid
            return reason or "no score"
    scored = [
        (rank, v.score) for rank, v in zip(ranks, verdicts, strict=True) if v.score is not None
    ]
    leads = [
        better_score - worse_score
        for better, better_score in scored
        for worse, worse_score in scored
        if better < worse
    ]
    agree = min(leads) >= 0 < max(leads) if allow_ties else min(leads) > 0
    return None if agree else "order disagrees"


def _from_ranks(groups: Sequence[RankedGroup], prompt: JudgePrompt) -> _Harvest:
    """Scores from 5 (best) to 0 (worst), evenly over the distinct ranks, halves rounded up."""
    rows: dict[int, list[Row]] = {}
    for index, group in enumerate(groups):
        levels = sorted(set(group.ranks), reverse=True)
        step = MAX_SCORE / (len(levels) - 1)
        rows[index] = []
        for response, rank in zip(group.responses, group.ranks, strict=True):
            score = math.floor(levels.index(rank) * step + 0.5)
            rows[index].append(
                (Example(prompt.fill(group.prompt, response), f"Score: {score}"), score)
            )
    return _Harvest(rows, Counter(), [], [])


def _cap_modal_score(rows: Sequence[Row], cap: float, rng: random.Random) -> list[Row]:
    """Drops rows of the most frequent score at random; with a single score there is no cap."""
    frequent = Counter(score for _, score in rows).most_common(2)
    if cap <= 0 or len(frequent) < 2:
        return list(rows)
    (modal, count), (_, runner_up) = frequent
    room = min(count, math.floor(cap * runner_up))
    modal_rows = [index for index, (_, score) in enumerate(rows) if score == modal]
    dropped = set(modal_rows) - set(rng.sample(modal_rows, room))
    return [row for index, row in enumerate(rows) if index not in dropped]


def _histogram(scores: Sequence[float]) -> dict[str, int]:
    counts = Counter(scores)
    return {f"{score:g}": counts[score] for score in sorted(counts)}
