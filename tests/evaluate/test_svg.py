import math
import xml.etree.ElementTree as ET

import pytest

from srlm_fast.evaluate.markup import tag
from srlm_fast.evaluate.svg import HEIGHT, WIDTH, Series, line_plot, ticks


def plot(series, **options):
    figure = line_plot("title", series, x_label="step", y_label="loss", **options)
    return ET.fromstring(figure)


def test_tag_escapes_text_and_attributes_but_not_markup():
    element = tag("p", "a < b & c", tag("b", "bold"), class_="x", title='"><script>')
    assert element == (
        '<p class="x" title="&quot;&gt;&lt;script&gt;">a &lt; b &amp; c<b>bold</b></p>'
    )


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (-3.0, 3.0, ["-3", "-2", "-1", "0", "1", "2", "3"]),
        (3.9, 4.8, ["4.0", "4.2", "4.4", "4.6", "4.8"]),
        (0.0, 21000.0, ["0", "5000", "10000", "15000", "20000"]),
        (0.612, 0.655, ["0.62", "0.63", "0.64", "0.65"]),
    ],
)
def test_ticks_are_round_numbers_inside_the_range(low, high, labels):
    assert [label for _, label in ticks(low, high)] == labels


@pytest.mark.parametrize("seed", range(20))
def test_ticks_of_any_range_are_few_inside_and_labelled_truly(seed):
    low = math.sin(seed) * 10.0 ** (seed % 7 - 3)
    high = low + 10.0 ** (seed % 9 - 4)
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    for value, label in found:
        assert low - 1e-9 <= value <= high + 1e-9
        assert float(label) == pytest.approx(value, abs=1e-9)
    assert len({label for _, label in found}) == len(found)


def test_points_lie_inside_the_drawing_and_higher_values_above_lower_ones():
    root = plot([Series("a", [(0, 1.0), (1, 3.0), (2, 2.0)], [0.5, None, 0.25])])
    (line,) = root.iter("polyline")
    xy = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in xy)
    assert xy[1][1] < xy[2][1] < xy[0][1]
    bars = [e for e in root.iter("line") if e.get("class") == "error"]
    assert len(bars) == 2
    assert float(bars[0].get("y1")) - float(bars[0].get("y2")) == pytest.approx(
        2 * (float(bars[1].get("y1")) - float(bars[1].get("y2"))), abs=0.4
    )


def test_axes_are_labelled_and_named():
    texts = [e.text for e in plot([Series("a", [(0, 1.0)])], x_names=["SFT", "M1"]).iter("text")]
    assert {"step", "loss", "SFT", "M1"} <= set(texts)


def test_a_legend_names_the_lines():
    two = plot([Series("a", [(0, 1.0)]), Series("b", [(0, 2.0)])])
    assert [e.text for e in two.iter("li")] == ["a", "b"]
    assert not list(plot([Series("loss", [(0, 1.0)])]).iter("li"))  # the axis says it already


def test_values_that_are_not_finite_are_not_drawn():
    root = plot([Series("a", [(0, math.nan), (1, 2.0), (2, math.inf)])])
    assert len(list(root.iter("circle"))) == 1
    assert line_plot("t", [Series("a", [(0, math.nan)])], x_label="x", y_label="y") == ""
    assert line_plot("t", [], x_label="x", y_label="y") == ""


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-9, 1e9])
@pytest.mark.parametrize("from_zero", [False, True])
def test_a_constant_series_still_has_an_axis(value, from_zero):
    root = plot([Series("a", [(0, value), (1, value)])], from_zero=from_zero)
    assert all(0 < float(e.get("cy")) < HEIGHT for e in root.iter("circle"))


def test_from_zero_keeps_the_origin_in_sight():
    texts = [
        e.text for e in plot([Series("a", [(0, 20.0), (1, 21.0)])], from_zero=True).iter("text")
    ]
    assert "0" in texts
