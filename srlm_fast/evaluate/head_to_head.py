"""One model against another, by a judge that was asked in both orders (arXiv 2401.10020, 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from srlm_fast.data.records import Prompt, Sample, Vote
from srlm_fast.evaluate.correlation import mean
from srlm_fast.evaluate.responses import outcome_rates


class Comparison(Protocol):
    """One response against another: `outcome` is 1 where it is better, 1/2 for a tie, 0 where it is
    worse, None without a verdict. `votes` are those of the two orders, scored alike: the first with
    this response in the first place. Where nobody was asked there are none."""

    @property
    def outcome(self) -> float | None: ...

    @property
    def votes(self) -> Sequence[Vote]: ...


class Comparer(Protocol):
    """A pairwise judge, as far as evaluation needs one."""

    @property
    def name(self) -> str:
        """Who judges, for the report."""

    def compare(
        self, prompts: Sequence[Prompt], ones: Sequence[Sample], others: Sequence[Sample]
    ) -> Sequence[Comparison]:
        """One comparison for each prompt."""


def head_to_head(
    judge: Comparer, ours: Sequence[Sample], theirs: Sequence[Sample]
) -> dict[str, Any]:
    """`outcome_rates` by the verdicts of `judge` on one response of either model to a prompt.

    inconsistent: share of the prompts with a verdict in both orders on which the two differ; it is
        a tie then. first_place: mean vote for whatever stood first, 1/2 for a judge to whom the
        place is all one. Both None where nobody was asked.
    """
    found = judge.compare([sample.prompt for sample in ours], ours, theirs)
    asked = [comparison.votes for comparison in found if comparison.votes]
    voted = [(a.score, b.score) for a, b in asked if a.score is not None and b.score is not None]
    return {
        **outcome_rates([comparison.outcome for comparison in found]),
        "judged_by": judge.name,
        "inconsistent": mean([one != other for one, other in voted]),
        "first_place": mean([(one + 1.0 - other) / 2 for one, other in voted]),
    }
