"""recipes.json and recipes.md from the records of benchmarks/recipes.py: means over seeds, paired intervals, costs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.recipe_arms import ARMS, CANDIDATES, PAIRS, SEEDS, Pair
from src.distillation.kd import KDConfig
from src.evaluation.statistics import ALPHA, crossed, difference, holm
from src.utils.common import UserError, provenance

CELLS = ("greedy", "T=0.7")
MEASURES = ("kl_to_teacher", "nll", "top1_agreement")
POOLED = "both"  # domains
# README.zh-CN.md: what its tables say for an English word, the longer before those that they hold
CHINESE = {
    "right, greedy": "贪心解码正确率",
    "right, T = 0.7": "T = 0.7 正确率",
    "against SFT: greedy": "与 SFT 相比：贪心",
    "against SFT: T = 0.7": "与 SFT 相比：T = 0.7",
    "teacher tokens": "教师词元",
    "reverse KL": "反向 KL",
    "recipe": "训练方式",
    "student before": "训练前的学生",
    "teacher": "教师",
    "as sampled": "按采样分布",
    ", then ": "，然后 ",
    " to ": " 到 ",
}

Record = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """What was asked, and what came of it.

    prompts: `id, domain, family` of each, in the order of a record's answers.
    records: of one model each, an arm with one seed, or the bare student or the teacher.
    """

    prompts: list[dict[str, str]]
    records: list[Record]

    def of_arm(self, name: str, seeds: Sequence[int]) -> list[Record]:
        """An arm's records, one a seed; none where one is missing: the mean of fewer seeds is of other seeds."""
        by_seed = {record["seed"]: record for record in self.records if record["name"] == name}
        return [by_seed[seed] for seed in seeds] if by_seed.keys() >= set(seeds) else []

    def domains(self) -> dict[str, np.ndarray]:
        """Name -> which prompts; all of them first."""
        own = np.array([prompt["domain"] for prompt in self.prompts])
        # a mask over the prompts for each domain, beside one of all
        masks = {POOLED: np.ones(len(own), bool)}
        for domain in sorted(set(own)):
            masks[str(domain)] = own == domain
        return masks

    def families(self) -> np.ndarray:
        return np.array([prompt["family"] for prompt in self.prompts])


def right_SP(records: Sequence[Record], cell: str) -> np.ndarray:
    """`[seeds, prompts]`, 1 for a right answer."""
    return np.array([record["graded"][cell]["right"] for record in records], float)


def accuracy_difference(one: Sequence[Record], other: Sequence[Record], cell: str, phase: Phase) -> dict[str, Any]:
    """Domain -> one less the other, paired by prompt and seed."""
    # -1, 0 or 1: one's answer is right and the other's is not, or the other way round
    gaps_SP = right_SP(one, cell) - right_SP(other, cell)
    found = {}
    for domain, mask in phase.domains().items():
        found[domain] = asdict(crossed(gaps_SP[:, mask], phase.families()[mask].tolist()))
    return found


def own_differences(one: Sequence[Record], other: Sequence[Record], phase: Phase) -> dict[str, Any]:
    """Reverse KL on the students' own samples, an answer and a token, one less the other, paired by prompt and seed."""
    # answers that every record has: one that was cut before it said a word is not measured
    ids = sorted(set.intersection(*(set(record["own"]["ids"]) for record in (*one, *other))))
    family = {prompt["id"]: prompt["family"] for prompt in phase.prompts}

    # [seeds, answers], by id, for an arm's records may lack others
    def own_SP(records: Sequence[Record], key: str) -> np.ndarray:
        rows = []
        for record in records:
            by_id = dict(zip(record["own"]["ids"], record["own"][key], strict=True))
            rows.append([by_id[row_id] for row_id in ids])
        return np.array(rows, float)

    # of each arm what its answers cost in KL, and how long they are
    sums, tokens = ([own_SP(records, key) for records in (one, other)] for key in ("reverse_kl", "tokens"))
    ratios = [linearised(*both) for both in zip(sums, tokens, strict=True)]
    families = [family[row_id] for row_id in ids]
    return {
        "own_reverse_kl": asdict(crossed(sums[0] - sums[1], families)),
        "own_reverse_kl_a_token": asdict(crossed(ratios[0] - ratios[1], families)),
    }


