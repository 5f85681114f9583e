"""results.json: every number of an evaluation, made from heldout.jsonl, samples.jsonl and the runs' own files."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from src.distillation.heldout import POSITIONS, SUMS, summarise, summarise_teacher, tokens_by_position
from src.evaluation.results_schema import ARMS, METRICS, PAIRS, SCHEMA_VERSION, read_results
from src.evaluation.statistics import (
    ALPHA,
    Estimate,
    Sums,
    difference,
    discordant,
    estimate,
    excludes_zero,
    holm,
    majority,
    mcnemar,
    minimum_detectable,
    pass_at_k,
    proportion,
    resample,
)
from src.evaluation.verdict import headline, sentences
from src.grading.rows import OUTCOMES
from src.utils.common import read_json, read_jsonl

CURVES = ("loss", "kd_loss", "ce_loss", *(f"validation_{name}" for name in METRICS))
CONTEXT = ("arms", "missing_arms", "training", "curves", "settings", "provenance")

Row = dict[str, Any]
Prompts = dict[str, list[Row]]  # id -> its answers


def _interval(found: Estimate) -> list[float] | None:
    return None if found.low is None else [found.low, found.high]


def _recovered(sums: Sums, before: int, after: int, goal: int | None) -> dict[str, Any] | None:
    """(before - after) / (before - goal) of three columns (goal None: 0); None where there may be no way to go."""

    def way(s: np.ndarray) -> np.ndarray:
        return s[..., before] - (0 if goal is None else s[..., goal])

    if not excludes_zero(estimate(sums, way)):
        return None
    found = estimate(sums, lambda s: (s[..., before] - s[..., after]) / way(s))
    return {"value": found.value, "interval": _interval(found)}


def heldout_section(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Per arm: KL to the teacher, NLL and top-1 agreement; per pair of arms: paired differences with intervals.

    Several answers to one prompt are one unit of the resampling. Every mean is a ratio of resampled sums, per token.
    """
    by_arm: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        unit = by_arm[row["arm"]].setdefault(row["id"], dict.fromkeys(("num_tokens", *SUMS), 0))
        for name in unit:
            unit[name] += row[name]
    shown = [arm for arm in ARMS if arm in by_arm]
    ids = sorted(set.intersection(*(set(units) for units in by_arm.values())))
    tokens = [by_arm[shown[0]][i]["num_tokens"] for i in ids]
    names = [(None, "num_tokens"), (None, "teacher_nll_sum"), *((arm, m) for arm in shown for m in METRICS.values())]
    place = {name: index for index, name in enumerate(names)}
    sums = resample([[by_arm[arm or shown[0]][i][column] for i in ids] for arm, column in names], seed)

    def mean(arm: str, metric: str) -> Estimate:
        return estimate(sums, lambda s: s[..., place[arm, METRICS[metric]]] / s[..., 0])

    differences = []
    for a, b in PAIRS:
        for metric, column in METRICS.items() if {a, b} <= by_arm.keys() else ():
            ours, theirs = place[a, column], place[b, column]
            found = estimate(sums, lambda s, x=ours, y=theirs: (s[..., x] - s[..., y]) / s[..., 0])
            differences.append({"a": a, "b": b, "metric": metric, "difference": found.value,
                                "interval": _interval(found), "real": excludes_zero(found)})  # fmt: skip
    arms = {arm: summarise([by_arm[arm][i] for i in ids]) for arm in shown}
    recovered = {}
    for arm in ("sft", "kd") if "base" in arms else ():
        if arm in arms:
            kl, nll = ((place["base", c], place[arm, c]) for c in ("kl_sum", "nll_sum"))
            recovered[arm] = {"kl_to_teacher": _recovered(sums, *kl, None), "nll": _recovered(sums, *nll, 1)}
    return {
        "rows": len(rows) // len(by_arm),
        "prompts": len(ids),
        "response_tokens": sum(tokens),
        "arms": arms | {"teacher": summarise_teacher(list(by_arm[shown[0]].values()))},
        "intervals": {arm: {metric: _interval(mean(arm, metric)) for metric in METRICS} for arm in shown},
        "differences": differences,
        "gap_recovered": recovered,
        "by_position": _by_position(rows, shown),
    }


