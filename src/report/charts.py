"""Line charts as SVG files that stand alone, beside text on a light or a dark page: no background, mid-tone colours.

The page of an evaluation draws its own (plots.py), in its own style sheet.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log10

from markupsafe import escape

from src.report.plots import Point, Tick, ticks

PANEL_WIDTH, PANEL_HEIGHT = 420, 300  # of one chart, px
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 34, 46  # margins inside it: labels and title
TITLE, LEGEND_ROW = 30, 18  # heights above all charts and of a line of the legend
LETTER = 7  # about the width of a letter, px, by which the legend is laid out

# Each is told from white and from near-black (contrast 3 or more, WCAG 2.2, 1.4.11), and from the others by its dashes.
INK = "#767d86"
COLOURS = ("#3d83cf", "#c9711c", "#2f9558", "#c4569a", "#8b71d6", "#8a8420")
DASHES = ("", "7 4", "2 4", "9 3 2 3", "5 2", "1 3")
STYLE = (
    f"text{{font:12px system-ui,sans-serif;fill:{INK}}}.title{{font-size:14px;font-weight:600}}"
    f".panel{{font-weight:600}}.grid{{stroke:{INK};stroke-opacity:.25}}.axis{{stroke:{INK}}}"
)


@dataclass(frozen=True)
class Curve:
    """Points from left to right; an interval is drawn as a bar through its point."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """One chart. Axes are labelled with their unit; `y_ticks` must enclose the values, and are found if not given.

    marks: draw the points; False for curves of a formula.
    log: the y axis is logarithmic, and needs `y_ticks`. log_x: the x axis is.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick] = ()
    marks: bool = True
    log: bool = False
    log_x: bool = False


