"""Which rows run: admitted while pages last, retired at their end, preempted when pages run out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from srlm_fast.sampler.forest import PrefixForest
from srlm_fast.sampler.pool import OutOfPages
from srlm_fast.sampler.rows import Row

LOOKAHEAD = 256  # tokens of every running row that admission leaves room for


class Scheduler:
    """Runs `rows` in their order, at most `most` at once, on the pages of `forest`.

    The whole batch is known, so rows of one prompt come together and are admitted together. Memory
    is promised for `LOOKAHEAD` tokens a row, not for max_tokens: should rows be longer, the
    youngest give up their own pages, keep their tokens, and come back later. Each row must fit the
    pool alone.
    """

    def __init__(self, forest: PrefixForest, rows: Iterable[Row], most: int) -> None:
        self.forest = forest
        self.waiting = deque(rows)
        self.running: list[Row] = []
        self.preemptions = 0
        self._most = most

    def admit(self) -> list[Row]:
        """Starts waiting rows, with pages for the tokens they have; returns them."""
        started: list[Row] = []
        promised = sum(self._promised(row) for row in self.running)
        while self.waiting and len(self.running) < self._most:
            row = self.waiting[0]
            need = self.forest.claim(row.prompt) + self._promised(row)
            if self.running and self.forest.available - promised < need:
                break
            try:
                row.path = self.forest.take(row.prompt)
            except OutOfPages:
                break
            if not self._hold(row, len(row.tokens)):
                self._leave(row)
                break
            promised += self._promised(row)
            self.running.append(self.waiting.popleft())
            started.append(row)
        return started

    def reserve(self, steps: int) -> None:
        """Gives every running row the pages of its next `steps` tokens, the oldest first; rows that
        cannot have them wait again."""
        for row in list(self.running):
            # A row draws its next token from the one before: that one is written now.
            while row.path and not self._hold(row, len(row.tokens) - 1 + steps):
                self._preempt(self.running[-1])

    def retire(self) -> list[Row]:
        """The rows that have ended; their pages are free again."""
        ended = [row for row in self.running if row.ended]
        for row in ended:
            self._leave(row)
        self.running = [row for row in self.running if not row.ended]
        return ended

    def _promised(self, row: Row) -> int:
        return max(0, row.pages_for(len(row.tokens) + LOOKAHEAD) - len(row.pages))

    def _hold(self, row: Row, tokens: int) -> bool:
        """Whether the row now has pages for the keys of `tokens` drawn tokens."""
        try:
            missing = max(0, row.pages_for(tokens) - len(row.pages))
            row.pages += self.forest.take_pages(missing)
        except OutOfPages:
            return False
        return True

    def _preempt(self, row: Row) -> None:
        self.preemptions += 1
        self._leave(row)
        self.running.remove(row)
        self.waiting.appendleft(row)

    def _leave(self, row: Row) -> None:
        self.forest.release(row.path)
        self.forest.pool.give(row.pages)
        row.path, row.pages = [], []
