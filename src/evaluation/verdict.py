"""What the numbers of results.json show, in words: accuracy, then closeness, then distillation against SFT.

Accuracy on graded answers and closeness to the teacher are two questions; no sentence draws on one for the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NAMES = {"base": "student before", "sft": "SFT control", "kd": "distilled", "teacher": "teacher"}
WHO = {
    "base": "the student before training",
    "sft": "the SFT control",
    "kd": "the distilled student",
    "teacher": "the teacher",
}
# in the order in which they are told
DECISIONS = {
    "better": "better",
    "worse": "worse",
    "not shown": "no difference shown",
    "withheld": "withheld: cut answers would turn it",
}
RULE = (
    "Won and lost: prompts with more, or fewer, right answers than the other arm. p: exact paired sign-flip test over "
    "families of related prompts; where a family is one prompt with one answer it is McNemar's exact test. p (Holm): "
    "corrected over the comparisons of one pair of arms that could differ. A comparison is better or worse where "
    "p (Holm) is at most 0.05 and the interval excludes 0. Could show: the smallest difference that this test, "
    "corrected, finds with 80 % power. Cut: answers that reached the token limit; they count as wrong, and the "
    "decision is withheld where it would turn if all of them counted as right."
)
NO_CONTROL = "no control: nothing is shown about distillation itself"
NOT_GRADED = "No answers were graded: nothing is said about accuracy."
NOT_HELD_OUT = "Closeness to the teacher on held-out text was not measured."
NO_STUDENT = "No distilled student was evaluated."
PREFERRED_PRESET = "recommended"

Entry = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The sampling that the headline is about."""

    preset: str
    temperature: float

    def holds(self, entry: Entry) -> bool:
        return (entry["preset"], entry["temperature"]) == (self.preset, self.temperature)


def headline_setting(results: dict[str, Any]) -> Setting | None:
    """The lowest temperature of the preset `recommended`, else of the first preset; None where nothing was graded."""
    if "graded" not in results:
        return None
    # where no domain can be pooled, single ones
    scores = results["graded"]["overall"]["scores"] or results["graded"]["scores"]
    presets = [score["preset"] for score in scores]
    preset = PREFERRED_PRESET if PREFERRED_PRESET in presets else presets[0]
    return Setting(preset, min(score["temperature"] for score in scores if score["preset"] == preset))


def overall_scores(results: dict[str, Any]) -> dict[str, Entry]:
    """The pooled score of every arm at the headline's setting."""
    setting = headline_setting(results)
    scores = results["graded"]["overall"]["scores"] if setting else []
    return {score["arm"]: score for score in scores if setting.holds(score) and score["accuracy"] is not None}


def pooled_first(graded: dict[str, Any], kind: str) -> list[Entry]:
    """The `scores` or `comparisons`, those over several domains before those of single ones."""
    overall = graded["overall"]
    return (overall[kind] if len(overall["domains"]) > 1 else []) + graded[kind]


def _overall_comparison(results: dict[str, Any], against: str) -> Entry | None:
    # at the headline's sampling, over all domains that teach something
    setting = headline_setting(results)
    for entry in results["graded"]["overall"]["comparisons"] if setting else ():
        if (entry["a"], entry["b"]) == ("kd", against) and setting.holds(entry):
            return entry
    return None


def _heldout_difference(results: dict[str, Any], against: str) -> Entry | None:
    """The paired difference in KL to the teacher between the distilled student and another arm."""
    for entry in results.get("heldout", {}).get("differences", []):
        if (entry["a"], entry["b"], entry["metric"]) == ("kd", against, "kl_to_teacher"):
            return entry
    return None


def _number(value: float, decimals: int) -> str:
    """With a minus sign that is one, and no sign on a zero."""
    # -0.4 with no decimals is "-0": the sign goes; -3 is "−3"
    text = f"{value:.{decimals}f}"
    return f"{0:.{decimals}f}" if float(text) == 0 else text.replace("-", "−")


def _points(share: float) -> str:
    """Whole points; below one point a decimal, so that an end of an interval beside 0 does not read as 0."""
    # 0.123 -> "12", 0.004 -> "0.4", -0.05 -> "−5"
    return _number(100 * share, 1 if 0 < abs(share) < 0.01 else 0)


