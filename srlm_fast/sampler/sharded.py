"""A sampler on several ranks, each of which has the whole model and a share of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srlm_fast.parallel import Ranks
from srlm_fast.sampler.engine import AnyPrompt, Sampler
from srlm_fast.sampler.params import Output, SamplingParams


class ShardedSampler(Sampler):
    """A `Sampler` whose calls all ranks make together, with the same arguments.

    Every rank gets all results. Since a row depends on its seed and prompt alone, they are those of
    one rank, to the rounding of the model's own products. An error of one rank is raised there
    only, and must end the others too.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, ranks: Ranks, **options: Any) -> None:
        self._ranks = ranks
        super().__init__(model, tokenizer, **options)

    def generate(
        self,
        prompts: Sequence[AnyPrompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: str = "",
    ) -> list[Output]:
        """See `Sampler.generate`; the bar is of the main rank's share."""
        if params is not None and not isinstance(params, SamplingParams):
            params = self._ranks.share(params)
        mine = super().generate(self._ranks.share(prompts), params, self._bar(progress))
        return self._ranks.gather(mine)

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        progress: str = "",
    ) -> list[list[Tensor]]:
        """See `Sampler.score`."""
        share = self._ranks.share
        mine = super().score(share(prompts), share(completions), self._bar(progress))
        return self._ranks.gather(mine)

    def next_logprobs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Tensor:
        """See `Sampler.next_logprobs`."""
        mine = super().next_logprobs(self._ranks.share(prompts), token_ids)
        return torch.stack(self._ranks.gather(list(mine))) if len(prompts) else mine

    def _check_row(self, row: int, prompt: Sequence[int], extra: int) -> None:
        super()._check_row(row * self._ranks.world + self._ranks.rank, prompt, extra)

    def _bar(self, name: str) -> str:
        return name if self._ranks.main else ""