def linearised(sums_SP: np.ndarray, tokens_SP: np.ndarray) -> np.ndarray:
    """`[seeds, answers]`: values whose mean is each seed's KL a token, sum / sum, and whose spread is that of this
    ratio (its first-order expansion, Cochran 1977, section 6.4), so that ratios can be compared like means."""
    ratio_S1 = sums_SP.sum(1, keepdims=True) / tokens_SP.sum(1, keepdims=True)
    return ratio_S1 + (sums_SP - ratio_S1 * tokens_SP) / tokens_SP.mean(1, keepdims=True)


def pairs() -> list[Pair]:
    """What is compared: every arm with all steps with SFT, and what the table was made to ask. Each pair once."""
    begun = {arm.after for arm in ARMS}
    whole = [arm for arm in ARMS if arm.name != "sft" and arm.name not in begun]
    return [Pair(arm.name, "sft", "recipe") for arm in whole] + PAIRS


def add_corrections(differences: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Holm's correction, `corrected_p`, over all pairs: of their accuracies over both domains, greedy and at T = 0.7
    together, and of either reverse KL by itself. What lies below is not tested.

    Returns:
        Measure -> how many tests were corrected for.
    """
    # two tests a pair, greedy and T = 0.7
    tests = {"accuracy": [found["accuracy"][cell][POOLED] for found in differences for cell in CELLS]}
    for name in ("own_reverse_kl", "own_reverse_kl_a_token"):
        tests[name] = [found[name] for found in differences]
    for family in tests.values():
        # in place: the same dictionaries stand in `differences`
        for test, p in zip(family, holm([test["p"] for test in family]), strict=True):
            test["corrected_p"] = p
    return {name: len(family) for name, family in tests.items()}


def accuracies(records: Sequence[Record], phase: Phase) -> dict[str, Any]:
    """Cell -> domain -> mean over seeds and prompts, and each seed's own."""
    found: dict[str, Any] = {}
    for cell in CELLS:
        right = right_SP(records, cell)
        found[cell] = {}
        for domain, mask in phase.domains().items():
            # [seeds, prompts] -> one number, and one a seed
            found[cell][domain] = {"mean": float(right[:, mask].mean()), "by_seed": right[:, mask].mean(1).tolist()}
    return found


def own_facts(records: Sequence[Record]) -> dict[str, float]:
    """Means over seeds on the students' own samples at T = 1; KL(student || teacher) in nats."""
    own = [record["own"] for record in records]
    return {
        # a mean over answers, each weighing alike
        "reverse_kl_an_answer": float(np.mean([np.mean(facts["reverse_kl"]) for facts in own])),
        # a mean over tokens: long answers weigh more
        "reverse_kl_a_token": float(np.mean([sum(facts["reverse_kl"]) / sum(facts["tokens"]) for facts in own])),
        "tokens": float(np.mean([np.mean(facts["tokens"]) for facts in own])),
        # an arm whose seeds differ in it is told by the fewest
        "answers": min(len(facts["ids"]) for facts in own),
    }


def facts_of(name: str, records: Sequence[Record], phase: Phase) -> dict[str, Any]:
    """All that the table says of an arm or a model."""
    facts: dict[str, Any] = {"name": name, "seeds": [record["seed"] for record in records]}
    # of any seed: they differ in nothing that is told here
    facts["made_of"] = {key: records[0]["made_of"][key] for key in ("arm", "after")}
    facts["accuracy"] = accuracies(records, phase)
    for key in ("tokens", "repetition", "truncated"):
        facts[key] = {cell: float(np.mean([record["graded"][cell][key] for record in records])) for cell in CELLS}
    # candidates have no own samples, models no held-out numbers and no cost
    if "own" in records[0]:
        facts["own_samples"] = own_facts(records)
    if "heldout" in records[0]:
        after = [record["heldout"] for record in records]
        facts["heldout"] = {measure: float(np.mean([row[measure] for row in after])) for measure in MEASURES}
        costs = [record["cost"] for record in records]
        facts["cost"] = {key: float(np.mean([cost[key] for cost in costs])) for key in costs[0]}
    return facts


def ranked_candidates(phase: Phase) -> list[dict[str, Any]]:
    """The best first, by the mean accuracy over both ways of sampling on the validation rows; with the interval of each
    one's distance from the best, over families of prompts: one seed says nothing about seeds."""
    found, means_P = [], {}
    for arm in CANDIDATES:
        records = phase.of_arm(arm.name, SEEDS[:1])
        if records:
            # [prompts]: 0, 0.5 or 1, the share of both ways of sampling that is right
            means_P[arm.about] = np.mean([right_SP(records, cell)[0] for cell in CELLS], axis=0)
            accuracy = {cell: float(right_SP(records, cell).mean()) for cell in CELLS}
            found.append({"name": arm.about, "settings": arm.settings, "accuracy": accuracy})
    # the order of `CANDIDATES` settles ties
    found.sort(key=lambda facts: -means_P[facts["name"]].mean())
    for facts in found:
        own, best = means_P[facts["name"]], means_P[found[0]["name"]]
        facts["mean_accuracy"] = float(own.mean())
        facts["less_than_best"] = difference(own, best, phase.families().tolist(), seed=0)._asdict()
    return found


def make_results(choosing: Phase, table: Phase) -> dict[str, Any]:
    """recipes.json.

    Raises:
        UserError: no arm of the table has all its seeds yet.
    """
    # 1. arms with all their seeds
    arms = {arm.name: table.of_arm(arm.name, SEEDS) for arm in ARMS}
    unfinished = [name for name, records in arms.items() if not records]
    arms = {name: records for name, records in arms.items() if records}
    if not arms:
        raise UserError("no arm has a record of every seed yet; run `table` first")
    # 2. the pairs, as far as both are there
    differences = []
    for pair in pairs():
        if pair.arm in arms and pair.against in arms:
            both = arms[pair.arm], arms[pair.against]
            cells = {cell: accuracy_difference(*both, cell, table) for cell in CELLS}
            differences.append({**asdict(pair), "accuracy": cells, **own_differences(*both, table)})
    tests = add_corrections(differences)
    # 3. what the tables are made of
    about = {arm.name: arm.about for arm in ARMS} | ABOUT_MODELS
    models = {record["name"]: [record] for record in table.records if record["name"] in ABOUT_MODELS}
    used = [record["provenance"] for phase in (choosing, table) for record in phase.records]
    return {
        "prompts": {domain: int(mask.sum()) for domain, mask in table.domains().items()},
        "families": len(set(table.families())),
        "seeds": list(SEEDS),
        "validation_prompts": len(choosing.prompts),
        "unfinished": unfinished,
        "candidates": ranked_candidates(choosing),
        "models": [
            {"about": about[name]} | facts_of(name, models[name], table) for name in ABOUT_MODELS if name in models
        ],
        "arms": [{"about": about[name]} | facts_of(name, records, table) for name, records in arms.items()],
        "differences": differences,
        "tests": tests,
        "commits": sorted({made["git_commit"] for made in used}),
        "changed_files": any(made["git_dirty"] for made in used),
        "provenance": provenance(),
    }


ABOUT_MODELS = {"base": "student before", "teacher": "teacher"}


def signed(found: dict[str, Any], scale: float, digits: int) -> str:
    """`**+4.2** (1.0 to 7.4)`, bold where it holds after correction."""
    value = f"{scale * found['value']:+.{digits}f}"
    # a difference that is not among those corrected is never bold
    value = f"**{value}**" if found.get("corrected_p", 1.0) <= ALPHA else value
    # one seed or one family has no interval
    if found["low"] is None:
        return value
    return f"{value} ({scale * found['low']:.{digits}f} to {scale * found['high']:.{digits}f})"


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def heading(*names: str) -> list[str]:
    return [row(names), "|" + "---|" * len(names)]


def what_was_asked(results: dict[str, Any]) -> list[str]:
    """One line above the tables: n, seeds, and what is not there."""
    prompts = ", ".join(f"{count} of {domain}" for domain, count in results["prompts"].items() if domain != POOLED)
    seeds = ", ".join(map(str, results["seeds"]))
    line = (
        f"{results['prompts'][POOLED]} prompts ({prompts}) in {results['families']} families; training seeds {seeds}."
    )
    if results["unfinished"]:
        line += f" Not finished, and left out: {', '.join(results['unfinished'])}."
    return [line]


def settings_table(results: dict[str, Any]) -> list[str]:
    """What each arm sets, of what the tables' names do not say."""
    lines = heading("recipe", "divergence", "T", "alpha", "target", "f", "steps", "begins with")
    defaults = {name: getattr(KDConfig(), name) for name in ("divergence", "temperature", "alpha")}
    for facts in results["arms"]:
        arm, after = facts["made_of"]["arm"], facts["made_of"]["after"]
        settings = defaults | arm["settings"]
        cells = [facts["about"], "", "", "0", "", "", f"{arm['steps']}", ""]
        # alpha = 0 has no divergence, and so no temperature and no target
        if settings["alpha"]:
            target = "as sampled" if "teacher_temperature" in settings else "softmax at T"
            cells[1:5] = [
                settings["divergence"],
                f"{settings['temperature']:g}",
                f"{settings['alpha']:g}",
                target,
            ]
        if "on_policy_fraction" in settings:
            cells[5] = f"{settings['on_policy_fraction']:g}"
        if after:
            cells[7] = after["about"]
        lines.append(row(cells))
    return lines


def accuracy_table(results: dict[str, Any]) -> list[str]:
    """Every model and arm: right answers (%), closeness, and what the answers look like at T = 0.7."""
    names = ("greedy", "T = 0.7", "KL", "NLL", "agreement", "reverse KL, an answer", "a token", "tokens", "repeated")
    lines = heading("recipe", *names)
    for facts in [*results["models"], *results["arms"]]:
        held, own = facts.get("heldout"), facts["own_samples"]
        cells = [facts["about"]]
        for cell in CELLS:
            cells.append(f"{100 * facts['accuracy'][cell][POOLED]['mean']:.1f}")
        for measure in MEASURES:
            cells.append(f"{held[measure]:.3f}" if held else "")
        cells += [f"{own['reverse_kl_an_answer']:.2f}", f"{own['reverse_kl_a_token']:.3f}"]
        cells += [f"{facts['tokens']['T=0.7']:.0f}", f"{100 * facts['repetition']['T=0.7']:.1f} %"]
        lines.append(row(cells))
    return lines


def difference_table(results: dict[str, Any]) -> list[str]:
    about = {facts["name"]: facts["about"] for facts in results["arms"]}
    names = ("greedy, points", "T = 0.7, points", "reverse KL, nats an answer", "a token")
    lines = heading("recipe", "against", "differ in", *names)
    for found in results["differences"]:
        cells = [about[found["arm"]], about[found["against"]], found["differ"]]
        cells += [signed(found["accuracy"][cell][POOLED], 100, 1) for cell in CELLS]
        cells += [signed(found["own_reverse_kl"], 1, 2), signed(found["own_reverse_kl_a_token"], 1, 3)]
        lines.append(row(cells))
    return lines


def domain_table(results: dict[str, Any]) -> list[str]:
    domains = [domain for domain in results["prompts"] if domain != POOLED]
    lines = heading("recipe", *(f"{domain}, {cell}" for domain in domains for cell in CELLS))
    for facts in [*results["models"], *results["arms"]]:
        # two columns a domain: greedy and T = 0.7
        cells = [facts["about"]]
        for domain in domains:
            for cell in CELLS:
                found = facts["accuracy"][cell][domain]
                # "44.1 (46, 43, 43)": the mean, and each seed's own
                spread = ", ".join(f"{100 * share:.0f}" for share in found["by_seed"])
                cells.append(f"{100 * found['mean']:.1f}" + (f" ({spread})" if len(found["by_seed"]) > 1 else ""))
        lines.append(row(cells))
    return lines


COSTS = {
    "student_tokens_trained": "student trains on",
    "student_tokens_written": "student writes",
    "teacher_tokens_written": "teacher wrote of what is learned",
    "teacher_tokens_read_of_own": "teacher reads of the student's",
}


def cost_table(results: dict[str, Any]) -> list[str]:
    """In thousands of tokens."""
    lines = heading("recipe, thousands of tokens", *COSTS.values())
    for facts in results["arms"]:
        lines.append(row([facts["about"], *(f"{facts['cost'][name] / 1000:.1f}" for name in COSTS)]))
    return lines


def candidate_table(results: dict[str, Any]) -> list[str]:
    lines = heading("candidate", "greedy", "T = 0.7", "mean", "less than the best, points")
    for facts in results["candidates"]:
        cells = [f"{100 * facts['accuracy'][cell]:.1f}" for cell in CELLS]
        cells += [f"{100 * facts['mean_accuracy']:.1f}", signed(facts["less_than_best"], 100, 1)]
        lines.append(row([facts["name"], *cells]))
    return lines


def summary_table(results: dict[str, Any]) -> list[str]:
    """The README's: the arms with all steps, and how each differs from SFT."""
    names = ("right, greedy", "right, T = 0.7", "against SFT: greedy", "against SFT: T = 0.7", "KL", "reverse KL")
    lines = heading("recipe", *names, "teacher tokens")
    # what each arm gains over the control
    against_sft = {found["arm"]: found for found in results["differences"] if found["against"] == "sft"}
    # arms that are only the beginning of others have half of the steps
    begun = {facts["made_of"]["after"]["name"] for facts in results["arms"] if facts["made_of"]["after"]}
    for facts in [*results["models"], *results["arms"]]:
        if facts["name"] in begun:
            continue
        cells = [facts["about"]]
        cells += [f"{100 * facts['accuracy'][cell][POOLED]['mean']:.1f} %" for cell in CELLS]
        found = against_sft.get(facts["name"])
        cells += [signed(found["accuracy"][cell][POOLED], 100, 1) if found else "" for cell in CELLS]
        cells.append(f"{facts['heldout']['kl_to_teacher']:.2f}" if "heldout" in facts else "")
        cells.append(f"{facts['own_samples']['reverse_kl_a_token']:.2f}")
        cells.append(f"{teacher_tokens(facts['cost']) / 1000:.0f} k" if "cost" in facts else "")
        lines.append(row(cells))
    return lines


def teacher_tokens(cost: dict[str, float]) -> float:
    """What the teacher wrote of what is learned from, and what it read of the student's."""
    return cost["teacher_tokens_written"] + cost["teacher_tokens_read_of_own"]


TABLES = {
    "summary": summary_table,
    "settings": settings_table,
    "asked": what_was_asked,
    "accuracy": accuracy_table,
    "differences": difference_table,
    "domains": domain_table,
    "cost": cost_table,
    "candidates": candidate_table,
}


def markdown(results: dict[str, Any]) -> str:
    """All tables, each between marks by which a page that quotes it can be brought up to date."""
    return "\n\n".join(marked(name, results) for name in TABLES) + "\n"


def marked(name: str, results: dict[str, Any], words: Mapping[str, str] | None = None) -> str:
    lines = "\n".join(TABLES[name](results))
    # one after the other, so that a word may hold what a later one replaces
    for english, other in (words or {}).items():
        lines = lines.replace(english, other)
    return f"<!-- recipes: {name} -->\n\n{lines}\n\n<!-- /recipes: {name} -->"


def brought_up_to_date(page: str, results: dict[str, Any], words: Mapping[str, str] | None = None) -> str:
    """A page with the tables that it has between marks replaced by what `results` says.

    Args:
        words: English -> what the page says for it, one after the other.
    """
    for name in TABLES:
        # <!-- recipes: asked --> anything <!-- /recipes: asked -->
        found = re.search(f"<!-- recipes: {name} -->.*?<!-- /recipes: {name} -->", page, re.DOTALL)
        if found:
            page = page.replace(found[0], marked(name, results, words))
    return page
