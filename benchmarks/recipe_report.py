"""recipes.json and recipes.md from the records of benchmarks/recipes.py: means over seeds, paired intervals, costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.recipe_arms import ARMS, CANDIDATES, SEEDS
from src.evaluation.statistics import Estimate, crossed, excludes_zero
from src.utils.common import UserError, provenance, read_json, write_json, write_text

CELLS = ("greedy", "T=0.7")
MEASURES = ("kl_to_teacher", "nll", "top1_agreement")
AGAINST = ("sft", "kd_T1", "kd_sampled")  # what every arm is compared with
POOLED = "both"

Record = dict[str, Any]
Prompts = list[dict[str, str]]


def read_records(folder: Path, names: Sequence[str], seeds: Sequence[int]) -> dict[str, list[Record]]:
    """The records of every arm that has one of each seed; the others are left out, they are not finished."""
    found = {}
    for name in names:
        paths = [folder / f"{name}_seed_{seed}.json" for seed in seeds]
        if all(path.is_file() for path in paths):
            found[name] = [read_json(path) for path in paths]
    return found


def scores_of(records: Sequence[Record], cell: str) -> np.ndarray:
    """`[seeds, prompts]`"""
    return np.array([record["graded"][cell]["scores"] for record in records], float)


def domains_of(prompts: Prompts) -> dict[str, np.ndarray]:
    """Name -> which prompts; all of them first."""
    own = np.array([prompt["domain"] for prompt in prompts])
    masks = {POOLED: np.ones(len(prompts), bool)}
    return masks | {domain: own == domain for domain in sorted(set(own))}


def interval(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "differs": excludes_zero(estimate)}


def accuracy_difference(one: Sequence[Record], other: Sequence[Record], cell: str, prompts: Prompts) -> dict[str, Any]:
    """Paired by prompt and seed, for both domains together and each."""
    gaps_SP = scores_of(one, cell) - scores_of(other, cell)
    families = np.array([prompt["family"] for prompt in prompts])
    found = {}
    for domain, mask in domains_of(prompts).items():
        found[domain] = interval(crossed(gaps_SP[:, mask], list(families[mask])))
    return found


def own_difference(one: Sequence[Record], other: Sequence[Record], prompts: Prompts) -> dict[str, Any]:
    """Reverse KL an answer on the students' own samples, paired by prompt and seed."""
    ids = sorted(set.intersection(*({*record["own"]["ids"]} for record in (*one, *other))))
    family = {prompt["id"]: prompt["family"] for prompt in prompts}

    def sums(records: Sequence[Record]) -> np.ndarray:
        rows = [dict(zip(r["own"]["ids"], r["own"]["reverse_kl"], strict=True)) for r in records]
        return np.array([[row[key] for key in ids] for row in rows])

    return interval(crossed(sums(one) - sums(other), [family[key] for key in ids]))


def arm_facts(name: str, records: Sequence[Record], prompts: Prompts) -> dict[str, Any]:
    """Means over seeds, and each seed's own."""
    facts: dict[str, Any] = {"name": name, "seeds": [record["seed"] for record in records]}
    facts["accuracy"] = {}
    for cell in CELLS:
        scores = scores_of(records, cell)
        facts["accuracy"][cell] = {
            domain: {"mean": float(scores[:, mask].mean()), "by_seed": scores[:, mask].mean(1).tolist()}
            for domain, mask in domains_of(prompts).items()
        }
    for key in ("tokens", "repetition"):
        facts[key] = {cell: float(np.mean([r["graded"][cell][key] for r in records])) for cell in CELLS}
    facts["truncated"] = {cell: float(np.mean([r["graded"][cell]["truncated"] for r in records])) for cell in CELLS}
    if "own" in records[0]:
        own = [record["own"] for record in records]
        facts["own_samples"] = {
            "reverse_kl_an_answer": float(np.mean([np.mean(o["reverse_kl"]) for o in own])),
            "reverse_kl_a_token": float(np.mean([sum(o["reverse_kl"]) / sum(o["tokens"]) for o in own])),
            "tokens": float(np.mean([np.mean(o["tokens"]) for o in own])),
            "answers": [len(o["ids"]) for o in own],
        }
    if "heldout" in records[0]:
        facts["heldout"] = {m: float(np.mean([r["heldout"]["after"][m] for r in records])) for m in MEASURES}
        facts["cost"] = {key: float(np.mean([record["cost"][key] for record in records])) for key in records[0]["cost"]}
    return facts


