"""What is sampled: new prompts, and candidates to answer them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from srlm_fast.config.rules import require, require_sampling


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling of the candidates."""

    num_candidates: int = 4
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    max_new_tokens: int = 1024
    keep_truncated: bool = False  # keep candidates that hit max_new_tokens
    force_eos: bool = False  # judge and train on them with an EOS behind, as SPA's code does

    def __post_init__(self) -> None:
        require(self.num_candidates >= 2, "num_candidates must be at least 2: a pair needs two")
        require(
            self.temperature != 0 and self.top_k != 1,
            "temperature must not be 0, nor top_k 1: the candidates of a prompt would all be equal",
        )
        require(self.top_k >= 0, "top_k must not be negative (0: off)")
        require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1")
        require(self.keep_truncated or not self.force_eos, "force_eos needs keep_truncated: true")
        require_sampling(self.temperature, self.top_p)


@dataclass(frozen=True)
class PromptsConfig:
    """New prompts of each round."""

    source: Literal["self_instruct", "dataset"] = "self_instruct"
    # HF folder or hub id of the model that writes them, the same in all rounds (SRLM's is Llama 2
    # Chat); "": the model of the round. It is in memory only while it writes.
    model: str = ""
    chat_template: str = "auto"  # of that model, as `template` is of the run's
    num_prompts: int = 500
    num_prompts_by_round: tuple[int, ...] = ()  # instead: of each round, the last one's stays
    template: str = "tasks"  # a name in prompts/templates, or a file
    num_seed_demos: int = 6
    num_generated_demos: int = 2
    temperature: float = 0.6
    top_p: float = 0.9
    max_new_tokens: int = 512
    max_tasks: int = 7  # a numbered list is stopped when it has so many new ones; 0: no limit
    keep_truncated: bool = False  # of a list cut off at max_new_tokens, keep all but the last task
    max_calls: int = 0  # generation calls a round at most; 0: twenty times num_prompts
    rouge_l: float = 0.7
    min_words: int = 4
    max_words: int = 150
    keyword_filter: bool = True

    def __post_init__(self) -> None:
        require(
            not self.model or self.source == "self_instruct",
            "model writes prompts, and source: dataset takes them from a file; leave one out",
        )
        require(
            self.chat_template == "auto" or bool(self.model),
            "chat_template is that of prompts.model, and there is none; the run's is template",
        )
        require(self.num_prompts >= 1, "num_prompts must be at least 1")
        require(
            min(self.num_prompts_by_round, default=1) >= 1, "num_prompts_by_round must be 1 or more"
        )
        require(
            not self.num_prompts_by_round or self.num_prompts == PromptsConfig.num_prompts,
            "num_prompts_by_round says how many: set that one, and leave num_prompts out",
        )
        require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1")
        require(self.max_tasks >= 0, "max_tasks must not be negative (0: no limit)")
        require(self.max_calls >= 0, "max_calls must not be negative (0: twenty times num_prompts)")
        require(self.num_seed_demos >= 0, "num_seed_demos must not be negative")
        require(self.num_generated_demos >= 0, "num_generated_demos must not be negative")
        require(
            self.num_seed_demos + self.num_generated_demos >= 1, "num_seed_demos: show one at least"
        )
        require(0 <= self.rouge_l <= 1, "rouge_l must lie in 0..1")
        require(0 <= self.min_words <= self.max_words, "min_words must lie in 0..max_words")
        require_sampling(self.temperature, self.top_p)

    def of_round(self, t: int) -> int:
        """How many prompts round t (from 1) takes."""
        sizes = self.num_prompts_by_round or (self.num_prompts,)
        return sizes[min(t, len(sizes)) - 1]

    def for_round(self, t: int) -> PromptsConfig:
        """These settings, with the number of round t for `num_prompts`."""
        return replace(self, num_prompts=self.of_round(t), num_prompts_by_round=())

    def of_rounds(self, rounds: int) -> int:
        """How many prompts all rounds take."""
        return sum(self.of_round(t) for t in range(1, rounds + 1))
