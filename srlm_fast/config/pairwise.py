"""A judge of two responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from srlm_fast.config.rules import require, require_sampling

if TYPE_CHECKING:
    from srlm_fast.config import Config


@dataclass(frozen=True)
class PairwiseConfig:
    """Who compares two responses, and how, for `preference.load_best_model_at_end` and
    `evaluate.head_to_head`."""

    kind: Literal["prompted", "score"] = "prompted"  # score: who scores higher by `judge` is better
    prompt: str = "verdict"  # a name in judge/prompts/pairwise, or a file with three placeholders
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    num_prompts: int = 64  # held-out prompts on which checkpoints, not models, are compared

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1")
        require(self.num_prompts >= 1, "num_prompts must be at least 1")
        require_sampling(self.temperature, self.top_p)


def compares(config: Config) -> bool:
    """Whether the run has anything to compare."""
    return config.preference.load_best_model_at_end or config.evaluate.head_to_head


def compares_in_words(config: Config) -> bool:
    """Whether the run asks a model to compare responses."""
    return compares(config) and config.pairwise.kind == "prompted"


def check_pairwise(config: Config) -> None:
    """Raises UserError where a pairwise judge has nothing to do, or cannot do it."""
    train, pairwise = config.preference, config.pairwise
    chooses = train.load_best_model_at_end
    require(
        compares(config) or pairwise == PairwiseConfig(),
        "pairwise compares checkpoints (preference.load_best_model_at_end) or models "
        "(evaluate.head_to_head); set one of them, or leave it out",
    )
    require(
        chooses or pairwise.num_prompts == PairwiseConfig.num_prompts,
        "pairwise.num_prompts is of preference.load_best_model_at_end; models are compared on "
        "evaluate.num_prompts: leave it out",
    )
    require(
        pairwise.kind == "prompted"
        or pairwise == PairwiseConfig(kind="score", num_prompts=pairwise.num_prompts),
        "pairwise.kind: score asks nobody to compare; leave out the prompt of pairwise, its "
        "temperature, top_p and max_new_tokens, or set kind: prompted",
    )
    require(
        compares_in_words(config) or not compares(config) or config.judge.kind != "implicit",
        "pairwise.kind: score cannot take the implicit reward, which on a model's own responses "
        "grows by drift alone; set pairwise.kind: prompted",
    )
    require(
        not chooses or (config.method == "srlm" and config.srlm.training == "preference"),
        "preference.load_best_model_at_end is for method srlm with srlm.training: preference",
    )
    require(
        not chooses or train.save_steps > 0,
        "preference.load_best_model_at_end chooses among checkpoints; set preference.save_steps",
    )
    require(
        not chooses or train.parallel == "replicate",
        "preference.load_best_model_at_end needs preference.parallel: replicate, as no process can "
        "sample with a share of the weights",
    )
