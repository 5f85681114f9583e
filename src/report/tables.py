"""results.json as tables: the sections of report.md and report.html, and a summary for the terminal.

Nothing is computed here, and model-written text never enters a table.
"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from src.evaluation.results_schema import ARMS
from src.evaluation.verdict import (
    DECISIONS,
    NAMES,
    RULE,
    against_sft,
    bound_note,
    closeness,
    could_show_nothing,
    cut_rate,
    headline,
    headline_setting,
    is_idle,
    particulars,
    pooled_first,
)

LINES, COLUMNS = 25, 100  # of the summary in the terminal
NAME = 16  # letters of a domain's name there
WHERE = ["domain", "sampling", "T"]

Entry = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A table; `name` says which: heldout, heldout_differences, scores, comparisons, samples or recovered.

    `further` is one line for what has no row, `note` how to read the rows.
    """

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]
    further: str = ""
    note: str = ""


def _between(interval: Sequence[float] | None, form: str) -> str:
    # (0.12, 0.3), ".0%" -> "12% to 30%"
    return "no interval" if interval is None else " to ".join(format(end, form) for end in interval)


def _where(entry: Entry) -> list[str]:
    return [entry["domain"], entry["preset"], f"{entry['temperature']:g}"]


def _heldout(held: dict[str, Any]) -> Section:
    rows = []
    for arm in (arm for arm in ARMS if arm in held["arms"]):
        own = held["arms"][arm]
        gap = held["gap_recovered"].get(arm, {}).get("kl_to_teacher")
        recovered = "-" if gap is None else f"{gap['value']:.1%} ({_between(gap['interval'], '.1%')})"
        # the order of the header, below
        shares = [f"{own[name]:.1%}" for name in ("top1_agreement", "expected_acceptance")]
        rows.append([NAMES[arm], f"{own['kl_to_teacher']:.4f}", f"{own['nll']:.4f}", *shares, recovered])
    title = f"Held-out teacher text ({held['rows']} rows, {held['response_tokens']} response tokens)"
    header = ["arm", "KL to teacher", "NLL", "top-1 agreement", "expected acceptance", "KL gap recovered"]
    return Section("heldout", title, header, rows, note=bound_note(held))


def _heldout_differences(held: dict[str, Any]) -> Section:
    rows = []
    for entry in held["differences"]:
        pair = f"{NAMES[entry['a']]} - {NAMES[entry['b']]}"
        value = [f"{entry['difference']:+.4f}", _between(entry["interval"], "+.4f")]
        rows.append([pair, entry["metric"], *value, "yes" if entry["real"] else "no"])
    header = ["difference", "measure", "value", "95 % interval", "excludes 0"]
    return Section("heldout_differences", "Paired differences over held-out rows", header, rows)


def _accuracy(score: Entry | None) -> str:
    if score is None:
        return "-"
    return "not executed" if score["accuracy"] is None else f"{score['accuracy']:.0%}"


def cells(scores: Sequence[Entry]) -> list[dict[str, Entry]]:
    """The scores of every domain, preset and temperature, by arm."""
    found: dict[tuple, dict[str, Entry]] = {}
    for score in scores:
        # (domain, preset, temperature) -> arm -> its score
        found.setdefault((score["domain"], score["preset"], score["temperature"]), {})[score["arm"]] = score
    return list(found.values())


def _scores(graded: dict[str, Any]) -> Section:
    by_cell = cells(pooled_first(graded, "scores"))
    arms = [arm for arm in ARMS if any(arm in cell for cell in by_cell)]  # no column for an arm that answered nowhere
    rows = []
    for cell in by_cell:
        one = next(iter(cell.values()))  # any arm of the cell: where it was asked is the same
        shown = []
        for score in map(cell.get, arms):
            known = score is not None and score["accuracy"] is not None
            # "62% (48% to 74%)"; "not executed"; "-" for an arm that is not in this cell
            shown.append(_accuracy(score) + (f" ({_between(score['interval'], '.0%')})" if known else ""))
        rows.append([*_where(one), str(one["prompts"]), str(one["families"]), str(one["answers"]), *shown])
    title = f"Share of correct answers (95 % interval); {graded['cap_hit_rate']:.1%} of all answers were cut"
    header = [*WHERE, "prompts", "families", "answers", *(NAMES[arm] for arm in arms)]
    return Section("scores", title, header, rows)


