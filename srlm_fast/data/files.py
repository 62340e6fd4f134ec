"""The task of a run on real data: input files, split so that no prompt is in two places."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from srlm_fast.config import Config
from srlm_fast.data.readers import read_prompts, read_trees
from srlm_fast.data.records import Example, Prompt, RankedGroup
from srlm_fast.data.slices import PreferenceRows, prompt_key
from srlm_fast.data.task import Task
from srlm_fast.errors import UserError


def task_from_files(config: Config) -> Task:
    """The task that `config.data` describes.

    srlm: message trees, split into IFT rows (the rank-0 reply), EFT groups and the judge's test
    groups (two ranked replies at least). The rounds' pool is `data.prompts`.
    spa: preference rows in the order of a fixed shuffle: gold pairs, then of each round's slice the
    prompts alone, unless `data.prompts` gives a pool; test pairs at its end (arXiv 2406.04412).

    Parts share no prompt, whatever its spacing and case. Test prompts are those of the test part;
    while they are fewer than `data.num_test_prompts`, prompts that no round needs join them.

    Raises UserError when a file is missing, unusable, or too small for the numbers asked.
    """
    return _srlm_task(config) if config.method == "srlm" else _spa_task(config)


def _srlm_task(config: Config) -> Task:
    data, dropped = config.data, Counter[str]()
    if not data.trees:
        raise UserError("srlm learns from ranked message trees; give a file with --data.trees")
    rng = _shuffler(config)
    groups = read_trees(data.trees, data.lang, dropped)
    seeds, ranked, held_out = _split_by_prompt(groups, data.split, rng)
    best = [g for g in seeds if g.ranks[0] == 0]
    eft, judge_test = ([g for g in part if len(g.responses) > 1] for part in (ranked, held_out))
    if not (best and judge_test and (eft or not config.eft.enabled)):
        raise UserError(
            f"{data.trees} has too few usable trees ({len(groups)}): data.split leaves {len(best)} "
            f"for IFT, {len(eft)} for EFT, {len(judge_test)} for the judge's test; give more trees"
        )
    dropped["IFT tree: no reply of rank 0"] += len(seeds) - len(best)
    dropped["EFT tree: a single reply"] += len(ranked) - len(eft)
    dropped["test tree: a single reply"] += len(held_out) - len(judge_test)
    pool: list[Prompt] = []
    if data.prompts:
        pool = _pool(data.prompts, {prompt_key(g.prompt) for g in groups}, rng, dropped)
    test_prompts, prompts = _hold_out([g.prompt for g in held_out], pool, config)
    return Task(
        name=Path(data.trees).name,
        ift=[Example(g.prompt, g.responses[0]) for g in best],
        eft=eft,
        judge_test=judge_test,
        prompts=prompts,
        test_prompts=test_prompts,
        dropped=+dropped,
    )


def _spa_task(config: Config) -> Task:
    data, dropped = config.data, Counter[str]()
    if not (data.preferences or (config.spa.no_seed and data.prompts)):
        raise UserError("spa learns from preference pairs; give a file with --data.preferences")
    rows = PreferenceRows(data, dropped)
    gold = [] if config.spa.no_seed else rows.deal(data.num_gold, "data.num_gold", repeats=True)
    sizes: list[int] = []
    if data.prompts:
        test_pairs, _ = rows.test_pairs()
        pool = _pool(data.prompts, rows.seen, _shuffler(config), dropped)
        test_prompts, prompts = _hold_out([row.prompt for row in test_pairs], pool, config)
    else:
        rounds = [rows.deal(size, "prompts.num_prompts") for size in _slice_sizes(config)]
        del rounds[config.rounds :]
        sizes = [len(part) for part in rounds]
        prompts = [row.prompt for part in rounds for row in part]
        test_pairs, spare = rows.test_pairs()
        test_prompts = _fresh([*(row.prompt for row in test_pairs), *spare])
    if not test_prompts:
        raise UserError("no prompt is left to test on: ask for fewer prompts, or give more data")
    return Task(
        name=Path(data.preferences or data.prompts).name,
        prompts=prompts,
        round_sizes=sizes,
        test_prompts=test_prompts[: data.num_test_prompts],
        gold=gold,
        test_pairs=test_pairs,
        dropped=+dropped,
    )


def _slice_sizes(config: Config) -> list[int]:
    """Of the slices behind the gold pairs: also those of rounds that are listed and not run, so
    that a shorter run of the same list is tested on the same rows."""
    last = max(config.rounds, len(config.prompts.num_prompts_by_round))
    return [config.prompts.of_round(t) for t in range(1, last + 1)]


def _shuffler(config: Config) -> random.Random:
    return random.Random(f"{config.seed}/data")


def _split_by_prompt(
    groups: Sequence[RankedGroup], shares: Sequence[float], rng: random.Random
) -> tuple[list[RankedGroup], ...]:
    """Three parts with `shares` of the distinct prompts, in a shuffled order."""
    by_prompt: dict[str, list[RankedGroup]] = {}
    for group in groups:
        by_prompt.setdefault(prompt_key(group.prompt), []).append(group)
    same_prompt = list(by_prompt.values())
    rng.shuffle(same_prompt)
    ends = [round(len(same_prompt) * sum(shares[:i])) for i in range(4)]
    parts = (same_prompt[start:end] for start, end in pairwise(ends))
    return tuple([group for same in part for group in same] for part in parts)


def _pool(source: str, seen: set[str], rng: random.Random, dropped: Counter[str]) -> list[Prompt]:
    """The prompts of a file in a shuffled order, without those in `seen`."""
    read = read_prompts(source, dropped)
    prompts = _fresh(read, seen)
    dropped["prompt: seen before"] += len(read) - len(prompts)
    rng.shuffle(prompts)
    return prompts


def _fresh(prompts: Iterable[Prompt], seen: Iterable[str] = ()) -> list[Prompt]:
    """The first of equal prompts, without those whose key is in `seen`."""
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        first.setdefault(prompt_key(prompt), prompt)
    for key in seen:
        first.pop(key, None)
    return list(first.values())


def _hold_out(
    test: Sequence[Prompt], pool: list[Prompt], config: Config
) -> tuple[list[Prompt], list[Prompt]]:
    """Test prompts, filled up from what the rounds leave of the pool, and the pool without them."""
    needed = 0
    if config.prompts.source == "dataset":
        needed = config.prompts.of_rounds(config.rounds)
    if len(pool) < needed:
        raise UserError(
            f"{config.rounds} rounds of prompts need {needed}, but {len(pool)} are left beside seed"
            " and test data; give more with --data.prompts or lower --prompts.num_prompts"
        )
    held_out = _fresh(test)[: config.data.num_test_prompts]
    spare = min(config.data.num_test_prompts - len(held_out), len(pool) - needed)
    kept = len(pool) - spare
    return [*held_out, *pool[kept:]], pool[:kept]
