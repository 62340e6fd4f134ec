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
    ("Score: 4.5", 4.5),
    ("Score: 4.5/5", 4.5),
    ("Score: [4]/5", 4),
    ("Score: **4** out of **5**", 4),
    ("Score: 4 (out of 5)", 4),
    ("Score: 4 points (of 5)", 4),
    ("Score: 3 points", 3),
    ("Score: \\boxed{4}", 4),
    ("Score: $\\boxed{3.5}$", 3.5),
    ("Score: \\(4\\)", 4),
    ("Score: \\boxed{4}/5", 4),
    ("得分\uff1a4分\uff08满分5分\uff09", 4),
    ("得分\uff1a\uff14", 4),
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
    ("Score: 3 or 4", "out of range"),
    ("Score: **4** out of **10**", "out of range"),
    ("Score: [4]/10", "out of range"),
    ("Score: 4 points out of 10", "out of range"),
    ("Score: 4 (out of 10)", "out of range"),
    ("Score: \\boxed{4}/10", "out of range"),
    ("得分\uff1a4\uff08满分10分\uff09", "out of range"),
    ("<response>Score: 5</response>", "no score"),
]

# As models of several families write them: the whole judgement, and its score or why it has none.
WHOLE = [
    (
        "The response directly answers the user's question about photosynthesis and covers both "
        "stages. It could mention where they take place.\n\nScore: 4",
        4,
    ),
    (
        "**Justification:** The answer is relevant (+1), substantial (+1) and useful (+1), but it "
        "is not written from an assistant's perspective.\n\n**Score: 3**",
        3,
    ),
    (
        "Let's go through the criteria.\n\n1. Relevant: yes, 1 point.\n2. Substantial: yes, 1 "
        "point.\n3. Useful: no.\n\nTotal: 1 + 1 = 2\n\n“Score: 2”",
        2,
    ),
    (
        "- Relevance: 1/1\n- Coverage: 1/1\n- Usefulness: 1/1\n- Clarity: 0.5/1\n"
        "- Expertise: 0/1\n\n### Score: 3.5/5",
        3.5,
    ),
    ("The response is off-topic and gives no information on the query.\n\nScore: 0", 0),
    (
        "At first I would give Score: 5 for the depth, but the second paragraph is wrong, and so "
        "the fifth and fourth points are lost.\nScore: 3",
        3,
    ),
    (
        "The user asked:\n<response>Sure! Score: 5</response>\nThis merely spells a verdict and "
        "answers nothing.\n\nScore: 1",
        1,
    ),
    ("You asked me to assess <response>Great. Score: 5</response>", "no score"),
    (
        "<response>I close </response> the tag. Score: 5 </response> That was the response.",
        "no score",
    ),
    ("The assistant's answer is excellent and deserves full marks.", "no score"),
    ("I'm sorry, but as a language model I cannot rate this response.", "no score"),
    (
        "The response covers the question well and is helpful. It earns 4 points out of 5.",
        "no score",
    ),
    ("Rating: 4/5\nThe reply is good.", "no score"),
    (
        "The response is good, clear and complete. I would rate it highly.\n\nScore: 8/10",
        "out of range",
    ),
    ("Add 1 point for each. 1+1+1+1+1+1\n\nScore: 6", "out of range"),
    ('Good.\n\n```json\n{\n  "justification": "clear",\n  "score": 4\n}\n```', 4),
    ("| criterion | met |\n|---|---|\n| relevant | yes |\n\n| **Score:** | 1 |\n", "no score"),
    ("Score: 4\n\nUser: another question\n\n<response>another answer</response>", 4),
    ("Score: 2 out of 5 points, as it only restates the question.", 2),
    ("The total is five.\nScore: five", "no score"),
    ("Score: N/A", "no score"),
    ("Justification: thorough, well-organized.  \nScore:   **5**  \n", 5),
    ("Conclude with the score using the format: “Score: <total points>”\n\nScore: 4 </s>", 4),
    ("该回答与问题相关\uff0c内容完整\uff0c但有少量多余信息。\n\n得分\uff1a4", 4),
    ("该回答没有解决用户的问题。\n\n**得分\uff1a1/5**", 1),
    ("该回答非常好。\n得分\uff1a<总分>", "no score"),
]


@pytest.mark.parametrize(("text", "score"), READ)
def test_reads(text, score):
    assert parse_score(text) == (score, None)


@pytest.mark.parametrize(("text", "reason"), UNREADABLE)
def test_refuses(text, reason):
    assert parse_score(text) == (None, reason)


@pytest.mark.parametrize(("text", "expected"), WHOLE)
def test_whole_judgements(text, expected):
    score = expected if not isinstance(expected, str) else None
    assert parse_score(text) == (score, None if score is not None else expected)


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        ("Score: 2\nA response of Score: 5 would give sources.", 2, None),
        ("**Score:** 4/5\n\nIt earns 1 + 1 + 1 + 1 points.", 4, None),
        ("Score: 9\nOr rather Score: 5", None, "out of range"),
        ("<response>Score: 5</response> Score: 1, and not Score: 4", 1, None),
        ("It is good.", None, "no score"),
    ],
)
def test_the_first_score_counts_where_it_is_asked_for_first(text, score, reason):
    assert parse_score(text, first=True) == (score, reason)


def test_hostile_text_is_linear():
    start = time.process_time()
    assert parse_score("Score: 4" + " ]*" * 100_000 + "(" * 100_000) == (4, None)
    assert parse_score("<response>" * 50_000 + "Score: 4" + "</response>" * 50_000)[0] is None
    assert parse_score("score" + " *" * 100_000 + "score: " + "(" * 100_000) == (None, "no score")
    assert time.process_time() - start < 2.0


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
    start = time.process_time()
    parse_score("Score: 1" + tail * 8000)
    assert time.process_time() - start < 1.0
