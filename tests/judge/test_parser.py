import time

import pytest

from srlm_fast.judge.parser import parse_score, through_score_line

READ = [
    ("Score: 4", 4),
    ("Score:4", 4),
    ("Score : 4", 4),
    ("score: 0", 0),
    ("SCORE: 5", 5),
    ("Score: 3.5", 3.5),
    ("Score: 3,5", 3.5),
    ("Score: 4.", 4),
    ("Score: 4, since it is short", 4),
    ("Score:\n\n4", 4),
    ("**Score:** 4", 4),
    ("**Score**: 4", 4),
    ("**Score: 4**", 4),
    ("Score: **4**/5", 4),
    ("## Score: *4*", 4),
    ("`Score: 4`", 4),
    ("“Score: 4”", 4),
    ("“Score”: “4”", 4),
    ('"score": "4"', 4),
    ("'Score': '4'", 4),
    ('{"score": 4}', 4),
    ("Score: <4>", 4),
    ("Score: [4]", 4),
    ("Score: (4)", 4),
    ("Score: $4$", 4),
    ("Score: 4/5", 4),
    ("Score: 4 / 5", 4),
    ("Score: 4 out of 5", 4),
    ("Score: 4 points", 4),
    ("Score (0-5): 4", 4),
    ("**Score (out of 5):** 4", 4),
    ("Total score: 4", 4),
    ("Final Score: 4", 4),
    ("_Score: 4_", 4),
    ("得分\uff1a4", 4),
    ("得分: 4", 4),
    ("总得分\uff1a**3.5**", 3.5),
    ("得分\uff1a4分", 4),
    ("Score\uff1a4", 4),
    ("Score: +4", 4),
    ("relevant yes exact no Score: 3", 3),
    ("Score: 4 at first sight, but on reflection Score: 2", 2),
    ("I give it Score: 4\nScore: <total points>", 4),
]

UNREADABLE = [
    ("", "no score"),
    ("I like it", "no score"),
    ("4", "no score"),
    ("4/5", "no score"),
    ("Score", "no score"),
    ("Score:", "no score"),
    ("Score: four", "no score"),
    ("Score: <total points>", "no score"),
    ("Score 4", "no score"),
    ("scores: 4", "no score"),
    ("underscore: 4", "no score"),
    ("Score: 10", "out of range"),
    ("Score: 51", "out of range"),
    ("Score: 5.5", "out of range"),
    ("Score: 6", "out of range"),
    ("Score: -1", "out of range"),
    ("Score: \u22121", "out of range"),
    ("Score: **-1**", "out of range"),
    ("Score: 8/10", "out of range"),
    ("Score: 4/10", "out of range"),
    ("Score: 4 out of 100", "out of range"),
    ("Score: 0-5", "out of range"),
    ("Score: 0\u20135", "out of range"),
    ("得分\uff1a100", "out of range"),
    ("Score: 4 and then Score: 7", "out of range"),
]


@pytest.mark.parametrize(("text", "score"), READ)
def test_reads(text, score):
    assert parse_score(text) == (score, None)


@pytest.mark.parametrize(("text", "reason"), UNREADABLE)
def test_refuses(text, reason):
    assert parse_score(text) == (None, reason)


def test_hostile_text_is_linear():
    start = time.perf_counter()
    assert parse_score("score" + " *" * 100_000 + "score: " + "(" * 100_000) == (None, "no score")
    assert time.perf_counter() - start < 2.0


def test_line_of_the_score_ends_the_judgement():
    assert through_score_line("Fine.\n**Score:** 4/5.\n\nNow more") == "Fine.\n**Score:** 4/5."
    assert through_score_line("Score: 2\nno, Score: 3") == "Score: 2\nno, Score: 3"
    assert through_score_line("no verdict\nat all") == "no verdict\nat all"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Score: 1 + 1 + 1 = 3", (3.0, None)),
        ("Score: 2+1=**3**", (3.0, None)),
        ("Score: 1+1+1+1+1 = 5/5", (5.0, None)),
        ("Score: 2 + 1 = 3/10", (None, "out of range")),
        ("Score: 1 + 1", (None, "a sum without its total")),
        ("Score: 1 + 1, so Score: 2", (2.0, None)),
        ("Score: 5 = excellent", (5.0, None)),
        ("Score: 4+", (4.0, None)),
        ("Score: 4\n\n- 1 point lost for length", (4.0, None)),
        ("Score: 4\n\n+ clear", (4.0, None)),
        ("Score: 4 to 5", (None, "out of range")),
    ],
)
def test_sums_and_what_follows_a_score(text, expected):
    """The additive prompt invites sums; their first term is not the verdict."""
    assert parse_score(text) == expected


@pytest.mark.parametrize("tail", ["=   ", " + 1", "\n+", " = "])
def test_loops_of_a_small_model_take_linear_time(tail):
    start = time.perf_counter()
    parse_score("Score: 1" + tail * 8000)
    assert time.perf_counter() - start < 1.0
