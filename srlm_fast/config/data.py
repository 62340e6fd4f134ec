"""Where a run's model and data come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from srlm_fast.config.rules import require


@dataclass(frozen=True)
class SandboxConfig:
    """The embedded world (when `model` is "sandbox"): how its base model M0 is made."""

    scale: Literal["smoke", "small", "full"] = "full"
    world: str = "W4"
    num_ift: int = 300  # seed trees whose best response is trained on
    num_eft: int = 120  # seed trees whose ranked responses are judged
    pretrain_steps: int = 1000
    min_exact: float = 0.75  # gate: share of perfect greedy copies on 100 prompts
    max_seconds: float = 270.0  # cap on pre-training, gate included
    cache_dir: str = ""  # default: $XDG_CACHE_HOME/srlm_fast

    def __post_init__(self) -> None:
        require(self.pretrain_steps >= 1, "pretrain_steps must be at least 1")
        require(self.num_ift >= 1, "num_ift must be at least 1")
        require(self.num_eft >= 1, "num_eft must be at least 1")
        require(0 <= self.min_exact <= 1, "min_exact must lie in 0..1")
        require(self.max_seconds > 0, "max_seconds must be above 0")


@dataclass(frozen=True)
class DataConfig:
    """Input files (or HF dataset names) and how they are split. Unused by the sandbox."""

    trees: str = ""  # OASST message trees: IFT, EFT and the judge's test set
    preferences: str = ""  # prompt, chosen, rejected rows: gold seed, test pairs, round prompts
    prompts: str = ""  # a prompt list: round prompts instead of generated ones
    lang: str = "en"
    split: tuple[float, ...] = (0.6, 0.25, 0.15)  # of the trees: IFT, EFT, judge test
    num_gold: int = 2000  # SPA's seed pairs
    num_test_pairs: int = 500
    # Preference rows are dealt in the order of `datasets`' shuffle(seed=shuffle_seed), which is not
    # the run's seed: as many prompts as are asked for, or as many rows, usable or not (SPA's code).
    shuffle_seed: int = 42
    slices: Literal["prompts", "rows"] = "prompts"
    num_test_prompts: int = 256

    def __post_init__(self) -> None:
        shares = self.split
        require(
            len(shares) == 3 and min(shares) > 0 and abs(sum(shares) - 1) < 1e-6,
            "split must be three positive shares (IFT, EFT, judge test) that sum to 1",
        )
        require(self.num_gold >= 1, "num_gold must be at least 1 (none: spa.no_seed true)")
        require(self.shuffle_seed >= 0, "shuffle_seed must not be negative")
        require(self.num_test_pairs >= 0, "num_test_pairs must not be negative")
        require(self.num_test_prompts >= 1, "num_test_prompts must be at least 1")
