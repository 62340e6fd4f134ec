"""The results of a run as one table: models are columns, measures are rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

WIDTH = 110
MISSING = "-"

# Where a model's entry counts by reason what was dropped, and what it was.
DROPS = {
    "prompts": ("prompts_dropped",),
    "in the round": ("dropped",),
    "in training": ("training", "dropped"),
    "held-out pairs": ("training", "eval_dropped"),
    "EFT groups": ("eft", "groups_dropped"),
    "EFT rows": ("eft", "rows_dropped"),
    "test prompts": ("test_prompts_dropped",),
    "test judgements": ("judge", "invalid"),
}

Model = Mapping[str, Any]
Row = tuple[str, list[str]]  # label, a cell for each model


def summary_table(summary: Mapping[str, Any]) -> str:
    """The terminal table of a `summary.json`: plain text, at most 110 columns.

    A value that a model lacks is "-", a measure that all lack is left out. Models that do not fit
    beside each other continue in a further block.
    """
    models = summary["models"]
    rows = [*result_rows(models), *dropped_rows(models)]
    label_width = max((len(label) for label, _ in rows), default=0)
    cell_width = max([len(cell) for _, cells in rows for cell in cells], default=0)
    cell_width = max([cell_width, *(len(m["name"]) for m in models)])
    fit = max(1, (WIDTH - label_width) // (cell_width + 2))
    blocks = [
        _block(models[i : i + fit], [(label, cells[i : i + fit]) for label, cells in rows],
               label_width, cell_width)
        for i in range(0, len(models), fit)
    ]  # fmt: skip
    return "\n\n".join([run_title(summary), *blocks])


def run_title(summary: Mapping[str, Any]) -> str:
    """What was run: method, task, seed."""
    return f"{summary['method']} on {summary['task']}, seed {summary['seed']}"


def result_rows(models: Sequence[Model]) -> list[Row]:
    """How good each model is, as a policy and as a judge."""
    measures: list[tuple[str, Callable[[Model], str]]] = [
        ("oracle score (0 to 5) ± se", _pm("oracle_score", "oracle_se")),
        *[(f"  {c}", _number("criteria", c)) for c in keys(models, "criteria")],
        ("oracle score, greedy", _number("greedy_oracle_score")),
        ("own judge's mean score ± se", _pm("judge_score", "judge_se")),
        *_wins(models, "win_rates", "win/tie/lose against {}"),
        ("  decided by", _text("judged_by")),
        *_wins(models, "head_to_head", "head to head with {}: win/tie/lose"),
        (
            "judge: pairs right (ties wrong/half)",
            _parts("judge", "pairwise_accuracy", parts=("wrong", "half")),
        ),
        ("  exact match", _number("judge", "exact_match")),
        ("  5-best", _number("judge", "five_best")),
        ("  Spearman", _number("judge", "spearman")),
        ("  Kendall tau", _number("judge", "kendall_tau")),
        ("  judgements parsed", _number("judge", "parsed_share")),
        (
            "  length bias, judge/ranks",
            _parts("judge", parts=("length_bias", "length_bias_of_ranks")),
        ),
        ("held-out preference accuracy", _number("preference_accuracy")),
        (
            "EFT: ranked groups kept/judged",
            _parts("eft", parts=("groups_kept", "groups"), form="{}"),
        ),
        ("  rows", _number("eft", "rows", digits=0)),
        ("mean length (tokens)", _number("mean_length", digits=1)),
        ("finished responses", _number("finished_share")),
        ("positive examples kept", _number("positives_kept", digits=0)),
        ("pairs kept", _number("pairs_kept", digits=0)),
        ("  score gap, chosen less rejected", _number("pairs", "score_gap")),
        ("  true gap by the oracle", _number("labels", "true_gap")),
        (
            "  tokens, chosen/rejected",
            _parts("pairs", parts=("chosen_length", "rejected_length"), form="{:.1f}"),
        ),
        (
            "  log-prob change, chosen/rejected",
            _parts(
                "training", parts=("chosen_logp_change", "rejected_logp_change"), form="{:+.2f}"
            ),
        ),
        ("  chosen less likely than before", _number("training", "displaced")),
        ("  checkpoint chosen (step)", _number("training", "best_step", digits=0)),
        ("  judgements parsed in its round", _number("round_parsed_share")),
        ("  labels right by the oracle", _number("label_accuracy")),
        ("  truly equal pairs", _number("labels", "equal")),
        ("  noise flags right/by chance", _parts("flags", parts=("precision", "base_rate"))),
    ]
    return _present([(label, [cell(m) for m in models]) for label, cell in measures])


def agreement_rows(models: Sequence[Model]) -> list[Row]:
    """The judge's agreement by every convention that papers could mean (see `reward_model`)."""
    accuracy = {
        f"pairs right, {scope}, ties {policy}": (key, policy)
        for policy in ("wrong", "half", "drop", "right")
        for key, scope in [
            ("pairwise_accuracy", "all pairs"),
            ("pairwise_accuracy_per_prompt", "mean of prompts"),
        ]
    }
    rest = {
        "exact match": ("exact_match",),
        "5-best, all responses": ("five_best",),
        "5-best, mean of prompts": ("five_best_per_prompt",),
        "Spearman, mean of prompts": ("spearman",),
        "Spearman, all responses": ("spearman_pooled",),
        "Kendall tau-b, mean of prompts": ("kendall_tau",),
        "Kendall tau-b, all responses": ("kendall_tau_pooled",),
    }
    cells = {label: _number("judge", *path, digits=3) for label, path in (accuracy | rest).items()}
    return _present([(label, [cell(m) for m in models]) for label, cell in cells.items()])


