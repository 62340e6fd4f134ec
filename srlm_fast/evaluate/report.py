"""The report of a run: one HTML page without scripts or anything to load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from srlm_fast.data.jsonl import read_rows
from srlm_fast.errors import UserError
from srlm_fast.evaluate.markup import Markup, table, tag
from srlm_fast.evaluate.plots import model_plots, throughput_plot, training_plots
from srlm_fast.evaluate.table import (
    Row,
    agreement_rows,
    dropped_rows,
    eft_score_rows,
    result_rows,
    run_title,
)
from srlm_fast.evaluate.transcripts import answers_by_model, round_transcripts

NUM_TRANSCRIPTS = 8  # prompts shown of each round
NUM_ANSWERS = 4  # test prompts shown side by side


def render_report(run_dir: Path) -> str:
    """The report of a finished run folder as a self-contained HTML page.

    Every text of the run is escaped; a part whose file is missing is left out. Raises UserError
    when there is no summary.json.
    """
    path = run_dir / "summary.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; the report is made of a finished run")
    summary = json.loads(path.read_text(encoding="utf-8"))
    metrics_path = run_dir / "metrics.jsonl"
    metrics = read_rows(metrics_path) if metrics_path.is_file() else []
    title = run_title(summary)
    body = [
        tag("header", tag("h1", title), *[tag("p", note) for note in summary["notes"]]),
        _results(summary["models"]),
        _plots(summary, metrics),
        *[_evaluation_data(m["eft"]) for m in summary["models"] if m.get("eft")],
        _dropped(summary["models"]),
        _answers(run_dir / "evaluation", [m["name"] for m in summary["models"]]),
        *[_round(folder) for folder in _round_folders(run_dir)],
        _stages(summary["stages"]),
        _configuration(summary),
    ]
    return _page(title, body)


def _page(title: str, body: Sequence[Markup]) -> str:
    style = (resources.files("srlm_fast.evaluate") / "report.css").read_text(encoding="utf-8")
    head = [
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(style)),
    ]
    return (
        "<!DOCTYPE html>\n" + tag("html", tag("head", *head), tag("body", *body), lang="en") + "\n"
    )


def _section(title: str, *content: str) -> Markup:
    """A section of the page; nothing at all when there is no content."""
    return tag("section", tag("h2", title), *content) if any(content) else Markup("")


def _results(models: Sequence[Mapping[str, Any]]) -> Markup:
    agreement = agreement_rows(models)
    details = tag(
        "details",
        tag("summary", "Agreement of the judges by every convention"),
        _by_model(models, agreement),
    )
    return _section("Results", _by_model(models, result_rows(models)), details if agreement else "")


def _by_model(models: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> Markup:
    return table(["", *[m["name"] for m in models]], [[label, *cells] for label, cells in rows])


def _plots(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Markup:
    models = summary["models"]
    plots = [
        *model_plots(models),
        *training_plots(metrics),
        throughput_plot(summary["stages"], models),
    ]
    return _section("Plots", tag("div", *plots, class_="plots") if any(plots) else "")


def _evaluation_data(eft: Mapping[str, Any]) -> Markup:
    head = ["score", "judged", "order agrees", "taught"]
    rows = [[score, *cells] for score, cells in eft_score_rows(eft)]
    kept = f"{eft['groups_kept']} of {eft['groups']} ranked groups gave evaluation data."
    note = tag("p", f"{kept} Judgements, and the rows made of them, by score:", class_="quiet")
    return _section("Evaluation fine-tuning data", note, table(head, rows))


def _dropped(models: Sequence[Mapping[str, Any]]) -> Markup:
    rows = dropped_rows(models)
    note = tag("p", "What a round drops stands under the model that it trains.", class_="quiet")
    content = [note, _by_model(models, rows)] if rows else []
    return _section("What was dropped, and why", *content)


def _answers(folder: Path, models: Sequence[str]) -> Markup:
    return _section("One test prompt, every model", *answers_by_model(folder, models, NUM_ANSWERS))


def _round_folders(run_dir: Path) -> list[Path]:
    return sorted(
        run_dir.glob("round-[0-9]*"), key=lambda path: int(path.name.removeprefix("round-"))
    )


def _round(folder: Path) -> Markup:
    number = folder.name.removeprefix("round-")
    transcripts = round_transcripts(folder, NUM_TRANSCRIPTS)
    return _section(f"Round {number}: its first prompts, candidates and judgements", *transcripts)


def _stages(stages: Sequence[Mapping[str, Any]]) -> Markup:
    total = sum(stage["seconds"] for stage in stages)
    rows = [
        [
            stage["name"],
            f"{stage['seconds']:.1f}",
            _bar(stage["seconds"] / total if total else 0.0),
            _count(stage["rows"]),
            _count(stage["tokens"]),
            _rate(stage),
        ]
        for stage in stages
    ]
    head = ["stage", "seconds", "", "rows", "tokens", "tokens / s"]
    return _section(
        "Where the time went",
        tag("p", f"{total:.1f} seconds in all.") if rows else "",
        table(head, rows) if rows else "",
    )


def _bar(share: float) -> Markup:
    return tag("span", Markup(""), class_="bar", style=f"width: {8 * share:.2f}rem")


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _rate(stage: Mapping[str, Any]) -> str:
    return (
        f"{stage['tokens'] / stage['seconds']:,.0f}" if stage["tokens"] and stage["seconds"] else ""
    )


def _configuration(summary: Mapping[str, Any]) -> Markup:
    versions = [[name, str(version)] for name, version in summary["versions"].items()]
    config = yaml.safe_dump(summary["config"], sort_keys=False, allow_unicode=True)
    return _section(
        "How it was made",
        tag("details", tag("summary", "Configuration"), tag("pre", config)),
        tag("details", tag("summary", "Versions"), table(["", "version"], versions)),
    )
