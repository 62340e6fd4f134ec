from __future__ import annotations

import json

import pytest

from srlm_fast.data.records import (
    Example,
    Judgement,
    Message,
    Pair,
    Preference,
    RankedGroup,
    Sample,
    Vote,
    prompt_text,
    user,
)

CONVERSATION = (Message("system", "s"), *user("a"), Message("assistant", "b"), *user("ü\n"))
RECORDS = [
    Example(CONVERSATION, "r"),
    RankedGroup(CONVERSATION, ("a", "b"), (0.0, 1.5)),
    RankedGroup(user("a"), ("a", "b"), (0, 0), scores=(5, 4)),
    Preference(CONVERSATION, "c", "r"),
    Preference(user("a"), "c", "r", 0.25, 1e-6),
    Sample(CONVERSATION, (1, 2), "r", (3, 4), (-0.1, -2.5e-7), "stop", 3, 2**63 - 1, 1),
    Judgement(2.5, (Vote("Score: 2", 2.0), Vote("x", None, "no score"), Vote("Score: 3", 3.0))),
    Judgement(None, (), "no vote counts"),
    Pair(CONVERSATION, (1,), "c", (2, 3), "r", (4,), 5.0, None, 2),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: type(r).__name__)
def test_json_round_trip_is_exact(record):
    again = type(record).from_json(json.loads(json.dumps(record.to_json())))
    assert again == record
    assert hash(again) == hash(record)  # lists would have stayed lists
    assert list(record.to_json()) == list(type(record).__dataclass_fields__)


def test_prompt_may_be_written_as_a_string():
    assert Example.from_json({"prompt": "a", "response": "b"}) == Example(user("a"), "b")


def test_prompt_text_is_what_the_user_said_last():
    assert prompt_text(CONVERSATION) == "ü\n"
    assert prompt_text((Message("system", "s"),)) == ""


def test_unknown_and_missing_fields_are_refused():
    with pytest.raises(TypeError):
        Example.from_json({"prompt": "a", "response": "b", "extra": 1})
    with pytest.raises(TypeError):
        Example.from_json({"prompt": "a"})
