"""A sweep's table and plot, from sweep.json alone: Markdown, CSV and an SVG."""

import csv
import io
from math import ceil, floor, log10
from typing import Any

from src.report.card import plain
from src.report.charts import Chart, Curve, draw
from src.report.plots import Point, Tick, ticks

Sweep = dict[str, Any]
NAMES = {"kl_to_teacher": "KL to the teacher", "nll": "NLL", "top1_agreement": "top-1 agreement"}
UNITS = {"kl_to_teacher": "nats per token", "nll": "nats per token", "top1_agreement": "share of tokens"}
REPEATED = ("seed", "data_seed")
EXACT = "exact"  # what `kl_is` says where the teacher's whole distribution is known
WIDE = 10  # the largest value over the smallest from which on an axis is logarithmic


def axes_of(sweep: Sweep) -> list[str]:
    """The settings that make one cell differ from another."""
    return [name for name in sweep["axes"] if name not in REPEATED]


def shown(value: Any) -> str:
    """A setting's value; `any` where the cell does not depend on it."""
    if value is None:
        return "any"
    return f"{value:g}" if isinstance(value, float) else str(value)  # 2.0 -> "2", 5e-05 -> "5e-05"


def _spread(found: dict[str, float] | None, n: int) -> str:
    """`0.6123 (0.6100 to 0.6150)`: mean and range over seeds; one seed has no range."""
    if not found:  # no seed of the cell has finished
        return "-"
    if n == 1:
        return f"{found['mean']:.4f}"
    return f"{found['mean']:.4f} ({found['min']:.4f} to {found['max']:.4f})"


def named(sweep: Sweep, measure: str) -> str:
    """A measure's name; of a KL that is known from below only, that it is."""
    bound = measure == "kl_to_teacher" and sweep["kl_is"] != EXACT
    return f"{NAMES[measure]} (at least)" if bound else NAMES[measure]


def markdown(sweep: Sweep) -> str:
    """The table, what it was made of, and what can be said of it. Values and lines of logs are text of others."""
    # | alpha | seeds | validation KL to the teacher | validation NLL | validation top-1 agreement |
    names = axes_of(sweep)
    head = [plain(name) for name in names] + ["seeds"] + [f"validation {named(sweep, measure)}" for measure in NAMES]
    axes = ", ".join(plain(name) for name in sweep["axes"])
    lines = [f"# Sweep over {axes}", "", *_made_of(sweep), ""]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for cell in sweep["cells"]:
        row = [plain(shown(cell["settings"][name])) for name in names]
        row.append(_seeds(cell))
        row += [_spread(cell["validation"].get(measure), cell["n"]) for measure in NAMES]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, "", *_remarks(sweep)]) + "\n"


def _seeds(cell: dict[str, Any]) -> str:
    """`2`, or `1 of 2` while one is missing."""
    return f"{cell['n']}" if cell["n"] == len(cell["runs"]) else f"{cell['n']} of {len(cell['runs'])}"


def _made_of(sweep: Sweep) -> list[str]:
    done = [run for run in sweep["runs"].values() if run["status"] == "finished"]
    rows = sorted({run["validation_rows"] for run in done})  # one number, unless runs differ
    fixed = f", all with {plain(sweep['fixed'])}" if sweep["fixed"] else ""
    return [
        f"{len(done)} of {len(sweep['runs'])} runs finished, on the rows and the teacher cache of "
        f"{plain(sweep['experiment_dir'])}{fixed}.",
        f"Measured after the last step on {' or '.join(map(str, rows)) or 'no'} validation rows, in nats per answer "
        "token at temperature 1: mean over seeds, and the range where there are several.",
    ]


def _remarks(sweep: Sweep) -> list[str]:
    lines = [f"- {_lowest(sweep, measure)}" for measure in ("kl_to_teacher", "nll") if sweep["lowest"][measure]]
    # "alpha 0.5 (1 of 2)"
    unfinished = [f"{_name(sweep, c)} ({_seeds(c)})" for c in sweep["cells"] if c["n"] < len(c["runs"])]
    if unfinished:
        lines.append(f"- Not ranked, for not all of their seeds have finished: {'; '.join(unfinished)}.")
    if sweep["kl_is"] != EXACT:
        lines.append(f"- KL is a {plain(sweep['kl_is'])}: cells may stand in another order by the whole KL.")
    if any(cell["n"] == 1 for cell in sweep["cells"]):
        lines.append("- Cells with one seed show no range: another seed may order them in another way.")
    lines += _free(sweep)
    if sweep["heldout"]:
        lines.append(f"- {_heldout(sweep)}")
    for name, run in sweep["runs"].items():
        if run["status"] == "failed":
            lines.append(f"- Failed: {plain(name)}: {plain(run['line'])}")
    return lines


def _free(sweep: Sweep) -> list[str]:
    """What `any` means in this table."""
    free: dict[str, list[str]] = {}  # settings without effect -> the cells that have none of them
    for cell in sweep["cells"]:
        # a None setting had no part in the cell: alpha = 0 reads no temperature
        idle = ", ".join(name for name, value in cell["settings"].items() if value is None)
        if idle:
            free.setdefault(idle, []).append(_name(sweep, cell))
    return [
        f"- any: does not depend on {plain(idle)}; one run a seed serves all ({'; '.join(cells)})."
        for idle, cells in free.items()
    ]


