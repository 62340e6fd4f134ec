"""Reads the score out of a judge's generated text.

The last verdict counts, since a justification may mention scores before it concludes; or the first,
where the prompt asks for the score before the reasons. Only what the judge generated may be given
here: the judge prompt holds the response under judgement, which could spell a score of its own.
For the same reason nothing between `<response>` and `</response>` counts: it is an echo.
"""

from __future__ import annotations

import re
from collections import deque
from itertools import islice

MAX_SCORE = 5.0
NO_SCORE = "no score"
OUT_OF_RANGE = "out of range"
NO_TOTAL = "a sum without its total"

_SCORE = re.compile(
    r"""
    (?: (?<![a-z0-9]) score | 得分 )
    [\s*_"'`\u201d\u2019]*+                              # closing quote or bold
    (?: \( [^()\n]{0,20} \) [\s*_]*+ )?                  # "Score (0-5):"
    [:\uff1a]
    [\s*_"'`\u201c\u201d\u2018\u2019<\[({$\\]*+          # opening quote, bold or bracket
    (?: boxed \{ [\s*_]*+ )?
    (?P<value> [+\-\u2212]? \d+ (?: [.,] \d+ )? )        # all digits: 10 must not be read as 1
    (?:                                                  # "1 + 1 + 1 = 3"
        (?: [^\S\n]*+ \+ [^\S\n]*+ \d++ (?: [.,] \d++ )? )++
        [^\S\n]*+ = (?: [^\S\n] | [*_] )*+ (?P<total> \d+ (?: [.,] \d+ )? )
    )?
    (?P<open> [^\S\n]*+ \+ [^\S\n]*+ \d )?               # "1 + 1", and no total
    (?P<range> [^\S\n]*+ (?: [-\u2013~] | (?: to | or )\b ) [^\S\n]*+ \d )?
    (?:                                                  # "4/5", "[4] / 5", "8 points (of **10**)"
        (?: [^\S\n] | [*_"'`\u201d\u2019>\])}$] )*+ (?: points?\b | 分 )? [^\S\n]*+ [(\uff08]?+
        (?: / | (?: out\ )? of\b | 满分 ) (?: [^\S\n] | [*_<\[({$] )*+ (?P<scale> \d+ )
    )?
    """,
    re.VERBOSE | re.IGNORECASE,
)


def parse_score(text: str, *, first: bool = False) -> tuple[float | None, str | None]:
    """The score of the last `Score: <number>` in `text`, or of the first; or None and the reason.

    Case, markdown, quotes, brackets, `4/5`, `4 out of 5`, decimals, a full-width colon and 得分 for
    "Score" are tolerated. A verdict below 0 or above 5, on another scale (`4/10`) or naming a range
    (`0-5`) is "out of range": no other verdict stands in for it. Of a sum (`1 + 1 = 2`) the total
    counts. Without any verdict the reason is "no score".
    """
    match = _verdict(text, first)
    if match is None:
        return None, NO_SCORE
    if match["open"]:
        return None, NO_TOTAL
    value = match["total"] or match["value"]
    score = float(value.replace(",", ".").replace("\u2212", "-"))
    other_scale = match["scale"] is not None and float(match["scale"]) != MAX_SCORE
    if other_scale or match["range"] or not 0.0 <= score <= MAX_SCORE:
        return None, OUT_OF_RANGE
    return score, None


def through_score_line(text: str) -> str:
    """`text` up to the end of the line that holds its last verdict; all of it without one."""
    match = _verdict(text, first=False)
    end = text.find("\n", match.end()) if match else -1
    return text if end < 0 else text[:end]


def _verdict(text: str, first: bool) -> re.Match[str] | None:
    found = _SCORE.finditer(own_words(text))
    chosen = islice(found, 1) if first else deque(found, maxlen=1)
    return next(iter(chosen), None)


def own_words(text: str) -> str:
    """`text` with the responses that it repeats blanked out, up to the last closing tag: a response
    may hold one itself."""
    for tag in ("response", "response_a", "response_b"):
        start, end = text.find(f"<{tag}>"), text.rfind(f"</{tag}>")
        if 0 <= start < end:
            text = text[:start] + "\0" * (end - start) + text[end:]
    return text
