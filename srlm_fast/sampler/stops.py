"""When a row ends, and what is left of it: EOS, stop tokens, stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from srlm_fast.errors import UserError
from srlm_fast.sampler.params import SamplingParams


class Ending(NamedTuple):
    """How a row ended: its first `length` tokens stay."""

    length: int
    text: str
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None


class Stops:
    """The stop rules of one call.

    Raises UserError for stop strings without a tokenizer: only text can contain them.
    """

    def __init__(self, params: SamplingParams, eos_ids: Iterable[int], tokenizer: Any) -> None:
        if params.stop and tokenizer is None:
            raise UserError("stop strings need the tokenizer; give it to Sampler(model, tokenizer)")
        self.strings = params.stop
        self.eos_ids = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self.ids = self.eos_ids | set(params.stop_token_ids)
        self._min_tokens = params.min_tokens
        self._tokenizer = tokenizer
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))

    def flags(self, vocab: int, device: torch.device) -> Tensor:
        """[V] bool: the tokens that end a row."""
        flags = torch.zeros(vocab, dtype=torch.bool)
        flags[[i for i in self.ids if 0 <= i < vocab]] = True
        return flags.to(device)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; empty without a tokenizer."""
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def found(self, ids: Sequence[int], fresh: int) -> bool:
        """Whether a stop string is complete in `ids`, of which the last `fresh` are new."""
        if not self.strings or len(ids) < self._min_tokens:
            return False
        # A quick look at the end first. A token that is not special gives at least a byte, so a
        # stop string spans no more of them than it has bytes. What shows may still lie inside the
        # first min_tokens.
        width, start = fresh + max(len(string.encode()) for string in self.strings), len(ids)
        while start > 0 and width > 0:
            start -= 1
            width -= ids[start] not in self._special
        text = self.decode(ids[start:])
        shown = any(string in text for string in self.strings)
        return shown and self._first_string(ids) is not None

    def ending(self, ids: Sequence[int]) -> Ending:
        """The end of a row of `ids`, which may run past a stop string."""
        if found := self._first_string(ids):
            return found
        if not ids or ids[-1] not in self.ids:
            return Ending(len(ids), self.decode(ids), "length", None)
        reason = None if ids[-1] in self.eos_ids else ids[-1]
        return Ending(len(ids), self.decode(ids[:-1]), "stop", reason)

    def _first_string(self, ids: Sequence[int]) -> Ending | None:
        """The stop string that is complete first, not wholly inside the first min_tokens."""
        if not self.strings:
            return None
        text = self.decode(ids)
        start = len(self.decode(ids[: self._min_tokens])) if self._min_tokens else 0
        hits = []
        for string in self.strings:
            at = text.find(string, max(0, start - len(string) + 1))
            if at >= 0:
                hits.append((at + len(string), at, string))
        if not hits:
            return None
        end, at, string = min(hits, key=lambda hit: hit[0])
        return Ending(self._tokens_until(ids, end), text[:at], "stop", string)

    def _tokens_until(self, ids: Sequence[int], end: int) -> int:
        """The smallest number of tokens whose text has `end` characters."""
        low, high = max(1, self._min_tokens), len(ids)
        while low < high:
            middle = (low + high) // 2
            if len(self.decode(ids[:middle])) >= end:
                high = middle
            else:
                low = middle + 1
        return low
