"""results.json rendered for people: tables for the terminal and report.md. Nothing is computed here."""

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from src.evaluation.results import ARMS
from src.utils.common import write_text

NAMES = {"base": "student before", "sft": "SFT control", "kd": "distilled", "teacher": "teacher"}


def _cells(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of every table."""
    tables = []
    if held := results.get("heldout"):
        rows = []
        for arm in ARMS:
            if arm in held["arms"]:
                m = held["arms"][arm]
                gap = held["gap_recovered"].get(arm, {}).get("kl_to_teacher")
                rows.append([NAMES[arm], f"{m['kl_to_teacher']:.4f}", f"{m['nll']:.4f}", f"{m['top1_agreement']:.1%}",
                             "-" if gap is None else f"{gap:.1%}"])  # fmt: skip
        title = f"Held-out teacher text ({held['rows']} rows, {held['response_tokens']} response tokens)"
        tables.append((title, ["arm", "KL to teacher", "NLL", "top-1 agreement", "KL gap recovered"], rows))
        rows = [
            [f"{NAMES[d['a']]} - {NAMES[d['b']]}", d["metric"], f"{d['difference']:+.4f}",
             f"{d['interval'][0]:+.4f} to {d['interval'][1]:+.4f}", "yes" if d["real"] else "no"]
            for d in held["differences"]
        ]  # fmt: skip
        header = ["difference", "measure", "value", "95 % interval", "excludes 0"]
        tables.append(("Paired differences over held-out rows", header, rows))
    if graded := results.get("graded"):
        by_cell: dict[tuple, dict[str, Any]] = {}
        for score in graded["scores"]:
            by_cell.setdefault((score["domain"], score["preset"], score["temperature"]), {})[score["arm"]] = score
        arms = [arm for arm in ARMS if any(arm in cell for cell in by_cell.values())]
        rows = []
        for (domain, preset, temperature), cell in by_cell.items():
            shown = []
            for arm in arms:
                one = cell.get(arm)
                if one is None:
                    shown.append("-")
                elif one["accuracy"] is None:
                    shown.append("not executed")
                else:
                    shown.append(f"{one['accuracy']:.0%} [{one['interval'][0]:.0%}, {one['interval'][1]:.0%}]")
            answers = max(one["answers"] for one in cell.values())
            rows.append([domain, preset, f"{temperature:g}", str(answers), *shown])
        header = ["domain", "sampling", "T", "answers", *(NAMES[arm] for arm in arms)]
        title = f"Share of correct answers [95 % interval]; {graded['cap_hit_rate']:.1%} of all answers were cut"
        tables.append((title, header, rows))
    return tables


def console_tables(results: dict[str, Any]) -> list[Table]:
    """Every table, for a terminal; model-written text never enters one."""
    tables = []
    for title, header, rows in _cells(results):
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def make_console() -> Console:
    """A console on standard output, wide enough for the tables where it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def markdown(results: dict[str, Any]) -> str:
    """report.md's text; model-written text never enters it."""
    lines = [f"# Evaluation of {results['settings']['experiment']}", "", results["verdict"], ""]
    for title, header, rows in _cells(results):
        lines += [f"## {title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    lines += ["## Arms", ""]
    lines += [f"- {NAMES[arm]}: `{what}`" for arm, what in results["arms"].items()]
    lines += [f"- {NAMES[arm]}: missing, {why}" for arm, why in results["missing_arms"].items()]
    lines += ["", "## Settings", ""] + [f"- {name}: `{value}`" for name, value in results["settings"].items()]
    return "\n".join(lines) + "\n"


def write_markdown(results: dict[str, Any], path: Path) -> None:
    write_text(path, markdown(results))
