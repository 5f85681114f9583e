"""A sweep's table and plot, from sweep.json alone: Markdown, CSV and an SVG."""

import csv
import io
from typing import Any

from src.report.card import plain
from src.report.charts import Chart, Curve, draw
from src.report.plots import Point, Tick, ticks

Sweep = dict[str, Any]
NAMES = {"kl_to_teacher": "KL to the teacher", "nll": "NLL", "top1_agreement": "top-1 agreement"}
UNITS = {"kl_to_teacher": "nats per token", "nll": "nats per token", "top1_agreement": "share of tokens"}
REPEATED = ("seed", "data_seed")
HELDOUT = (
    "Held-out columns were asked for. They tell how the chosen cell does on rows that nothing was chosen on; "
    "a cell chosen by them would have no such rows left."
)


def axes_of(sweep: Sweep) -> list[str]:
    """The settings that make one cell differ from another."""
    return [name for name in sweep["axes"] if name not in REPEATED]


def shown(value: Any) -> str:
    """A setting's value; `any` where the cell does not depend on it."""
    if value is None:
        return "any"
    return f"{value:g}" if isinstance(value, float) else str(value)


def safe(value: Any) -> str:
    """A value for Markdown: names of models and words of logs are text of others."""
    return plain(shown(value))


def _spread(found: dict[str, float] | None, n: int) -> str:
    """`0.6123 (0.6100 to 0.6150)`: mean and range over seeds; one seed has no range."""
    if not found:
        return "-"
    if n == 1:
        return f"{found['mean']:.4f}"
    return f"{found['mean']:.4f} ({found['min']:.4f} to {found['max']:.4f})"


def _kinds(sweep: Sweep) -> list[tuple[str, str]]:
    """Key in a cell and word for it, of the groups of columns."""
    return [("validation", "validation"), *([("heldout", "held-out")] if sweep["heldout_shown"] else [])]


def markdown(sweep: Sweep) -> str:
    """The table, what it was made of, and what can be said of it."""
    names = axes_of(sweep)
    head = [*names, "seeds"]
    for _, word in _kinds(sweep):
        head += [f"{word} {NAMES[measure]}" for measure in NAMES]
    lines = [f"# Sweep over {', '.join(sweep['axes'])}", "", *_made_of(sweep), ""]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for cell in sweep["cells"]:
        row = [safe(cell["settings"][name]) for name in names]
        row.append(str(cell["n"]) if cell["n"] == len(cell["runs"]) else f"{cell['n']} of {len(cell['runs'])}")
        for kind, _ in _kinds(sweep):
            row += [_spread(cell[kind].get(measure), cell["n"]) for measure in NAMES]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, "", *_remarks(sweep)]) + "\n"


def _made_of(sweep: Sweep) -> list[str]:
    done = [run for run in sweep["runs"].values() if run["status"] == "finished"]
    rows = sorted({run["validation_rows"] for run in done})
    fixed = f", all with {plain(sweep['fixed'])}" if sweep["fixed"] else ""
    return [
        f"{len(done)} of {len(sweep['runs'])} runs finished, on the rows and the teacher cache of "
        f"{plain(sweep['experiment_dir'])}{fixed}.",
        f"Measured after the last step on {' or '.join(map(str, rows)) or 'no'} validation rows, in nats per answer "
        "token at temperature 1: mean over seeds, and the range where there are several.",
    ]


def _remarks(sweep: Sweep) -> list[str]:
    lines = [f"- {_lowest(sweep, measure)}" for measure in ("kl_to_teacher", "nll") if sweep["lowest"][measure]]
    short = [_name(sweep, cell) for cell in sweep["cells"] if cell["n"] < len(cell["runs"])]
    if short:
        lines.append(f"- Not compared, for they lack a seed: {'; '.join(short)}.")
    if any(cell["n"] == 1 for cell in sweep["cells"]):
        lines.append("- Cells with one seed show no range: another seed may order them in another way.")
    free: dict[str, list[str]] = {}  # settings without effect -> the cells that have none of them
    for cell in sweep["cells"]:
        idle = ", ".join(name for name, value in cell["settings"].items() if value is None)
        if idle:
            free.setdefault(idle, []).append(_name(sweep, cell))
    for idle, cells in free.items():
        lines.append(f"- any: does not depend on {idle}; one run a seed serves all ({'; '.join(cells)}).")
    if sweep["heldout_shown"]:
        lines.append(f"- {HELDOUT}")
    for name, run in sweep["runs"].items():
        if run["status"] == "failed":
            lines.append(f"- Failed: {plain(name)}: {plain(run['line'])}")
    return lines


