"""What a run writes and removes again, before anything is loaded."""

from __future__ import annotations

from math import comb

from srlm_fast.config import Config


def cached_rows(config: Config, prompts: int, context: int) -> int:
    """Response tokens whose reference states a training keeps on disk, at most: of a round with so
    many `prompts`, or of spa's gold seed; held-out pairs too, where they are evaluated on.

    Sampled responses are as long as they may be, and given ones as long as a row.
    """
    longest = min(config.preference.max_length or context, context)
    sampled = min(config.sampling.max_new_tokens, longest)
    candidates = config.sampling.num_candidates * (1 + config.pairs.anchored_rejection)
    pairs = pairs_of(config, prompts, candidates)
    if config.method != "spa":
        return 2 * pairs * sampled
    is_sandbox, gamma = config.model == "sandbox", config.pairs.gold_replay
    gold = config.spa.num_seed_pairs if is_sandbox else config.data.num_gold
    seed = 0 if config.spa.no_seed else gold
    given = sampled if is_sandbox else longest
    replayed = min(seed, round(gamma / (1 - gamma) * pairs))
    held_out = config.data.num_test_pairs * longest if config.preference.eval_steps else 0
    return 2 * (max(pairs * sampled + replayed * given, seed * given) + held_out)


def pairs_of(config: Config, prompts: int, candidates: int) -> int:
    """That so many prompts give, at most, with so many candidates each."""
    return prompts * (comb(candidates, 2) if config.pairs.selection == "all" else 1)
