"""HTML and SVG that cannot forget to escape: plain strings are text, only `Markup` is markup."""

from __future__ import annotations

import html


class Markup(str):
    """A string that is markup already and is inserted as it is."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """The element `name`; children that are not Markup are escaped, and so are all attributes.

    Attribute names are written as Python names: `class_` is class, `text_anchor` is text-anchor.
    Numbers are rounded to a tenth, which is plenty for a drawing; None leaves the attribute out.
    """
    opening = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_plain(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{opening}>{join(children)}</{name}>")


def join(children: tuple[str, ...] | list[str]) -> Markup:
    """Children after each other, escaped where they are plain text."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(c) for c in children))


def table(head: list[str], rows: list[list[str]]) -> Markup:
    """A table whose first column labels the rows; wide ones scroll by themselves."""
    header = tag("tr", *[tag("th", cell, scope="col") for cell in head])
    body = [
        tag("tr", tag("th", row[0], scope="row"), *[tag("td", cell) for cell in row[1:]])
        for row in rows
    ]
    whole = tag("table", tag("thead", header), tag("tbody", *body))
    return tag("div", whole, class_="scroll")


def _plain(value: str | float | None) -> str:
    return f"{round(value, 1):g}" if isinstance(value, float) else str(value)
