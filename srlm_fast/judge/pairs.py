"""From candidates to preference pairs: what is judged at all, and best against worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from srlm_fast.data.records import Judgement, Pair, Sample


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
) -> tuple[list[Pair], Counter[str]]:
    """The best against the worst judged candidate of each prompt (SRLM section 2.2).

    A prompt without a pair is counted, so pairs and counts add up to the prompts: "fewer than two
    judged" (a candidate without a score is neither best nor worst), or "tie" (best = worst). Among
    equal scores the candidate sampled first is taken.
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for group, verdicts in zip(candidates, judgements, strict=True):
        judged = [
            (verdict.score, sample)
            for sample, verdict in zip(group, verdicts, strict=True)
            if verdict.score is not None
        ]
        if len(judged) < 2:
            dropped["fewer than two judged"] += 1
            continue
        best, chosen = max(judged, key=lambda item: item[0])
        worst, rejected = min(judged, key=lambda item: item[0])
        if best == worst:
            dropped["tie"] += 1
            continue
        pairs.append(_pair(chosen, best, rejected, worst, round))
    return pairs, dropped


def _pair(chosen: Sample, best: float, rejected: Sample, worst: float, round: int) -> Pair:
    return Pair(
        prompt=chosen.prompt,
        prompt_ids=chosen.prompt_ids,
        chosen=chosen.response,
        chosen_ids=chosen.response_ids,
        rejected=rejected.response,
        rejected_ids=rejected.response_ids,
        chosen_score=best,
        rejected_score=worst,
        round=round,
    )
