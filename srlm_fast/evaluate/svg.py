"""Line plots as inline SVG: axes, labels, error bars, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from srlm_fast.evaluate.markup import Markup, join, tag

WIDTH, HEIGHT = 460.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 66.0, 14.0, 10.0, 44.0
COLOURS = 6  # classes c0 to c5 of the style sheet


@dataclass(frozen=True)
class Series:
    """A named line: points (x, y), and the half-height of each point's error bar, if any."""

    name: str
    points: Sequence[tuple[float, float]]
    errors: Sequence[float | None] = ()

    def finite(self) -> list[tuple[float, float, float]]:
        """(x, y, error) of the points that can be drawn."""
        errors = [e or 0.0 for e in self.errors] or [0.0] * len(self.points)
        rows = [(x, y, e) for (x, y), e in zip(self.points, errors, strict=True)]
        return [row for row in rows if all(map(math.isfinite, row))]


@dataclass(frozen=True)
class Scale:
    """A linear map of [low, high] onto [start, stop] of the drawing."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def line_plot(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] = (),
    from_zero: bool = False,
) -> Markup:
    """A figure with legend; an empty string when there is no finite point.

    x_names: names of x = 0, 1, ... where the axis is not a quantity.
    """
    lines = [(s.name, s.finite()) for s in series if s.finite()]
    points = [p for _, line in lines for p in line]
    if not points:
        return Markup("")
    bottom, top = min(y - e for _, y, e in points), max(y + e for _, y, e in points)
    y_range = _padded(min(0.0, bottom) if from_zero else bottom, top)
    y_scale = Scale(*y_range, HEIGHT - BOTTOM, TOP)
    if x_names:
        x_range = -0.4, len(x_names) - 0.6
        x_ticks = [(float(i), name) for i, name in enumerate(x_names)]
    else:
        x_range = _widened(min(x for x, _, _ in points), max(x for x, _, _ in points))
        x_ticks = ticks(*x_range)
    x_scale = Scale(*x_range, LEFT, WIDTH - RIGHT)
    drawing = tag(
        "svg",
        _axes(x_scale, x_ticks, y_scale, x_label, y_label),
        *[_line(name, line, x_scale, y_scale, i % COLOURS) for i, (name, line) in enumerate(lines)],
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_label=title,
    )
    names = [tag("li", name, class_=f"c{i % COLOURS}") for i, (name, _) in enumerate(lines)]
    needed = len(lines) > 1 or lines[0][0] != y_label
    legend = tag("ul", *names, class_="legend") if needed else Markup("")
    return tag("figure", tag("figcaption", title), drawing, legend)


def ticks(low: float, high: float, about: int = 6) -> list[tuple[float, str]]:
    """Round values within [low, high] at a step of 1, 2 or 5 times a power of ten, with labels."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Adding 0.0 turns the label of minus zero into "0".
    return [
        (i * step, f"{round(i * step, digits) + 0.0:.{digits}f}") for i in range(first, last + 1)
    ]


def _axes(
    x: Scale, x_ticks: Sequence[tuple[float, str]], y: Scale, x_label: str, y_label: str
) -> Markup:
    middle_x, middle_y = (x.start + x.stop) / 2, (y.start + y.stop) / 2
    rules = [
        join([
            tag("line", x1=x.start, x2=x.stop, y1=y(value), y2=y(value), class_="grid"),
            tag("text", label, x=x.start - 6, y=y(value) + 4, text_anchor="end"),
        ])
        for value, label in ticks(y.low, y.high)
    ]  # fmt: skip
    names = [
        tag("text", label, x=x(value), y=y.start + 16, text_anchor="middle")
        for value, label in x_ticks
    ]
    return tag(
        "g",
        *rules,
        *names,
        tag("line", x1=x.start, x2=x.stop, y1=y.start, y2=y.start, class_="axis"),
        tag("line", x1=x.start, x2=x.start, y1=y.start, y2=y.stop, class_="axis"),
        tag("text", x_label, x=middle_x, y=HEIGHT - 6, text_anchor="middle", class_="label"),
        tag("text", y_label, transform=f"translate(14 {middle_y:g}) rotate(-90)",
            text_anchor="middle", class_="label"),
    )  # fmt: skip


def _line(
    name: str, points: Sequence[tuple[float, float, float]], x: Scale, y: Scale, colour: int
) -> Markup:
    path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py, _ in points)
    bars = [
        tag("line", x1=x(px), x2=x(px), y1=y(py - error), y2=y(py + error), class_="error")
        for px, py, error in points
        if error
    ]
    # Dots of a long training curve would be a smear, and nobody hovers over one of a thousand.
    dots = [
        tag("circle", tag("title", f"{name}: {_value(py, error)}"), cx=x(px), cy=y(py), r=3)
        for px, py, error in points
        if len(points) <= 40
    ]
    return tag("g", tag("polyline", points=path), *bars, *dots, class_=f"series c{colour}")


def _value(value: float, error: float) -> str:
    return f"{value:.4g} ± {error:.2g}" if error else f"{value:.4g}"


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is never empty."""
    room = max(abs(low), 1.0) * 0.1
    return (low, high) if high > low else (low - room, high + room)


def _padded(low: float, high: float) -> tuple[float, float]:
    low, high = _widened(low, high)
    return (low if low == 0.0 else low - 0.05 * (high - low)), high + 0.05 * (high - low)
