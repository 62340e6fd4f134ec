"""What a run is about: the data it starts from, and how its models are measured.

A `Task` is built once, before the first stage, either from files (`data.files`) or by the sandbox.
The rounds see only this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from srlm_fast.data.records import Example, Preference, Prompt, RankedGroup


@dataclass(frozen=True)
class Task:
    """The inputs of both methods; a field that a method does not need may be empty.

    round_sizes: how many of `prompts` each round takes, in order, where the data decides it.
    annotate: stands for the human who labels the seed pairs of SPA when `gold` is empty: takes a
        prompt and responses, returns a score for each (higher is better). Never called inside a
        round.
    oracle: the true criteria of a response, name to 0 or 1, where the world has them (the sandbox).
        Their sum is the true score. Used for evaluation only.
    is_valid_prompt: says whether a generated prompt is well-formed, where that is known.
    dropped: counts of what the readers left out of the input, by reason.
    """

    name: str
    ift: Sequence[Example] = ()
    eft: Sequence[RankedGroup] = ()
    judge_test: Sequence[RankedGroup] = ()
    prompts: Sequence[Prompt] = ()
    round_sizes: Sequence[int] = ()
    test_prompts: Sequence[Prompt] = ()
    gold: Sequence[Preference] = ()
    test_pairs: Sequence[Preference] = ()
    annotate: Callable[[Prompt, Sequence[str]], list[float]] | None = None
    oracle: Callable[[Prompt, str], dict[str, int]] | None = None
    is_valid_prompt: Callable[[str], bool] | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
