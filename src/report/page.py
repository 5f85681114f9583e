"""report.md and report.html. The page opens from disk and fetches nothing.

Every text goes through the template's autoescaping. Model-written text is only ever data in it: JSON in a block that is
not a script, shown with textContent.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from src.evaluation.results_schema import ARMS, METRICS
from src.evaluation.verdict import (
    NAMES,
    against_sft,
    bound_note,
    closeness,
    cut_rate,
    headline,
    headline_setting,
    is_idle,
    overall_scores,
    particulars,
)
from src.report.plots import Dot, Point, Series, Tick, dots, lines, mark, ticks
from src.report.tables import Section, markdown, sections
from src.utils.common import write_text

TEMPLATE = Path(__file__).with_name("report.html.j2")
MAX_EMBEDDED = 20_000_000  # characters of answers on the page; the rest is in samples.jsonl
MAX_POINTS = 400  # of a curve
MAX_DOMAINS = 5  # in the picture at the top; of more, only all together
METRIC_NAMES = {
    "kl_to_teacher": ("KL to the teacher", "nats per token; less is closer"),
    "nll": ("Negative log-likelihood", "nats per token; the line is the teacher's own"),
    "top1_agreement": ("Top-1 agreement", "share of tokens; more is closer"),
    "expected_acceptance": ("Expected acceptance", "share of tokens that the teacher would accept; more is closer"),
}


@dataclass(frozen=True)
class Figure:
    title: str
    note: str
    plot: Markup


@dataclass(frozen=True)
class Picture:
    """What stands at the top of the page: accuracy at one sampling, and closeness beside it."""

    accuracy_note: str
    accuracy: list[Figure]
    closeness: list[Figure]
    with_control: bool


@dataclass(frozen=True)
class Part:
    """A section of the page: what to know, figures, and tables that open on request."""

    title: str
    about: str
    figures: list[Figure]
    legend: Sequence[str] = ()  # arms
    notes: Sequence[str] = ()
    tables: Sequence[Section] = ()


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _signed(value: float) -> str:
    return f"{value:+.0%}" if value else "0"  # no sign on a zero


def _plain(value: float) -> str:
    return f"{value:.4g}"  # 0.06732 -> "0.06732", 12.3456 -> "12.35"


def _accuracy_dots(scores: Sequence[dict[str, Any]]) -> list[Dot]:
    return [
        Dot(NAMES[s["arm"]], s["arm"], s["accuracy"], s["interval"], strong=s["arm"] == "kd", instead="not executed")
        for s in scores
    ]


def _heldout_dots(held: dict[str, Any], metric: str, arms: Iterable[str]) -> list[Dot]:
    """The teacher is held against itself: its value has no interval."""
    rows = []
    for arm in (arm for arm in ARMS if arm in arms):
        interval = held["intervals"].get(arm, {}).get(metric)  # None for the teacher
        rows.append(Dot(NAMES[arm], arm, held["arms"][arm][metric], interval, strong=arm == "kd"))
    return rows


def _accuracy_figure(title: str, scores: Sequence[dict[str, Any]], where: str = "") -> Figure:
    prompts = scores[0]["prompts"]
    note = f"{prompts} question{'' if prompts == 1 else 's'}{where}"
    return Figure(title, note, dots(_accuracy_dots(scores), _percent, f"Accuracy, {title}", (0, 1)))


def _accuracy_figures(results: dict[str, Any]) -> list[Figure]:
    """The domains of the headline together, then each of them, at its setting; of no headline, all domains."""
    setting = headline_setting(results)
    if setting is None:
        return []
    # 1. the scores at the headline's setting, by domain
    pooled, together = results["graded"]["overall"]["domains"], list(overall_scores(results).values())
    domains: dict[str, list[dict[str, Any]]] = {}
    for score in results["graded"]["scores"]:
        if setting.holds(score) and (score["domain"] in pooled or not pooled):
            domains.setdefault(score["domain"], []).append(score)
    # 2. together where there are several; of many domains that is all
    figures = []
    if len(pooled) > 1 and together:
        figures.append(_accuracy_figure("Together", together, f" in {len(pooled)} domains"))
    if not figures or len(domains) <= MAX_DOMAINS:
        figures += [_accuracy_figure(name, scores) for name, scores in domains.items()]
    return figures


def _picture(results: dict[str, Any]) -> Picture:
    setting, held = headline_setting(results), results.get("heldout")
    note = f"share of right answers, T = {setting.temperature:g}, {setting.preset} sampling" if setting else ""
    shown = []
    if held:
        plot = dots(_heldout_dots(held, "expected_acceptance", held["arms"]), _percent, "Expected acceptance", (0, 1))
        known = " (lower bounds)" if bound_note(held) else ""
        shown.append(Figure("Held-out text", f"{held['prompts']} prompts{known}", plot))
    return Picture(note, _accuracy_figures(results), shown, "sft" in results["arms"])


def _heldout_figures(held: dict[str, Any]) -> list[Figure]:
    figures = []
    for metric in METRICS:
        title, note = METRIC_NAMES[metric]
        text = _percent if metric in ("top1_agreement", "expected_acceptance") else _plain
        rows = _heldout_dots(held, metric, held["intervals"])
        within = [] if metric == "nll" else [0]  # a KL or a share is read against 0, an NLL against the teacher's
        line_at = held["arms"]["teacher"]["nll"] if metric == "nll" else None
        figures.append(Figure(title, note, dots(rows, text, title, within, line_at)))
    return figures


def _by_task(graded: dict[str, Any]) -> list[Figure]:
    # (domain, preset) -> temperature -> the arms' scores
    panels: dict[tuple, dict[float, list[dict[str, Any]]]] = {}
    for score in graded["scores"]:
        panels.setdefault((score["domain"], score["preset"]), {}).setdefault(score["temperature"], []).append(score)
    figures = []
    for (domain, preset), by_temperature in panels.items():
        rows = []
        for temperature, scores in by_temperature.items():
            rows += [Dot(f"T = {temperature:g}"), *_accuracy_dots(scores)]
        prompts = next(iter(by_temperature.values()))[0]["prompts"]
        note = f"{preset} sampling, {prompts} prompt{'' if prompts == 1 else 's'}"
        figures.append(Figure(domain, note, dots(rows, _percent, f"Correct answers, {domain}", (0, 1))))
    return figures


def _differences(graded: dict[str, Any]) -> list[Figure]:
    """Of every pair of arms the comparisons that could show something."""
    figures = []
    for a, b in (("kd", "base"), ("kd", "sft"), ("sft", "base")):
        rows, last = [], None
        for c in graded["comparisons"]:
            if (c["a"], c["b"]) != (a, b) or is_idle(c):
                continue
            if (place := (c["domain"], c["preset"])) != last:  # a heading where another place begins
                rows.append(Dot(f"{c['domain']} ({c['preset']})"))
                last = place
            shown = c["decision"] in ("better", "worse")
            # hollow where nothing is shown; the axis holds 10 points both ways at least
            rows.append(Dot(f"T = {c['temperature']:g}", a, c["difference"], c["interval"], not shown))
        if rows:
            title = f"{NAMES[a]} less {NAMES[b]}"
            figures.append(Figure(title, "in points", dots(rows, _signed, title, (-0.1, 0.1), 0)))
    return figures


def _against_temperature(graded: dict[str, Any]) -> list[Figure]:
    # (domain, preset) -> arm -> its scores by temperature
    panels: dict[tuple, dict[str, list[dict[str, Any]]]] = {}
    for score in graded["scores"]:
        panels.setdefault((score["domain"], score["preset"]), {}).setdefault(score["arm"], []).append(score)
    temperatures = sorted({score["temperature"] for score in graded["scores"]})
    if len(temperatures) < 2:
        return []
    at = [Tick(t, f"{t:g}") for t in temperatures]
    figures = []
    for measure, interval, title, top in (
        ("accuracy", "interval", "correct", 1.0),
        ("repetition", "repetition_interval", "repeated 4-grams", 0.1),
    ):
        for (domain, preset), arms in panels.items():
            series = []
            for arm, scores in arms.items():
                if all(score[measure] is not None for score in scores):  # not executed: no line
                    points = [Point(score["temperature"], score[measure], score[interval]) for score in scores]
                    series.append(Series(arm, NAMES[arm], points))
            if series:
                label = f"{domain}: {title}"
                plot = lines(series, _percent, label, at, "sampling temperature", (0, top))
                figures.append(Figure(label, f"{preset} sampling", plot))
    return figures


def _by_position(held: dict[str, Any]) -> list[Figure]:
    found = held["by_position"]
    if len(found["start"]) < 2:
        return []
    # bins at even steps, though they double in width
    at = [Tick(i, str(start)) for i, start in enumerate(found["start"])]
    figures = []
    for metric, text in (("top1_agreement", _percent), ("kl_to_teacher", _plain)):
        series = []
        for arm, values in found["arms"].items():
            points = [Point(index, value) for index, value in enumerate(values[metric])]
            series.append(Series(arm, NAMES[arm], points))
        title, note = METRIC_NAMES[metric]
        plot = lines(series, text, f"{title} by position", at, "first response token of the bin", (0,))
        figures.append(Figure(title, note, plot))
    return figures


def _curves(curves: dict[str, list[dict[str, float]]]) -> list[Figure]:
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
            if len(points) > 1 and any(p.y for p in points):  # a loss that had no part in a run is 0 all along
                # every n-th, so that at most 400 are left
                series.append(Series(arm, NAMES[arm], points[:: len(points) // MAX_POINTS + 1]))
        if series:
            last = max(one.points[-1].x for one in series)  # points are in the order of their steps
            at = [Tick(step, f"{step:g}") for step in ticks(0, last)]
            text, within = (_percent, ()) if "agreement" in name else (_plain, (0,))
            sparse = max(len(one.points) for one in series) <= 12  # marks on a few points, a line alone on many
            figures.append(Figure(title, note, lines(series, text, title, at, "optimisation step", within, sparse)))
    return figures


def browser_data(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the answer browser shows: prompts, and for each (prompt, preset, temperature, sample) the arms' answers."""
    # 1. an item for each question at each sampling, with every arm's answer
    prompts: dict[str, list[str]] = {}
    items: dict[tuple, dict[str, Any]] = {}
    for row in samples:
        prompts[row["id"]] = [row["prompt"], row["reference"]]
        # first samples first: they are what fits where all do not
        key = (row["sample_index"], row["domain"], row["id"], row["preset"], row["temperature"])
        item = items.setdefault(key, {name: row[name] for name in ("id", "domain", "preset", "temperature")})
        item.setdefault("sample", row["sample_index"])
        answer = [row["outcome"], row["response"], row["num_tokens"], row["extracted"]]
        item.setdefault("answers", {})[row["arm"]] = answer
    # 2. as many as the page can carry, whole items, counted in `all`
    kept, left = [], MAX_EMBEDDED
    for _, item in sorted(items.items(), key=lambda pair: pair[0]):
        left -= sum(len(answer[1]) for answer in item["answers"].values())
        if left < 0:
            break
        kept.append(item)
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in samples)]
    return {"arms": [[arm, NAMES[arm]] for arm in arms], "prompts": prompts, "items": kept, "all": len(items)}


