"""The orderings that the papers report, and whether the rows have them too.

A claim is a difference that is positive in the paper. It is taken seed by seed, since the variants
of a seed share their pre-training and test prompts, and judged by a t-interval over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from benchmarks.fidelity import paper
from benchmarks.rows import Row
from srlm_fast.evaluate.correlation import mean, standard_error
from srlm_fast.evaluate.table import lookup

# Student's t: 0.975 quantiles for 1, 2, ... degrees of freedom; with more than 9 the last is used.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

BySeed = Mapping[str, Row]  # the rows of one seed, by variant
Measure = Callable[[BySeed], float | None]


@dataclass(frozen=True)
class Claim:
    """`measure` is positive in the paper, whose own numbers are `reported`."""

    method: str
    text: str
    reported: str
    measure: Measure


@dataclass(frozen=True)
class Finding:
    """What the rows say of a claim: a difference for each seed that has all it takes."""

    claim: Claim
    differences: Sequence[float]

    @property
    def verdict(self) -> str:
        """One of "as reported", "reversed", "undecided" (the 95 % interval holds 0), "not run"."""
        centre, error = mean(self.differences), standard_error(self.differences)
        if centre is None or error is None:
            return "not run"
        if abs(centre) <= T_975[min(len(self.differences) - 1, len(T_975)) - 1] * error:
            return "undecided"
        return "as reported" if centre > 0 else "reversed"


def findings(seeds: Sequence[BySeed]) -> list[Finding]:
    """Of every claim, in the order of the report."""
    return [
        Finding(claim, [d for seed in seeds if (d := claim.measure(seed)) is not None])
        for claim in claims()
    ]


def claims() -> Iterator[Claim]:
    """SRLM's rounds, duels and pairs, then SPA's tables."""
    for label, path, _, values in paper.CHAINS:
        for (low, worse), (high, better) in pairwise(values):
            if worse == better:  # no order to claim
                continue
            measure = _above(path, ("srlm", high), ("srlm", low))
            yield Claim("SRLM", f"{label}: {high} above {low}", f"{better} > {worse}", measure)
    for (name, opponent), (win, _, lose) in paper.DUELS.items():
        if win > lose:  # M1 and the SFT baseline are equals in the paper
            yield Claim(
                "SRLM", f"{name} beats {opponent}", f"{win} : {lose}", _beats(name, opponent)
            )
    yield Claim(
        "SRLM", "with EFT data the first round has more pairs than without",
        f"{paper.PAIRS['M2']} > {paper.PAIRS_WITHOUT_EFT['M2']}",
        _above("pairs_kept", ("srlm", "M2"), ("srlm/no-eft", "M2")),
    )  # fmt: skip
    yield Claim(
        "SRLM", "a round of pairs is better than one of positive examples",
        "{} > {}".format(*paper.POSITIVES),
        _above("oracle_score", ("srlm", "M2"), ("srlm/positives", "M2")),
    )  # fmt: skip
    for text, better_model, worse_model, reported in paper.SCORES:
        yield Claim("SPA", text, reported, _above("oracle_score", better_model, worse_model))


def entry(row: Row, name: str) -> dict[str, Any]:
    """What a row says of a model; empty where the run made none of this name."""
    models: list[dict[str, Any]] = row["models"]
    if name == "last":
        return models[-1]
    return next((m for m in models if m["name"] == name), {})


def _value(seed: BySeed, model: paper.Model, path: str) -> float | None:
    variant, name = model
    found: float | None = None
    if variant in seed:
        found = lookup(entry(seed[variant], name), *path.split("."))
    return found


def _above(path: str, better: paper.Model, worse: paper.Model) -> Measure:
    def measure(seed: BySeed) -> float | None:
        high, low = _value(seed, better, path), _value(seed, worse, path)
        return None if high is None or low is None else high - low

    return measure


def _beats(name: str, opponent: str) -> Measure:
    """Wins less losses."""

    def measure(seed: BySeed) -> float | None:
        path = f"win_rates.{opponent}"
        win, lose = (_value(seed, ("srlm", name), f"{path}.{part}") for part in ("win", "lose"))
        return None if win is None or lose is None else win - lose

    return measure
