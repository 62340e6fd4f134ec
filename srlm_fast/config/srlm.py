"""Self-Rewarding Language Models (arXiv 2401.10020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from srlm_fast.config.judge import PairsConfig
from srlm_fast.config.rules import require

if TYPE_CHECKING:
    from srlm_fast.config import Config

UNSCALED = ("implicit", "scorer", "longest")  # judges that do not score 0 to 5
BELOW_5 = ("expected", "random")  # a mean over all digits, and a draw from [0, 5)


@dataclass(frozen=True)
class SRLMConfig:
    """What a round of self-rewarding learns from. Without EFT: `eft.enabled`."""

    # preference: DPO on pairs. positives: SFT of the base model again, on the seed data and every
    # response of the rounds so far that scored `positive_score` (the paper's ablation).
    training: Literal["preference", "positives"] = "preference"
    positive_score: float = 5.0  # mean of the votes, at least

    def __post_init__(self) -> None:
        require(0 < self.positive_score <= 5, "positive_score must be above 0 and at most 5")
        require(
            self.positive_score == 5 or self.training == "positives",
            "positive_score needs training: positives",
        )


def check_srlm(config: Config) -> None:
    """Raises UserError where settings of SRLM contradict others, or would be ignored."""
    positives = config.srlm.training == "positives"
    require(
        config.method == "srlm" or config.srlm == SRLMConfig(),
        "srlm.training is for method srlm; leave it out, or set method to srlm",
    )
    require(
        not config.teaches_judging or config.eft.max_tries == 1 or config.judge.temperature > 0,
        "eft.max_tries must be 1 with judge.temperature 0: every try would be the same",
    )
    require(
        not positives or config.judge.kind not in UNSCALED,
        f"srlm.training: positives needs scores from 0 to 5, and judge.kind {config.judge.kind} "
        "gives others; take prompted or expected",
    )
    require(
        not positives or config.judge.kind not in BELOW_5 or config.srlm.positive_score < 5,
        f"srlm.positive_score must be below 5 with judge.kind {config.judge.kind}, whose scores "
        "never reach 5; try 4.5",
    )
    require(
        not positives or config.pairs == PairsConfig(),
        "srlm.training: positives makes no pairs; leave the settings of pairs as they are",
    )
