"""Preference rows in a fixed shuffled order, dealt to parts that share no prompt."""

from __future__ import annotations

from collections import Counter

import numpy as np

from srlm_fast.config import DataConfig
from srlm_fast.data.readers import read_preference_rows
from srlm_fast.data.records import Preference, Prompt
from srlm_fast.errors import UserError


def prompt_key(prompt: Prompt) -> str:
    """What makes two prompts the same: the user's words, without regard to spacing and case."""
    return " ".join(" ".join(m.content for m in prompt if m.role == "user").split()).casefold()


class PreferenceRows:
    """The rows of `data.preferences`, dealt from the front; none, where there is no such file.

    Their order is that of `datasets.Dataset.shuffle(seed=data.shuffle_seed)`, a permutation of all
    rows before any is left out; so with `data.slices: rows` the parts are those of the authors'
    code. A row whose prompt an earlier part has is left out and counted in `dropped`.
    """

    def __init__(self, data: DataConfig, dropped: Counter[str]) -> None:
        self.data, self.dropped = data, dropped
        rows = read_preference_rows(data.preferences, dropped) if data.preferences else []
        self.usable = sum(row is not None for row in rows)
        order = np.random.default_rng(data.shuffle_seed).permutation(len(rows))
        self._rows = iter([rows[i] for i in order.tolist()])
        self.seen: set[str] = set()  # prompts that were dealt

    def deal(self, size: int, setting: str, *, repeats: bool = False) -> list[Preference]:
        """The next part: `size` rows, or what is usable of as many rows (`data.slices`).

        No prompt is in it twice, unless `repeats`. Raises UserError, which names `setting`, when
        there are not enough rows.
        """
        part: list[Preference] = []
        new: set[str] = set()
        missing = size
        for row in self._rows if size else ():
            key = prompt_key(row.prompt) if row else ""
            if row and key not in self.seen and (repeats or key not in new):
                part.append(row)
                new.add(key)
                missing -= 1
            else:
                self.dropped["pair: prompt seen before"] += row is not None
                missing -= self.data.slices == "rows"
            if not missing:
                break
        if missing:
            raise self._too_few(size, setting, missing)
        self.seen |= new
        return part

    def test_pairs(self) -> tuple[list[Preference], list[Prompt]]:
        """The last `data.num_test_pairs` rows of the order on prompts that no part has, so that
        they hardly change with the parts; and the prompts of those that nobody has.

        Raises UserError as `deal`.
        """
        left = [row for row in self._rows if row]
        fresh = [row for row in left if prompt_key(row.prompt) not in self.seen]
        self.dropped["pair: prompt seen before"] += len(left) - len(fresh)
        missing = self.data.num_test_pairs - len(fresh)
        if self.data.preferences and missing > 0:
            raise self._too_few(self.data.num_test_pairs, "data.num_test_pairs", missing)
        spare = max(-missing, 0)
        test = fresh[spare:]
        self.seen |= {prompt_key(row.prompt) for row in test}
        return test, [row.prompt for row in reversed(fresh[:spare])]

    def _too_few(self, size: int, setting: str, missing: int) -> UserError:
        return UserError(
            f"{self.data.preferences} has {self.usable} usable pairs, too few: {setting} asks for"
            f" {size}, {missing} more than are left on prompts that no other part has; lower it, or"
            " what is dealt before it"
        )
