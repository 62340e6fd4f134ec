"""A bar of what is done, with the rate of tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from srlm_fast.sampler.rows import Row


def bar_of(name: str, total: int, unit: str) -> Any:
    """A progress bar called `name`, shown on terminals only; silent without a name."""
    return tqdm(total=total, desc=name, unit=unit, disable=None if name else True)


class Meter:
    """Moves a bar of rows as they end, and shows tokens a second."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._tokens = 0
        self._start = time.perf_counter()

    def __call__(self, ended: Sequence[Row]) -> None:
        self._tokens += sum(len(row.tokens) for row in ended)
        rate = self._tokens / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
        self._bar.update(len(ended))
