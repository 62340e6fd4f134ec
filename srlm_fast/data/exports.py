"""Output in the formats of other tools."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from srlm_fast.data.records import Sample, prompt_text


def alpaca_eval_rows(samples: Iterable[Sample], generator: str) -> list[dict[str, Any]]:
    """Rows of an AlpacaEval `model_outputs` file, one for each sample.

    generator: the name of the model that wrote them.
    """
    return [
        {
            "instruction": prompt_text(sample.prompt),
            "output": sample.response,
            "generator": generator,
            "dataset": "srlm_fast",
            "datasplit": "eval",
        }
        for sample in samples
    ]
