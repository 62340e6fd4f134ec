"""SRLM's pair construction on a case small enough to be done by hand, and written a second time.

Section 2.3 of arXiv 2401.10020: three judgements of each candidate, their mean, the best against
the worst, equal ones dropped; and what the paper leaves open, as the design has it.
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from srlm_fast.config import Config, JudgeConfig, SamplingConfig
from srlm_fast.data.records import Sample, user
from srlm_fast.errors import UserError
from srlm_fast.judge.prompted import PromptedJudge
from srlm_fast.rounds.engine import Engine
from srlm_fast.rounds.manifest import Run
from srlm_fast.rounds.stages import best_and_worst, judgements
from tests.judge.conftest import CharTemplate, ScriptedSampler

CONFIG = Config(model="sandbox", judge=JudgeConfig(prompt="sandbox", num_samples=3))
ROOM = 400  # characters of a judge prompt
LONG = "long " * 80

# Candidates of each prompt: the response, and the judge's three words on it; or why none are asked.
Case = dict[str, list[tuple[str, list[str] | str]]]
CASE: Case = {
    # Means 13/3, 7/2 (of the two that can be read), 5/3, and none.
    "plain": [
        ("a", ["good Score: 4", "good Score: 4", "fine Score: 5"]),
        ("b", ["Score: 3", "I like it", "Score: 4"]),
        ("c", ["Score: 1", "Score: 2", "Score: 2"]),
        ("d", ["bad", "Score: 9", "Score: 1 + 1"]),
    ],
    # All that can be read is 3 in the mean, and d is a repetition.
    "tie": [
        ("a", ["Score: 3", "Score: 3", "Score: 3"]),
        ("b", ["Score: 2", "Score: 3", "Score: 4"]),
        ("c", ["Score: 3", "hm", "hm"]),
        ("b", "duplicate"),
    ],
    "one left": [
        ("a", "truncated"),
        ("b", ["Score: 5", "Score: 5", "Score: 5"]),
        ("c", ["hm", "hm", "hm"]),
        (" ", "empty"),
    ],
    # 11/3 twice: the floor of both and of 10/3 is 3, and the order of votes must not matter.
    "thirds": [
        ("a", ["Score: 4", "Score: 4", "Score: 3"]),
        ("b", ["Score: 3", "Score: 4", "Score: 4"]),
        ("c", ["Score: 4", "Score: 3", "Score: 3"]),
        ("d", ["Score: 10", "Score: 3", "Score: 4"]),
    ],
    # The worst twice; d's words are no score, and so it is not the worst.
    "worst twice": [
        ("a", ["Score: 2", "Score: 2", "Score: 2"]),
        ("b", ["Score: 5", "Score: 5", "Score: 5"]),
        ("c", ["Score: 2", "Score: 2", "Score: 2"]),
        ("d", ["Score: 8/10", "Score:", "4/5"]),
    ],
    "nothing left": [("a", "truncated"), ("b", "truncated"), ("", "empty"), (" ", "empty")],
    # c has no room to be judged.
    "long": [
        ("a", ["Score: 0", "Score: 0", "Score: 1"]),
        ("b", ["Score: 1", "Score: 0", "Score: 0"]),
        (LONG, "judge prompt too long"),
        ("d", ["Score: 0", "Score: 0", "Score: 0"]),
    ],
    # 13.5 / 3 each.
    "decimals": [
        ("a", ["Score: 4.5", "hm", "Score: 4.5"]),
        ("b", ["Score: 4.5", "Score: 4.4", "Score: 4.6"]),
        ("c", ["Score: 4.6", "Score: 4.5", "Score: 4.4"]),
        ("c", "truncated"),
    ],
}
# Prompt, chosen and rejected, and their scores: by hand.
PAIRS = [
    ("plain", 0, 2, Fraction(13, 3), Fraction(5, 3)),
    ("thirds", 0, 2, Fraction(11, 3), Fraction(10, 3)),
    ("worst twice", 1, 0, Fraction(5), Fraction(2)),
    ("long", 0, 3, Fraction(1, 3), Fraction(0)),
]
DROPPED = {"duplicate": 1, "truncated": 4, "empty": 3, "tie": 2, "fewer than two judged": 2}
# Votes without a score; "no score" stands 2, 2, 3, 2 and 1 times, in the order of the prompts.
UNREAD = {"no score": 10, "out of range": 3, "a sum without its total": 1}


def samples() -> list[Sample]:
    return [
        Sample(
            prompt=user(prompt), prompt_ids=tuple(map(ord, prompt)), response=response,
            response_ids=(*map(ord, response), index), logprobs=(), index=index, seed=0, round=1,
            finish_reason="length" if said == "truncated" else "stop",
        )
        for prompt, group in CASE.items()
        for index, (response, said) in enumerate(group)
    ]  # fmt: skip


def says(prompt: str, vote: int, seed: int) -> str:
    found = re.search(r"task : (.*) ; response : (.*) ; justify", prompt)
    assert found
    said = next(said for response, said in CASE[found[1]] if response == found[2])
    assert isinstance(said, list), f"{found[1]}: {found[2]!r} is not to be judged"
    return said[vote]


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    """As much of an engine as judging needs, with a judge whose words are those of the case."""
    template, sampler = CharTemplate(), ScriptedSampler(says)
    context = ROOM + CONFIG.judge.max_new_tokens
    judge = PromptedJudge(sampler, template, CONFIG.judge, seed=0, context=context)  # type: ignore
    run = Run(tmp_path / "run", CONFIG, {})
    model = SimpleNamespace(dtype=torch.float32)
    return SimpleNamespace(
        run=run, config=CONFIG, base=None, model=model, judge=lambda *_, **__: judge
    )


def transcribed() -> list[tuple[str, int, int, Fraction, Fraction]]:
    """The construction a second time: exact fractions, a reader of its own, nothing of the package.

    For each prompt: r = the mean of the readable of the three; argmax and argmin, the first of
    equals; no pair where they are equal, or where fewer than two candidates have an r.
    """
    pairs = []
    for prompt, group in CASE.items():
        r: dict[int, Fraction] = {}
        for index, (_, said) in enumerate(group):
            if isinstance(said, str):
                continue
            read = [re.search(r"Score: ([0-5](?:\.[0-9])?)$", vote) for vote in said]
            scores = [Fraction(match[1]) for match in read if match]
            if scores:
                r[index] = sum(scores, Fraction()) / len(scores)
        if len(r) < 2 or len({*r.values()}) == 1:
            continue
        best, worst = max(r, key=lambda i: (r[i], -i)), min(r, key=lambda i: (r[i], i))
        pairs.append((prompt, best, worst, r[best], r[worst]))
    return pairs


def test_both_writings_give_what_the_hand_gave(engine: Any) -> None:
    assert transcribed() == PAIRS
    drawn = samples()
    made = best_and_worst(engine, drawn, judgements(engine, drawn, 1), 1)
    by_place = {(s.prompt, s.response_ids): s for s in drawn}
    found = [
        (
            pair.prompt[0].content,
            by_place[pair.prompt, pair.chosen_ids].index,
            by_place[pair.prompt, pair.rejected_ids].index,
            pair.chosen_score,
            pair.rejected_score,
        )
        for pair in made
    ]
    assert found == [(*pair[:3], float(pair[3]), float(pair[4])) for pair in PAIRS]


def test_all_that_is_dropped_is_counted_by_reason(engine: Any) -> None:
    drawn = samples()
    verdicts = judgements(engine, drawn, 1)
    pairs = best_and_worst(engine, drawn, verdicts, 1)
    assert engine.run.info("round-1/pairs")["dropped"] == DROPPED
    assert len(pairs) + DROPPED["tie"] + DROPPED["fewer than two judged"] == len(CASE)
    lost = DROPPED["duplicate"] + DROPPED["truncated"] + DROPPED["empty"]
    assert len(verdicts) == len(drawn) - lost == 24
    unread = Counter(vote.invalid for v in verdicts for vote in v.votes if vote.score is None)
    assert unread == UNREAD
    why = Counter(v.invalid for v in verdicts if v.score is None)
    assert why == {"no vote has a score": 3, "judge prompt too long": 1}


def test_prompts_that_leave_no_room_are_dropped_and_counted() -> None:
    config = Config(model="sandbox", sampling=SamplingConfig(max_new_tokens=50))
    engine: Any = SimpleNamespace(
        config=config, run=SimpleNamespace(seed=lambda _: 0), template=CharTemplate(),
        sampler=ScriptedSampler(lambda *_: "answer"), context=100,
    )  # fmt: skip
    engine.with_room = partial(Engine.with_room, engine)
    prompts = [user("short"), user("word " * 20), user("brief")]
    drawn, dropped = Engine.candidates(engine, prompts, stage="candidates-1", round=1)
    assert dropped == {"prompt too long": 1}
    assert [s.prompt for s in drawn] == [prompts[0]] * 4 + [prompts[2]] * 4
    with pytest.raises(UserError, match="no prompt leaves room"):
        Engine.candidates(engine, prompts[1:2], stage="candidates-1", round=1)
