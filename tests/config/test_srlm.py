"""Settings of SRLM that contradict others, or would be ignored."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from srlm_fast.config import Config
from srlm_fast.errors import UserError
from srlm_fast.recipes import load_config

POSITIVES = {"srlm.training": "positives"}
GREEDY = {"judge.temperature": "0", "judge.num_samples": "1"}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"srlm.positive_score": "4"}, "^srlm.positive_score needs training: positives$"),
        (POSITIVES | {"srlm.positive_score": "0"}, "positive_score must be above 0"),
        (POSITIVES | {"srlm.positive_score": "5.5"}, "positive_score must be above 0 and at most"),
        (POSITIVES | {"method": "spa"}, "srlm.training is for method srlm"),
        (POSITIVES | {"judge.kind": "implicit"}, "judge.kind implicit gives others; take prompted"),
        (POSITIVES | {"judge.kind": "longest"}, "judge.kind longest gives others; take prompted"),
        (POSITIVES | {"judge.kind": "scorer", "judge.scorer": "a:b"}, "judge.kind scorer gives"),
        (POSITIVES | {"judge.kind": "expected"}, "must be below 5 with judge.kind expected"),
        (POSITIVES | {"judge.kind": "random"}, "must be below 5 with judge.kind random"),
        (POSITIVES | {"pairs.length_control": "0.2"}, "positives makes no pairs; leave"),
        ({"sampling.temperature": "0"}, "^sampling.temperature must not be 0, nor top_k 1: the"),
        ({"sampling.top_k": "1"}, "candidates of a prompt would all be equal"),
        ({"judge.temperature": "0"}, "^judge.num_samples must be 1 with temperature 0"),
        (GREEDY | {"eft.max_tries": "2"}, "eft.max_tries must be 1 with judge.temperature 0"),
        ({"prompts.max_tasks": "-1"}, "max_tasks must not be negative"),
    ],
)  # fmt: skip
def test_senseless_settings_are_refused(settings: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_config("srlm", settings)


def test_the_variants_of_the_paper_are_accepted() -> None:
    assert load_config("srlm", POSITIVES).srlm.positive_score == 5.0
    expected = POSITIVES | {"judge.kind": "expected", "srlm.positive_score": "4.5"}
    assert load_config("srlm", expected).srlm.training == "positives"
    assert not load_config("srlm", {"eft.enabled": "false"}).eft.enabled
    assert Config(method="spa").srlm == Config().srlm
    assert load_config("srlm", GREEDY).judge.num_samples == 1
    ranks = GREEDY | {"eft.max_tries": "2", "eft.target": "rank"}
    assert load_config("srlm", ranks).eft.target == "rank"
    assert load_config("srlm", {"judge.kind": "expected", "judge.temperature": "0"})


def test_every_variant_of_the_documentation_is_a_setting() -> None:
    """Of the table in docs/srlm.md; what stands there in capitals is a name of the user's."""
    page = (Path(__file__).parents[2] / "docs" / "srlm.md").read_text("utf-8")
    rows = [row for row in page.splitlines() if row.startswith("| ") and "`--" in row]
    assert len(rows) > 15
    for row in rows:
        flags = dict(re.findall(r"--([a-z_.]+) ([^\s`]+)", row))
        recipe = flags.pop("recipe", "srlm")
        if "srlm.positive_score" in flags:
            flags["srlm.training"] = "positives"
        assert load_config(recipe, flags)
