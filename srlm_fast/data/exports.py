"""Output in the formats of other tools."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

from srlm_fast.data.records import Sample, prompt_text


def alpaca_eval_rows(samples: Iterable[Sample], generator: str) -> list[dict[str, Any]]:
    """Rows of an AlpacaEval `model_outputs` file, one for each sample.

    generator: the name of the model that wrote them.
    """
    return [
        alpaca_eval_row(prompt_text(sample.prompt), sample.response, generator)
        for sample in samples
    ]


def alpaca_eval_row(
    instruction: str, output: str, generator: str, dataset: str = "srlm_fast"
) -> dict[str, Any]:
    """One of them; AlpacaEval joins two models' outputs by their instruction."""
    return {
        "instruction": instruction,
        "output": output,
        "generator": generator,
        "dataset": dataset,
        "datasplit": "eval",
    }


def mt_bench_row(question_id: Any, turns: Sequence[str], model_id: str) -> dict[str, Any]:
    """A line of FastChat's `model_answer/<model_id>.jsonl`: the replies to the turns of a question.

    FastChat takes the model's name from the file's, so `model_id` should be its stem.
    """
    text = "\0".join([model_id, str(question_id), *turns])
    return {
        "question_id": question_id,
        "answer_id": hashlib.sha256(text.encode()).hexdigest()[:22],
        "model_id": model_id,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": time.time(),
    }
