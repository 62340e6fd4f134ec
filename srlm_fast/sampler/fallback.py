"""For models that cannot run on pages: one prompt at a time, with the model's own cache.

The prompt is computed once and its cache repeated for the candidates where the cache can do that;
else the candidates compute it together, and without a cache everything again for every token. Rows
stay until the last one of their prompt has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from srlm_fast.model.forward import Head, decoder, hidden_states, lm_head
from srlm_fast.model.load import text_config
from srlm_fast.model.phase import inference
from srlm_fast.model.probe import moving_rope
from srlm_fast.sampler.batching import max_rows
from srlm_fast.sampler.decode import STEPS, Rules, draw_step, harvest, start_state, steps_of
from srlm_fast.sampler.rows import Row
from srlm_fast.sampler.scoring import Groups, Scores
from srlm_kernels import linear_logp

# Layers that keep nothing but keys and values, and so can be repeated; others may forget a state.
_REPEATABLE = (DynamicLayer, DynamicSlidingWindowLayer)


class FallbackEngine:
    """Decodes and scores like `PagedEngine`, with nothing shared between prompts."""

    name = "fallback"
    max_pages = 1 << 40  # no pages: memory is the cache's own business

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = self.head.weight.device
        self.vocab = len(self.head.weight)
        self._rope_limit = moving_rope(text_config(model))

    @property
    def head(self) -> Head:
        """Looked up every time: loading a checkpoint may have put another one into the model."""
        return lm_head(self.model)

    def generate(
        self, rows: Sequence[Row], rules: Rules, on_end: Callable[[list[Row]], None]
    ) -> None:
        """Draws every row to its end; `on_end` is shown the rows as they end."""
        with inference(self.model):
            for _, group in groupby(rows, key=lambda row: row.prompt):
                same, most = list(group), max_rows(self.vocab)
                for start in range(0, len(same), most):
                    self._decode(same[start : start + most], rules)
                    on_end(same[start : start + most])

    def score(self, prompts: Sequence[Sequence[int]], completions: Groups, bar: Any) -> Scores:
        """See `Sampler.score`."""
        with inference(self.model):
            return [
                [
                    self._score(prompt, ids, bar) if ids else torch.empty(0, dtype=torch.float32)
                    for ids in group
                ]
                for prompt, group in zip(prompts, completions, strict=True)
            ]

    def next_logprobs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Tensor:
        """See `Sampler.next_logprobs`."""
        with inference(self.model):
            logits = [self.head.logits(self._states(prompt)[-1]).float() for prompt in prompts]
        return torch.stack([row.log_softmax(-1)[list(token_ids)].cpu() for row in logits])

    def sleep(self) -> None:
        """Nothing is kept between calls."""

    def _states(self, ids: Sequence[int]) -> Tensor:
        return hidden_states(self.model, torch.tensor([list(ids)], device=self.device))[0]

    def _score(self, prompt: Sequence[int], ids: Sequence[int], bar: Any) -> Tensor:
        states = self._states([*prompt, *ids[:-1]])[len(prompt) - 1 :]
        target, head = torch.tensor(list(ids), device=self.device), self.head
        bar.update(len(ids))
        return linear_logp(
            states, head.weight, target,
            bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale,
        ).logp.float().cpu()  # fmt: skip

    def _decode(self, rows: list[Row], rules: Rules) -> None:
        ids = torch.tensor([list(rows[0].prompt)] * len(rows), device=self.device)
        cache, hidden = self._prefill(ids)
        steps = steps_of(rows, STEPS)
        while not all(row.ended for row in rows):
            # Rows that have ended stay in the batch, since the cache cannot let them go.
            state = start_state(rows, steps, self.vocab, self.device)
            for _ in range(steps):
                draw_step(state, self.head.logits(hidden), rules)
                if not bool(state.alive.any()):
                    break
                ids = torch.cat([ids, state.token[:, None]], 1)
                cache, hidden = self._next(ids, cache)
            harvest(rows, state)

    def _prefill(self, ids: Tensor) -> tuple[Any, Tensor]:
        """A cache of the equal rows `ids` [R, S], None if the model has none of the usual kind, and
        their last hidden states [R, D]."""
        run = decoder(self.model)
        output = run(input_ids=ids[:1], use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if len(ids) == 1 or cache is None:
            return cache, output.last_hidden_state[:, -1].expand(len(ids), -1)
        if all(type(layer) in _REPEATABLE for layer in cache.layers):
            cache.batch_repeat_interleave(len(ids))
            return cache, output.last_hidden_state[:, -1].expand(len(ids), -1)
        output = run(input_ids=ids, use_cache=True)
        return output.past_key_values, output.last_hidden_state[:, -1]

    def _next(self, ids: Tensor, cache: Any) -> tuple[Any, Tensor]:
        """The cache of `ids` [R, S], and the hidden states [R, D] of their last tokens."""
        run = decoder(self.model)
        if cache is None or ids.shape[1] == self._rope_limit + 1:  # keys of other frequencies
            output = run(input_ids=ids, use_cache=True)
            cache = getattr(output, "past_key_values", None)
        else:
            output = run(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        return cache, output.last_hidden_state[:, -1]
