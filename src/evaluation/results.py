"""results.json: every number of an evaluation, made from heldout.jsonl, samples.jsonl and the runs' own results."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from src.distillation.heldout import SUMS, gap_recovered, summarise, summarise_teacher
from src.evaluation.graders import OUTCOMES
from src.evaluation.statistics import Estimate, bootstrap, excludes_zero

SCHEMA_VERSION = 1
ARMS = ("base", "sft", "kd", "teacher")
PAIRS = (("kd", "base"), ("kd", "sft"), ("sft", "base"), ("teacher", "base"))
NO_CONTROL = "no control: nothing is shown about distillation itself"

Row = dict[str, Any]


def _interval(estimate: Estimate) -> dict[str, Any]:
    return {"difference": estimate.value, "interval": [estimate.low, estimate.high], "real": excludes_zero(estimate)}


def heldout_section(rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """Per arm: KL to the teacher, NLL and top-1 agreement; per pair of arms: paired differences with intervals.

    Several answers to one prompt are one unit of the resampling.
    """
    by_arm: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        unit = by_arm[row["arm"]].setdefault(row["id"], dict.fromkeys(("num_tokens", *SUMS), 0))
        for name in unit:
            unit[name] += row[name]
    arms = {arm: summarise(list(by_arm[arm].values())) for arm in ARMS if arm in by_arm}
    first = next(iter(by_arm.values()))
    arms["teacher"] = summarise_teacher(list(first.values()))
    differences = []
    for a, b in PAIRS:
        if a not in by_arm or b not in by_arm:
            continue
        ids = sorted(by_arm[a].keys() & by_arm[b].keys())
        tokens = np.array([by_arm[a][i]["num_tokens"] for i in ids])
        for metric, column in (("kl_to_teacher", "kl_sum"), ("nll", "nll_sum"), ("top1_agreement", "agreement_sum")):
            sums = [np.array([by_arm[arm][i][column] for i in ids]) for arm in (a, b)]
            differences.append({"a": a, "b": b, "metric": metric, **_interval(bootstrap(*sums, tokens, seed))})
    recovered = {
        arm: gap_recovered(arms["base"], arms[arm], arms["teacher"])
        for arm in ("sft", "kd")
        if {arm, "base"} <= arms.keys()
    }
    return {
        "rows": len(rows) // len(by_arm),
        "prompts": len(first),
        "response_tokens": sum(row["num_tokens"] for row in first.values()),
        "arms": arms,
        "differences": differences,
        "gap_recovered": recovered,
    }


def graded_section(samples: Sequence[Row], seed: int) -> dict[str, Any]:
    """Per (domain, preset, temperature, arm): outcomes and score; per pair of arms: paired differences.

    A row's score is the mean over its samples. Where some answers were not executed there is no accuracy: the others
    (cut, or without code) alone would say nothing.
    """
    cells: dict[tuple, list[Row]] = defaultdict(list)
    for row in samples:
        cells[row["domain"], row["preset"], row["temperature"], row["arm"]].append(row)
    scores = []
    by_prompt: dict[tuple, dict[str, list[float]]] = {}
    for (domain, preset, temperature, arm), rows in sorted(
        cells.items(), key=lambda item: (*item[0][:3], ARMS.index(item[0][3]))
    ):
        outcomes = Counter(row["outcome"] for row in rows)
        judged = [] if outcomes["not_executed"] else rows
        prompts: dict[str, list[float]] = defaultdict(list)
        for row in judged:
            prompts[row["id"]].append(float(row["outcome"] == "correct"))
        by_prompt[domain, preset, temperature, arm] = prompts
        entry = {
            "domain": domain,
            "preset": preset,
            "temperature": temperature,
            "arm": arm,
            "answers": len(rows),
            "outcomes": {outcome: outcomes[outcome] for outcome in OUTCOMES},
            "mean_tokens": sum(row["num_tokens"] for row in rows) / len(rows),
            "accuracy": None,
            "interval": None,
            "strict_accuracy": None,
            "mean_score": None,
        }
        if judged:
            sums, counts = (np.array([f(v) for v in prompts.values()]) for f in (sum, len))
            accuracy = bootstrap(sums, None, counts, seed)
            entry |= {
                "accuracy": accuracy.value,
                "interval": [accuracy.low, accuracy.high],
                "strict_accuracy": sum(bool(row["strict"]) for row in judged) / len(judged),
                "mean_score": sum(row["score"] for row in judged) / len(judged),
            }
        scores.append(entry)
    comparisons = []
    for domain, preset, temperature in sorted({key[:3] for key in by_prompt}):
        found: dict[tuple[str, str], Estimate] = {}
        for a, b in PAIRS:
            ours, theirs = (by_prompt.get((domain, preset, temperature, arm), {}) for arm in (a, b))
            ids = sorted(ours.keys() & theirs.keys())
            if ids:
                pair = [np.array([sum(side[i]) / len(side[i]) for i in ids]) for side in (ours, theirs)]
                found[a, b] = bootstrap(*pair, np.ones(len(ids)), seed)
                where = {"domain": domain, "preset": preset, "temperature": temperature, "prompts": len(ids)}
                comparisons.append({**where, "a": a, "b": b, **_interval(found[a, b])})
    return {"scores": scores, "comparisons": comparisons}


def verdict(results: dict[str, Any]) -> str:
    """What the numbers show, in sentences; a missing arm is named."""
    parts = []
    for a, b, words in (
        ("kd", "base", "the untrained student"),
        ("kd", "sft", "its SFT control (same rows, same steps)"),
    ):
        found = [
            d for d in results.get("heldout", {}).get("differences", [])
            if (d["a"], d["b"], d["metric"]) == (a, b, "kl_to_teacher")
        ]  # fmt: skip
        for d in found:
            low, high = d["interval"]
            how = "no measurable difference" if not d["real"] else "closer" if d["difference"] < 0 else "farther"
            parts.append(
                f"On held-out teacher text the distilled student against {words}: {how} (KL to the teacher "
                f"{d['difference']:+.3f} nats per token, 95 % interval {low:+.3f} to {high:+.3f})."
            )
    graded = [c for c in results.get("graded", {}).get("comparisons", []) if (c["a"], c["b"]) == ("kd", "base")]
    if graded:
        better = sum(c["real"] and c["difference"] > 0 for c in graded)
        worse = sum(c["real"] and c["difference"] < 0 for c in graded)
        parts.append(
            f"On graded answers against the untrained student: {better} of {len(graded)} domain-temperature cells "
            f"better, {worse} worse, the rest within their 95 % intervals (not corrected for their number)."
        )
    for arm, why in results["missing_arms"].items():
        parts.append(f"The arm {arm} is missing: {why}.")
    if "sft" in results["missing_arms"]:
        parts.append(f"{NO_CONTROL[0].upper()}{NO_CONTROL[1:]}.")
    elif any(c["b"] == "sft" for c in results.get("heldout", {}).get("differences", [])):
        parts.append("One training seed an arm: a claim that distillation beats SFT needs several.")
    return " ".join(parts)


def make_results(samples: Sequence[Row], heldout: Sequence[Row], context: dict[str, Any], seed: int) -> dict[str, Any]:
    """The content of results.json.

    Args:
        samples: the rows of samples.jsonl; `heldout` those of heldout.jsonl (may be empty).
        context: `arms`, `missing_arms`, `training`, `settings`, `provenance`, taken over as they are.
        seed: of the bootstrap.
    """
    results: dict[str, Any] = {"schema_version": SCHEMA_VERSION, **context}
    if heldout:
        results["heldout"] = heldout_section(heldout, seed)
    if samples:
        results["graded"] = graded_section(samples, seed)
        cut = sum(row["outcome"] == "truncated" for row in samples)
        results["graded"]["cap_hit_rate"] = cut / len(samples)
    results["verdict"] = verdict(results)
    return results
