"""One candidate on its way: what was asked for, what it has drawn, which pages it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from srlm_fast.sampler.forest import Node
from srlm_fast.sampler.params import Completion, SamplingParams
from srlm_fast.sampler.stops import Stops
from srlm_kernels.tree_attention import PAGE


@dataclass(eq=False)
class Row:
    """Candidate `index` of a prompt.

    `tokens` are drawn, and `numbers` holds logprob, sample_logprob and kept_mass of each. While the
    row runs, `path` and `pages` are its prompt's nodes and its own pages; the keys and values of
    its last token are not written yet.
    """

    prompt: tuple[int, ...]
    index: int
    seed: int
    params: SamplingParams
    stops: Stops
    tokens: list[int] = field(default_factory=list)
    numbers: list[list[float]] = field(default_factory=list)
    path: list[Node] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    ended: bool = False

    def pages_for(self, tokens: int) -> int:
        """Own pages that hold the keys of `tokens` drawn tokens, of all but the last that the row
        can ever draw: that one is never fed back."""
        tokens = min(tokens, self.params.max_tokens - 1)
        return own_pages(len(self.prompt), tokens)


def own_pages(prompt: int, tokens: int) -> int:
    """Pages that `tokens` tokens behind a prompt of `prompt` tokens need of their own."""
    return -(-(prompt + tokens) // PAGE) - prompt // PAGE if tokens > 0 else 0


def most_pages(prompt: int, tokens: int) -> int:
    """Pages of a prompt of `prompt` tokens and of one response of `tokens` tokens."""
    return -(-prompt // PAGE) + own_pages(prompt, tokens)


def row_seed(seed: int, prompt_ids: Sequence[int], index: int) -> int:
    """The seed (a signed 64-bit integer) of candidate `index` of a prompt."""
    digest = hashlib.blake2b(f"{seed}:{index}:".encode(), digest_size=8)
    digest.update(np.asarray(prompt_ids, dtype="<i8").tobytes())
    return int.from_bytes(digest.digest(), "little", signed=True)


def completion(row: Row) -> Completion:
    """What comes back of a row that has ended."""
    end = row.stops.ending(row.tokens)
    logprobs, sample_logprobs, kept_mass = map(list, zip(*row.numbers[: end.length], strict=True))
    return Completion(
        index=row.index,
        token_ids=row.tokens[: end.length],
        text=end.text,
        finish_reason=end.finish_reason,
        stop_reason=end.stop_reason,
        cumulative_logprob=sum(logprobs),
        logprobs=logprobs,
        sample_logprobs=sample_logprobs,
        kept_mass=kept_mass,
        seed=row.seed,
    )