def said(words: str) -> str:
    """Words as text of an XML file, in which control characters have no place, escaped or not (XML 1.0, 2.2)."""
    # "a\x00<b>" -> "a &lt;b&gt;"
    return escape("".join(letter if letter.isprintable() else " " for letter in words))


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "", turned: bool = False) -> str:
    """A line of text; `turned` is read from below."""
    marked = f' class="{kind}"' if kind else ""
    # around the text's own anchor
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{marked}{turn}>{said(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def document(width: float, height: float, title: str, description: str, parts: Sequence[str]) -> str:
    """A whole SVG file.

    Args:
        title: stands above the drawing.
        description: what it shows, for those who do not see it.
        parts: markup, every text in it escaped.
    """
    # a width and height as well as the view box: an <img> takes its size from them
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-labelledby="t d">'
    )
    # what `aria-labelledby` refers to
    named = f'<title id="t">{said(title)}</title><desc id="d">{said(description)}</desc>'
    drawn = [text(8, 20, title, kind="title"), *parts]
    return "\n".join([head, named, f"<style>{STYLE}</style>", *drawn, "</svg>"]) + "\n"


def draw(charts: Sequence[Chart], title: str, description: str, notes: Sequence[str] = ()) -> str:
    """Charts side by side over one legend; curves of one name look alike in all of them.

    notes: lines of text under the legend, such as what was measured.
    """
    # each name once, in order: its place decides colour and dashes in every chart
    names = list(dict.fromkeys(curve.name for chart in charts for curve in chart.curves))
    width = PANEL_WIDTH * len(charts)
    legend, rows = _legend(names, width)
    parts = [f'<g transform="translate(0 {TITLE + PANEL_HEIGHT + 4})">', *legend, "</g>"]
    for index, chart in enumerate(charts):
        parts += [f'<g transform="translate({index * PANEL_WIDTH} {TITLE})">', *_chart(chart, names), "</g>"]
    for note in notes:  # notes stand below the legend, in lines of the same height
        parts.append(text(8, TITLE + PANEL_HEIGHT + 16 + rows * LEGEND_ROW, note))
        rows += 1
    return document(width, TITLE + PANEL_HEIGHT + 8 + rows * LEGEND_ROW, title, description, parts)


def _stroke(index: int) -> str:
    dashes = DASHES[index % len(DASHES)]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'stroke="{COLOURS[index % len(COLOURS)]}" stroke-width="2"{dashed}'


def _legend(names: Sequence[str], width: float) -> tuple[list[str], int]:
    """Its markup, and how many lines it takes."""
    parts, x, row = [], LEFT, 0
    for index, name in enumerate(names):
        wide = 42 + LETTER * len(name)  # a stroke of 26 px, 6 px, the name, 10 px to the next
        if x > LEFT and x + wide > width:  # a name too long for any line stands alone on one
            x, row = LEFT, row + 1
        y = 12 + row * LEGEND_ROW
        parts.append(f'<path d="M{x:.1f} {y - 4}h26" {_stroke(index)}/>')
        parts.append(text(x + 32, y, name))
        x += wide
    return parts, row + 1


def _chart(chart: Chart, names: Sequence[str]) -> list[str]:
    # 1. where values stand
    y_ticks = chart.y_ticks or _found_ticks(chart)
    # points at either end stand 8 px inside, clear of the labels
    x = _scale(chart.x_ticks, LEFT + 8, PANEL_WIDTH - RIGHT - 8, chart.log_x)
    y = _scale(y_ticks, PANEL_HEIGHT - BOTTOM, TOP, chart.log)
    right, bottom = PANEL_WIDTH - RIGHT, PANEL_HEIGHT - BOTTOM
    # 2. grid, axes and labels
    parts = [text(LEFT, TOP - 14, chart.title, kind="panel")]
    for tick in y_ticks:
        parts += [line(LEFT, y(tick.at), right, y(tick.at), "grid"), text(LEFT - 6, y(tick.at) + 4, tick.label, "end")]
    for tick in chart.x_ticks:
        parts += [line(x(tick.at), bottom, x(tick.at), bottom + 4, "axis")]
        parts += [text(x(tick.at), bottom + 17, tick.label, "middle")]
    parts.append(line(LEFT, bottom, right, bottom, "axis"))
    parts.append(text((LEFT + right) / 2, PANEL_HEIGHT - 8, chart.x_label, "middle"))
    parts.append(text(14, (TOP + bottom) / 2, chart.y_label, "middle", turned=True))
    # 3. the curves above them
    for curve in chart.curves:
        parts += _curve(curve, names.index(curve.name), x, y, chart.marks)
    return parts


def _found_ticks(chart: Chart) -> list[Tick]:
    values: list[float] = []
    for curve in chart.curves:
        for point in curve.points:
            values += [point.y, *(point.interval or ())]
    found = ticks(min(values), max(values), wanted=5)
    return [Tick(value, f"{value:.6g}") for value in found]


def _scale(along: Sequence[Tick], start: float, end: float, log: bool = False) -> Callable[[float], float]:
    """From values to pixels: the first tick is at `start`, the last at `end`."""

    def position(value: float) -> float:
        return log10(value) if log else value

    # on a logarithmic axis equal factors are equally far apart; y goes up, so its `start` is the larger pixel
    first, last = position(along[0].at), position(along[-1].at)
    return lambda value: start + (position(value) - first) / (last - first) * (end - start)


def _curve(
    curve: Curve, index: int, x: Callable[[float], float], y: Callable[[float], float], marks: bool
) -> list[str]:
    colour = COLOURS[index % len(COLOURS)]
    # "M62.0 254.0L70.5 198.3": move there, then a line to each further point
    path = "M" + "L".join(f"{x(p.x):.1f} {y(p.y):.1f}" for p in curve.points)
    parts = [f'<path d="{path}" fill="none" {_stroke(index)}><title>{said(curve.name)}</title></path>']
    for p in curve.points if marks else ():  # each with its interval, and its value as a tooltip
        if p.interval:
            low, high = y(p.interval[0]), y(p.interval[1])
            parts.append(f'<path d="M{x(p.x):.1f} {low:.1f}V{high:.1f}" stroke="{colour}" stroke-width="1.5"/>')
        label = f"<title>{said(f'{curve.name}: {p.y:.4g} at {p.x:g}')}</title>"
        parts.append(f'<circle cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="3.5" fill="{colour}">{label}</circle>')
    return parts
