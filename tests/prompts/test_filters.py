import pytest

from srlm_fast.config import PromptsConfig
from srlm_fast.prompts.filters import KEYWORDS, text_fault

CONFIG = PromptsConfig()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Tell me about apples", None),
        ("", "empty"),
        ("Tell me more", "length"),
        (" ".join(["word"] * 150), None),
        (" ".join(["word"] * 151), "length"),
        ("Describe the image shown below", "keyword"),
        ("Where can I go to now", "keyword"),
        ("Draw a house for me", "keyword"),
        ("Describe your imagination and mapping skills", None),
        ("Write a program that adds numbers", "program"),
        ("write a Program that adds numbers", "program"),
        ("Please write a program that adds", None),
        ("- list three good books", "start"),
        ("“Hello” is what language?", "start"),
        ("Élodie est une amie", "start"),
    ],
)
def test_faults(text, fault):
    assert text_fault(text, CONFIG) == fault


@pytest.mark.parametrize("word", KEYWORDS)
def test_every_keyword_rejects(word):
    assert text_fault(f"Please do the {word.upper()} thing", CONFIG) == "keyword"


def test_bounds_and_switch():
    config = PromptsConfig(min_words=2, max_words=3, keyword_filter=False)
    assert text_fault("draw it", config) is None
    assert text_fault("画 一 张", config) is None
    assert text_fault("draw it now please", config) == "length"