def chosen(folder: Path, prompts: Prompts) -> list[dict[str, Any]]:
    """The candidates, the best first: by the mean accuracy over both ways of sampling, on the validation rows."""
    found = []
    for name, records in read_records(folder, [arm.name for arm in CANDIDATES], SEEDS[:1]).items():
        facts = arm_facts(name, records, prompts)
        mean = sum(facts["accuracy"][cell][POOLED]["mean"] for cell in CELLS) / len(CELLS)
        found.append({"name": name, "mean_accuracy": mean} | facts)
    return sorted(found, key=lambda facts: -facts["mean_accuracy"])


def write_report(folder: Path, families: dict[str, Prompts], path: Path) -> None:
    """recipes.json at `path`, recipes.md beside it.

    Raises:
        UserError: no arm of the table has all its seeds yet.
    """
    arms = read_records(folder / "records" / "table", [arm.name for arm in ARMS], SEEDS)
    models = read_records_of_models(folder / "records" / "table")
    if not arms:
        raise UserError(f"{folder}: no arm has a record of every seed yet; run `table` first")
    prompts = families["table"]
    about = {arm.name: arm.about for arm in ARMS}
    differences = []
    for name, records in arms.items():
        for other in AGAINST:
            if other != name and other in arms:
                found = {"arm": name, "against": other}
                found |= {cell: accuracy_difference(records, arms[other], cell, prompts) for cell in CELLS}
                differences.append(found | {"own_reverse_kl": own_difference(records, arms[other], prompts)})
    results = {
        "prompts": {domain: int(mask.sum()) for domain, mask in domains_of(prompts).items()},
        "families": len({prompt["family"] for prompt in prompts}),
        "seeds": list(SEEDS),
        "validation_prompts": len(families["choose"]),
        "chosen_among": chosen(folder / "records" / "choose", families["choose"]),
        "models": [arm_facts(name, [record], prompts) for name, record in models.items()],
        "arms": [{"about": about[name]} | arm_facts(name, records, prompts) for name, records in arms.items()],
        "settings": {name: records[0]["arm"] for name, records in arms.items()},
        "differences": differences,
        "commits": sorted({r["provenance"]["git_commit"] for records in arms.values() for r in records}),
        "provenance": provenance(),
    }
    write_json(path, results)
    write_text(path.with_suffix(".md"), markdown(results))
    print(markdown(results))


def read_records_of_models(folder: Path) -> dict[str, Record]:
    found = {}
    for name in ("base", "teacher"):
        if (folder / f"{name}.json").is_file():
            found[name] = read_json(folder / f"{name}.json")
    return found


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(found: dict[str, Any]) -> str:
    """`**+4.2** (1.0 to 7.4)`, bold where 0 is outside."""
    if found["low"] is None:
        return f"{100 * found['value']:+.1f}"
    value = f"{100 * found['value']:+.1f}"
    value = f"**{value}**" if found["differs"] else value
    return f"{value} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def nats(found: dict[str, Any]) -> str:
    value = f"{found['value']:+.2f}"
    value = f"**{value}**" if found["differs"] else value
    return value if found["low"] is None else f"{value} ({found['low']:.2f} to {found['high']:.2f})"


def markdown(results: dict[str, Any]) -> str:
    """The tables, for people."""
    lines = [
        "| recipe | greedy | T = 0.7 | KL | NLL | agreement | own reverse KL | tokens | repetition |",
        "|---" * 9 + "|",
    ]
    for facts in [*results["models"], *results["arms"]]:
        held, own = facts.get("heldout"), facts.get("own_samples")
        lines.append(
            f"| {facts.get('about', facts['name'])} | "
            + " | ".join(percent(facts["accuracy"][cell][POOLED]["mean"]) for cell in CELLS)
            + " | "
            + " | ".join(f"{held[m]:.3f}" if held else "" for m in MEASURES)
            + f" | {own['reverse_kl_an_answer']:.2f} | "
            if own
            else " | | "
        )
        lines[-1] += f"{facts['tokens']['T=0.7']:.0f} | {facts['repetition']['T=0.7']:.3f} |"
    lines += [
        "",
        "| recipe | against | greedy, points | T = 0.7, points | own reverse KL, nats an answer |",
        "|---" * 5 + "|",
    ]
    for found in results["differences"]:
        lines.append(
            f"| {found['arm']} | {found['against']} | {points(found['greedy'][POOLED])} | "
            f"{points(found['T=0.7'][POOLED])} | {nats(found['own_reverse_kl'])} |"
        )
    lines += ["", "| chosen among | greedy | T = 0.7 | mean |", "|---" * 4 + "|"]
    for facts in results["chosen_among"]:
        cells = [percent(facts["accuracy"][cell][POOLED]["mean"]) for cell in CELLS]
        lines.append(f"| {facts['name']} | {' | '.join(cells)} | {percent(facts['mean_accuracy'])} |")
    return "\n".join(lines) + "\n"
