"""What to sample and what comes back; names and meanings are vLLM's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; every row draws from its own random stream.

    Processing order: allowed, logit_bias, repetition_penalty, min_tokens, temperature, top_k,
    top_p, min_p. Raises ValueError on impossible values.

    `allowed`, for grammars and the like, is given the tokens that a row has drawn and says which
    may come next, EOS among them: bool [V]. It is called for every token of every row, on the host.
    """

    n: int = 1  # candidates of each prompt
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: the whole vocabulary
    min_p: float = 0.0  # drop tokens less probable than this share of the most probable one
    repetition_penalty: float = 1.0  # over prompt and response tokens, as in transformers
    seed: int = 0
    max_tokens: int = 16
    min_tokens: int = 0  # no stop of any kind before this many tokens
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)  # -inf bans a token
    allowed: Callable[[Sequence[int]], Tensor] | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for ok, rule in (
            (self.n >= 1, f"n must be at least 1, not {self.n}"),
            (
                0 <= self.temperature < math.inf,
                f"temperature must be finite and not negative, but is {self.temperature}",
            ),
            (0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}"),
            (self.top_k >= -1, f"top_k must be 0 (off) or positive, not {self.top_k}"),
            (0 <= self.min_p <= 1, f"min_p must be in [0, 1], not {self.min_p}"),
            (
                0 < self.repetition_penalty < math.inf,
                f"repetition_penalty must be positive and finite, not {self.repetition_penalty}",
            ),
            (self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}"),
            (
                0 <= self.min_tokens <= self.max_tokens,
                f"min_tokens must be in [0, {self.max_tokens}], not {self.min_tokens}",
            ),
            (all(stop), "a stop string must not be empty"),
            (
                all(bias < math.inf for bias in (self.logit_bias or {}).values()),
                f"logit_bias must be finite, or -inf to ban a token, but is {self.logit_bias}",
            ),
        ):
            if not ok:
                raise ValueError(rule)


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    token_ids end with the EOS or stop token if one was sampled; `text` is without it, without
    special tokens, and is cut before a stop string. finish_reason "stop" has stop_reason None for
    EOS, the id for a stop token, the string for a stop string.

    Per token, as Python floats in nats: `logprobs` are the model's own (T = 1, unprocessed logits),
    `sample_logprobs` those of the distribution sampled from, and `kept_mass` is the probability
    that top_k, top_p and min_p left, before renormalisation (at T = 1 without bias, penalty or
    `allowed`, sample_logprob = logprob - log kept_mass).
    """

    index: int
    token_ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    cumulative_logprob: float
    logprobs: list[float]
    sample_logprobs: list[float]
    kept_mass: list[float]
    seed: int  # of this row's random stream

    def copy(self) -> Completion:
        """The same, with lists of its own."""
        return replace(
            self,
            token_ids=list(self.token_ids),
            logprobs=list(self.logprobs),
            sample_logprobs=list(self.sample_logprobs),
            kept_mass=list(self.kept_mass),
        )


@dataclass(frozen=True)
class Output:
    """A prompt and its n candidates."""

    prompt_token_ids: list[int]
    outputs: list[Completion]