def _comparisons(graded: dict[str, Any]) -> Section:
    """One row for every comparison that could show something; the others are one line under the table."""
    comparisons = pooled_first(graded, "comparisons")
    rows = []
    for entry in (entry for entry in comparisons if not is_idle(entry)):
        least = entry["minimum_detectable"]
        rows.append([
            f"{NAMES[entry['a']]} - {NAMES[entry['b']]}", *_where(entry), str(entry["prompts"]), str(entry["families"]),
            f"{entry['difference']:+.1%}", _between(entry["interval"], "+.1%"), f"{entry['won']} / {entry['lost']}",
            f"{entry['p']:.2g}", f"{entry['p_holm']:.2g}", "nothing" if least is None else f"{least:.0%}",
            f"{entry['cut'][0]} / {entry['cut'][1]}", DECISIONS[entry["decision"]],
        ])  # fmt: skip
    header = ["difference", *WHERE, "prompts", "families", "value", "95 % interval", "won / lost"]
    header += ["p", "p (Holm)", "could show", "cut", "decision"]
    title = "Paired differences of graded answers"
    return Section("comparisons", title, header, rows, could_show_nothing(comparisons), RULE if rows else "")


def _samples(graded: dict[str, Any]) -> Section:
    rows = []
    for score in (score for score in graded["scores"] if score["pass_at_k"]):
        # "pass@1 31.0%, pass@4 52.0%, maj@4 38.0%"
        said = [f"pass@{k} {value:.1%}" for k, value in score["pass_at_k"].items()]
        if score["majority_at_k"] is not None:
            said.append(f"maj@{max(map(int, score['pass_at_k']))} {score['majority_at_k']:.1%}")
        rows.append([*_where(score), NAMES[score["arm"]], ", ".join(said)])
    return Section("samples", "Several answers a prompt", [*WHERE, "arm", "share of prompts"], rows)


def _recovered(graded: dict[str, Any]) -> Section:
    rows = []
    for entry in (entry for entry in graded["gap_recovered"] if entry["score"] is not None):
        # adding 0.0 turns -0.0 into 0.0, or -0.2 % would read "-0%"
        value = [f"{round(entry['score']['value'], 2) + 0.0:.0%}", _between(entry["score"]["interval"], ".0%")]
        rows.append([NAMES[entry["arm"]], *_where(entry), *value])
    title = "Gap to the teacher's score recovered (where the teacher is measurably apart from the student before)"
    return Section("recovered", title, ["arm", *WHERE, "recovered", "95 % interval"], rows)


def sections(results: dict[str, Any]) -> list[Section]:
    """Every table that has something to say."""
    found = []
    if held := results.get("heldout"):
        found += [_heldout(held), _heldout_differences(held)]
    if graded := results.get("graded"):
        found += [_scores(graded), _comparisons(graded), _samples(graded), _recovered(graded)]
    return [section for section in found if section.rows or section.further]


def _markdown_row(cells: Sequence[str]) -> str:
    # "a|b\nc" -> "a\|b c": a cell is one line, and a bar in it ends no column
    escaped = [" ".join(cell.replace("|", "\\|").split()) for cell in cells]
    return f"| {' | '.join(escaped)} |"