def _by_position(rows: Sequence[Row], shown: Sequence[str]) -> dict[str, Any]:
    """Means per token over the bins of response positions, as far as a row reaches."""
    found: dict[str, Any] = {"start": [], "tokens": [], "arms": {}}
    for arm in shown:
        sums = np.zeros((3, len(POSITIONS)))
        for row in (row for row in rows if row["arm"] == arm):
            reached = len(row["kl_by_position"])
            own = (tokens_by_position(row["num_tokens"]), row["kl_by_position"], row["agreement_by_position"])
            sums[:, :reached] += own
        tokens, kl, agreement = sums[:, sums[0] > 0]
        found |= {"start": list(POSITIONS[: len(tokens)]), "tokens": [int(count) for count in tokens]}
        found["arms"][arm] = {
            "kl_to_teacher": (kl / tokens).tolist(),
            "top1_agreement": (agreement / tokens).tolist(),
        }
    return found


HAN = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts without blanks between words: a letter is a word
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+|[^\w\s]")


def repetition(text: str) -> float:
    """The share of 4-grams of words that stood in the text before (seq-rep-4, Welleck et al. 2020); 0 without any."""
    words = WORD.findall(text)
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _judged(prompts: Prompts) -> bool:
    return not any(row["outcome"] == "not_executed" for rows in prompts.values() for row in rows)


def _shares(prompts: Prompts, ids: Collection[str], cut_is_right: bool = False) -> list[float]:
    """Of each prompt the share of its answers that are right."""
    right = ("correct", "truncated") if cut_is_right else ("correct",)
    return [sum(row["outcome"] in right for row in prompts[i]) / len(prompts[i]) for i in ids]


def _score(prompts: Prompts, seed: int) -> dict[str, Any]:
    """One arm in one cell. Where some answers were not executed there is no accuracy: the others alone say nothing."""
    rows = [row for answers in prompts.values() for row in answers]
    outcomes = Counter(row["outcome"] for row in rows)
    samples = min(len(answers) for answers in prompts.values())
    repeated = [sum(map(repetition, texts)) / len(texts)
                for texts in ([row["response"] for row in answers] for answers in prompts.values())]  # fmt: skip
    share = difference(repeated, [0.0] * len(repeated), seed)
    entry = (
        {
            "prompts": len(prompts),
            "answers": len(rows),
            "outcomes": {outcome: outcomes[outcome] for outcome in OUTCOMES},
            "mean_tokens": sum(row["num_tokens"] for row in rows) / len(rows),
            "repetition": share.value,
            "repetition_interval": _interval(share),
        }
        | dict.fromkeys(("accuracy", "interval", "strict_accuracy", "mean_score", "majority_at_k"))
        | {"pass_at_k": {}}
    )
    if not _judged(prompts):
        return entry
    accuracy = proportion(_shares(prompts, prompts), samples)
    entry |= {
        "accuracy": accuracy.value,
        "interval": _interval(accuracy),
        "strict_accuracy": sum(bool(row["strict"]) for row in rows) / len(rows),
        "mean_score": sum(row["score"] or 0.0 for row in rows) / len(rows),
    }
    if samples > 1:
        right = [(len(a), sum(row["outcome"] == "correct" for row in a)) for a in prompts.values()]
        sizes = sorted({k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples} | {samples})
        entry["pass_at_k"] = {str(k): sum(pass_at_k(n, c, k) for n, c in right) / len(right) for k in sizes}
        if all(row["grader"] == "numeric" for row in rows):
            votes = [
                [(row["extracted"], row["outcome"] == "correct") for row in a if row["outcome"] in ("correct", "wrong")]
                for a in prompts.values()
            ]
            entry["majority_at_k"] = sum(map(majority, votes)) / len(votes)
    return entry


def _compare(cells: Mapping[tuple, Mapping[str, Prompts]], a: str, b: str, seed: int) -> list[dict[str, Any]]:
    """Two arms in every cell where both are judged. These cells are the family that Holm's correction is over.

    A difference is decided where the corrected exact test and the interval both say so, on the same side. The decision
    is withheld where it turns when the answers that were cut are scored all right instead of all wrong.
    """
    found = []
    for key, arms in cells.items():
        if a in arms and b in arms and _judged(arms[a]) and _judged(arms[b]) and arms[a].keys() & arms[b].keys():
            found.append((key, arms[a], arms[b], sorted(arms[a].keys() & arms[b].keys())))
    decisions, entries = [], []
    for cut_is_right in (True, False):
        shares = [[_shares(arm, ids, cut_is_right) for arm in pair] for _, *pair, ids in found]
        estimates = [difference(*pair, seed) for pair in shares]
        counts = [discordant(*pair) for pair in shares]
        p_values = [mcnemar(*count) for count in counts]
        adjusted = holm(p_values)
        decisions.append([
            ("better" if value.value > 0 else "worse")
            if p <= ALPHA and excludes_zero(value) and (value.value > 0) == (won > lost) else "not shown"
            for value, (won, lost), p in zip(estimates, counts, adjusted, strict=True)
        ])  # fmt: skip
        if cut_is_right:
            if_right = [value.value for value in estimates]
    for i, ((domain, preset, temperature), *pair, ids) in enumerate(found):
        entries.append({
            "domain": domain, "preset": preset, "temperature": temperature, "a": a, "b": b, "prompts": len(ids),
            "difference": estimates[i].value, "interval": _interval(estimates[i]),
            "won": counts[i][0], "lost": counts[i][1], "p": p_values[i], "p_holm": adjusted[i], "family": len(found),
            "minimum_detectable": minimum_detectable(*shares[i], ALPHA / len(found)),
            "cut": [sum(row["outcome"] == "truncated" for k in ids for row in arm[k]) for arm in pair],
            "difference_if_cut_right": if_right[i],
            "decision": decisions[1][i] if decisions[0][i] == decisions[1][i] else "withheld",
        })  # fmt: skip
    return entries


