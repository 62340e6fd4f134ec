"""Seeds and page counts of rows."""

import pytest

from srlm_fast.sampler.rows import most_pages, own_pages, row_seed


def test_seeds_are_the_same_everywhere_and_differ_by_each_part() -> None:
    assert row_seed(0, [1, 2, 3], 0) == -1904877767052379095
    seeds = {
        row_seed(seed, prompt, index)
        for seed in (0, 1)
        for prompt in ([1, 2, 3], [1, 23], [1], [])
        for index in (0, 1, 12)
    }
    assert len(seeds) == 24
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("prompt", "tokens", "pages"),
    [(64, 0, 0), (64, 1, 1), (64, 64, 1), (64, 65, 2), (100, 1, 1), (100, 28, 1), (100, 29, 2)],
)
def test_own_pages_begin_where_the_prompt_ends(prompt: int, tokens: int, pages: int) -> None:
    assert own_pages(prompt, tokens) == pages
    assert most_pages(prompt, tokens) == -(-prompt // 64) + pages
