"""The evaluation stage that follows every model: same prompts, same sampling seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
    """Evaluate the resident model as `name`; samples go to evaluation/<name>.jsonl.

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
        judge = engine.judge("evaluate", initial or engine.base, before)
        implicit: Judge | None = judge if judge.name == "implicit" else None
        if implicit is None and initial and task.test_pairs:
            implicit = engine.implicit(initial)
        metrics, samples = evaluate_model(
            name,
            round=round,
            draw=draw,
            as_samples=partial(text_samples, template=engine.template),
            task=task,
            config=engine.config,
            judge=judge,
            implicit=implicit,
            opponents=_samples_of_earlier(run, previous),
            pairs=pairs,
        )
        flags = run.info(f"train/{name}").get("flags")
        if flags and task.oracle:
            # Behind the round's own pairs there may be gold ones.
            metrics["flags"] = flag_metrics(task.oracle, pairs, flags[: len(pairs)])
        return samples, metrics

    run.records(f"evaluation/{name}", Sample, make)


def _samples_of_earlier(run: Run, last: str) -> dict[str, list[Sample]]:
    """What the models up to `last` answered, in the order they were made; "": there are none."""
    stages, part = run.manifest["stages"], "evaluation/"
    names = [stage.removeprefix(part) for stage in stages if stage.startswith(part)]
    earlier = names[: names.index(last) + 1] if last else []
    return {name: read_jsonl(run.folder / f"evaluation/{name}.jsonl", Sample) for name in earlier}
