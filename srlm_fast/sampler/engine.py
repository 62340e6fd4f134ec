"""The sampler: generate and score with the trainer's own model, without a copy of its weights."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, cast

from torch import Tensor
from tqdm import tqdm

from srlm_fast.data.records import Message
from srlm_fast.data.template import ChatTemplate
from srlm_fast.errors import UserError
from srlm_fast.model.forward import lm_head
from srlm_fast.model.load import context_length, eos_token_ids
from srlm_fast.sampler import scoring
from srlm_fast.sampler.batching import default_batch_tokens, max_rows, plan
from srlm_fast.sampler.decode import BatchDecoder, Row
from srlm_fast.sampler.params import Completion, Output, SamplingParams
from srlm_fast.sampler.phase import inference
from srlm_fast.sampler.sampling import row_seed
from srlm_fast.sampler.selftest import check_model
from srlm_fast.sampler.stops import Stops

# Token ids, a text, or messages (role, content) that the tokenizer's chat template renders.
AnyPrompt = Sequence[int] | str | Sequence[tuple[str, str]]


class Sampler:
    """Samples from and scores with any HF causal LM whose attention keeps keys and values.

    The model is borrowed, not copied: weights changed in place count from the next call on, and
    train/eval modes are as before after every call. A row's tokens depend on (seed, prompt ids,
    candidate index) only, whatever else is in the call; equal prompts are computed once and get
    equal candidates.

    `eos_ids` adds to the EOS ids of the model and the tokenizer. `batch_tokens` bounds the tokens
    whose keys and values are held at once (0: by the memory at hand). `impl`: "slab" decodes with
    our own attention where that is faster, "reference" with the model's; "auto" is "slab", and
    `backend` says which. Raises UserError for a model that cannot be decoded this way.
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
        if impl not in ("auto", "slab", "reference"):
            raise ValueError(f"impl must be auto, slab or reference, not {impl!r}")
        check_model(model)
        self.model = model
        self.tokenizer = tokenizer
        self.backend = "slab" if impl == "auto" else impl
        self.eos_ids = tuple(sorted({*eos_token_ids(model, tokenizer), *eos_ids}))
        self.context = context_length(model)
        self.batch_tokens = batch_tokens or default_batch_tokens(model)

    def generate(
        self,
        prompts: Sequence[AnyPrompt],
        params: SamplingParams | None = None,
        progress: str = "",
    ) -> list[Output]:
        """n candidates of each prompt, in order; a bar named `progress` unless that is empty.

        Raises UserError, before any work, for an empty prompt, one that does not fit the context
        together with max_tokens, or ids outside the vocabulary.
        """
        params = params or SamplingParams()
        stops = Stops(params, self.eos_ids, self.tokenizer)
        ids = [self._encode(prompt) for prompt in prompts]
        self._check(ids, params)
        unique = list(dict.fromkeys(map(tuple, ids)))
        made = self._decode(unique, params, stops, progress)
        return [Output(prompt, list(made[tuple(prompt)])) for prompt in ids]

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
        progress: str = "",
    ) -> list[list[Tensor]]:
        """The model's raw log-probability (T = 1, nats) of each token of each completion.

        [p][c] is a float32 CPU tensor as long as completions[p][c]. Raises UserError as `generate`.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts, but {len(completions)} lists of completions")
        for row, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
            self._check_row(row, prompt, max(map(len, group), default=0))
            for completion in group:
                self._check_ids(completion, f"a completion of prompt {row}")
        with inference(self.model):
            return scoring.score(self.model, prompts, completions, progress)

    def next_logprobs(self, prompts: Sequence[Sequence[int]], token_ids: Sequence[int]) -> Tensor:
        """[P, K] float32 CPU: raw log-probability of each of `token_ids` to follow each prompt."""
        for row, prompt in enumerate(prompts):
            self._check_row(row, prompt, 0)
        self._check_ids(token_ids, "token_ids")
        with inference(self.model):
            return scoring.next_logprobs(self.model, prompts, token_ids)

    def _decode(
        self,
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams,
        stops: Stops,
        progress: str,
    ) -> dict[tuple[int, ...], list[Completion]]:
        """The candidates of each of these different prompts."""
        n, made = params.n, {}
        batches = plan(
            [len(p) for p in prompts],
            rows=n,
            extra=params.max_tokens,
            tokens=self.batch_tokens,
            most=max_rows(self._vocab),
        )
        bar = tqdm(
            total=len(prompts) * n, desc=progress, unit="seq", disable=None if progress else True
        )
        with bar, inference(self.model):
            decoder = BatchDecoder(
                self.model,
                lm_head(self.model),
                params,
                stops,
                _Meter(bar),
                slab_attention=self.backend == "slab",
            )
            for batch in batches:
                part = [prompts[i] for i in batch]
                seeds = [row_seed(params.seed, p, i) for p in part for i in range(n)]
                rows = decoder.decode(part, seeds)
                done = [
                    _completion(k % n, row, seed, stops)
                    for k, (row, seed) in enumerate(zip(rows, seeds, strict=True))
                ]
                made.update({p: done[k * n : (k + 1) * n] for k, p in enumerate(part)})
        return made

    def _encode(self, prompt: AnyPrompt) -> list[int]:
        if not isinstance(prompt, str) and (not prompt or isinstance(prompt[0], int)):
            return list(cast(Sequence[int], prompt))
        if self.tokenizer is None:
            raise UserError(
                "prompts of text need the tokenizer; give it to Sampler(model, tokenizer)"
            )
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt).input_ids)
        messages = cast(Sequence[tuple[str, str]], prompt)
        return self._template.encode_prompt(tuple(Message(*message) for message in messages))

    def _check(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        for row, prompt in enumerate(prompts):
            self._check_row(row, prompt, params.max_tokens)
        self._check_ids(list(params.logit_bias or ()), "logit_bias")
        self._check_ids(params.stop_token_ids, "stop_token_ids")

    def _check_row(self, row: int, prompt: Sequence[int], extra: int) -> None:
        if len(prompt) == 0:
            raise UserError(f"prompt {row} is empty; give at least one token (BOS, for instance)")
        if len(prompt) + extra > self.context:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens, and with {extra} response tokens exceeds"
                f" the model's context of {self.context}; shorten it or lower max_tokens"
            )
        self._check_ids(prompt, f"prompt {row}")

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
        return len(self.model.get_output_embeddings().weight)


class _Meter:
    """Moves a bar of rows and shows tokens a second."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._tokens = 0
        self._start = time.perf_counter()

    def __call__(self, rows: int, tokens: int) -> None:
        self._tokens += tokens
        rate = self._tokens / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
        self._bar.update(rows)


def _completion(index: int, row: Row, seed: int, stops: Stops) -> Completion:
    end = stops.ending(row.token_ids)
    logprobs, sample_logprobs, kept_mass = map(list, zip(*row.numbers[: end.length], strict=True))
    return Completion(
        index=index,
        token_ids=row.token_ids[: end.length],
        text=end.text,
        finish_reason=end.finish_reason,
        stop_reason=end.stop_reason,
        cumulative_logprob=sum(logprobs),
        logprobs=logprobs,
        sample_logprobs=sample_logprobs,
        kept_mass=kept_mass,
        seed=seed,
    )
