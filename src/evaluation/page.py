"""report.html: one page that opens from disk and fetches nothing. Model-written text is only ever data in it: JSON in a
block that is not a script, shown with textContent."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from src.evaluation.plots import Dot, Point, dots, lines, mark, ticks
from src.evaluation.results_schema import ARMS, METRICS
from src.evaluation.verdict import NAMES, RULE, sentences

TEMPLATE = Path(__file__).with_name("report_template.html")
MAX_EMBEDDED = 20_000_000  # characters of answers on the page; the rest is in samples.jsonl
MAX_POINTS = 400  # of a curve
METRIC_NAMES = {
    "kl_to_teacher": ("KL to the teacher", "nats per token; less is closer"),
    "nll": ("Negative log-likelihood", "nats per token; the line is the teacher's own"),
    "top1_agreement": ("Top-1 agreement", "share of tokens; more is closer"),
    "expected_acceptance": ("Expected acceptance", "share of drafts the teacher would take; more is closer"),
}


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _signed(value: float) -> str:
    return f"{value:+.0%}" if value else "0"


def _plain(value: float) -> str:
    return f"{value:.4g}"


def _figure(title: str, note: str, plot: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b> <span>{escape(note)}</span></figcaption>{plot}</figure>"


def _figures(figures: Sequence[str], legend: Sequence[str] = ()) -> str:
    keys = "".join(f"<li>{mark(arm)}{escape(NAMES[arm])}</li>" for arm in legend)
    return (f'<ul class="legend">{keys}</ul>' if keys else "") + f'<div class="figures">{"".join(figures)}</div>'


def _table(section: Any, note: str = "") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in section.header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in section.rows)
    return (
        f"<details><summary>Table: {escape(section.title)}</summary>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{escape(note)}</p></details>'
    )


def _list(items: dict[str, Any]) -> str:
    rows = []
    for name, value in items.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        rows.append(f"<dt>{escape(name)}</dt><dd>{escape(shown)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"


def _heldout_figures(held: dict[str, Any]) -> str:
    figures = []
    for metric in METRICS:
        title, note = METRIC_NAMES[metric]
        text = _percent if metric in ("top1_agreement", "expected_acceptance") else _plain
        rows = [
            Dot(NAMES[arm], arm, held["arms"][arm][metric], held["intervals"][arm][metric])
            for arm in ARMS
            if arm in held["intervals"]
        ]
        within = [] if metric == "nll" else [0]
        line_at = held["arms"]["teacher"]["nll"] if metric == "nll" else None
        figures.append(_figure(title, note, dots(rows, text, title, within, line_at)))
    return _figures(figures)


def _by_task(graded: dict[str, Any]) -> str:
    panels: dict[tuple, dict[float, list[dict[str, Any]]]] = {}
    for score in graded["scores"]:
        panels.setdefault((score["domain"], score["preset"]), {}).setdefault(score["temperature"], []).append(score)
    figures = []
    for (domain, preset), by_temperature in panels.items():
        rows = []
        for temperature, scores in by_temperature.items():
            rows.append(Dot(f"T = {temperature:g}"))
            rows += [
                Dot(NAMES[s["arm"]], s["arm"], s["accuracy"], s["interval"], instead="not executed") for s in scores
            ]
        prompts = next(iter(by_temperature.values()))[0]["prompts"]
        note = f"{preset} sampling, {prompts} prompt{'' if prompts == 1 else 's'}"
        figures.append(_figure(domain, note, dots(rows, _percent, f"Correct answers, {domain}", (0, 1))))
    return _figures(figures)


def _differences(graded: dict[str, Any]) -> str:
    figures = []
    for pair in (("kd", "base"), ("kd", "sft"), ("sft", "base")):
        found = [c for c in graded["comparisons"] if (c["a"], c["b"]) == pair]
        rows, last = [], None
        for c in found:
            if (place := (c["domain"], c["preset"])) != last:
                rows.append(Dot(f"{c['domain']} ({c['preset']})"))
                last = place
            shown = c["decision"] in ("better", "worse")
            rows.append(Dot(f"T = {c['temperature']:g}", c["a"], c["difference"], c["interval"], not shown))
        if rows:
            title = f"{NAMES[pair[0]]} less {NAMES[pair[1]]}"
            figures.append(_figure(title, "in points", dots(rows, _signed, title, (-0.1, 0.1), 0)))
    return _figures(figures)


def _against_temperature(graded: dict[str, Any]) -> str:
    panels: dict[tuple, dict[str, list[dict[str, Any]]]] = {}
    for score in graded["scores"]:
        panels.setdefault((score["domain"], score["preset"]), {}).setdefault(score["arm"], []).append(score)
    temperatures = sorted({score["temperature"] for score in graded["scores"]})
    if len(temperatures) < 2:
        return "<p>One temperature was sampled at; there is nothing to draw against it.</p>"
    at = [(t, f"{t:g}") for t in temperatures]
    figures = []
    for measure, interval, title, top in (
        ("accuracy", "interval", "correct", 1.0),
        ("repetition", "repetition_interval", "repeated 4-grams", 0.1),
    ):
        for (domain, preset), arms in panels.items():
            series = [
                (arm, NAMES[arm], [Point(s["temperature"], s[measure], s[interval]) for s in scores])
                for arm, scores in arms.items()
                if all(s[measure] is not None for s in scores)
            ]
            if series:
                label = f"{domain}: {title}"
                plot = lines(series, _percent, label, at, "sampling temperature", (0, top))
                figures.append(_figure(label, f"{preset} sampling", plot))
    return _figures(figures, [arm for arm in ARMS if any(arm in arms for arms in panels.values())])


def _by_position(held: dict[str, Any]) -> str:
    found = held["by_position"]
    if len(found["start"]) < 2:
        return "<p>Every answer is shorter than the second bin of positions.</p>"
    at = [(i, str(start)) for i, start in enumerate(found["start"])]
    figures = []
    for metric, text in (("top1_agreement", _percent), ("kl_to_teacher", _plain)):
        series = [
            (arm, NAMES[arm], [Point(i, v) for i, v in enumerate(values[metric])])
            for arm, values in found["arms"].items()
        ]
        title, note = METRIC_NAMES[metric]
        plot = lines(series, text, f"{title} by position", at, "first response token of the bin", (0,))
        figures.append(_figure(title, note, plot))
    counts = ", ".join(f"{start}: {count}" for start, count in zip(found["start"], found["tokens"], strict=True))
    return _figures(figures, list(found["arms"])) + f'<p class="note">Response tokens in each bin: {counts}.</p>'


def _curves(curves: dict[str, list[dict[str, float]]]) -> str:
    figures = []
    for name, title, note in (
        ("ce_loss", "Cross-entropy", "training rows, nats per token"),
        ("kd_loss", "Divergence from the teacher", "training rows, at the temperature of training"),
        ("validation_kl_to_teacher", "KL to the teacher", "validation rows, at T = 1"),
        ("validation_top1_agreement", "Top-1 agreement", "validation rows"),
    ):
        series = []
        for arm, rows in curves.items():
            points = [Point(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if len(points) > 1 and any(p.y for p in points):
                series.append((arm, NAMES[arm], points[:: len(points) // MAX_POINTS + 1]))
        if series:
            steps = [p.x for *_, points in series for p in points]
            at = [(step, f"{step:g}") for step in ticks(0, max(steps))]
            text, within = (_percent, ()) if "agreement" in name else (_plain, (0,))
            sparse = max(len(points) for *_, points in series) <= 12
            figures.append(_figure(title, note, lines(series, text, title, at, "optimisation step", within, sparse)))
    return _figures(figures, list(curves)) if figures else "<p>The runs left no curves.</p>"


def browser_data(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the answer browser shows: prompts, and for each (prompt, preset, temperature, sample) the arms' answers."""
    prompts: dict[str, list[str]] = {}
    items: dict[tuple, dict[str, Any]] = {}
    for row in samples:
        prompts[row["id"]] = [row["prompt"], row["reference"]]
        key = (row["sample_index"], row["domain"], row["id"], row["preset"], row["temperature"])
        item = items.setdefault(key, {name: row[name] for name in ("id", "domain", "preset", "temperature")})
        item.setdefault("sample", row["sample_index"])
        answer = [row["outcome"], row["response"], row["num_tokens"], row["extracted"]]
        item.setdefault("answers", {})[row["arm"]] = answer
    kept, left = [], MAX_EMBEDDED
    for _, item in sorted(items.items(), key=lambda pair: pair[0]):
        left -= sum(len(answer[1]) for answer in item["answers"].values())
        if left < 0:
            break
        kept.append(item)
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in samples)]
    return {"arms": [[arm, NAMES[arm]] for arm in arms], "prompts": prompts, "items": kept, "all": len(items)}


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: no `<`, `>` or `&`, and no line separators."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _body(results: dict[str, Any], sections: Sequence[Any]) -> list[tuple[str, str, str]]:
    """(title, what to know, content) of every section before the answers."""
    tables = {section.name: _table(section, RULE if section.name == "comparisons" else "") for section in sections}
    parts = []
    if held := results.get("heldout"):
        about = (
            f"How well each arm predicts the teacher's own answers to {held['prompts']} prompts it was not trained on "
            f"({held['response_tokens']} tokens). Whiskers are 95 % bootstrap intervals over prompts."
        )
        content = _heldout_figures(held) + tables["heldout"] + tables["heldout_differences"]
        parts.append(("Closeness to the teacher", about, content))
    if graded := results.get("graded"):
        about = (
            f"The share of answers that are right, per task and sampling temperature, with 95 % intervals. "
            f"{graded['cap_hit_rate']:.1%} of all answers reached the token limit; those count as wrong."
        )
        rest = "".join(tables.get(name, "") for name in ("scores", "samples", "recovered"))
        parts.append(("Correct answers", about, _by_task(graded) + rest))
        if graded["comparisons"]:
            about = (
                "Both arms answer the same prompts, so prompts are compared one by one. A filled mark is a difference "
                "that holds after correction for their number; a hollow one is not shown to differ from 0, or withheld."
            )
            parts.append(("Differences, paired by prompt", about, _differences(graded) + tables["comparisons"]))
        about = "Repetition is the share of an answer's 4-grams of words that it had used before."
        parts.append(("Accuracy and repetition against temperature", about, _against_temperature(graded)))
    if held:
        about = "The same teacher text, token by token: does the student lose its teacher as an answer goes on?"
        parts.append(("Agreement by position in the answer", about, _by_position(held)))
    about = "What the runs logged." + " Both arms saw the same rows in the same order." * (len(results["curves"]) > 1)
    parts.append(("Training", about, _curves(results["curves"])))
    return parts