def _nats(value: float) -> str:
    """Two decimals; below 0.1 two digits, so that a small KL does not read as 0."""
    # 0.673 -> "0.67", 0.0512 -> "0.051"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _interval(interval: Sequence[float] | None, flip: bool = False) -> str:
    """In points; flipped where the words already say that it is a loss."""
    if interval is None:
        return "no interval"
    # of a loss, [-0.12, -0.03] reads 3 to 12
    low, high = (-interval[1], -interval[0]) if flip else interval
    return f"95 % interval {_points(low)} to {_points(high)}"


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _joined(words: Sequence[str]) -> str:
    # ["a", "b", "c"] -> "a, b and c"; ["a"] -> "a"
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _left_out(results: dict[str, Any]) -> str:
    return "; ".join(f"{domain} ({why})" for domain, why in results["graded"]["overall"]["left_out"].items())


def _is_counted(scores: dict[str, Entry]) -> bool:
    """Whether 'N of M questions' is exact: one answer a question, and the same questions for every arm."""
    return len({score["prompts"] for score in scores.values()} | {score["answers"] for score in scores.values()}) == 1


def _right(score: Entry, counted: bool) -> str:
    return str(score["outcomes"]["correct"]) if counted else f"{_number(100 * score['accuracy'], 1)} %"


def _accuracies(scores: dict[str, Entry]) -> str:
    """How much each arm has right, the distilled student first where it is there."""
    # "the distilled student answers 31 of 50 questions right, 22 before training, its teacher 41"; where not counted:
    # "... has 58.5 % of 200 answers to 50 questions right, 42.0 % before training, its teacher 79.5 %"
    counted = _is_counted(scores)
    first = "kd" if "kd" in scores else next(iter(scores))
    score = scores[first]
    of = f"{score['outcomes']['correct']} of {_plural(score['prompts'], 'question')}"
    if not counted:
        of = f"{_right(score, False)} of {score['answers']} answers to {_plural(score['prompts'], 'question')}"
    said = [f"{WHO[first]} {'answers' if counted else 'has'} {of} right"]
    if first != "base" and "base" in scores:
        said.append(f"{_right(scores['base'], counted)} before training")
    if first != "teacher" and "teacher" in scores:
        said.append(f"its teacher {_right(scores['teacher'], counted)}")
    return ", ".join(said)


def _undecided(entry: Entry) -> str:
    """A difference that is not shown: its size, and how far the test is from showing it."""
    # "4 points higher, 95 % interval −2 to 10, corrected p = 0.21"
    way = "higher" if entry["difference"] > 0 else "lower"
    corrected = "corrected p" if entry["corrected_over"] > 1 else "p"
    size = f"{_points(abs(entry['difference']))} points {way}" if entry["difference"] else "0 points"
    return f"{size}, {_interval(entry['interval'])}, {corrected} = {entry['p_holm']:.2g}"


def _decided(entry: Entry) -> str:
    """What may be said of the distilled student's accuracy against before training."""
    flip = entry["decision"] == "worse"  # a loss is told by its size: signs turn, ends change places
    size = f"{_points(abs(entry['difference']))} points ({_interval(entry['interval'], flip)})"
    # one cell alone needs none
    holds = "holds after correction" if entry["corrected_over"] > 1 else "the exact test confirms"
    if entry["decision"] in ("better", "worse"):
        return f"a {'loss' if flip else 'gain'} of {size} that {holds}"
    if entry["decision"] == "withheld":
        ours, theirs = entry["cut"]
        return (
            f"whether that is a gain is withheld, because {ours} of its answers and {theirs} from before training were "
            "cut at the token limit, and the decision would turn if they counted as right"
        )
    # no signs of the differences could have given p <= 0.05
    if not entry["could_differ"]:
        why = "too few answers differ" if entry["won"] or entry["lost"] else "no question is answered differently"
        return f"no gain can be shown, because {why}"
    return f"no difference is shown ({_undecided(entry)})"


def headline(results: dict[str, Any]) -> str:
    """Accuracy, in one sentence."""
    missing = "" if "kd" in results["arms"] else f"{NO_STUDENT} "
    if "graded" not in results:
        return f"{missing}{NOT_GRADED}"
    scores, setting = overall_scores(results), headline_setting(results)
    if not scores:
        left_out = _left_out(results)
        return f"{missing}Nothing can be said about accuracy{f'; left out: {left_out}' if left_out else ''}."
    said = f"{missing}At temperature {setting.temperature:g} {_accuracies(scores)}"
    if "kd" not in scores:
        return f"{said}."
    if "base" not in scores:
        return f"{said}; the student before training was not evaluated, so no gain can be told."
    entry = _overall_comparison(results, "base")
    return f"{said}: {_decided(entry)}." if entry else f"{said}; the two answered no question in common."


