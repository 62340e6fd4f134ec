"""From candidates to what is learned from: best against worst, or the best alone."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

from srlm_fast.config import PairsConfig
from srlm_fast.data.records import Judgement, Pair, Sample
from srlm_fast.judge.length import Judged, balancing_penalty, length_controlled

DEFAULT = PairsConfig()


def drop_unusable(
    candidates: Sequence[Sequence[Sample]], keep_truncated: bool = False
) -> tuple[list[list[Sample]], Counter[str]]:
    """The candidates worth judging, in order, and how many were not, by reason.

    "truncated": unfinished at the token limit (unless `keep_truncated`); "empty": no text;
    "duplicate": the token ids or the text of an earlier candidate of the same prompt.
    """
    dropped: Counter[str] = Counter()
    kept = []
    for group in candidates:
        usable: list[Sample] = []
        seen: set[tuple[int, ...] | str] = set()
        for sample in group:
            if sample.finish_reason == "length" and not keep_truncated:
                dropped["truncated"] += 1
            elif not sample.response.strip():
                dropped["empty"] += 1
            elif sample.response_ids in seen or sample.response in seen:
                dropped["duplicate"] += 1
            else:
                usable.append(sample)
                seen |= {sample.response_ids, sample.response}
        kept.append(usable)
    return kept, dropped


def select_pairs(
    candidates: Sequence[Sequence[Sample]],
    judgements: Sequence[Sequence[Judgement]],
    round: int,
    config: PairsConfig = DEFAULT,
    seed: int = 0,
) -> tuple[list[Pair], Counter[str]]:
    """Preference pairs from the judged candidates of each prompt, as `config.selection` says.

    min_max: the best against the worst (SRLM section 2.2). max_chosen: the best against another
    one, drawn by `seed` and the prompt (SPA's code, for more than two). all: each against each.
    Equal scores make no pair, and of equals the one sampled first counts as the better or worse.
    With `config.anchored_rejection` the best is one of this round's, and the worst of any round's.
    `config`'s other settings: see `judge.length`.

    A prompt without a pair is counted: "fewer than two judged" (a candidate without a finite
    score is in no pair), "none of this round judged", or "tie".
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    groups = [_judged(*group) for group in zip(candidates, judgements, strict=True)]
    penalty = config.length_penalty
    if config.balance_length:
        penalty = balancing_penalty([group for group in groups if len(group) > 1])
    for group in groups:
        group = [item.penalised(penalty) for item in group]
        own = [i for i in group if i.sample.round == round] if config.anchored_rejection else group
        if len(group) < 2:
            dropped["fewer than two judged"] += 1
            continue
        if not own:
            dropped["none of this round judged"] += 1
            continue
        found = _choose(own, group, config, seed)
        if not found:
            dropped["tie"] += 1
        pairs += [_pair(chosen, rejected, round) for chosen, rejected in found]
    return pairs, dropped


def select_positives(
    samples: Sequence[Sample], judgements: Sequence[Judgement], least: float
) -> tuple[list[Sample], Counter[str]]:
    """The judged samples that score at least `least` (SRLM appendix A.4), and what the others are:
    "no score", or "score too low". `Judgement.sample` says which sample was judged."""
    dropped: Counter[str] = Counter()
    kept = []
    for verdict in judgements:
        if verdict.score is None or not math.isfinite(verdict.score):
            dropped["no score"] += 1
        elif verdict.score < least:
            dropped["score too low"] += 1
        elif verdict.sample is not None:
            kept.append(samples[verdict.sample])
    return kept, dropped


def _judged(group: Sequence[Sample], verdicts: Sequence[Judgement]) -> list[Judged]:
    return [
        Judged(verdict.score, sample, verdict.score)
        for sample, verdict in zip(group, verdicts, strict=True)
        if verdict.score is not None and math.isfinite(verdict.score)
    ]


def _choose(
    own: list[Judged], group: list[Judged], config: PairsConfig, seed: int
) -> list[tuple[Judged, Judged]]:
    """(chosen, rejected) of one prompt; every chosen one's value is above its rejected one's.

    own: those of `group` that may be the best.
    """
    best, worst = max(own, key=lambda item: item.value), min(group, key=lambda item: item.value)
    if best.value == worst.value:
        return []
    if config.selection == "all":
        return [(a, b) for a in group for b in group if a.value > b.value]
    if config.selection == "max_chosen":
        others = [item for item in group if item.value < best.value]
        ids = ",".join(map(str, best.sample.prompt_ids))
        return [(best, random.Random(f"{seed}/{ids}").choice(others))]
    if config.length_control:
        return [length_controlled(group, config.length_control)]
    return [(best, worst)]


def _pair(chosen: Judged, rejected: Judged, round: int) -> Pair:
    return Pair(
        prompt=chosen.sample.prompt,
        prompt_ids=chosen.sample.prompt_ids,
        chosen=chosen.sample.response,
        chosen_ids=chosen.sample.response_ids,
        rejected=rejected.sample.response,
        rejected_ids=rejected.sample.response_ids,
        chosen_score=chosen.score,
        rejected_score=rejected.score,
        round=round,
    )
