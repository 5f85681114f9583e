"""results.json rendered for people: tables for the terminal, report.md and report.html. Nothing is computed here."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from src.evaluation.page import html_page
from src.evaluation.results_schema import ARMS
from src.evaluation.verdict import DECISIONS, NAMES, RULE
from src.utils.common import write_text


class Section(NamedTuple):
    name: str  # heldout, heldout_differences, scores, comparisons, samples, recovered
    title: str
    header: list[str]
    rows: list[list[str]]


def _between(interval: Sequence[float] | None, form: str) -> str:
    return "no interval" if interval is None else " to ".join(format(end, form) for end in interval)


def _heldout(held: dict[str, Any]) -> list[Section]:
    rows = []
    for arm in ARMS:
        if arm in held["arms"]:
            m = held["arms"][arm]
            gap = held["gap_recovered"].get(arm, {}).get("kl_to_teacher")
            shown = "-" if gap is None else f"{gap['value']:.1%} ({_between(gap['interval'], '.1%')})"
            shares = [f"{m[name]:.1%}" for name in ("top1_agreement", "expected_acceptance")]
            rows.append([NAMES[arm], f"{m['kl_to_teacher']:.4f}", f"{m['nll']:.4f}", *shares, shown])
    title = f"Held-out teacher text ({held['rows']} rows, {held['response_tokens']} response tokens)"
    header = ["arm", "KL to teacher", "NLL", "top-1 agreement", "expected acceptance", "KL gap recovered"]
    first = Section("heldout", title, header, rows)
    rows = [
        [f"{NAMES[d['a']]} - {NAMES[d['b']]}", d["metric"], f"{d['difference']:+.4f}", _between(d["interval"], "+.4f"),
         "yes" if d["real"] else "no"]
        for d in held["differences"]
    ]  # fmt: skip
    header = ["difference", "measure", "value", "95 % interval", "excludes 0"]
    return [first, Section("heldout_differences", "Paired differences over held-out rows", header, rows)]


def _graded(graded: dict[str, Any]) -> list[Section]:
    by_cell: dict[tuple, dict[str, Any]] = {}
    for score in graded["scores"]:
        by_cell.setdefault((score["domain"], score["preset"], score["temperature"]), {})[score["arm"]] = score
    arms = [arm for arm in ARMS if any(arm in cell for cell in by_cell.values())]
    scores, several = [], []
    for (domain, preset, temperature), cell in by_cell.items():
        shown = []
        for arm in arms:
            one = cell.get(arm)
            if one is None:
                shown.append("-")
            elif one["accuracy"] is None:
                shown.append("not executed")
            else:
                shown.append(f"{one['accuracy']:.0%} ({_between(one['interval'], '.0%')})")
                passes = [f"pass@{k} {value:.1%}" for k, value in one["pass_at_k"].items()]
                if one["majority_at_k"] is not None:
                    passes.append(f"maj@{max(map(int, one['pass_at_k']))} {one['majority_at_k']:.1%}")
                if passes:
                    several.append([domain, preset, f"{temperature:g}", NAMES[arm], ", ".join(passes)])
        answers = max(one["answers"] for one in cell.values())
        scores.append([domain, preset, f"{temperature:g}", str(answers), *shown])
    title = f"Share of correct answers (95 % interval); {graded['cap_hit_rate']:.1%} of all answers were cut"
    where = ["domain", "sampling", "T"]
    sections = [Section("scores", title, [*where, "answers", *(NAMES[arm] for arm in arms)], scores)]
    compared = []
    for c in graded["comparisons"]:
        differ = c["won"] or c["lost"]
        least = "nothing" if c["minimum_detectable"] is None else f"{c['minimum_detectable']:.0%}"
        compared.append([
            f"{NAMES[c['a']]} - {NAMES[c['b']]}", c["domain"], c["preset"], f"{c['temperature']:g}", str(c["prompts"]),
            f"{c['difference']:+.1%}", _between(c["interval"], "+.1%") if differ else "no answer differs",
            f"{c['won']} / {c['lost']}", f"{c['p']:.2g}",
            f"{c['p_holm']:.2g}", least, f"{c['cut'][0]} / {c['cut'][1]}", DECISIONS[c["decision"]],
        ])  # fmt: skip
    if compared:
        header = ["difference", *where, "prompts", "value", "95 % interval", "won / lost"]
        header += ["p", "p (Holm)", "could show", "cut", "decision"]
        sections.append(Section("comparisons", "Paired differences of graded answers", header, compared))
    if several:
        sections.append(Section("samples", "Several answers a prompt", [*where, "arm", "share of prompts"], several))
    recovered = [
        [NAMES[g["arm"]], g["domain"], g["preset"], f"{g['temperature']:g}", f"{g['score']['value']:.0%}",
         _between(g["score"]["interval"], ".0%")]
        for g in graded["gap_recovered"]
        if g["score"] is not None
    ]  # fmt: skip
    if recovered:
        title = "Gap to the teacher's score recovered (where the teacher is measurably apart from the student before)"
        sections.append(Section("recovered", title, ["arm", *where, "recovered", "95 % interval"], recovered))
    return sections


def sections(results: dict[str, Any]) -> list[Section]:
    """Every table; model-written text never enters one."""
    held, graded = results.get("heldout"), results.get("graded")
    return (_heldout(held) if held else []) + (_graded(graded) if graded else [])


def console_tables(results: dict[str, Any]) -> list[Table]:
    """The tables for a terminal; of the graded comparisons those of the distilled student."""
    tables = []
    for section in sections(results):
        table = Table(*section.header, title=section.title, title_justify="left")
        for row in section.rows:
            if section.name != "comparisons" or row[0].startswith(NAMES["kd"]):
                table.add_row(*row)
        tables.append(table)
    return tables


def make_console() -> Console:
    """A console on standard output, wide enough for the tables where it is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 180)


def markdown(results: dict[str, Any]) -> str:
    """report.md's text; model-written text never enters it."""
    lines = [f"# Evaluation of {results['settings']['experiment']}", "", f"**{results['headline']}**", ""]
    lines += [results["verdict"].removeprefix(results["headline"]).strip(), ""]
    for section in sections(results):
        lines += [f"## {section.title}", "", f"| {' | '.join(section.header)} |", f"|{'---|' * len(section.header)}"]
        escaped = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in section.rows]
        lines += [f"| {' | '.join(row)} |" for row in escaped] + [""]
        lines += [RULE, ""] if section.name == "comparisons" else []
    lines += ["## Arms", ""]
    lines += [f"- {NAMES[arm]}: `{what}`" for arm, what in results["arms"].items()]
    lines += [f"- {NAMES[arm]}: missing, {why}" for arm, why in results["missing_arms"].items()]
    lines += ["", "## Settings", ""] + [f"- {name}: `{value}`" for name, value in results["settings"].items()]
    return "\n".join(lines) + "\n"


def write_reports(folder: Path, results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    """report.md and report.html from the content of results.json and samples.jsonl."""
    write_text(folder / "report.md", markdown(results))
    write_text(folder / "report.html", html_page(results, samples, sections(results)))
