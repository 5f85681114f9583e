"""Charts that stand alone: points are where their values are, and all of it can be read on white and on near-black."""

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from src.report.charts import COLOURS, INK, Chart, Curve, draw
from src.report.plots import Point, Tick


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance of `#rrggbb`."""
    parts = []
    for start in (1, 3, 5):
        part = int(colour[start : start + 2], 16) / 255
        parts.append(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
@pytest.mark.parametrize("colour", [INK, *COLOURS])
def test_colours_are_seen_on_light_and_dark_pages(page, colour):
    assert contrast(colour, page) >= (4 if colour == INK else 3)


def chart(points: list[Point], **more) -> Chart:
    ends = [Tick(value, f"{value:g}") for value in (0, 1, 2)]
    return Chart("a < b", "x (s)", "y (nats)", [Curve("one & two", points)], ends, **more)


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([0-9.]+)" cy="([0-9.]+)"', svg)]


def test_an_axis_is_a_straight_scale():
    svg = draw([chart([Point(0, 1), Point(1, 2), Point(2, 5)])], "title", "description")
    (x0, y0), (x1, y1), (x2, y2) = circles(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y2 == pytest.approx(4 * (y0 - y1), abs=0.4)  # higher values stand higher


def test_a_logarithmic_axis_gives_factors_the_same_height():
    y_ticks = [Tick(value, f"{value:g}") for value in (1, 10, 100)]
    svg = draw([chart([Point(0, 1), Point(1, 10), Point(2, 100)], y_ticks=y_ticks, log=True)], "title", "description")
    heights = [y for _, y in circles(svg)]
    steps = [before - after for before, after in pairwise(heights)]
    assert steps[0] == pytest.approx(steps[1], abs=0.2)
    assert steps[0] > 50


def test_a_drawing_is_a_file_of_its_own():
    """Valid XML with escaped text, a title and a description, and axis labels."""
    svg = draw([chart([Point(0, 1, (0.5, 1.5)), Point(2, 2)]), chart([Point(0, 0), Point(2, 1)])], "T & T", "what")
    root = ElementTree.fromstring(svg)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for expected in ("T & T", "a < b", "x (s)", "y (nats)", "one & two"):
        assert expected in words
    assert words.count("one & two") == 1  # one legend for both charts
    assert root.attrib["role"] == "img"
