"""Spread Preference Annotation (arXiv 2406.04412)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srlm_fast.config.rules import require

# Fields of what comes before the rounds.
OF_THE_SEED = ("no_seed", "seed_epochs", "seed_learning_rate", "num_seed_pairs")


@dataclass(frozen=True)
class SPAConfig:
    """Spread Preference Annotation (arXiv 2406.04412, section 5.1)."""

    self_refinement: bool = True  # false: plain preference training on the self-made pairs
    decoupled: bool = True  # noise is sought in extrapolated logits (eq. 12); false: lambda is 0
    refine_srlm: bool = False  # method srlm refines its labels too
    no_seed: bool = False  # the model is pi_0 as it comes (figure 4): no gold pairs, no seed DPO
    alpha: float = 0.1
    k_percent: float = 10.0
    lambdas: tuple[float, ...] = (0.5, 0.25, 0.125)
    warmup_fraction: float = 0.2  # alpha is 0 in this first share of a round's steps
    tau: Literal["window", "dataset", "official"] = "window"
    tau_window: int = 0  # at most half of the pairs; 0: min(512, a quarter)
    tau_interval: int = 0  # dataset mode: steps between scoring passes; 0: once
    seed_epochs: int = 3
    seed_learning_rate: float = 0.0  # 0: that of `preference`
    num_seed_pairs: int = 48  # where the task annotates on-policy samples instead of giving gold

    def __post_init__(self) -> None:
        require(0 <= self.alpha <= 1, "alpha must lie in 0..1")
        require(0 <= self.k_percent <= 100, "k_percent must lie in 0..100")
        require(min(self.lambdas, default=-1.0) >= 0, "lambdas needs one value, none negative")
        require(
            0 <= self.warmup_fraction < 1,
            "warmup_fraction must be at least 0 and below 1, or no step would refine a label; turn"
            " that off with self_refinement false",
        )
        require(self.tau_window >= 0, "tau_window must not be negative (0: by the round's pairs)")
        require(self.tau_interval >= 0, "tau_interval must not be negative (0: once)")
        require(not self.tau_window or self.tau == "window", "tau_window needs tau: window")
        require(not self.tau_interval or self.tau == "dataset", "tau_interval needs tau: dataset")
        require(self.seed_epochs >= 1, "seed_epochs must be at least 1")
        require(self.seed_learning_rate >= 0, "seed_learning_rate must not be negative")
        require(self.num_seed_pairs >= 1, "num_seed_pairs must be at least 1")