def bound_note(held: dict[str, Any]) -> str:
    """How to read measures against a teacher of which only the top tokens are known; empty where they are exact."""
    if held["kl_is"] == "exact":
        return ""
    return (
        f"Every KL to the teacher is a {held['kl_is']}, every expected acceptance a {held['expected_acceptance_is']}, "
        "because its server says no more; NLL and top-1 agreement are exact. Compare neither with values that are "
        "exact or of another top."
    )


def closeness(results: dict[str, Any]) -> str:
    """Closeness to the teacher on held-out text, in one sentence; empty where there is no distilled student."""
    if "kd" not in results["arms"]:
        return ""
    held = results.get("heldout", {})
    arms = held.get("arms", {})
    if "kd" not in arms:
        return NOT_HELD_OUT
    # a KL and an acceptance known from the top tokens alone are lower bounds
    least = "at least " if bound_note(held) else ""
    accepted = {arm: f"{least}{100 * own['expected_acceptance']:.0f}" for arm, own in arms.items()}
    kl = {arm: f"{least}{_nats(own['kl_to_teacher'])}" for arm, own in arms.items()}
    said = f"Of 100 tokens of the distilled student its teacher would accept {accepted['kd']}"
    if "base" not in arms:
        return f"{said} (KL to the teacher {kl['kd']} nats per token)."
    said += f", {accepted['base']} before training (KL to the teacher {kl['kd']} nats per token, {kl['base']} before)"
    entry = _heldout_difference(results, "base")
    if not entry["real"]:
        return f"{said}; no difference from before is shown."
    return f"{said}: it is {'closer to' if entry['difference'] < 0 else 'farther from'} its teacher than before."


def _win(entry: Entry) -> str:
    """Who wins a decided comparison with SFT, and by how much."""
    # the interval is of kd - sft: turned where SFT wins
    winner, flip = ("distilled", False) if entry["decision"] == "better" else ("SFT", True)
    size = f"{_points(abs(entry['difference']))} points ({_interval(entry['interval'], flip)})"
    return f"{winner} wins, by {size}"


def _elsewhere(results: dict[str, Any], here: str) -> str:
    """What is decided against SFT at other samplings than the headline's, other than `here`; empty where nothing is."""
    setting, said = headline_setting(results), []
    for entry in results["graded"]["overall"]["comparisons"]:
        # what says the same as the headline's sampling need not be said again
        decided = (entry["a"], entry["b"]) == ("kd", "sft") and entry["decision"] in ("better", "worse")
        if decided and entry["decision"] != here and not setting.holds(entry):
            preset = "" if entry["preset"] == setting.preset else f", {entry['preset']} sampling,"
            said.append(f", at temperature {entry['temperature']:g}{preset} {_win(entry)}")
    return "".join(said)


def _accuracy_against_sft(results: dict[str, Any]) -> str:
    entry = _overall_comparison(results, "sft")
    if entry is None:
        return "accuracy was not compared"
    at = f" at temperature {headline_setting(results).temperature:g}"
    elsewhere = _elsewhere(results, entry["decision"])
    if entry["decision"] in ("better", "worse"):
        return f"in accuracy{at} {_win(entry)}{elsewhere}"
    if entry["decision"] == "withheld":
        return f"in accuracy{at} the decision is withheld, because cut answers would turn it{elsewhere}"
    if not entry["could_differ"]:
        return f"in accuracy{at} too few answers differ to show a winner{elsewhere}"
    return f"in accuracy{at} neither is shown to win (distilled {_undecided(entry)}){elsewhere}"


def _closeness_against_sft(results: dict[str, Any]) -> str:
    entry = _heldout_difference(results, "sft")
    if entry is None:
        return "closeness was not compared"
    if not entry["real"]:
        return "in closeness to the teacher neither is shown to win"
    # a real difference has both ends on one side of 0: [-0.31, -0.12] -> 0.12, 0.31
    ends = sorted(abs(end) for end in entry["interval"])
    size = f"{_nats(abs(entry['difference']))} nats per token (95 % interval {_nats(ends[0])} to {_nats(ends[1])})"
    winner = "distilled" if entry["difference"] < 0 else "SFT"
    known = "its KL, as far as it is known," if bound_note(results["heldout"]) else "its KL"
    return f"in closeness to the teacher {winner} wins, {known} lower by {size}"


