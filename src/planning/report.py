"""A plan in words: a table for people, JSON for machines. The dry run of run_pipeline.sh prints the same lines."""

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from src.planning.result import PARTS, Plan, StagePlan, Use

TABLE_WIDTH = 140  # characters


def amount(gb: float) -> str:
    """Three digits, with the unit that wants no zeros.

    >>> amount(16.38), amount(0.0071), amount(0)
    ('16.4 GB', '7 MB', '-')
    """
    if gb <= 0:
        return "-"
    if gb < 0.1:
        return f"{gb * 1000:.0f} MB"
    return f"{gb:.1f} GB" if gb < 100 else f"{gb:.0f} GB"


def duration(hours: tuple[float, float]) -> str:
    """A range in the unit that its end wants.

    >>> duration((0.01, 0.02)), duration((0.2, 0.9)), duration((1.5, 3.2))
    ('36 to 72 s', '12 to 54 min', '1.5 to 3.2 h')
    """
    low, high = hours
    if high < 0.05:
        return f"{low * 3600:.0f} to {high * 3600:.0f} s"
    if high < 2:
        return f"{low * 60:.0f} to {high * 60:.0f} min"
    return f"{low:.1f} to {high:.1f} h"


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {json.dumps(value)}" for key, value in settings.items())


def verdict(stage: StagePlan) -> str:
    """Whether it fits, why not, and what would."""
    if stage.fits:
        return "fits"
    # what is too full, then what else stands in the way, then what would help
    over = [use for use in stage.uses if not use.fits]
    reasons = [f"{use.name}: {amount(use.memory.peak)} of {amount(use.capacity_gb)}" for use in over]
    said = "does not fit (" + "; ".join([*reasons, *stage.problems]) + ")"
    if not stage.changes:
        return said + "; nothing that was tried does"
    for change in stage.changes:
        whose = f" for the {change.of}" if change.of else ""
        settings = f" ({_settings(change.settings)})" if change.settings else ""
        said += f"; the nearest that does{whose}: {change.words}{settings}, then {amount(change.peak_gb)} at the most, "
        said += duration(change.hours)
    return said


def _parts(use: Use) -> str:
    held = [(name.replace("_", " "), getattr(use.memory, name)) for name in PARTS]  # kv_cache -> "kv cache"
    return ", ".join(f"{name} {amount(gb)}" for name, gb in held if gb > 0.0005)


def lines(plan: Plan) -> list[str]:
    """The plan as plain lines."""
    said = [f"plan for {plan.hardware}"]
    for model in plan.models:
        size = f"{model.weights / 1e9:.2f} B weights"
        if model.active_weights < model.weights:
            size += f", {model.active_weights / 1e9:.1f} B at work on a token"
        shapes = "" if model.config == model.name else f" (shapes: {model.config})"
        said.append(f"{model.role}: {model.name}, {size}, {amount(model.weights_gb)}{shapes}")
    said.append(f"rows: {plan.rows}")
    for stage in plan.stages:
        said.append(f"{stage.stage}: {stage.how}")
        for use in stage.uses:
            said.append(f"    {use.name}: {amount(use.memory.peak)} of {amount(use.capacity_gb)}: {_parts(use)}")
        said.append(
            f"    {stage.tokens / 1e6:.2f} M tokens, {stage.flops / 1e15:.3g} PFLOP, disk {amount(stage.disk_gb)}, "
            f"{duration(stage.hours)}"
        )
        said.append(f"    {verdict(stage)}")
    said.append(f"together: disk {amount(plan.disk_gb)}, {duration(plan.hours)}")
    return said + [f"note: {note}" for note in plan.notes]


def _number(gb: float) -> str:
    return f"{gb:.1f}" if gb >= 0.1 else f"{gb:.2g}" if gb > 0 else "-"


def table(plan: Plan) -> Table:
    """The same as a table: a row for each group of GPUs of a stage."""
    made = Table(title=f"Plan for {plan.hardware}; sizes in GB", title_justify="left")
    made.add_column("stage", no_wrap=True)
    made.add_column("where", no_wrap=True)
    for name in ("weights", "LoRA", "grad+opt", "activ.", "KV", "loss", "teacher", "peak", "disk"):
        made.add_column(name, justify="right")
    made.add_column("time", justify="right", no_wrap=True)
    made.add_column("fits")
    for stage in plan.stages:
        for number, use in enumerate(stage.uses):
            memory = use.memory
            held = [memory.weights, memory.adapters, memory.gradients + memory.optimiser, memory.activations,
                    memory.kv_cache, memory.loss, memory.teacher, memory.peak]  # fmt: skip
            first = number == 0
            made.add_row(
                stage.stage if first else "",
                use.name,
                *map(_number, held),
                _number(stage.disk_gb) if first else "",
                duration(stage.hours) if first else "",
                ("yes" if stage.fits else "[bold]no[/bold]") if first else "",
            )
    return made


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """On a terminal that is wide enough the table and what it cannot hold; elsewhere plain lines, never broken."""
    console = console or Console()
    if not console.is_terminal or console.width < TABLE_WIDTH:
        for line in lines(plan):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    console.print(table(plan))
    for line in lines(plan):
        # the table has the numbers of the indented lines, but not their verdicts
        if not line.startswith("    ") or "fit" in line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def as_json(plan: Plan) -> str:
    """Every number, and what follows from them."""
    said = dataclasses.asdict(plan)
    for own, stage in zip(said["stages"], plan.stages, strict=True):
        # properties, which asdict leaves out
        own |= {"fits": stage.fits, "peak_gb": stage.peak_gb, "verdict": verdict(stage)}
        for use, planned in zip(own["uses"], stage.uses, strict=True):
            use["memory"]["peak"] = planned.memory.peak
    said |= {"fits": plan.fits, "hours": plan.hours, "disk_gb": plan.disk_gb}
    return json.dumps(said, indent=2)
