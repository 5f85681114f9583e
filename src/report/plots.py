"""Two kinds of plot as inline SVG: dots with whiskers, and lines. Colours and text sizes are the page's (CSS)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, log10

from markupsafe import Markup, escape

WIDTH, LEFT, ROW, HEADING, AXIS = 360, 104, 17, 22, 26  # AXIS: height of the labels under a plot of dots
VALUES = 50  # width of the column of values beside dots
HEIGHT, MARGIN, RIGHT, BOTTOM, TOP = 190, 44, 18, 34, 8  # of a plot of lines
Text = Callable[[float], str]


@dataclass(frozen=True)
class Dot:
    """A value with its interval in the style of an arm; `hollow` says that nothing is shown by it, `instead` what
    stands in the place of a value. Without an arm it is the heading of the rows under it."""

    label: str
    arm: str = ""
    value: float | None = None
    interval: Sequence[float] | None = None
    hollow: bool = False
    strong: bool = False
    instead: str = ""


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    interval: Sequence[float] | None = None


@dataclass(frozen=True)
class Series:
    """An arm's points, from left to right."""

    arm: str
    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that enclose [low, high]."""
    if low == high:
        high = low + (abs(low) or 1.0)
    span = high - low
    power = 10.0 ** floor(log10(span / wanted))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= wanted)  # 0 to 0.93 -> 0, 0.5, 1
    first = floor(low / step + 1e-9)  # a low end that is a tick but for rounding is the first
    found = [first * step]
    while found[-1] < high - step * 1e-9:
        found.append((first + len(found)) * step)
    return found


def _mark(arm: str, x: float, y: float, hollow: bool = False) -> str:
    kind = " hollow" if hollow else ""
    if arm == "base":  # arms differ by shape as well as by colour
        return f'<circle class="mark{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>'
    shape = {
        "sft": "-3.3,-3.3 3.3,-3.3 3.3,3.3 -3.3,3.3",
        "kd": "0,-4.8 4.8,0 0,4.8 -4.8,0",
        "teacher": "0,-4.4 4.4,3.6 -4.4,3.6",
    }[arm]
    return f'<polygon class="mark{kind}" transform="translate({x:.1f} {y:.1f})" points="{shape}"/>'


def mark(arm: str) -> Markup:
    """An arm's mark alone, for legends."""
    return Markup(f'<svg class="key a-{arm}" viewBox="-6 -6 12 12" aria-hidden="true">{_mark(arm, 0, 0)}</svg>')


def _svg(height: float, label: str, parts: Sequence[str]) -> Markup:
    """The parts are this module's own markup, every text in them escaped."""
    return Markup(
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _spoken(name: str, value: float, interval: Sequence[float] | None, text: Text) -> str:
    between = f" [{text(interval[0])}, {text(interval[1])}]" if interval else ""
    return f"<title>{escape(f'{name}: {text(value)}{between}')}</title>"


def _dot(row: Dot, y: float, x: Callable[[float], float], text: Text) -> list[str]:
    """A row of `dots` on the baseline y: label, whisker, mark and value; or a heading."""
    if not row.arm:
        return [_text("heading", 0, y - 1, row.label)]  # a row without an arm
    kind = "label end strong" if row.strong else "label end"
    label = _text(kind, LEFT - 9, y - 1, row.label)
    if row.value is None:
        return [label, _text("label none", LEFT + 4, y - 1, row.instead)]
    whisker = _line("whisker", x(row.interval[0]), y - 5, x(row.interval[1]), y - 5) if row.interval else ""
    spoken = _spoken(row.label, row.value, row.interval, text)
    drawn = f'<g class="a-{row.arm}">{spoken}{whisker}{_mark(row.arm, x(row.value), y - 5, row.hollow)}</g>'
    return [label, drawn, _text(kind, WIDTH, y - 1, text(row.value))]


def dots(
    rows: Sequence[Dot], text: Text, label: str, within: Sequence[float] = (), line_at: float | None = None
) -> Markup:
    """Values with whiskers, one under another, the numbers beside them.

    Args:
        rows: from top to bottom.
        text: a value in words, for the axis, the numbers and the tooltips.
        within: values that the axis must hold at least.
        line_at: where to draw a line to compare with (0, or the teacher's value).
    """
    # the axis holds all that is drawn
    values = [*within] if line_at is None else [*within, line_at]
    for row in rows:
        values += [value for value in (row.value, *(row.interval or ())) if value is not None]
    scale = ticks(min(values), max(values))
    height = sum(ROW if row.arm else HEADING for row in rows) + AXIS

    def x(value: float) -> float:
        return LEFT + (value - scale[0]) / (scale[-1] - scale[0]) * (WIDTH - LEFT - VALUES)

    parts = []
    for tick in scale:
        parts += [_line("grid", x(tick), 4, x(tick), height - 20), _text("tick mid", x(tick), height - 6, text(tick))]
    if line_at is not None:
        parts.append(_line("compare", x(line_at), 2, x(line_at), height - 20))
    y = 0.0
    for row in rows:
        y += ROW if row.arm else HEADING
        parts += _dot(row, y, x, text)
    return _svg(height, label, parts)


def lines(
    series: Sequence[Series],
    text: Text,
    label: str,
    x_ticks: Sequence[Tick],
    x_label: str,
    within: Sequence[float] = (),
    marks: bool = True,
) -> Markup:
    """Values against something, an arm a line.

    Args:
        text, within: see `dots`.
        x_ticks: at least two.
    """
    values = [*within]
    for one in series:
        for point in one.points:
            values += [point.y, *(point.interval or ())]
    scale = ticks(min(values), max(values))
    first, last = x_ticks[0].at, x_ticks[-1].at
    pad = 14 if marks else 0  # px at both ends, so that marks and whiskers stay inside

    def x(value: float) -> float:
        return MARGIN + pad + (value - first) / (last - first) * (WIDTH - MARGIN - RIGHT - 2 * pad)

    def y(value: float) -> float:
        return TOP + (scale[-1] - value) / (scale[-1] - scale[0]) * (HEIGHT - TOP - BOTTOM)  # y of SVG grows downwards

    parts = []
    for tick in scale:
        parts.append(_line("grid", MARGIN, y(tick), WIDTH - RIGHT, y(tick)))
        parts.append(_text("tick end", MARGIN - 6, y(tick) + 4, text(tick)))
    parts += [_text("tick mid", x(tick.at), HEIGHT - BOTTOM + 15, tick.label) for tick in x_ticks]
    parts.append(_text("tick mid", (MARGIN + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label))
    for index, one in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * 4 if marks else 0  # whiskers side by side, not on one another
        path = "M" + "L".join(f"{x(p.x) + shift:.1f} {y(p.y):.1f}" for p in one.points)
        parts.append(f'<g class="a-{one.arm}"><path class="line" d="{path}"><title>{escape(one.name)}</title></path>')
        for p in one.points if marks else ():
            px = x(p.x) + shift
            whisker = _line("whisker", px, y(p.interval[0]), px, y(p.interval[1])) if p.interval else ""
            parts.append(f"<g>{_spoken(one.name, p.y, p.interval, text)}{whisker}{_mark(one.arm, px, y(p.y))}</g>")
        parts.append("</g>")
    return _svg(HEIGHT, label, parts)
