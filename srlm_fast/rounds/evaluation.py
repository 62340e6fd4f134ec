"""The evaluation stage that follows every model: same prompts, same sampling seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from srlm_fast.data.jsonl import read_jsonl
from srlm_fast.data.records import Pair, Prompt, Sample
from srlm_fast.data.task import Task
from srlm_fast.evaluate.labels import flag_metrics
from srlm_fast.evaluate.policy import evaluate_model
from srlm_fast.judge.base import Judge, text_samples
from srlm_fast.rounds.engine import Engine
from srlm_fast.rounds.manifest import Run
from srlm_fast.rounds.selection import pairwise_judge


def evaluate(
    engine: Engine,
    task: Task,
    name: str,
    *,
    round: int = 0,
    previous: str = "",
    initial: Path | None = None,
    before: Path | None = None,
    pairs: Sequence[Pair] = (),
) -> None:
    """Evaluate the resident model as `name`; samples go to evaluation/<name>.jsonl, and what is a
    number to metrics.jsonl and the trackers, where models are the steps of stage "evaluation".

    previous: the model made before it; to win against that one and all before it.
    initial: pi_init, for the implicit reward (SPA).
    before: the model it was trained from, for that reward too; see `Engine.judge`.
    pairs: what the model was trained on.
    """
    run = engine.run

    def draw(
        prompts: Sequence[Prompt], *, n: int, temperature: float, top_p: float
    ) -> tuple[list[Sample], Counter[str]]:
        return engine.candidates(
            prompts, stage="evaluate", round=round, n=n, temperature=temperature, top_p=top_p
        )

    def make() -> tuple[list[Sample], dict[str, Any]]:
        earlier = _evaluated(run)
        judge = engine.judge("evaluate", initial or engine.base, before)
        implicit: Judge | None = judge if judge.name == "implicit" else None
        if implicit is None and initial and task.test_pairs:
            implicit = engine.implicit(initial)
        compares = engine.config.evaluate.head_to_head
        metrics, samples = evaluate_model(
            name,
            round=round,
            draw=draw,
            as_samples=partial(text_samples, template=engine.template),
            task=task,
            config=engine.config,
            judge=judge,
            implicit=implicit,
            pairwise=pairwise_judge(engine, "evaluate") if compares else None,
            opponents=_samples(run, earlier[: earlier.index(previous) + 1] if previous else []),
            pairs=pairs,
        )
        flags = run.info(f"train/{name}").get("flags")
        if flags and task.oracle:
            # Behind the round's own pairs there may be gold ones.
            metrics["flags"] = flag_metrics(task.oracle, pairs, flags[: len(pairs)])
        run.logger("evaluation")({"step": len(earlier), **dict(_numbers(metrics))})
        return samples, metrics

    run.records(f"evaluation/{name}", Sample, make)


def _evaluated(run: Run) -> list[str]:
    """The models that have been evaluated, in the order they were made."""
    part = "evaluation/"
    return [s.removeprefix(part) for s in run.manifest["stages"] if s.startswith(part)]


def _samples(run: Run, names: Sequence[str]) -> dict[str, list[Sample]]:
    """What models answered to the test prompts."""
    return {name: read_jsonl(run.folder / f"evaluation/{name}.jsonl", Sample) for name in names}


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested metrics, by the names on their way: "judge/spearman"."""
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