def markdown(results: dict[str, Any]) -> str:
    """report.md's text; model-written text never enters it."""
    # 1. what the first screen says
    lines = [f"# Evaluation of {results['settings']['experiment']}", "", f"**{headline(results)}**", ""]
    for sentence in (closeness(results), against_sft(results)):
        lines += [sentence, ""] if sentence else []
    lines += [f"- {sentence}" for sentence in particulars(results)] + [""]
    # 2. the tables
    for section in sections(results):
        lines += [f"## {section.title}", ""]
        if section.rows:
            lines += [_markdown_row(section.header), f"|{'---|' * len(section.header)}"]
            lines += [*map(_markdown_row, section.rows), ""]
        for sentence in (section.further, section.note):
            lines += [sentence, ""] if sentence else []
    # 3. what was evaluated, and how
    lines += ["## Arms", ""]
    lines += [f"- {NAMES[arm]}: `{what}`" for arm, what in results["arms"].items()]
    lines += [f"- {NAMES[arm]}: missing, {why}" for arm, why in results["missing_arms"].items()]
    lines += ["", "## Settings", ""] + [f"- {name}: `{value}`" for name, value in results["settings"].items()]
    return "\n".join(lines) + "\n"


def make_console() -> Console:
    """A console on standard output, wide enough for a table where it is not a terminal."""
    # rich takes 80 columns where there is no terminal
    return Console(highlight=False, width=None if sys.stdout.isatty() else 180)


def _wrapped(sentence: str, most: int) -> list[str]:
    """At most so many lines; control characters, which could steer the terminal, become blanks."""
    printable = "".join(letter if letter.isprintable() else " " for letter in sentence)
    return textwrap.wrap(printable, COLUMNS, max_lines=most, placeholder=" ...")


def _summary_row(graded: dict[str, Any], cell: dict[str, Entry], arms: Sequence[str]) -> list[str]:
    one = next(iter(cell.values()))
    decision = "-"
    for entry in graded["comparisons"]:
        if (entry["a"], entry["b"]) == ("kd", "base") and _where(entry) == _where(one):
            decision = "could show nothing" if is_idle(entry) else entry["decision"]
    # a domain's name comes from a file of others: see `_wrapped`
    name = "".join(letter if letter.isprintable() else " " for letter in one["domain"])
    name = name if len(name) <= NAME else f"{name[: NAME - 3]}..."
    return [name, f"{one['temperature']:g}", *(_accuracy(cell.get(arm)) for arm in arms), decision]


def _summary_table(results: dict[str, Any], room: int) -> list[str]:
    """Domain by temperature at the headline's preset; what does not fit is counted."""
    graded = results["graded"]
    preset = headline_setting(results).preset
    by_cell = cells(graded["scores"])
    arms = [arm for arm in ARMS if any(arm in cell for cell in by_cell)]
    # 1. the rows at the headline's preset, under a header
    chosen = [cell for cell in by_cell if next(iter(cell.values()))["preset"] == preset]
    rows = [["domain", "T", *(NAMES[arm] for arm in arms), "distilled against before"]]
    rows += [_summary_row(graded, cell, arms) for cell in chosen]
    # 2. as many as fit; where any are left out, a line is kept to count them
    if len(rows) > room or len(chosen) < len(by_cell):
        rows = rows[: room - 1]
    # 3. columns: names to the left, numbers to the right, the decision behind them
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers, row[-1]]))
    if left := len(by_cell) - len(rows) + 1:  # the header is no cell
        lines.append(f"{left} more of domain, sampling and temperature: report.md")
    return lines


def summary(results: dict[str, Any], folder: str | Path) -> list[str]:
    """What the page says first, in at most 25 lines of at most 100 columns; only a path may be longer."""
    # what is above and below has its lines first; the table gets the rest, less the two empty lines around it
    above = []
    for sentence in (headline(results), closeness(results), against_sft(results)):
        above += _wrapped(sentence, 4)
    below = []
    if graded := results.get("graded"):
        below += _wrapped(could_show_nothing(pooled_first(graded, "comparisons")), 2)
        below.append(cut_rate(graded))
    below += [str(Path(folder) / name) for name in ("report.html", "results.json")]
    table = _summary_table(results, LINES - len(above) - len(below) - 2) if graded else []
    return [*above, "", *table, *([""] if table else []), *below]


def print_summary(results: dict[str, Any], folder: str | Path) -> None:
    print("\n".join(summary(results, folder)))
