"""ROUGE-L between short texts, and an exact search for a near-duplicate among many."""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence

import torch

_WORD = re.compile(r"[^\W_]+")
# A word and its how-maniest occurrence: texts become sets whose overlap is that of the multisets.
Token = tuple[str, int]
# Float32 rounding may only add candidates, never lose one: they are compared exactly afterwards.
_SLACK = 0.01


def words(text: str) -> list[str]:
    """The words that ROUGE-L compares: runs of letters and digits, lower-cased. On ASCII text they
    are those of Google's rouge_score, which knows no other letters."""
    return _WORD.findall(text.lower())


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel (Hyyrö, 2004): len(b) steps."""
    positions: dict[str, int] = defaultdict(int)
    for index, word in enumerate(a):
        positions[word] |= 1 << index
    row = full = (1 << len(a)) - 1
    for word in b:
        matches = row & positions.get(word, 0)
        row = (row + matches) | (row - matches)
    return (~row & full).bit_count()


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """ROUGE-L F1 of two word lists: 2 LCS / (|a| + |b|), 0 when both are empty."""
    return 2 * lcs_length(a, b) / (len(a) + len(b)) if a or b else 0.0


class RougeIndex:
    """Texts so far, and whether a new one has ROUGE-L F1 above `threshold` with any of them.

    The answer is exactly that of comparing with every text. An inverted index gives the number of
    words that the new text shares with each; that bounds their LCS from above, and only where the
    bound passes the threshold is the LCS computed.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._texts: list[list[str]] = []
        self._lengths = array("i")
        self._postings: dict[Token, array[int]] = {}

    def add(self, text: str) -> None:
        """Adds a text to compare with."""
        new = words(text)
        for token in _tokens(new):
            self._postings.setdefault(token, array("i")).append(len(self._texts))
        self._texts.append(new)
        self._lengths.append(len(new))

    def has_similar(self, text: str) -> bool:
        """Whether some text that was added has ROUGE-L F1 above the threshold with this one."""
        new = words(text)
        shared = [self._postings[token] for token in _tokens(new) if token in self._postings]
        if not shared:
            return False
        where = torch.cat([torch.frombuffer(posting, dtype=torch.int32) for posting in shared])
        overlap = where.bincount(minlength=len(self._texts))
        lengths = torch.frombuffer(self._lengths, dtype=torch.int32)
        near = 2 * overlap > self.threshold * (lengths + len(new)) - _SLACK
        return any(
            rouge_l(new, self._texts[i]) > self.threshold for i in near.nonzero()[:, 0].tolist()
        )


def _tokens(text: Sequence[str]) -> list[Token]:
    seen: Counter[str] = Counter()
    tokens = []
    for word in text:
        tokens.append((word, seen[word]))
        seen[word] += 1
    return tokens
