"""Which rows go together."""

import random
from typing import Any

from srlm_fast.sampler.batching import default_batch_tokens, max_rows, plan


def test_every_item_once_within_the_budgets() -> None:
    lengths = [random.Random(0).randint(1, 50) for _ in range(200)]
    batches = plan(lengths, rows=4, extra=10, tokens=1000, most=40)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    for batch in batches:
        width = max(lengths[i] for i in batch) + 10
        assert len(batch) * 4 <= 40
        assert len(batch) * 4 * width <= 1000
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(lengths, reverse=True)


def test_an_item_beyond_the_budget_goes_alone() -> None:
    assert plan([100, 3, 200], rows=2, extra=0, tokens=50, most=1) == [[2], [0], [1]]


def test_nothing_to_plan() -> None:
    assert plan([], rows=1, extra=0, tokens=1, most=1) == []


def test_default_budget_is_a_gibibyte_of_keys_and_values(model: Any) -> None:
    # 2 layers, 2 KV heads of 8, keys and values in float32.
    assert default_batch_tokens(model) == 2**30 // (2 * 2 * 2 * 8 * 4)


def test_rows_are_bounded_by_the_vocabulary() -> None:
    assert max_rows(151_936) * 151_936 * 4 <= 2**28
    assert max_rows(10**12) == 1