def _name(sweep: Sweep, cell: dict[str, Any]) -> str:
    """`alpha 0.5, temperature 2.5`"""
    named = [f"{name} {safe(cell['settings'][name])}" for name in axes_of(sweep) if cell["settings"][name] is not None]
    return ", ".join(named) or "all"


def _lowest(sweep: Sweep, measure: str) -> str:
    found, cells = sweep["lowest"][measure], sweep["cells"]
    best = cells[found["cell"]]
    said = f"Lowest validation {NAMES[measure]}: {_name(sweep, best)}."
    if found["overlapping"]:
        others = "; ".join(_name(sweep, cells[index]) for index in found["overlapping"])
        said += f" Ranges over seeds overlap with: {others}."
    return said


def csv_text(sweep: Sweep) -> str:
    """One line a cell, with mean, min and max of every measure."""
    names = axes_of(sweep)
    head = [*names, "seeds"]
    for kind, _ in _kinds(sweep):
        head += [f"{kind}_{measure}_{part}" for measure in NAMES for part in ("mean", "min", "max")]
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(head)
    for cell in sweep["cells"]:
        row = [shown(cell["settings"][name]) for name in names] + [cell["n"]]
        for kind, _ in _kinds(sweep):
            for measure in NAMES:
                row += [cell[kind].get(measure, {}).get(part, "") for part in ("mean", "min", "max")]
        writer.writerow(row)
    return made.getvalue()


def plot(sweep: Sweep) -> str | None:
    """Validation KL and NLL along the first axis of numbers, a curve for each setting of the others.

    None where there is no such axis or not two measured cells along it.
    """
    along = _numeric_axis(sweep)
    charts = [_chart(sweep, along, measure) for measure in ("kl_to_teacher", "nll")] if along else []
    if not along or not all(chart.curves for chart in charts):
        return None
    seeds = sorted({cell["n"] for cell in sweep["cells"] if cell["n"]})
    said = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    title = f"Validation rows over {along}, " + (
        "one seed" if seeds == [1] else f"{said} seeds a point, with their range"
    )
    return draw(charts, title, f"KL to the teacher and NLL after the last step, over {along}.")


def _numeric_axis(sweep: Sweep) -> str | None:
    for name in axes_of(sweep):
        values = {cell["settings"][name] for cell in sweep["cells"] if cell["settings"][name] is not None}
        if len(values) > 1 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return name
    return None


def _chart(sweep: Sweep, along: str, measure: str) -> Chart:
    others = [name for name in axes_of(sweep) if name != along]
    keys: dict[str, dict[str, Any]] = {}  # a curve's name -> its settings
    for cell in sweep["cells"]:
        settings = {name: cell["settings"][name] for name in others}
        if None not in settings.values():  # a cell that depends on none of them begins no curve: it is on all
            keys.setdefault(", ".join(f"{n} {shown(v)}" for n, v in settings.items()) or "student", settings)
    curves = []
    for name, settings in keys.items():
        points = _points(sweep, along, measure, settings)
        if len(points) > 1:
            curves.append(Curve(name, points))
    # from the points that are there: while a sweep is under way, a curve may be shorter than its axis
    at = sorted({point.x for curve in curves for point in curve.points})
    x_ticks = [Tick(value, f"{value:g}") for value in ticks(at[0], at[-1])] if at else []
    return Chart(NAMES[measure], along, UNITS[measure], curves, x_ticks)


def _points(sweep: Sweep, along: str, measure: str, settings: dict[str, Any]) -> list[Point]:
    """Of the cells with these settings, and of those that depend on none of them."""
    points = []
    for cell in sweep["cells"]:
        own = cell["settings"]
        fits = all(own[name] in (value, None) for name, value in settings.items())
        if fits and own[along] is not None and cell["n"]:
            found = cell["validation"][measure]
            # the range of one seed is a point, which must not look like certainty
            interval = (found["min"], found["max"]) if cell["n"] > 1 else None
            points.append(Point(own[along], found["mean"], interval))
    return sorted(points, key=lambda point: point.x)
