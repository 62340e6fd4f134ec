"""The papers' numbers: SRLM is arXiv 2401.10020 (v3), SPA is arXiv 2406.04412 (v2).

A model is named by the variant of `variants.py` that makes it and its name in that run; "last" is
the model of the last round.
"""

from __future__ import annotations

from typing import NamedTuple

Model = tuple[str, str]

SFT, SEED_DPO, SPA = ("spa", "SFT"), ("spa", "DPO"), ("spa", "last")
EXPANSION, REFINEMENT = ("spa/expansion", "last"), ("spa/refinement", "last")
PREVIOUS, NO_REFERENCE = ("spa/previous", "last"), ("spa/none", "last")
WORDS = ("spa/words", "last")


class Chain(NamedTuple):
    """A measure of SRLM's models, from the lowest to the highest in the paper."""

    label: str
    path: str  # in a model's entry of summary.json
    digits: int
    values: tuple[tuple[str, float], ...]


# AlpacaEval 2.0 win rate; length in characters there; table 4.
CHAINS = (
    Chain("oracle score", "oracle_score", 2, (("M1", 9.94), ("M2", 15.38), ("M3", 20.44))),
    Chain("mean length", "mean_length", 1, (("M1", 1092), ("M2", 1552), ("M3", 2552))),
    Chain("pairs right (ties half)", "judge.pairwise_accuracy.half", 3,
          (("SFT", 65.1), ("M1", 78.7), ("M2", 80.4), ("M3", 81.7))),
    Chain("5-best", "judge.five_best", 3,
          (("SFT", 39.6), ("M1", 41.5), ("M3", 43.2), ("M2", 44.3))),
    Chain("exact match", "judge.exact_match", 3,
          (("SFT", 10.1), ("M1", 13.1), ("M2", 14.3), ("M3", 14.3))),
    Chain("Spearman", "judge.spearman", 3,
          (("SFT", 0.253), ("M1", 0.279), ("M2", 0.331), ("M3", 0.349))),
    Chain("Kendall tau", "judge.kendall_tau", 3,
          (("SFT", 0.233), ("M1", 0.253), ("M2", 0.315), ("M3", 0.324))),
)  # fmt: skip

# Wins over the SFT baseline, of M2 and of SFT on the perfectly scored responses in its place.
POSITIVES = (49.2, 29)

PAIRS = {"M2": 3964, "M3": 6942}
PAIRS_WITHOUT_EFT = {"M2": 541, "M3": 429}

# (model, opponent) -> wins, ties, losses in percent, by GPT-4.
DUELS = {
    ("M1", "SFT"): (30.5, 38.7, 30.9),
    ("M2", "SFT"): (49.2, 36.3, 14.5),
    ("M3", "SFT"): (62.5, 27.7, 9.8),
    ("M2", "M1"): (55.5, 32.8, 11.7),
    ("M3", "M2"): (47.7, 39.8, 12.5),
    ("M3", "M1"): (68.8, 22.7, 8.6),
}

# Better, worse, numbers: AlpacaEval 2.0 length-controlled win rates (tables 1, 2, 6, 7, figure 4).
SCORES: tuple[tuple[str, Model, Model, str], ...] = (
    ("DPO on the seed is better than SFT", SEED_DPO, SFT, "9.03 > 7.58"),
    ("expansion is better than DPO on the seed", EXPANSION, SEED_DPO, "14.41 > 9.03"),
    ("self-refinement adds to expansion", REFINEMENT, EXPANSION, "14.70 > 14.41"),
    ("decoupled detection adds to self-refinement", SPA, REFINEMENT, "15.39 > 14.70"),
    ("SPA is better than DPO on the seed", SPA, SEED_DPO, "15.39 > 9.03"),
    ("the SFT model is a better judging reference than the previous model", SPA, PREVIOUS,
     "15.08 > 13.73"),
    ("the previous model is a better judging reference than none", PREVIOUS, NO_REFERENCE,
     "13.73 > 12.83"),
    ("SPA is better than LLM-as-a-judge", SPA, WORDS, "15.39 > 9.28"),
    ("LLM-as-a-judge is better than DPO on the seed", WORDS, SEED_DPO, "9.28 > 9.03"),
    *((f"SPA is better than DPO on a seed of {size}", (f"spa/{size}", "last"),
       (f"spa/{size}", "DPO"), "about twice") for size in ("0.8%", "1.7%", "10%")),
    ("without a seed SPA improves on its start", ("spa/no-seed", "last"), ("spa/no-seed", "SFT"),
     "11.59 > 10.14"),
)  # fmt: skip


class Line(NamedTuple):
    """A line of SPA's tables."""

    label: str
    model: Model
    reported: str = "-"  # length-controlled / raw win rate


ABLATION = (
    Line("SFT", SFT, "7.58 / 4.72"),
    Line("DPO on the seed", SEED_DPO, "9.03 / 7.68"),
    Line("+ expansion", EXPANSION, "14.41 / 19.91"),
    Line("+ self-refinement", REFINEMENT, "14.70 / 19.94"),
    Line("+ decoupled detection (SPA)", SPA, "15.39 / 21.13"),
)
JUDGES = (
    Line("own reward against the SFT model (SPA)", SPA, "15.08; 15.39 / 21.13"),
    Line("own reward against the previous model", PREVIOUS, "13.73"),
    Line("own likelihood, no reference", NO_REFERENCE, "12.83"),
    Line("LLM-as-a-judge, no refinement", WORDS, "9.28 / 9.18"),
    Line("control: random labels", ("spa/random", "last")),
    Line("control: longest wins", ("spa/longest", "last")),
)
SEEDS = (
    Line("0.8 %, DPO", ("spa/0.8%", "DPO")),
    Line("0.8 %, SPA", ("spa/0.8%", "last")),
    Line("1.7 %, DPO", ("spa/1.7%", "DPO")),
    Line("1.7 %, SPA", ("spa/1.7%", "last")),
    Line("3.3 %, DPO", SEED_DPO, "9.03 / 7.68"),
    Line("3.3 %, SPA", SPA, "15.39 / 21.13"),
    Line("10 %, DPO", ("spa/10%", "DPO")),
    Line("10 %, SPA", ("spa/10%", "last")),
    Line("no seed, start", ("spa/no-seed", "SFT"), "10.14 / 6.31"),
    Line("no seed, SPA", ("spa/no-seed", "last"), "11.59 / 9.79"),
)
