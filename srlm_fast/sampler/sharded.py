"""A sampler on several ranks, each of which has the whole model and a share of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from srlm_fast.parallel import Ranks
from srlm_fast.sampler.engine import Asked, Sampler
from srlm_fast.sampler.params import Completion
from srlm_fast.sampler.scoring import Groups, Ids, Scores

T = TypeVar("T")


class ShardedSampler(Sampler):
    """A `Sampler` whose calls all ranks make together, with the same arguments, for all results.

    They are those of one rank: a row depends on its seed and its prompt alone, up to the rounding
    of the model's own matrix products. Every rank checks the whole call, so a mistake is refused by
    all of them; an error that only one meets is raised there, and must end the others.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, ranks: Ranks, **options: Any) -> None:
        self._ranks = ranks
        super().__init__(model, tokenizer, **options)

    def _generate(self, asked: Sequence[Asked], progress: str) -> list[list[Completion]]:
        return self._gather(super()._generate(self._mine(asked), self._bar(progress)))

    def _score(self, prompts: Sequence[Ids], completions: Groups, progress: str) -> Scores:
        mine = self._mine(prompts), self._mine(completions)
        return self._gather(super()._score(*mine, self._bar(progress)))

    def _next_logprobs(self, prompts: Sequence[tuple[int, ...]], token_ids: Ids) -> Tensor:
        mine = self._mine(prompts)
        logps = super()._next_logprobs(mine, token_ids) if mine else torch.empty(0, len(token_ids))
        return torch.cat(self._ranks.gather([logps]))

    def _mine(self, items: Sequence[T]) -> Sequence[T]:
        """A stretch of `items`, not every n-th: neighbours begin alike, and share what is computed
        (the judge prompts of one prompt's candidates)."""
        rank, world = self._ranks.rank, self._ranks.world
        return items[len(items) * rank // world : len(items) * (rank + 1) // world]

    def _gather(self, mine: list[T]) -> list[T]:
        return list(chain.from_iterable(self._ranks.gather([mine])))

    def _bar(self, name: str) -> str:
        return name if self._ranks.main else ""
