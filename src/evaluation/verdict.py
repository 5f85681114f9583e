"""What the numbers of results.json show, in words: one sentence for everybody, then the particulars."""

from typing import Any

NAMES = {"base": "student before", "sft": "SFT control", "kd": "distilled", "teacher": "teacher"}
DECISIONS = {
    "better": "better",
    "worse": "worse",
    "not shown": "no difference shown",
    "withheld": "withheld: cut answers would turn it",
}
RULE = (
    "Won and lost: prompts with more, or fewer, right answers than the other arm. p: exact McNemar test of these two "
    "counts; p (Holm): corrected over the cells of one comparison. A cell is better or worse where p (Holm) is at most "
    "0.05 and the interval excludes 0. Could show: the smallest difference that this test, corrected, finds with 80 % "
    "power among this number of prompts and answers. Cut: answers that reached the token limit; they count as wrong, "
    "and the decision is withheld where it would turn if all of them counted as right."
)
NO_CONTROL = "no control: nothing is shown about distillation itself"
AGAINST = (("base", "the untrained student"), ("sft", "its SFT control (same rows, same steps)"))

Entry = dict[str, Any]


def _heldout(results: dict[str, Any], against: str) -> Entry | None:
    """The paired difference in KL to the teacher between the distilled student and another arm."""
    for entry in results.get("heldout", {}).get("differences", []):
        if (entry["a"], entry["b"], entry["metric"]) == ("kd", against, "kl_to_teacher"):
            return entry
    return None


def _graded(results: dict[str, Any], against: str) -> list[Entry]:
    comparisons = results.get("graded", {}).get("comparisons", [])
    return [c for c in comparisons if (c["a"], c["b"]) == ("kd", against)]


def _way(entry: Entry) -> str:
    return "no measurable difference" if not entry["real"] else "closer" if entry["difference"] < 0 else "farther"


def _count(entries: list[Entry], decision: str) -> int:
    return sum(entry["decision"] == decision for entry in entries)


def _cells(number: int) -> str:
    return f"{number} cell{'' if number == 1 else 's'}"


def headline(results: dict[str, Any]) -> str:
    """One sentence without a technical term."""
    if "kd" not in results["arms"]:
        return "No distilled student was evaluated."
    parts = []
    if base := _heldout(results, "base"):
        parts.append({
            "closer": "distillation brought the student closer to its teacher",
            "farther": "distillation took the student away from its teacher",
        }.get(_way(base), "whether distillation brought the student closer to its teacher cannot be told"))  # fmt: skip
        if control := _heldout(results, "sft"):
            parts[-1] += {
                "closer": ", closer than training on the same answers alone does",
                "farther": ", though training on the same answers alone brings it closer",
            }.get(_way(control), ", not measurably closer or farther than training on the same answers alone")
    if graded := _graded(results, "base"):
        better, worse, held = (_count(graded, decision) for decision in ("better", "worse", "withheld"))
        questions = sum({c["domain"]: c["prompts"] for c in graded}.values())
        if better or worse:
            gained = [f"in {better}"] * bool(better) + [f"fewer in {worse}"] * bool(worse and better)
            parts.append(
                f"it answers {'more' if better else 'fewer'} questions correctly than before "
                f"{' and '.join(gained or [f'in {worse}'])} of {len(graded)} combinations of task and temperature"
            )
        elif held == len(graded):
            parts.append("too many answers were cut short to say whether it answers more questions correctly")
        else:
            parts.append(
                f"whether it answers more questions correctly than before, {questions} questions were too few to show"
            )
    if not parts:
        return "Nothing was measured that the distilled student could be compared by."
    if "sft" in results["missing_arms"]:
        parts.append("without a control run nobody can say how much of this is due to distillation itself")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _graded_sentences(results: dict[str, Any], against: str, words: str) -> list[str]:
    graded = _graded(results, against)
    if not graded:
        return []
    other = words.partition(" (")[0]
    better, worse, held = (_count(graded, decision) for decision in ("better", "worse", "withheld"))
    counts = [f"{better} better", f"{worse} worse", f"{len(graded) - better - worse - held} without a difference shown"]
    counts += [f"{held} withheld because answers that were cut would turn them"] if held else []
    said = [
        f"On graded answers against {words}, of {_cells(len(graded))} of task, sampling and temperature: "
        f"{', '.join(counts)} (exact McNemar, Holm over the {len(graded)})."
    ]
    for decision in ("better", "worse"):
        if found := [c for c in graded if c["decision"] == decision]:
            where: dict[str, list[str]] = {}
            for c in found:
                where.setdefault(f"{c['domain']} ({c['preset']})", []).append(f"{c['temperature']:g}")
            cells = "; ".join(f"{name} at T = {', '.join(at)}" for name, at in where.items())
            sizes = sorted((c["difference"] for c in found), key=abs)
            by = f"{sizes[0]:+.1%}" if len(sizes) == 1 else f"{sizes[0]:+.1%} to {sizes[-1]:+.1%}"
            said.append(f"{decision.capitalize()} than {other}, by {by}: {cells}.")
    able = [c["minimum_detectable"] for c in graded if c["minimum_detectable"] is not None]
    if able:
        least = " to ".join(dict.fromkeys(f"{end:.0%}" for end in (min(able), max(able))))
        said.append(f"The smallest difference from {other} that a cell could have shown with 80 % power: {least}.")
    if len(able) < len(graded):
        few = _cells(len(graded) - len(able))
        said.append(f"Against {other}, {few} had too few prompts to show a difference of any size.")
    return said


def sentences(results: dict[str, Any]) -> list[str]:
    """The headline and what it rests on; missing arms and measures and answers that were not executed are named."""
    parts = [headline(results)]
    for against, words in AGAINST:
        if (found := _heldout(results, against)) and found["interval"]:
            low, high = found["interval"]
            parts.append(
                f"On held-out teacher text the distilled student against {words}: {_way(found)} (KL to the teacher "
                f"{found['difference']:+.3f} nats per token, 95 % interval {low:+.3f} to {high:+.3f})."
            )
    for against, words in AGAINST:
        parts += _graded_sentences(results, against, words)
    if graded := results.get("graded"):
        parts.append(f"{graded['cap_hit_rate']:.1%} of all answers were cut at the token limit.")
        unjudged = sorted({score["domain"] for score in graded["scores"] if score["outcomes"]["not_executed"]})
        if unjudged:
            parts.append(f"Not executed, and so without accuracy: answers of {', '.join(unjudged)}.")
    else:
        parts.append("No answers were graded.")
    if "heldout" not in results:
        parts.append("Closeness to the teacher on held-out text was not measured.")
    parts += [f"The arm {arm} is missing: {why}." for arm, why in results["missing_arms"].items()]
    if "sft" in results["missing_arms"]:
        parts.append(f"{NO_CONTROL[0].upper()}{NO_CONTROL[1:]}.")
    elif "kd" in results["arms"]:
        parts.append("One training seed an arm: a claim that distillation beats SFT needs several.")
    return parts
