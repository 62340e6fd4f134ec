"""What Self-Instruct rejects by the look of the text alone (arXiv 2212.10560)."""

from __future__ import annotations

import re
import string

from srlm_fast.config import PromptsConfig

# Tasks that a text model cannot do.
KEYWORDS = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps",
    "draw", "plot", "go to",
)  # fmt: skip
_KEYWORD = re.compile(rf"\b({'|'.join(KEYWORDS)})\b", re.IGNORECASE)


def text_fault(text: str, config: PromptsConfig) -> str | None:
    """Why `text` is no usable prompt ("empty", "length", "keyword", "program", "start"), or None.

    "program" is the opening `Write a program`, which models put in front of other tasks; "start" is
    a punctuation mark or a non-ASCII letter. `config.keyword_filter` switches off all but the
    length.
    """
    if not text:
        return "empty"
    if not config.min_words <= len(text.split()) <= config.max_words:
        return "length"
    if not config.keyword_filter:
        return None
    if _KEYWORD.search(text):
        return "keyword"
    if text.lower().startswith("write a program"):
        return "program"
    if text[0] in string.punctuation or not text[0].isascii():
        return "start"
    return None