def against_sft(results: dict[str, Any]) -> str:
    """Whether distillation beats training on the same answers, in accuracy and in closeness: two things."""
    if "kd" not in results["arms"]:
        return ""
    if "sft" not in results["arms"]:
        return f"{NO_CONTROL[0].upper()}{NO_CONTROL[1:]}."  # a sentence of its own: capital and full stop
    return f"Distilled against SFT: {_accuracy_against_sft(results)}; {_closeness_against_sft(results)}."


def _places(entries: Sequence[Entry]) -> str:
    """Domain and temperatures of every entry, a domain once; the preset is named where there are several."""
    # "maths at T = 0.1, 0.7; code at T = 0.1"; with several presets "maths (raw) at T = 0.1"
    presets = {entry["preset"] for entry in entries}
    found: dict[str, set[float]] = {}
    for entry in entries:
        name = f"{entry['domain']} ({entry['preset']})" if len(presets) > 1 else entry["domain"]
        found.setdefault(name, set()).add(entry["temperature"])
    parts = []
    for name, at in found.items():
        temperatures = ", ".join(f"{t:g}" for t in sorted(at))
        parts.append(f"{name} at T = {temperatures}")
    return "; ".join(parts)


def is_idle(entry: Entry) -> bool:
    """Whether no outcome of a comparison's test could reach 0.05, were cut answers right or wrong."""
    return not entry["could_differ"] and entry["decision"] == "not shown"


def could_show_nothing(comparisons: Sequence[Entry]) -> str:
    """The one line for all idle comparisons; empty without any."""
    idle = [entry for entry in comparisons if is_idle(entry)]
    if not idle:
        return ""
    # where all comparisons are idle, there is nothing that these come on top of
    further = "further " if len(idle) < len(comparisons) else ""
    return (
        f"{_plural(len(idle), f'{further}comparison')} could show nothing: no or too few answers differ "
        f"({_places(idle)})."
    )


def _domain_sentence(results: dict[str, Any], against: str, other: str) -> str:
    """Where, among the domains and samplings, a difference from another arm is shown."""
    comparisons = results.get("graded", {}).get("comparisons", [])
    entries = [c for c in comparisons if (c["a"], c["b"]) == ("kd", against) and not is_idle(c)]
    if not entries:
        return ""
    said = []
    for decision, words in DECISIONS.items():
        if found := [entry for entry in entries if entry["decision"] == decision]:
            # "withheld: cut answers would turn it" -> "Withheld"
            said.append(f"{words[0].upper()}{words[1:].partition(':')[0]}: {_places(found)}.")
    return f"Against {other}, by domain. {' '.join(said)}"


def cut_rate(graded: dict[str, Any]) -> str:
    share = _number(100 * graded["cap_hit_rate"], 1)
    return f"{share} % of all answers were cut at the token limit; they count as wrong."


def particulars(results: dict[str, Any]) -> list[str]:
    """What the first three sentences leave out: single domains, what is missing, and why."""
    said = [_domain_sentence(results, "base", "before training"), _domain_sentence(results, "sft", "SFT")]
    if graded := results.get("graded"):
        pooled, left_out = graded["overall"]["domains"], _left_out(results)
        # one domain of one needs no words: the headline is about it
        if len(pooled) > 1 or (pooled and left_out):
            said.append(f"The headline is about {_joined(pooled)}{f'; left out: {left_out}' if left_out else ''}.")
        said.append(cut_rate(graded))
    said += [f"The arm {arm} is missing: {why}." for arm, why in results["missing_arms"].items()]
    if {"kd", "sft"} <= results["arms"].keys():
        said.append("One training seed an arm: a claim that distillation beats SFT needs several.")
    return [sentence for sentence in said if sentence]


def sentences(results: dict[str, Any]) -> list[str]:
    """The whole verdict, from the headline to the particulars."""
    said = [headline(results), closeness(results), against_sft(results), *particulars(results)]
    if graded := results.get("graded"):
        said.append(could_show_nothing(pooled_first(graded, "comparisons")))
    return [sentence for sentence in said if sentence]
