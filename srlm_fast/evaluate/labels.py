"""Which labels of preference pairs are truly right, and whether noise detection finds the wrong."""

from __future__ import annotations

from collections.abc import Sequence

from srlm_fast.data.records import Pair
from srlm_fast.evaluate.correlation import mean
from srlm_fast.evaluate.responses import Oracle


def label_accuracy(oracle: Oracle, pairs: Sequence[Pair]) -> dict[str, float | None]:
    """Are the chosen responses truly better? Shares of `better`, `worse` and `equal` pairs.

    accuracy: better over better and worse, so that pairs without a right label do not count.
    true_gap: mean true score of the chosen response less that of the rejected one.
    """
    gains = _true_gains(oracle, pairs)
    return {
        "accuracy": mean([gain > 0 for gain in gains if gain]),
        "better": mean([gain > 0 for gain in gains]),
        "worse": mean([gain < 0 for gain in gains]),
        "equal": mean([gain == 0 for gain in gains]),
        "true_gap": mean(gains),
    }


def flag_metrics(
    oracle: Oracle, pairs: Sequence[Pair], flags: Sequence[bool | None]
) -> dict[str, float | None]:
    """Precision and recall of SPA's noise flags (equation 11), and the precision of chance.

    flags: one per pair, None where the detector was off (the warm-up). Pairs whose responses are
    truly equal have no wrong label and are left out, as are those the detector did not see.
    base_rate: the share of wrong labels among the pairs that are left.
    """
    seen = [
        (gain < 0, flag)
        for gain, flag in zip(_true_gains(oracle, pairs), flags, strict=True)
        if gain and flag is not None
    ]
    return {
        "flagged": float(sum(flag for _, flag in seen)),
        "precision": mean([wrong for wrong, flag in seen if flag]),
        "recall": mean([flag for wrong, flag in seen if wrong]),
        "base_rate": mean([wrong for wrong, _ in seen]),
    }


def _true_gains(oracle: Oracle, pairs: Sequence[Pair]) -> list[int]:
    """True score of the chosen response minus that of the rejected one."""
    return [
        sum(oracle(p.prompt, p.chosen).values()) - sum(oracle(p.prompt, p.rejected).values())
        for p in pairs
    ]
