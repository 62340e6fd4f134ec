"""Experience replay: some gold pairs in every round's training (DICE, arXiv 2406.09760)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from srlm_fast.data.records import Pair
from srlm_fast.rounds.engine import Engine


def replayed(engine: Engine, gold: Sequence[Pair], pairs: Sequence[Pair], t: int) -> list[Pair]:
    """Gold pairs to train on beside the `pairs` of round t, of which they make a share gamma.

    That is gamma / (1 - gamma) of them for each of `pairs`, drawn without replacement, and as in
    the authors' code on prompts that `pairs` do not have. What `gold` is short of is counted.
    """
    gamma = engine.config.pairs.gold_replay
    if gamma == 0:
        return []

    def make() -> tuple[list[Pair], dict[str, Any]]:
        wanted = round(gamma / (1 - gamma) * len(pairs))
        seen = {pair.prompt_ids for pair in pairs}
        fresh = [pair for pair in gold if pair.prompt_ids not in seen]
        rng = random.Random(engine.run.seed(f"replay-{t}"))
        drawn = rng.sample(fresh, min(wanted, len(fresh)))
        return drawn, {"missing": wanted - len(drawn)}

    return engine.run.records(f"round-{t}/replay", Pair, make)
