"""What preference pairs are like, whoever labelled them: how far apart, and how long."""

from __future__ import annotations

from collections.abc import Sequence

from srlm_fast.data.records import Pair
from srlm_fast.evaluate.correlation import mean, standard_error


def pair_metrics(pairs: Sequence[Pair]) -> dict[str, float | None]:
    """Means over pairs.

    score_gap: the judge's score of the chosen less that of the rejected, over pairs with both. A
        gap that falls from round to round is what starves self-rewarding (arXiv 2508.06026): both
        sides become alike, and nothing is left to prefer. `score_gap_se` is its standard error.
    chosen_length, rejected_length: in tokens, with the EOS. chosen_longer: the share of pairs whose
        chosen response is the longer one, of equal lengths half.
    """
    gaps = [
        p.chosen_score - p.rejected_score
        for p in pairs
        if p.chosen_score is not None and p.rejected_score is not None
    ]
    lengths = [(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
    return {
        "score_gap": mean(gaps),
        "score_gap_se": standard_error(gaps),
        "chosen_length": mean([chosen for chosen, _ in lengths]),
        "rejected_length": mean([rejected for _, rejected in lengths]),
        "chosen_longer": mean([(c > r) + 0.5 * (c == r) for c, r in lengths]),
    }