def html_page(results: dict[str, Any], samples: Sequence[dict[str, Any]], sections: Sequence[Any]) -> str:
    """The whole page.

    Args:
        sections: the tables, as report.py makes them.
    """
    settings, made = results["settings"], results["provenance"]
    body = "".join(
        f'<section><h2>{escape(title)}</h2><p class="about">{escape(about)}</p>{content}</section>'
        for title, about, content in _body(results, sections)
    )
    arms = {NAMES[arm]: what for arm, what in results["arms"].items()}
    arms |= {NAMES[arm]: f"missing: {why}" for arm, why in results["missing_arms"].items()}
    training = {NAMES[arm]: facts for arm, facts in results["training"].items()}
    folded = [("Arms", arms), ("Settings", settings), ("Training runs", training), ("Provenance", made)]
    first, *others = sentences(results)
    parts = {
        "TITLE": escape(f"Evaluation of {settings['experiment']}"),
        "EYEBROW": escape(f"{settings['experiment']} · {str(made.get('time', ''))[:10]}".strip(" ·")),
        "HEADLINE": escape(first),
        "VERDICT": "".join(f"<li>{escape(sentence)}</li>" for sentence in others),
        "BODY": body,
        "FOLDED": "".join(
            f"<details><summary>{title}</summary>{_list(items)}</details>" for title, items in folded if items
        ),
        "MARKS": "".join(f'<template id="mark-{arm}">{mark(arm)}</template>' for arm in ARMS),
        "DATA": script_json(browser_data(samples)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1]
    parts["HASH"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return re.sub(r"@@([A-Z]+)@@", lambda match: parts[match[1]], template)  # one pass: what is put in is not searched
