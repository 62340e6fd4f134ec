"""Anchored rejection: the worst is sought in the past too (Temporal Self-Rewarding Language Models,
arXiv 2508.06026).

As rounds go on the worst candidate gets as good as the best, and pairs teach less. So the rejected
response is the lowest-scored one of M_t's candidates and of those of M_0, the model that the first
round started from; the chosen one is M_t's. M_t judges both. The paper's other half, chosen
responses of a model trained ahead, is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from srlm_fast.data.records import Prompt, Sample
from srlm_fast.rounds.engine import Engine


def with_anchors(
    engine: Engine, prompts: Sequence[Prompt], samples: Sequence[Sample], t: int
) -> list[Sample]:
    """`samples` of M_t in round t, each prompt's followed by as many of M_0, whose `round` is 0.

    In the first round the two are one model, and there are none.
    """
    current, first = engine.resident, engine.lineage[-t]
    if first == current:
        return list(samples)
    engine.use(first)
    anchors, _ = engine.candidates(prompts, stage=f"anchors-{t}", round=0)
    engine.use(current)
    n = engine.config.sampling.num_candidates
    both = zip(_groups(samples, n), _groups(anchors, n), strict=True)
    return [
        sample
        for own, past in both
        for sample in (*own, *(replace(s, index=n + s.index) for s in past))
    ]


def _groups(samples: Sequence[Sample], n: int) -> list[Sequence[Sample]]:
    return [samples[i : i + n] for i in range(0, len(samples), n)]
