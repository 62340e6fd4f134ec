"""Decode one batch: prefill each prompt once, then step all candidates until they have ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srlm_fast.model.forward import Head, decoder
from srlm_fast.model.load import text_config
from srlm_fast.sampler.attention import decode_attention
from srlm_fast.sampler.cache import SlabCache
from srlm_fast.sampler.params import SamplingParams
from srlm_fast.sampler.sampling import Draw, process, sample, uniforms
from srlm_fast.sampler.stops import Stops

_PREFILL_TOKENS = 8192  # of one forward
_HEADROOM = 64  # response tokens that a slab has room for before it doubles
_RETIRE_SHARE = 0.25  # of the rows must have ended before the batch is compacted


class Row(NamedTuple):
    """What one row drew; `numbers` per token are logprob, sample_logprob, kept_mass."""

    token_ids: list[int]
    numbers: list[list[float]]


@dataclass
class _Live:
    """The rows still in the batch: R of them, in every tensor. `length` is 0 until a row ends."""

    origin: Tensor
    seeds: Tensor
    prompt_length: Tensor
    length: Tensor
    tokens: Tensor  # [R, max_tokens]
    numbers: Tensor  # [R, max_tokens, 3]
    mask: Tensor | None  # [R, prompt + max_tokens] bool; None: no row is padded
    seen: Tensor | None  # [R, V] bool; None: no repetition penalty

    def select(self, rows: Tensor) -> _Live:
        names = [field.name for field in dataclasses.fields(self)]
        values: Any = [getattr(self, name) for name in names]
        kept: Any = [None if value is None else value[rows] for value in values]
        return _Live(*kept)


class BatchDecoder:
    """Decodes batches under one set of parameters. Call inside no_grad, with the model in eval."""

    def __init__(
        self,
        model: Any,
        head: Head,
        params: SamplingParams,
        stops: Stops,
        on_end: Callable[[int, int], None],
        slab_attention: bool = True,
    ) -> None:
        self._decoder = decoder(model)
        self._config = text_config(model)
        self._head = head
        self._params = params
        self._stops = stops
        self._on_end = on_end  # called with the numbers of rows and tokens that have ended
        self._slab_attention = slab_attention
        self._device = head.weight.device
        self._vocab = len(head.weight)
        self._is_stop = stops.flags(self._vocab, self._device)
        self._bias = self._bias_vector()
        # A look at the ended rows makes the host wait for a GPU, and decodes text for stop strings.
        self._look_every = 8 if self._device.type == "cuda" or stops.strings else 1

    def decode(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Row]:
        """The rows of n candidates of each prompt, in order; one seed for each row."""
        params = self._params
        cache, states = self._prefill(prompts)
        live = self._start(prompts, seeds)
        rows: list[Row | None] = [None] * len(seeds)
        logits = self._head.logits(states).repeat_interleave(params.n, 0)
        width = max(map(len, prompts))
        attention = decode_attention(self._config, self._device)
        with attention if self._slab_attention else nullcontext():
            for step in range(params.max_tokens):
                self._draw(live, logits, step)
                keep = self._retire(live, rows, step + 1)
                if keep is not None:
                    live = live.select(keep)
                    if len(keep) == 0:
                        break
                    cache.keep(keep)
                logits = self._step(live, cache, width, step)
        return [row for row in rows if row is not None]

    def _step(self, live: _Live, cache: SlabCache, width: int, step: int) -> Tensor:
        """The logits [R, V] after feeding the tokens drawn at `step`."""
        output = self._decoder(
            input_ids=live.tokens[:, step : step + 1],
            attention_mask=None if live.mask is None else live.mask[:, : width + step + 1],
            position_ids=(live.prompt_length + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        return self._head.logits(output.last_hidden_state[:, -1])

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[SlabCache, Tensor]:
        """The cache with n rows for each prompt, and each prompt's last hidden state [P, D]."""
        width = max(map(len, prompts))
        size = max(1, _PREFILL_TOKENS // width)
        caches, states = [], []
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            cache = SlabCache(self._config.num_hidden_layers, max(map(len, part)))
            ids, mask = self._left_padded(part)
            output = self._decoder(
                input_ids=ids,
                attention_mask=None if bool(mask.all()) else mask.to(self._device),
                position_ids=(mask.cumsum(-1) - 1).clamp_(min=0).to(self._device),
                past_key_values=cache,
                use_cache=True,
            )
            caches.append(cache)
            states.append(output.last_hidden_state[:, -1])
        capacity = width + min(self._params.max_tokens, _HEADROOM)
        return SlabCache.expanded(caches, self._params.n, capacity), torch.cat(states)

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids [P, S] on the device and their bool mask [P, S] on the host."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        lengths = torch.tensor([len(p) for p in prompts])
        return ids.to(self._device), torch.arange(width) >= width - lengths[:, None]

    def _start(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> _Live:
        count, limit, device = len(seeds), self._params.max_tokens, self._device
        _, mask = self._left_padded(prompts)
        lengths = mask.sum(-1)
        padded = not bool(mask.all())
        mask = torch.cat([mask, mask.new_ones(len(mask), limit)], -1)

        def each(per_prompt: Tensor) -> Tensor:
            return per_prompt.repeat_interleave(self._params.n, 0).to(device)

        return _Live(
            origin=torch.arange(count, device=device),
            seeds=torch.tensor(seeds, device=device),
            prompt_length=each(lengths),
            length=torch.zeros(count, dtype=torch.long, device=device),
            tokens=torch.zeros(count, limit, dtype=torch.long, device=device),
            numbers=torch.zeros(count, limit, 3, device=device),
            mask=each(mask) if padded else None,
            seen=each(self._seen(prompts)) if self._params.repetition_penalty != 1 else None,
        )

    def _seen(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        seen = torch.zeros(len(prompts), self._vocab, dtype=torch.bool)
        for row, prompt in zip(seen, prompts, strict=True):
            row[list(prompt)] = True
        return seen

    def _bias_vector(self) -> Tensor | None:
        if not self._params.logit_bias:
            return None
        bias = torch.zeros(self._vocab)
        bias[list(self._params.logit_bias)] = torch.tensor(list(self._params.logit_bias.values()))
        return bias.to(self._device)

    def _draw(self, live: _Live, logits: Tensor, step: int) -> None:
        banned = self._is_stop if step < self._params.min_tokens else None
        scores = process(
            logits, self._params, bias_V=self._bias, seen_RV=live.seen, banned_V=banned
        )
        draw: Draw = sample(logits, scores, self._params, uniforms(live.seeds, step))
        live.tokens[:, step] = draw.token
        live.numbers[:, step] = torch.stack(draw[1:], -1)
        ended = self._is_stop[draw.token] & (live.length == 0)
        live.length.masked_fill_(ended, step + 1)
        if live.seen is not None:
            live.seen.scatter_(1, draw.token[:, None], True)

    def _find_strings(self, live: _Live, count: int) -> None:
        """Ends the rows in which a stop string is complete; `Stops.ending` cuts them exactly."""
        if not self._stops.strings or count < self._params.min_tokens:
            return
        start = max(0, count - self._stops.tail(self._look_every))
        open_rows = (live.length == 0).nonzero()[:, 0]
        shown = live.tokens[open_rows, :count].tolist()
        # The tail is a quick look: what it shows may lie inside the first min_tokens.
        found = [
            self._stops.in_tail(ids[start:]) and self._stops.ending(ids).finish_reason == "stop"
            for ids in shown
        ]
        live.length[open_rows[torch.tensor(found, dtype=torch.bool)]] = count

    def _retire(self, live: _Live, rows: list[Row | None], count: int) -> Tensor | None:
        """Moves ended rows to `rows` once they are many; None when nothing changes.

        Returns the indices [R'] of those that stay as `SlabCache.keep` wants them: the last of
        them fill the holes.
        """
        last = count == self._params.max_tokens
        if not last and count % self._look_every:
            return None
        self._find_strings(live, count)
        if last:
            live.length.masked_fill_(live.length == 0, count)
        ended = live.length > 0
        total = int(ended.sum())
        if total == 0 or total < _RETIRE_SHARE * len(ended):
            return None
        out = live.select(ended.nonzero()[:, 0])
        lengths = out.length.tolist()
        tokens, numbers = out.tokens[:, :count].tolist(), out.numbers[:, :count].tolist()
        for i, (origin, length) in enumerate(zip(out.origin.tolist(), lengths, strict=True)):
            rows[origin] = Row(tokens[i][:length], numbers[i][:length])
        self._on_end(total, sum(lengths))
        keep = torch.arange(len(ended) - total, device=self._device)
        holes = ended[: len(keep)].nonzero()[:, 0]
        keep[holes] = (~ended[len(keep) :]).nonzero()[:, 0] + len(keep)
        return keep