def script_json(value: Any) -> Markup:
    """JSON that can stand in a script element: no `<`, `>` or `&`, and no line separators."""
    # "</script>" -> "\u003c/script\u003e", which is the same string to JSON and ends no element to HTML
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _closeness_parts(held: dict[str, Any], tables: dict[str, Section]) -> list[Part]:
    about = (
        f"How well each arm predicts the teacher's own answers to {held['prompts']} prompts it was not trained on "
        f"({held['response_tokens']} tokens). Whiskers are 95 % bootstrap intervals over families of prompts."
    )
    shown = [tables["heldout"], *([tables["heldout_differences"]] if "heldout_differences" in tables else [])]
    notes = [note] if (note := bound_note(held)) else []
    parts = [Part("Closeness to the teacher", about, _heldout_figures(held), notes=notes, tables=shown)]
    if figures := _by_position(held):
        about = "The same teacher text, token by token: does the student lose its teacher as an answer goes on?"
        found = held["by_position"]
        counts = ", ".join(f"{start}: {count}" for start, count in zip(found["start"], found["tokens"], strict=True))
        notes = [f"Response tokens in each bin: {counts}."]
        parts.append(Part("Agreement by position in the answer", about, figures, list(found["arms"]), notes))
    return parts


def _graded_parts(graded: dict[str, Any], tables: dict[str, Section]) -> list[Part]:
    about = f"The share of answers that are right, by domain and temperature. {cut_rate(graded)}"
    shown = [tables[name] for name in ("scores", "samples", "recovered") if name in tables]
    parts = [Part("Correct answers", about, _by_task(graded), tables=shown)]
    if compared := tables.get("comparisons"):
        about = (
            "Both arms answer the same prompts, so prompts are compared one by one. A filled mark is a difference "
            "that holds after correction for their number; a hollow one is not shown to differ from 0, or withheld."
        )
        figures = _differences(graded)
        notes = [compared.further] if compared.further else []
        shown = [compared] if compared.rows else []
        parts.append(Part("Differences, paired by prompt", about if figures else "", figures, (), notes, shown))
    if figures := _against_temperature(graded):
        about = "Repetition is the share of an answer's 4-grams of words that it had used before."
        legend = [arm for arm in ARMS if any(score["arm"] == arm for score in graded["scores"])]
        parts.append(Part("Accuracy and repetition against temperature", about, figures, legend))
    return parts