def _heldout(sweep: Sweep) -> str:
    found = sweep["heldout"]
    cell = sweep["cells"][found["cell"]]
    # "KL to the teacher 0.6123 (0.6100 to 0.6150), NLL ..."
    values = [f"{named(sweep, measure)} {_spread(found[measure], cell['n'])}" for measure in NAMES]
    return (
        f"Chosen by the lowest validation {named(sweep, found['chosen_by'])}: {_name(sweep, cell)}. On the held-out "
        f"rows, on which nothing was chosen: {', '.join(values)}."
    )


def _name(sweep: Sweep, cell: dict[str, Any]) -> str:
    """`alpha 0.5, temperature 2.5`, as Markdown"""
    settings = cell["settings"]
    words = [f"{name} {shown(settings[name])}" for name in axes_of(sweep) if settings[name] is not None]
    return plain(", ".join(words) or "all")


def _lowest(sweep: Sweep, measure: str) -> str:
    # where ranges overlap, seeds may have decided which is lowest: the others are named
    found, cells = sweep["lowest"][measure], sweep["cells"]
    best = cells[found["cell"]]
    said = f"Lowest validation {named(sweep, measure)}: {_name(sweep, best)}."
    if found["overlapping"]:
        others = "; ".join(_name(sweep, cells[index]) for index in found["overlapping"])
        said += f" Ranges over seeds overlap with: {others}."
    return said


def csv_text(sweep: Sweep) -> str:
    """One line a cell, with mean, min and max of every measure."""
    names = axes_of(sweep)
    head = [*names, "seeds", *(f"validation_{measure}_{part}" for measure in NAMES for part in ("mean", "min", "max"))]
    # csv quotes what needs it: a setting may hold a comma
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\n")
    writer.writerow(head)
    for cell in sweep["cells"]:
        row = [shown(cell["settings"][name]) for name in names] + [cell["n"]]
        for measure in NAMES:
            row += [cell["validation"].get(measure, {}).get(part, "") for part in ("mean", "min", "max")]
        writer.writerow(row)
    return made.getvalue()


def plot(sweep: Sweep) -> str | None:
    """Validation KL and NLL along the first axis of numbers, a curve for each setting of the others.

    None where there is no such axis or not two measured cells along it.
    """
    along = _numeric_axis(sweep)
    charts = [_chart(sweep, along, measure) for measure in ("kl_to_teacher", "nll")] if along else []
    # one measured cell makes no line
    if not along or not all(chart.curves for chart in charts):
        return None
    seeds = sorted({cell["n"] for cell in sweep["cells"] if cell["n"]})
    said = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    title = f"Validation rows over {along}, " + (
        "one seed" if seeds == [1] else f"{said} seeds a point, with their range"
    )
    return draw(charts, title, f"KL to the teacher and NLL after the last step, over {along}.", _notes(sweep))


def _notes(sweep: Sweep) -> list[str]:
    """Of what models the plot is, and with what settings."""
    models = ", ".join(f"{role} {name}" for role, name in sorted(sweep["models"].items()))
    return [f"Models: {models}", *([f"All with {sweep['fixed']}"] if sweep["fixed"] else [])]


def _numeric_axis(sweep: Sweep) -> str | None:
    for name in axes_of(sweep):
        values = {cell["settings"][name] for cell in sweep["cells"] if cell["settings"][name] is not None}
        # True and False are ints to Python, and no axis
        if len(values) > 1 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return name
    return None


def _chart(sweep: Sweep, along: str, measure: str) -> Chart:
    # 1. a curve for each setting of the other axes
    others = [name for name in axes_of(sweep) if name != along]
    keys: dict[str, dict[str, Any]] = {}  # a curve's name -> its settings
    for cell in sweep["cells"]:
        settings = {name: cell["settings"][name] for name in others}
        if None not in settings.values():  # a cell that depends on none of them begins no curve: it is on all
            keys.setdefault(", ".join(f"{n} {shown(v)}" for n, v in settings.items()) or "student", settings)
    # 2. the points of each
    curves = []
    for name, settings in keys.items():
        points = _points(sweep, along, measure, settings)
        if len(points) > 1:
            curves.append(Curve(name, points))
    # 3. the axis
    # from the points that are there: while a sweep is under way, a curve may be shorter than its axis
    at = sorted({point.x for curve in curves for point in curve.points})
    wide = bool(at) and at[0] > 0 and at[-1] > WIDE * at[0]  # 0 has no place on a logarithmic axis
    found = (log_ticks(at[0], at[-1]) if wide else ticks(at[0], at[-1])) if at else []
    x_ticks = [Tick(value, f"{value:g}") for value in found]
    label = f"{along} (log scale)" if wide else along
    return Chart(named(sweep, measure), label, UNITS[measure], curves, x_ticks, log_x=wide)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that enclose [low, high], both above 0."""
    # 0.02 and 3 -> 0.01, 0.1, 1, 10; 1e-9, so that a power of ten is an end and does not go beyond itself
    return [10.0**power for power in range(floor(log10(low) + 1e-9), ceil(log10(high) - 1e-9) + 1)]


def _points(sweep: Sweep, along: str, measure: str, settings: dict[str, Any]) -> list[Point]:
    """Of the cells with these settings, and of those that depend on none of them."""
    points = []
    for cell in sweep["cells"]:
        own = cell["settings"]
        # None: the cell is the same whatever this setting is
        fits = all(own[name] in (value, None) for name, value in settings.items())
        if fits and own[along] is not None and cell["n"]:
            found = cell["validation"][measure]
            # the range of one seed is a point, which must not look like certainty
            interval = (found["min"], found["max"]) if cell["n"] > 1 else None
            points.append(Point(own[along], found["mean"], interval))
    return sorted(points, key=lambda point: point.x)
