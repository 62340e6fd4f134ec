"""Which plots a report shows, and what of `summary.json` and `metrics.jsonl` they draw."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from srlm_fast.evaluate.markup import Markup
from srlm_fast.evaluate.svg import Series, line_plot
from srlm_fast.evaluate.table import keys, lookup

Model = Mapping[str, Any]

# Stage of a round -> what it does, in the words of the throughput plot.
WORK = {"samples": "sampling", "judgements": "judging", "train": "training"}


def model_plots(models: Sequence[Model]) -> list[Markup]:
    """Score, criteria, judge agreement, labels and length over the models; absent where unknown."""
    names = [m["name"] for m in models]

    def over_models(
        title: str, y_label: str, series: list[Series], from_zero: bool = False
    ) -> Markup:
        return line_plot(
            title, series, x_label="model", y_label=y_label, x_names=names, from_zero=from_zero
        )

    plots = [
        over_models("Oracle score", "points of 5", [
            _series(models, "sampled, ± standard error", "oracle_score", error="oracle_se"),
            _series(models, "greedy", "greedy_oracle_score"),
        ]),
        over_models("The criteria apart", "share of responses", [
            _series(models, name, "criteria", name) for name in keys(models, "criteria")
        ]),
        over_models("Own judge's mean score", "score", [
            _series(models, "sampled, ± standard error", "judge_score", error="judge_se"),
        ]),
        over_models("Agreement of the judge with the known ranking", "agreement", [
            _series(models, "pairs, ties half", "judge", "pairwise_accuracy", "half"),
            _series(models, "pairs, ties wrong", "judge", "pairwise_accuracy", "wrong"),
            _series(models, "exact match", "judge", "exact_match"),
            _series(models, "Spearman", "judge", "spearman"),
            _series(models, "Kendall tau", "judge", "kendall_tau"),
        ]),
        over_models("Preference labels", "share right", [
            _series(models, "labels trained on, by the oracle", "label_accuracy"),
            _series(models, "held-out pairs, by the implicit reward", "preference_accuracy"),
            _series(models, "noise flags", "flags", "precision"),
            _series(models, "noise flags by chance", "flags", "base_rate"),
        ]),
        over_models("Mean length of a response", "tokens", [
            _series(models, "tokens", "mean_length"),
            _series(models, "chosen, trained on", "pairs", "chosen_length"),
            _series(models, "rejected, trained on", "pairs", "rejected_length"),
        ], from_zero=True),
        over_models("Gap between chosen and rejected", "score", [
            _series(models, "by the judge", "pairs", "score_gap"),
            _series(models, "by the oracle", "labels", "true_gap"),
        ], from_zero=True),
    ]  # fmt: skip
    return [plot for plot in plots if plot]


def training_plots(metrics: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Reward margins and losses of every training stage, by optimiser step."""
    plots = [
        line_plot("Reward margins in training", _curves(metrics, "rewards/margins"),
                  x_label="step", y_label="reward margin"),
        line_plot("Training loss", _curves(metrics, "loss"), x_label="step", y_label="loss"),
    ]  # fmt: skip
    return [plot for plot in plots if plot]


def throughput_plot(stages: Sequence[Mapping[str, Any]], models: Sequence[Model]) -> Markup:
    """Tokens a second of the stages that count tokens, over the rounds."""
    round_of_model = {m["name"]: m["round"] for m in models}
    rates: dict[str, list[tuple[float, float]]] = {}
    for stage in stages:
        in_round = re.fullmatch(r"round-(\d+)/(\w+)", stage["name"])
        in_training = re.fullmatch(r"train/(.+)", stage["name"])
        if not stage.get("tokens") or not stage["seconds"]:
            continue
        rate = stage["tokens"] / stage["seconds"]
        if in_round and in_round[2] in WORK:
            rates.setdefault(WORK[in_round[2]], []).append((int(in_round[1]), rate))
        elif in_training and round_of_model.get(in_training[1]):
            rates.setdefault(WORK["train"], []).append((round_of_model[in_training[1]], rate))
    last = int(max((x for points in rates.values() for x, _ in points), default=0))
    return line_plot(
        "Throughput",
        [Series(name, [(x - 1, y) for x, y in points]) for name, points in rates.items()],
        x_label="round",
        y_label="tokens per second",
        x_names=[str(t) for t in range(1, last + 1)],
        from_zero=True,
    )


def _series(models: Sequence[Model], name: str, *path: str, error: str = "") -> Series:
    known = [(i, lookup(m, *path), m.get(error)) for i, m in enumerate(models)]
    known = [row for row in known if row[1] is not None]
    return Series(name, [(i, y) for i, y, _ in known], [e for _, _, e in known])


def _curves(metrics: Sequence[Mapping[str, Any]], key: str) -> list[Series]:
    rows = [row for row in metrics if row.get(key) is not None and "step" in row]
    return [
        Series(stage, [(row["step"], row[key]) for row in group])
        for stage, group in groupby(rows, key=lambda row: str(row["stage"]))
    ]
