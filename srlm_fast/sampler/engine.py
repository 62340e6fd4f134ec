"""The sampler: generate and score with the trainer's own model, without a copy of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from logging import getLogger
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor

from srlm_fast.data.records import Message
from srlm_fast.data.template import ChatTemplate
from srlm_fast.errors import UserError
from srlm_fast.model.load import context_length, eos_token_ids, text_config
from srlm_fast.model.probe import probe
from srlm_fast.sampler import selftest
from srlm_fast.sampler.batching import pages_of
from srlm_fast.sampler.decode import Rules
from srlm_fast.sampler.fallback import FallbackEngine
from srlm_fast.sampler.paged import PagedEngine
from srlm_fast.sampler.params import Completion, Output, SamplingParams
from srlm_fast.sampler.progress import Meter, bar_of
from srlm_fast.sampler.rows import Row, completion, most_pages, row_seed
from srlm_fast.sampler.scoring import Groups, Ids, Scores
from srlm_fast.sampler.stops import Stops
from srlm_kernels.tree_attention import PAGE

# Token ids, a text, or messages (role, content) that the tokenizer's chat template renders.
AnyPrompt = Sequence[int] | str | Sequence[tuple[str, str]]
Asked = tuple[tuple[int, ...], SamplingParams]  # prompt ids, and how to continue them
_LOG = getLogger("srlm_fast.sampler")
_IMPLS = ("auto", "paged", "reference", "fallback")


class Sampler:
    """Samples from and scores with any HF causal LM.

    The model is borrowed, not copied: weights changed in place count from the next call on, and
    train/eval modes are as before after every call. A row's tokens depend on (seed, prompt ids,
    candidate index) only, whatever else is in the call, up to the rounding of the model's own
    matrix products; equal prompts are computed once and get equal candidates.

    `impl`: "paged" computes and reads every shared prefix once, "reference" is the same in plain
    torch, "fallback" decodes prompt by prompt with the model's own cache. "auto" is "paged" if the
    model passes a self-test and else, with a warning, "fallback"; `backend` says which, and with
    which ops. `eos_ids` adds to the EOS ids of the model and the tokenizer. `batch_tokens` bounds
    the tokens whose keys and values are held at once (0: by the memory at hand).

    Raises UserError for impl "paged" or "reference" where the model fails the self-test, and for
    weights that are not finite.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        impl: str = "auto",
        eos_ids: Iterable[int] = (),
        batch_tokens: int = 0,
    ) -> None:
        if impl not in _IMPLS:
            raise ValueError(f"impl must be one of {', '.join(_IMPLS)}, not {impl!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.eos_ids = tuple(sorted({*eos_token_ids(model, tokenizer), *eos_ids}))
        self.context = context_length(model)
        self._engine = _engine(model, impl, pages_of(batch_tokens))
        self.backend = self._engine.name

    def generate(
        self,
        prompts: Sequence[AnyPrompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: str = "",
    ) -> list[Output]:
        """n candidates of each prompt, in order; a bar named `progress` unless that is empty.

        `params` may be a list, one for each prompt. Rows of different parameters run together,
        unless their stop tokens or logit biases differ, or only some have `allowed`.

        Raises UserError, before any work, for an empty prompt, one that does not fit the context
        or the KV memory together with max_tokens, or ids outside the vocabulary.
        """
        ids = [self._encode(prompt) for prompt in prompts]
        each = _one_for_each(params, len(ids))
        for row, (prompt, p) in enumerate(zip(ids, each, strict=True)):
            self._check_row(row, prompt, p.max_tokens)
        for p in dict.fromkeys(each):
            self._check_ids(list(p.logit_bias or ()), "logit_bias")
            self._check_ids(p.stop_token_ids, "stop_token_ids")
        asked = [(tuple(prompt), p) for prompt, p in zip(ids, each, strict=True)]
        unique = list(dict.fromkeys(asked))
        found = dict(zip(unique, self._generate(unique, progress), strict=True))
        return [Output(list(prompt), [c.copy() for c in found[prompt, p]]) for prompt, p in asked]

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        progress: str = "",
    ) -> list[list[Tensor]]:
        """The model's raw log-probability (T = 1, nats) of each token of each completion.

        `[p][c]` is a float32 CPU tensor as long as `completions[p][c]`. Raises UserError as
        `generate` does.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts, but {len(completions)} lists of completions")
        for row, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
            self._check_row(row, prompt, max(map(len, group), default=0))
            for ids in group:
                self._check_ids(ids, f"a completion of prompt {row}")
        return self._score(prompts, completions, progress)

    def next_logprobs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Tensor:
        """[P, K] float32 CPU: raw log-probability of each of `token_ids` to follow each prompt."""
        for row, prompt in enumerate(prompts):
            self._check_row(row, prompt, 0)
        self._check_ids(token_ids, "token_ids")
        if not prompts:
            return torch.empty(0, len(token_ids), dtype=torch.float32)
        unique = list(dict.fromkeys(map(tuple, prompts)))
        logps = self._next_logprobs(unique, token_ids)
        place = {prompt: i for i, prompt in enumerate(unique)}
        return logps[[place[tuple(prompt)] for prompt in prompts]]

    def sleep(self) -> None:
        """Frees the KV memory, and with it what is kept of earlier prompts."""
        self._engine.sleep()

    # What is left once a call is checked, and what `ShardedSampler` shares among ranks.

    def _generate(self, asked: Sequence[Asked], progress: str) -> list[list[Completion]]:
        """The candidates of each of `asked`, which differ."""
        groups = [self._rows(prompt, params) for prompt, params in asked]
        rows = [row for group in groups for row in group]
        with bar_of(progress, len(rows), "seq") as bar:
            for batch in _by_rules(rows):
                self._run(batch, Meter(bar))
        return [[completion(row) for row in group] for group in groups]

    def _score(self, prompts: Sequence[Ids], completions: Groups, progress: str) -> Scores:
        total = sum(len(ids) for group in completions for ids in group)
        with bar_of(progress, total, "tok") as bar:
            return self._engine.score(prompts, completions, bar)

    def _next_logprobs(self, prompts: Sequence[tuple[int, ...]], token_ids: Ids) -> Tensor:
        """[P, K] of `prompts`, which differ."""
        return self._engine.next_logprobs(prompts, token_ids)

    def _rows(self, prompt: tuple[int, ...], params: SamplingParams) -> list[Row]:
        stops = Stops(params, self.eos_ids, self.tokenizer)
        return [
            Row(prompt, index, row_seed(params.seed, prompt, index), params, stops)
            for index in range(params.n)
        ]

    def _run(self, rows: list[Row], meter: Meter) -> None:
        """Draws `rows`, which share their stop tokens and bias, to their ends."""
        bias, wanted = None, rows[0].params.logit_bias
        if wanted:
            bias = torch.zeros(self._vocab, dtype=torch.float32)
            bias[list(wanted)] = torch.tensor(list(wanted.values()), dtype=torch.float32)
            bias = bias.to(self._engine.device)
        flags = rows[0].stops.flags(self._vocab, self._engine.device)
        self._engine.generate(rows, Rules(flags, bias), meter)

    def _encode(self, prompt: AnyPrompt) -> list[int]:
        if not isinstance(prompt, str) and (not len(prompt) or isinstance(prompt[0], Integral)):
            return [int(i) for i in cast(Sequence[int], prompt)]
        if self.tokenizer is None:
            raise UserError(
                "prompts of text need the tokenizer; give it to Sampler(model, tokenizer)"
            )
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt).input_ids)
        messages = cast(Sequence[tuple[str, str]], prompt)
        return self._template.encode_prompt(tuple(Message(*message) for message in messages))

    def _check_row(self, row: int, prompt: Sequence[int], extra: int) -> None:
        if len(prompt) == 0:
            raise UserError(f"prompt {row} is empty; give at least one token (BOS, for instance)")
        if len(prompt) + extra > self.context:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens, and with {extra} response tokens exceeds"
                f" the model's context of {self.context}; shorten it or lower max_tokens"
            )
        self._check_ids(prompt, f"prompt {row}")
        pages, most = most_pages(len(prompt), extra - 1), self._engine.max_pages
        if pages > most:
            raise UserError(
                f"prompt {row} with {extra} response tokens needs {pages * PAGE} tokens of KV"
                f" memory, and there are {most * PAGE}; raise batch_tokens, or lower max_tokens"
            )

    def _check_ids(self, ids: Sequence[int], where: str) -> None:
        if ids and (min(ids) < 0 or max(ids) >= self._vocab):
            odd = min(ids) if min(ids) < 0 else max(ids)
            raise UserError(
                f"{where} has token id {odd}, outside the model's vocabulary of {self._vocab};"
                " was it made with another model's tokenizer?"
            )

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    @property
    def _vocab(self) -> int:
        return self._engine.vocab


def _engine(model: Any, impl: str, max_pages: int) -> PagedEngine | FallbackEngine:
    if impl == "fallback":
        return FallbackEngine(model)
    ops = "torch" if impl == "reference" else "auto"
    layers = probe(model)
    why = layers if isinstance(layers, str) else selftest.check(model, layers, ops)
    if not why and not isinstance(layers, str):
        return PagedEngine(model, layers, impl=ops, max_pages=max_pages)
    family = text_config(model).model_type
    if impl != "auto":
        raise UserError(f"{family!r} models cannot be sampled with impl={impl!r}: {why}")
    _LOG.warning(
        "%r models cannot run on paged memory: %s; falling back to one prompt at a time, slower",
        family, why,
    )  # fmt: skip
    return FallbackEngine(model)


def _one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise ValueError(f"{count} prompts, but {len(params)} SamplingParams")
    return list(params)


def _by_rules(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that may run together: the tokens that stop them and the bias on logits are one vector
    for all, and those that ask what is allowed would hold up others after every token."""
    batches: dict[Any, list[Row]] = {}
    for row in rows:
        bias = frozenset((row.params.logit_bias or {}).items())
        asks = row.params.allowed is not None
        batches.setdefault((row.stops.ids, bias, asks), []).append(row)
    return list(batches.values())
