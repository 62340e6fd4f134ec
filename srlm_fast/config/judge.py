"""Who judges, which pairs come of it, and how models are evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from srlm_fast.config.rules import require, require_sampling

REFERENCES = ("sft", "base", "previous", "none")


@dataclass(frozen=True)
class JudgeConfig:
    """Who scores the candidates, and how. `random` and `longest` are controls."""

    kind: Literal["prompted", "expected", "implicit", "scorer", "random", "longest"] = "prompted"
    # Of implicit: sft (pi_init; of srlm the SFT baseline), base (what the run starts from),
    # previous (what the judge was trained from; of srlm's M1 the SFT baseline), none (log pi
    # alone), or a model's folder or hub id.
    reference: str = "sft"
    scorer: str = ""  # of kind scorer: module:function, see judge/scorer.py
    prompt: str = "additive"  # a name in judge/prompts, or a file with both placeholders
    num_samples: int = 3
    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        require(self.num_samples >= 1, "num_samples must be at least 1")
        require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1")
        require_sampling(self.temperature, self.top_p)
        require(
            self.kind != "prompted" or self.temperature > 0 or self.num_samples == 1,
            "num_samples must be 1 with temperature 0: the votes on a response would all be equal",
        )
        require(
            self.kind == "implicit" or self.reference == "sft",
            "reference is what the implicit judge compares with: leave it at sft, or set kind to"
            " implicit",
        )
        module, _, function = self.scorer.partition(":")
        if self.kind == "scorer":
            require(bool(module and function), "scorer must name a function, as module:function")
        else:
            require(not self.scorer, "scorer needs kind: scorer")

    @property
    def reference_model(self) -> str:
        """The folder or hub id of a reference that is no model of the run; "" where it is one."""
        return "" if self.reference in REFERENCES else self.reference


@dataclass(frozen=True)
class PairsConfig:
    """Which judged candidates become preference pairs."""

    selection: Literal["min_max", "max_chosen", "all"] = "min_max"
    length_control: float = 0.0  # Meta-Rewarding's rho, with min_max; 0: off
    length_penalty: float = 0.0  # DICE's alpha: taken from the score for every token
    balance_length: bool = False  # DICE's search for the penalty: lengths equal in the mean
    # CREAM's weight: labels count as far as M_t and M_{t-1} rank candidates alike, in the mean over
    # all prompts (avg) or for each prompt (dyn).
    consistency: Literal["off", "avg", "dyn"] = "off"
    # Temporal Self-Rewarding's: the rejected one may be a candidate of the first round's model.
    anchored_rejection: bool = False
    gold_replay: float = 0.0  # DICE's gamma: this share of a round's training pairs is gold

    def __post_init__(self) -> None:
        require(0 <= self.length_control < 0.5, "length_control must be at least 0 and below 0.5")
        known = ("min_max", "max_chosen", "all")
        require(self.selection in known, f"selection must be one of {', '.join(known)}")
        require(0 <= self.gold_replay < 1, "gold_replay must be at least 0 and below 1")
        require(0 <= self.length_penalty < math.inf, "length_penalty must not be negative")
        require(
            not (self.balance_length and self.length_penalty), "balance_length finds length_penalty"
        )
        require(
            self.selection == "min_max" or self.length_control == 0,
            "length_control needs selection: min_max",
        )
        plain = self.selection == "min_max" and not (self.length_control or self.balance_length)
        require(
            plain or not self.anchored_rejection,
            "anchored_rejection needs selection: min_max without length_control, balance_length",
        )


@dataclass(frozen=True)
class EFTConfig:
    """Evaluation fine-tuning data (SRLM section 2.2)."""

    enabled: bool = True
    target: Literal["judge", "rank"] = "judge"
    max_tries: int = 1  # judgings per ranked group until its order agrees
    allow_ties: bool = False  # equal scores may stand where humans order strictly, if not only they
    modal_cap: float = 1.0  # rows of the modal score at most this many times the runner-up; 0: off

    def __post_init__(self) -> None:
        require(self.max_tries >= 1, "max_tries must be at least 1")
        require(self.modal_cap >= 0, "modal_cap must not be negative (0: off)")
        require(
            not (self.allow_ties and self.target == "rank"),
            "allow_ties needs target: judge, as scores made from ranks cannot disagree with them",
        )


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation after every model."""

    num_prompts: int = 200
    num_samples: int = 2
    temperature: float = 0.7
    top_p: float = 0.9
    num_judge_groups: int = 60
    greedy: bool = True
    head_to_head: bool = False  # a model's answers against every earlier one's, by `pairwise`

    def __post_init__(self) -> None:
        require(self.num_prompts >= 1, "num_prompts must be at least 1")
        require(self.num_samples >= 1, "num_samples must be at least 1")
        require(self.num_judge_groups >= 0, "num_judge_groups must not be negative")
        require_sampling(self.temperature, self.top_p)