def eft_score_rows(eft: Mapping[str, Any]) -> list[Row]:
    """How many judgements gave each score, and how many of their rows were kept and then taught."""
    counts = [eft.get(f"scores_{stage}", {}) for stage in ("judged", "before", "after")]
    scores = sorted({score for count in counts for score in count}, key=float)
    return [(s, [str(count[s]) if s in count else "" for count in counts]) for s in scores]


def dropped_rows(models: Sequence[Model]) -> list[Row]:
    """What was dropped on the way to each model and in its evaluation, by reason."""
    return [
        (f"dropped {what}: {reason}", [_number(*path, reason, digits=0)(m) for m in models])
        for what, path in DROPS.items()
        for reason in keys(models, *path)
    ]


def _block(models: Sequence[Model], rows: Sequence[Row], label_width: int, cell_width: int) -> str:
    lines = [("", [m["name"] for m in models]), *rows]
    text = [
        f"{label:<{label_width}}" + "".join(f"  {cell:>{cell_width}}" for cell in cells)
        for label, cells in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _present(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if any(cell != MISSING for cell in row[1])]


def keys(models: Sequence[Model], *path: str) -> list[str]:
    """The keys of a dict at a path over all models, in order of first appearance."""
    return list(dict.fromkeys(key for m in models for key in lookup(m, *path) or {}))


def lookup(model: Model, *path: str) -> Any:
    """The value at a path of nested dicts; None when any part is missing or None."""
    value: Any = model
    for key in path:
        value = (value or {}).get(key)
    return value


def _number(*path: str, digits: int = 2) -> Callable[[Model], str]:
    def cell(model: Model) -> str:
        value = lookup(model, *path)
        return MISSING if value is None else f"{value:.{digits}f}"

    return cell


def _text(*path: str) -> Callable[[Model], str]:
    return lambda model: str(lookup(model, *path) or MISSING)


def _pm(value: str, error: str) -> Callable[[Model], str]:
    def cell(model: Model) -> str:
        if model.get(value) is None:
            return MISSING
        se = model.get(error)
        return f"{model[value]:.2f}" + ("" if se is None else f" ± {se:.2f}")

    return cell


def _wins(
    models: Sequence[Model], key: str, label: str
) -> list[tuple[str, Callable[[Model], str]]]:
    """A row for each opponent."""
    parts = ("win", "tie", "lose")
    return [
        (label.format(name), _parts(key, name, parts=parts, form="{:.0%}"))
        for name in keys(models, key)
    ]


def _parts(*path: str, parts: Sequence[str], form: str = "{:.2f}") -> Callable[[Model], str]:
    """Several values of one dict in a cell."""

    def cell(model: Model) -> str:
        values = [lookup(model, *path, part) for part in parts]
        return MISSING if None in values else "/".join(map(form.format, values))

    return cell