def _parts(results: dict[str, Any]) -> list[Part]:
    """Every section between the picture and the answers."""
    tables = {section.name: section for section in sections(results)}
    held, graded, curves = results.get("heldout"), results.get("graded"), results["curves"]
    parts = _graded_parts(graded, tables) if graded else []
    parts += _closeness_parts(held, tables) if held else []
    if figures := _curves(curves):
        # a text times False is empty
        about = "What the runs logged." + " Both arms saw the same rows in the same order." * (len(curves) > 1)
        bounds = {facts["kl_is"] for facts in results["training"].values() if facts.get("kl_is", "exact") != "exact"}
        notes = [f"The KL on validation rows is a {bound}." for bound in sorted(bounds)]
        parts.append(Part("Training", about, figures, list(curves), notes))
    return parts


def _folded(results: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The lists at the foot of the page: title -> name -> value as text."""
    arms = {NAMES[arm]: what for arm, what in results["arms"].items()}
    arms |= {NAMES[arm]: f"missing: {why}" for arm, why in results["missing_arms"].items()}
    training = {NAMES[arm]: facts for arm, facts in results["training"].items()}
    lists = {
        "Arms": arms, "Settings": results["settings"], "Training runs": training, "Provenance": results["provenance"],
    }  # fmt: skip
    found = {}
    for title, items in lists.items():
        shown = {n: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for n, v in items.items()}
        found |= {title: shown} if shown else {}  # no list without entries
    return found


def html_page(results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> str:
    """The whole page."""
    source = TEMPLATE.read_text(encoding="utf-8")
    # the policy names the hash of the one script that may run; a change of one letter would block it
    script = re.search(r"<script>(.*?)</script>", source, re.DOTALL)[1]  # holds nothing of the template's language
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(TEMPLATE.parent),
        undefined=StrictUndefined,  # a misspelt name is an error, not an empty text
        trim_blocks=True,
        lstrip_blocks=True,
    )
    experiment, made = results["settings"]["experiment"], str(results["provenance"].get("time", ""))[:10]
    return environment.get_template(TEMPLATE.name).render(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=f"Evaluation of {experiment}",
        eyebrow=f"{experiment} · {made}".strip(" ·"),
        headline=headline(results),
        standfirst=[sentence for sentence in (closeness(results), against_sft(results)) if sentence],
        picture=_picture(results),
        particulars=particulars(results),
        parts=_parts(results),
        folded=_folded(results),
        arms=ARMS,
        names=NAMES,
        mark=mark,
        data=script_json(browser_data(samples)),
    )


def write_reports(folder: Path, results: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
    """report.md and report.html from the content of results.json and samples.jsonl."""
    write_text(folder / "report.md", markdown(results))
    write_text(folder / "report.html", html_page(results, samples))
