import hashlib

import pytest

from srlm_fast.data.records import Message, user
from srlm_fast.errors import UserError
from srlm_fast.judge.judge_prompt import JudgePrompt, judge_prompt_names, load_judge_prompt

BOTH = JudgePrompt("test", "Q <INSTRUCTION_HERE> A <RESPONSE_HERE>")


def test_shipped_prompts_load():
    assert judge_prompt_names() == ["additive", "additive_score_only", "sandbox", "score_first"]
    for name in judge_prompt_names():
        assert "Score:" in load_judge_prompt(name).text


def test_additive_is_verbatim():
    """Figure 2 of arXiv 2401.10020, to the letter: a known defect elsewhere is an edited prompt."""
    digest = hashlib.sha256(load_judge_prompt("additive").text.encode()).hexdigest()
    assert digest == "b5e09b89ff2fe3964a7b65de2b35be6aa05db93d89550024988e68be906f22db"


def test_score_first_asks_for_the_same_and_for_the_score_first():
    additive, score_first = (
        load_judge_prompt("additive").text,
        load_judge_prompt("score_first").text,
    )
    differing = set(additive.split("\n")) ^ set(score_first.split("\n"))
    assert len(differing) == 4 and all("score" in line for line in differing)
    assert score_first.index("Begin with the score") < score_first.index("Then briefly justify")


def test_which_score_counts_and_what_is_taught():
    text = "Score: 2\nFor Score: 5 it would need sources.\nUser: more"
    assert load_judge_prompt("score_first").parse(text) == (2, None)
    assert load_judge_prompt("score_first").lesson(text) == text
    assert load_judge_prompt("additive").parse(text) == (5, None)
    assert load_judge_prompt("additive").lesson(text) == text.partition("\nUser")[0]


def test_score_only_is_short():
    assert len(load_judge_prompt("additive_score_only").text.split()) < 120


def test_sandbox_is_one_line_of_single_spaced_words():
    text = load_judge_prompt("sandbox").text
    assert text == " ".join(text.split())


def test_fill_takes_the_last_user_turn():
    prompt = (Message("user", "first"), Message("assistant", "hm"), Message("user", "last"))
    assert BOTH.fill(prompt, "reply") == user("Q last A reply")


def test_placeholders_inside_the_values_stay():
    filled = BOTH.fill(user("say <RESPONSE_HERE>"), r"<INSTRUCTION_HERE> \1")
    assert filled == user(r"Q say <RESPONSE_HERE> A <INSTRUCTION_HERE> \1")


def test_user_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Note <RESPONSE_HERE> for <INSTRUCTION_HERE>\n")
    assert load_judge_prompt(str(path)).fill(user("q"), "r") == user("Note r for q")


def test_user_file_in_yaml_says_which_score_counts(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("verdict: first\ntext: |\n  Note <RESPONSE_HERE>\n  for <INSTRUCTION_HERE>\n")
    prompt = load_judge_prompt(str(path))
    assert prompt.fill(user("q"), "r") == user("Note r\nfor q")
    assert prompt.parse("Score: 1 Score: 2") == (1, None)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("text: [", "is not YAML"),
        ("text: 2024-13-45", "is not YAML"),
        ("- a", "must have the key text"),
        ("verdict: first", "must have the key text"),
        ("text: 7", "all of them strings"),
        ("text: {}\nmore: a", "of text, verdict no others"),
        ("text: <INSTRUCTION_HERE> <RESPONSE_HERE>\nverdict: middle", "must be first or last"),
        ("text: <INSTRUCTION_HERE>", "no <RESPONSE_HERE>"),
    ],
)
def test_wrong_yaml_is_refused(tmp_path, said, complaint):
    path = tmp_path / "mine.yaml"
    path.write_text(said)
    with pytest.raises(UserError, match=complaint):
        load_judge_prompt(str(path))


@pytest.mark.parametrize("missing", ["<INSTRUCTION_HERE>", "<RESPONSE_HERE>"])
def test_missing_placeholder(tmp_path, missing):
    path = tmp_path / "mine.txt"
    path.write_text("<INSTRUCTION_HERE> <RESPONSE_HERE>".replace(missing, ""))
    with pytest.raises(UserError, match=missing):
        load_judge_prompt(str(path))


def test_unknown_name_gives_the_nearest():
    with pytest.raises(UserError, match="did you mean additive"):
        load_judge_prompt("aditive")
    with pytest.raises(UserError, match="known are additive, "):
        load_judge_prompt("xyzzy")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.txt does not exist; give a file or one of add"):
        load_judge_prompt(str(tmp_path / "nothing.txt"))


def test_unreadable_file_is_named(tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"caf\xe9 <INSTRUCTION_HERE> <RESPONSE_HERE>")
    for path in (tmp_path / "mine.txt", tmp_path):
        with pytest.raises(UserError, match=f"cannot read {path}: .*UTF-8"):
            load_judge_prompt(str(path))


def test_line_ends_of_windows_are_line_ends(tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"<INSTRUCTION_HERE>\r\n<RESPONSE_HERE>\r\n")
    assert load_judge_prompt(str(tmp_path / "mine.txt")).text == (
        "<INSTRUCTION_HERE>\n<RESPONSE_HERE>"
    )