def graded_section(samples: Sequence[Row], seed: int) -> dict[str, Any]:
    """Per cell (domain, preset, temperature) and arm: outcomes and scores; per pair of arms: paired differences."""
    cells: dict[tuple, dict[str, Prompts]] = {}
    for row in samples:
        cell = cells.setdefault((row["domain"], row["preset"], row["temperature"]), {})
        cell.setdefault(row["arm"], {}).setdefault(row["id"], []).append(row)
    cells = dict(sorted(cells.items()))
    scores, recovered = [], []
    for (domain, preset, temperature), arms in cells.items():
        where = {"domain": domain, "preset": preset, "temperature": temperature}
        scores += [where | {"arm": arm} | _score(arms[arm], seed) for arm in ARMS if arm in arms]
        for arm in ("sft", "kd"):
            three = [arms[name] for name in ("base", arm, "teacher") if name in arms]
            if len(three) == 3 and all(map(_judged, three)):
                ids = sorted(set.intersection(*map(set, three)))
                sums = resample([_shares(one, ids) for one in three], seed)
                recovered.append(where | {"arm": arm, "score": _recovered(sums, 0, 1, 2)})
    return {
        "cap_hit_rate": sum(row["outcome"] == "truncated" for row in samples) / len(samples),
        "scores": scores,
        "comparisons": [entry for a, b in PAIRS for entry in _compare(cells, a, b, seed)],
        "gap_recovered": recovered,
    }


def run_files(arms: Mapping[str, str]) -> dict[str, Any]:
    """What the runs of the trained arms left beside their final_model: kd_results.json, and metrics.jsonl's curves."""
    found: dict[str, Any] = {"training": {}, "curves": {}}
    for arm in ("sft", "kd"):
        run = Path(arms.get(arm, "")).parent
        if arm in arms and (run / "kd_results.json").is_file():
            found["training"][arm] = read_json(run / "kd_results.json")
        if arm in arms and (run / "metrics.jsonl").is_file():
            rows = read_jsonl(run / "metrics.jsonl", ("step",))
            curves = [{name: row[name] for name in ("step", *CURVES) if name in row} for row in rows]
            found["curves"][arm] = [row for row in curves if len(row) > 1]
    return found


def make_results(samples: Sequence[Row], heldout: Sequence[Row], context: dict[str, Any], seed: int) -> dict[str, Any]:
    """The content of results.json; the order of the rows is of no account.

    Args:
        samples: the rows of samples.jsonl; `heldout` those of heldout.jsonl (may be empty).
        context: `CONTEXT`, taken over as it is.
        seed: of the bootstrap.
    """
    results: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "headline": "", "verdict": "", **context}
    if heldout:
        results["heldout"] = heldout_section(
            sorted(heldout, key=lambda r: (r["arm"], r["id"], r["sample_index"])), seed
        )
    if samples:
        results["graded"] = graded_section(sorted(samples, key=lambda r: (r["id"], r["sample_index"])), seed)
    return results | {"headline": headline(results), "verdict": " ".join(sentences(results))}


def rebuild(folder: str | Path) -> dict[str, Any]:
    """results.json's content again, from the JSONL files beside it and the runs' files; settings and provenance are
    taken over."""
    folder = Path(folder)
    stored = read_results(folder / "results.json")
    samples = read_jsonl(folder / "samples.jsonl") if "graded" in stored else []
    heldout = read_jsonl(folder / "heldout.jsonl") if "heldout" in stored else []
    context = {name: stored[name] for name in CONTEXT} | run_files(stored["arms"])
    return make_results(samples, heldout, context, stored["settings"]["seed"])
