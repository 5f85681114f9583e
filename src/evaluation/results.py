"""results.json: every number of an evaluation, made from heldout.jsonl, samples.jsonl and the runs' own files."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.distillation.heldout import (
    EXACT,
    POSITIONS,
    SUMS,
    summarise,
    summarise_teacher,
    tokens_by_position,
    what_acceptance_is,
)
from src.evaluation.results_schema import (
    ARMS,
    METRICS,
    PAIRS,
    SCHEMA_VERSION,
    Arm,
    ByPosition,
    Comparison,
    Decision,
    Graded,
    GradedRecovered,
    Heldout,
    HeldoutDifference,
    HeldoutRecovered,
    Overall,
    Recovered,
    Results,
    Score,
)
from src.evaluation.statistics import (
    ALPHA,
    Estimate,
    Sums,
    by_family,
    difference,
    discordant,
    estimate,
    excludes_zero,
    holm,
    majority,
    minimum_detectable,
    pass_at_k,
    proportion,
    resample,
    sign_flip,
    smallest_p,
)
from src.evaluation.verdict import headline, sentences
from src.grading.rows import OUTCOMES
from src.utils.common import UserError, read_json, read_jsonl

CURVES = ("loss", "kd_loss", "ce_loss", *(f"validation_{name}" for name in METRICS))
CONTEXT = ("arms", "missing_arms", "training", "curves", "settings", "provenance")
TOGETHER = "all"  # the domain of cells in which domains are pooled

Row = dict[str, Any]
Prompts = dict[str, list[Row]]  # id -> its answers


def _family(row: Row) -> str:
    """What the row's prompt is a variant of; a prompt by itself is a family of its own."""
    return row.get("family") or row["id"]


def _interval(found: Estimate) -> list[float] | None:
    return None if found.low is None else [found.low, found.high]


def _recovered(sums: Sums, before: int, after: int, goal: int | None, is_loss: bool = True) -> Recovered | None:
    """(before - after) / (before - goal) of three columns (goal None: 0); None where there may be no way to go.

    Args:
        is_loss: whether less is better; a goal that is not shown to be better than before is no goal.
    """

    # from the student before to the goal: what is divided by
    def way(s: np.ndarray) -> np.ndarray:
        return s[..., before] - (0 if goal is None else s[..., goal])

    room = estimate(sums, way)
    # a way that may be 0 divides by nothing, and one in the wrong direction leads to no goal
    if not excludes_zero(room) or (room.value > 0) != is_loss:
        return None
    found = estimate(sums, lambda s: (s[..., before] - s[..., after]) / way(s))
    return {"value": found.value, "interval": _interval(found)}


@dataclass(frozen=True)
class HeldoutSums:
    """Held-out sums of the prompts that every arm has, all answers of a prompt together.

    arms: those that were measured, in the order of `ARMS`.
    prompts: arm -> of each prompt `num_tokens` and `SUMS`; families: of each prompt, its family.
    sums: over families, of the columns that `place` numbers: by (arm, column), the arm None for what all share.
    """

    arms: list[Arm]
    prompts: dict[Arm, list[Row]]
    families: list[str]
    sums: Sums
    place: dict[tuple[Arm | None, str], int]

    def mean(self, arm: Arm, metric: str) -> Estimate:
        """Per token; a ratio of resampled sums."""
        column = self.place[arm, METRICS[metric]]
        return estimate(self.sums, lambda s: s[..., column] / s[..., 0])

    def difference(self, a: Arm, b: Arm, metric: str) -> Estimate:
        ours, theirs = self.place[a, METRICS[metric]], self.place[b, METRICS[metric]]
        return estimate(self.sums, lambda s: (s[..., ours] - s[..., theirs]) / s[..., 0])


def _heldout_sums(rows: Sequence[Row], seed: int) -> HeldoutSums:
    # 1. the answers of a prompt are added up
    by_arm: dict[Arm, dict[str, Row]] = {}
    family_of = {}
    for row in rows:
        # arm -> prompt -> its sums, from 0
        prompt = by_arm.setdefault(row["arm"], {}).setdefault(row["id"], dict.fromkeys(("num_tokens", *SUMS), 0))
        family_of[row["id"]] = _family(row)
        for name in prompt:
            prompt[name] += row[name]

    # 2. the prompts that all arms have
    arms = [arm for arm in ARMS if arm in by_arm]
    ids = sorted(set.intersection(*map(set, by_arm.values())))
    prompts = {arm: [by_arm[arm][i] for i in ids] for arm in arms}
    families = [family_of[i] for i in ids]

    # 3. the columns, resampled together
    names = [(None, "num_tokens"), (None, "teacher_nll_sum")]
    for arm in arms:
        names += [(arm, column) for column in METRICS.values()]
    # what all arms share (no arm) is read off the first
    columns = [[prompt[column] for prompt in prompts[arm or arms[0]]] for arm, column in names]
    place = {name: index for index, name in enumerate(names)}
    return HeldoutSums(arms, prompts, families, resample(columns, families, seed), place)


def heldout_section(rows: Sequence[Row], seed: int) -> Heldout:
    """Per arm: KL to the teacher, NLL and top-1 agreement; per pair of arms: paired differences with intervals.

    Families of prompts are the unit of the resampling. Every mean is a ratio of resampled sums, per token.
    """
    held = _heldout_sums(rows, seed)
    of_any = held.prompts[held.arms[0]]
    kl_is = _kl_is(rows[0])  # of all: `join_heldout` lets no others pass
    intervals = {}
    for arm in held.arms:
        intervals[arm] = {metric: _interval(held.mean(arm, metric)) for metric in METRICS}
    return {
        "rows": len(rows) // len(held.arms),  # every arm has the same rows, or `join_heldout` refuses
        "prompts": len(of_any),
        "families": held.sums.families,
        "response_tokens": sum(prompt["num_tokens"] for prompt in of_any),
        "kl_is": kl_is,
        "expected_acceptance_is": what_acceptance_is(kl_is),
        "arms": {arm: summarise(held.prompts[arm]) for arm in held.arms} | {"teacher": summarise_teacher(of_any)},
        "intervals": intervals,
        "differences": _heldout_differences(held),
        "gap_recovered": _heldout_recovered(held),
        "by_position": _by_position(rows, held.arms),
    }


def _heldout_differences(held: HeldoutSums) -> list[HeldoutDifference]:
    found = []
    for a, b in PAIRS:
        for metric in METRICS if a in held.arms and b in held.arms else ():
            value = held.difference(a, b, metric)
            found.append(
                HeldoutDifference(
                    a=a,
                    b=b,
                    metric=metric,
                    difference=value.value,
                    interval=_interval(value),
                    real=excludes_zero(value),
                )
            )
    return found


def _heldout_recovered(held: HeldoutSums) -> dict[Arm, HeldoutRecovered]:
    found = {}
    for arm in ("sft", "kd"):
        if arm in held.arms and "base" in held.arms:
            # (before, after) columns of each measure
            kl, nll = ((held.place["base", name], held.place[arm, name]) for name in ("kl_sum", "nll_sum"))
            teacher_nll = held.place[None, "teacher_nll_sum"]
            found[arm] = HeldoutRecovered(  # no goal column: the teacher's KL to itself is 0
                kl_to_teacher=_recovered(held.sums, *kl, None), nll=_recovered(held.sums, *nll, teacher_nll)
            )
    return found


def _by_position(rows: Sequence[Row], shown: Sequence[Arm]) -> ByPosition:
    """Means per token over the bins of response positions, as far as a row reaches."""
    found: ByPosition = {"start": [], "tokens": [], "arms": {}}
    for arm in shown:
        sums = np.zeros((3, len(POSITIONS)))  # tokens, KL and agreement of each bin
        for row in (row for row in rows if row["arm"] == arm):
            reached = len(row["kl_by_position"])  # a short answer has the first bins only
            own = (tokens_by_position(row["num_tokens"]), row["kl_by_position"], row["agreement_by_position"])
            sums[:, :reached] += own
        tokens, kl, agreement = sums[:, sums[0] > 0]  # without bins that no answer reaches
        # the same from every arm, for all have read the same rows
        found |= {"start": list(POSITIONS[: len(tokens)]), "tokens": [int(count) for count in tokens]}
        found["arms"][arm] = {
            "kl_to_teacher": (kl / tokens).tolist(),
            "top1_agreement": (agreement / tokens).tolist(),
        }
    return found


HAN = "\u3040-\u30ff\u3400-\u9fff"  # scripts without blanks between words, which Hangul has: a letter is a word
WORD = re.compile(rf"[{HAN}]|[^\W{HAN}]+|[^\w\s]")  # "It's 18元." -> It, ', s, 18, 元, .


def repetition(text: str) -> float:
    """The share of 4-grams of words that stood in the text before (seq-rep-4, Welleck et al. 2020); 0 without any."""
    words = WORD.findall(text)
    # "a b c d e" -> (a, b, c, d), (b, c, d, e)
    grams = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True, order=True)
class Cell:
    """Where answers were given."""

    domain: str
    preset: str
    temperature: float


Cells = dict[Cell, dict[Arm, Prompts]]


def _cells(samples: Sequence[Row]) -> Cells:
    # cell -> arm -> prompt -> its answers
    found: Cells = {}
    for row in samples:
        arms = found.setdefault(Cell(row["domain"], row["preset"], row["temperature"]), {})
        arms.setdefault(row["arm"], {}).setdefault(row["id"], []).append(row)
    return dict(sorted(found.items()))


def _rows(prompts: Prompts) -> list[Row]:
    return list(itertools.chain.from_iterable(prompts.values()))


def _executed(prompts: Prompts) -> bool:
    return not any(row["outcome"] == "not_executed" for row in _rows(prompts))


def _cut(prompts: Prompts, ids: Collection[str]) -> int:
    """How many of the answers to these prompts were cut."""
    return sum(row["outcome"] == "truncated" for row in _rows({i: prompts[i] for i in ids}))


def _right(answers: Sequence[Row], cut_is_right: bool = False) -> int:
    """How many of the answers to a prompt are right."""
    right = ("correct", "truncated") if cut_is_right else ("correct",)
    return sum(row["outcome"] in right for row in answers)


def _shares(prompts: Prompts, ids: Collection[str], cut_is_right: bool = False) -> list[float]:
    """Of each prompt the share of its answers that are right."""
    return [_right(prompts[i], cut_is_right) / len(prompts[i]) for i in ids]


def _families(prompts: Prompts, ids: Collection[str]) -> list[str]:
    """Of each prompt its family."""
    return [_family(prompts[i][0]) for i in ids]


def _score(cell: Cell, arm: Arm, prompts: Prompts, seed: int) -> Score:
    """One arm in one cell. Where some answers were not executed there is no accuracy: the others alone say nothing."""
    # 1. what needs no right answers
    rows = _rows(prompts)
    outcomes = Counter(row["outcome"] for row in rows)
    families = _families(prompts, prompts)
    repeated = [sum(repetition(row["response"]) for row in answers) / len(answers) for answers in prompts.values()]
    # the mean with its interval: a difference from 0
    share = difference(repeated, [0.0] * len(repeated), families, seed)
    entry = Score(
        **asdict(cell),
        arm=arm,
        prompts=len(prompts),
        families=len(set(families)),
        answers=len(rows),
        outcomes={outcome: outcomes[outcome] for outcome in OUTCOMES},
        mean_tokens=sum(row["num_tokens"] for row in rows) / len(rows),
        repetition=share.value,
        repetition_interval=_interval(share),
        accuracy=None,
        interval=None,
        strict_accuracy=None,
        mean_score=None,
        pass_at_k={},
        majority_at_k=None,
    )
    # 2. what does
    if _executed(prompts):
        samples = min(map(len, prompts.values()))  # of a prompt; k of pass@k is at most this
        accuracy = proportion(_shares(prompts, prompts), families, samples)
        entry["accuracy"], entry["interval"] = accuracy.value, _interval(accuracy)
        entry["strict_accuracy"] = sum(bool(row["strict"]) for row in rows) / len(rows)
        entry["mean_score"] = sum(row["score"] or 0.0 for row in rows) / len(rows)
        if samples > 1:
            entry["pass_at_k"] = _pass_at_k(prompts, samples)
            entry["majority_at_k"] = _majority_at_k(prompts)
    return entry


def _pass_at_k(prompts: Prompts, samples: int) -> dict[str, float]:
    found = {}
    for k in sorted({1, 2, 4, 8, 16, 32, 64, samples}):
        if k <= samples:
            passes = [pass_at_k(len(answers), _right(answers), k) for answers in prompts.values()]
            found[str(k)] = sum(passes) / len(passes)
    return found


def _majority_at_k(prompts: Prompts) -> float | None:
    """The share of prompts whose most frequent number is right; None where not all answers are numbers."""
    won = []
    for answers in prompts.values():
        # votes are counted by value, which only numbers have
        if any(row["grader"] != "numeric" for row in answers):
            return None
        # a cut answer or one without a number has no vote
        votes = [(row["extracted"], row["outcome"] == "correct") for row in answers
                 if row["outcome"] in ("correct", "wrong")]  # fmt: skip
        won.append(majority(votes))
    return sum(won) / len(won)


@dataclass(frozen=True)
class Pair:
    """Two arms that are judged on the same prompts of a cell; both gave equally many answers to each."""

    cell: Cell
    a: Prompts
    b: Prompts
    ids: list[str]

    @property
    def families(self) -> list[str]:
        return _families(self.a, self.ids)

    @property
    def answers(self) -> int:
        """Of one arm."""
        return sum(len(self.a[i]) for i in self.ids)


@dataclass
class Finding:
    """What a pair shows, with the answers that were cut scored all wrong, or all right.

    nets: of each family, the right answers of a less those of b.
    p_holm: 1 until `_find_all` has corrected it, and where no p-value could be at most 5 %.
    """

    difference: Estimate
    won: int
    lost: int
    nets: np.ndarray
    p: float
    p_holm: float = 1.0

    @property
    def could_differ(self) -> bool:
        return smallest_p(self.nets) <= ALPHA

    @property
    def decision(self) -> Decision:
        """Where the corrected exact test and the interval both say so; one sum is behind both, so their sides agree."""
        if self.p_holm > ALPHA or not excludes_zero(self.difference):
            return "not shown"
        return "better" if self.difference.value > 0 else "worse"


def _find(pair: Pair, cut_is_right: bool, seed: int) -> Finding:
    # shares say who won a prompt and make the interval, counts by family make the exact test
    a, b = (_shares(arm, pair.ids, cut_is_right) for arm in (pair.a, pair.b))
    net = [_right(pair.a[i], cut_is_right) - _right(pair.b[i], cut_is_right) for i in pair.ids]
    nets = by_family(np.array(net), pair.families)
    return Finding(difference(a, b, pair.families, seed), *discordant(a, b), nets, sign_flip(nets))


def _find_all(pairs: Sequence[Pair], cut_is_right: bool, seed: int) -> list[Finding]:
    """The pairs' findings, corrected over the cells that could differ.

    The others can never be called, whatever their signs, so leaving them out keeps the chance of any false call
    (Tarone 1990).
    """
    found = [_find(pair, cut_is_right, seed) for pair in pairs]
    able = [one for one in found if one.could_differ]
    # Holm over the cells that could differ; the others keep p_holm = 1
    for one, adjusted in zip(able, holm([one.p for one in able]), strict=True):
        one.p_holm = adjusted
    return found


def _pairs(cells: Cells, a: Arm, b: Arm) -> list[Pair]:
    """Two arms in every cell in which both are judged."""
    found = []
    for cell, arms in cells.items():
        # a cell of which some answers were not executed is no comparison
        if a in arms and b in arms and _executed(arms[a]) and _executed(arms[b]):
            ids = sorted(arms[a].keys() & arms[b].keys())  # prompts that both answered
            if ids:
                found.append(Pair(cell, arms[a], arms[b], ids))
    return found


def _compare(cells: Cells, a: Arm, b: Arm, seed: int) -> list[Comparison]:
    """Two arms in every cell where both are judged; these cells are corrected together.

    The decision is withheld where it turns when the answers that were cut are scored all right instead of all wrong.
    """
    # every cell is decided twice, each time with a correction of its own
    pairs = _pairs(cells, a, b)
    if_wrong, if_right = (_find_all(pairs, cut_is_right, seed) for cut_is_right in (False, True))
    able = sum(one.could_differ for one in if_wrong)
    entries = []
    for pair, found, other in zip(pairs, if_wrong, if_right, strict=True):
        tests = able if found.could_differ else able + 1  # a difference that it shows would be among the corrected
        # found: cut answers are wrong, which is what is reported; other: they are right
        entries.append(
            Comparison(
                **asdict(pair.cell),
                a=a,
                b=b,
                prompts=len(pair.ids),
                families=len(found.nets),
                difference=found.difference.value,
                interval=_interval(found.difference),
                won=found.won,
                lost=found.lost,
                p=found.p,
                p_holm=found.p_holm,
                corrected_over=able,
                could_differ=found.could_differ,
                minimum_detectable=minimum_detectable(found.nets, pair.answers, ALPHA / tests),
                cut=[_cut(pair.a, pair.ids), _cut(pair.b, pair.ids)],
                difference_if_cut_right=other.difference.value,
                decision=found.decision if found.decision == other.decision else "withheld",
            )
        )
    return entries


def _compare_all(cells: Cells, seed: int) -> list[Comparison]:
    found = []
    for a, b in PAIRS:
        found += _compare(cells, a, b, seed)
    return found


def _scores(cells: Cells, seed: int) -> list[Score]:
    found = []
    for cell, arms in cells.items():
        found += [_score(cell, arm, arms[arm], seed) for arm in ARMS if arm in arms]
    return found


def _nothing_to_learn(cells: Sequence[Mapping[Arm, Prompts]]) -> str | None:
    """Why the cells of one domain tell nothing about the student; None where they do."""
    asked: set[str] = set()
    right = 0
    for arms in cells:
        for prompts in arms.values():
            if not _executed(prompts):
                return "not executed"
            asked.update(prompts)
            right += _right(_rows(prompts))
    return None if right else f"no arm answers any of {len(asked)} right"


def _overall(cells: Cells, seed: int) -> Overall:
    """The domains in which something can be learnt as one: their prompts together, by preset and temperature."""
    # 1. which domains teach something
    by_domain: dict[str, list[dict[Arm, Prompts]]] = {}
    for cell, arms in cells.items():
        by_domain.setdefault(cell.domain, []).append(arms)
    reasons = {domain: _nothing_to_learn(found) for domain, found in by_domain.items()}
    # 2. their prompts, by preset and temperature
    pooled: Cells = {}
    for cell, arms in cells.items():
        if reasons[cell.domain] is None:
            together = pooled.setdefault(Cell(TOGETHER, cell.preset, cell.temperature), {})
            for arm, prompts in arms.items():
                together.setdefault(arm, {}).update(prompts)  # no id is in two domains
    pooled = dict(sorted(pooled.items()))
    return {
        "domains": [domain for domain, reason in reasons.items() if reason is None],
        "left_out": {domain: reason for domain, reason in reasons.items() if reason is not None},
        "scores": _scores(pooled, seed),
        "comparisons": _compare_all(pooled, seed),
    }


def _graded_recovered(cells: Cells, seed: int) -> list[GradedRecovered]:
    found = []
    for cell, arms in cells.items():
        for arm in ("sft", "kd"):
            three = [arms[name] for name in ("base", arm, "teacher") if name in arms]
            if len(three) == 3 and all(map(_executed, three)):
                ids = sorted(set.intersection(*map(set, three)))
                # sums of shares, not means: the number of prompts cancels in the ratio
                sums = resample([_shares(one, ids) for one in three], _families(three[0], ids), seed)
                # columns: 0 before, 1 after, 2 the teacher
                found.append(GradedRecovered(**asdict(cell), arm=arm, score=_recovered(sums, 0, 1, 2, is_loss=False)))
    return found


def graded_section(samples: Sequence[Row], seed: int) -> Graded:
    """Per cell (domain, preset, temperature) and arm: outcomes and scores; per pair of arms: paired differences."""
    cells = _cells(samples)
    return {
        "cap_hit_rate": sum(row["outcome"] == "truncated" for row in samples) / len(samples),
        "scores": _scores(cells, seed),
        "comparisons": _compare_all(cells, seed),
        "gap_recovered": _graded_recovered(cells, seed),
        "overall": _overall(cells, seed),
    }


MEASURED = ("arm", "id", "sample_index", "num_tokens", *SUMS, "kl_by_position", "agreement_by_position")
AGAIN = "train again, or evaluate with --no_heldout"
# Two readings of one text by the same two models share these sums; not the count of tokens on which they agree, for a
# tie between two tokens falls either way.
ALIKE = tuple(name for name in SUMS if name != "agreement_sum")
TOLERANCE = 5e-3  # relative: other passes over the rows change sums by less than 1e-7, bf16 instead of fp32 by 1e-3


@dataclass(frozen=True)
class Measured:
    """What a training run left in its heldout.jsonl: rows by id and sample index, in one order.

    before, after: of its student before training and after it; the same rows.
    kl_is: whether their KL is exact or a bound, and which.
    """

    path: Path
    before: dict[tuple[str, int], Row]
    after: dict[tuple[str, int], Row]
    kl_is: str


def _kl_is(row: Row) -> str:
    """Runs of the version before knew exact KLs only, and did not say so."""
    return row.get("kl_is", EXACT)


def _fault(row: Row) -> str | None:
    """What is wrong with a row of a run's heldout.jsonl; None if nothing is."""
    lacking = [name for name in MEASURED if name not in row]
    if lacking:
        return f"{lacking[0]} is missing, the run is of an earlier version; {AGAIN}"
    if row["arm"] not in ("before", "after"):
        return f"unknown arm {row['arm']!r}; {AGAIN}"
    for name in ("num_tokens", *SUMS):
        if not isinstance(row[name], int | float):
            return f"{name} is {row[name]!r}, not a number; {AGAIN}"
    return None


def _read_measured(path: Path) -> Measured:
    """Of a run's heldout.jsonl.

    Raises:
        UserError: it is missing, broken or of an earlier version, or its two arms have not the same rows.
    """
    hint = f"the run is of an earlier version; {AGAIN}"
    found: dict[str, dict[tuple[str, int], Row]] = {"before": {}, "after": {}}
    kinds = set()
    for row in read_jsonl(path, (), hint, _fault, unique=("arm", "id", "sample_index"), twice=AGAIN):
        found[row["arm"]][row["id"], row["sample_index"]] = row
        kinds.add(_kl_is(row))
    if len(kinds) > 1:
        raise UserError(f"{path}: the KL of its rows is {' of some, '.join(sorted(kinds))} of others; {AGAIN}")
    if found["before"].keys() != found["after"].keys():
        raise UserError(f"{path}: its rows before and after training are not the same; {AGAIN}")
    # one order, whatever the order in which a run wrote its rows
    return Measured(path, dict(sorted(found["before"].items())), dict(sorted(found["after"].items())), kinds.pop())


def _refuse_other_measures(one: Measured, other: Measured) -> None:
    """Raise a UserError unless two runs read the same rows, as well, and found the same student before training."""
    # 1. KLs of one kind, exact or of the same bound
    way_out = "train both on the same rows, or evaluate with --no_heldout"
    if one.kl_is != other.kl_is:
        raise UserError(
            f"{one.path}: its KL is {one.kl_is}, that of {other.path} {other.kl_is}, which cannot be compared; train "
            "both with the same teacher_cache, or evaluate with --no_heldout"
        )
    # 2. the same rows
    if one.before.keys() != other.before.keys():
        row_id, sample = min(one.before.keys() ^ other.before.keys())  # the first that only one of them has
        raise UserError(f"{one.path}: {row_id}, sample {sample}, is in only one of it and {other.path}; {way_out}")
    # 3. of the same tokens
    for key, row in one.before.items():
        if row["num_tokens"] != other.before[key]["num_tokens"]:
            raise UserError(f"{one.path}: {key[0]}, sample {key[1]}, has other tokens than in {other.path}; {way_out}")
    # 4. the same student before training, by the same teacher: its sums are alike
    tokens = sum(row["num_tokens"] for row in one.before.values())
    for name in ALIKE:
        ours, theirs = (sum(row[name] for row in run.before.values()) / tokens for run in (one, other))
        if not math.isclose(ours, theirs, rel_tol=TOLERANCE, abs_tol=1e-6):  # a KL of 0 is rounding only
            raise UserError(
                f"{one.path}: before training, {name} is {ours:.6g} a token and {theirs:.6g} in {other.path}: another "
                "student, teacher or precision; train both from the same models, or evaluate with --no_heldout"
            )


def join_heldout(runs: Mapping[str, Path], families: Mapping[str, str]) -> list[Row]:
    """The rows of heldout.jsonl, from what the training runs measured when they had finished.

    Args:
        runs: arm -> its run's folder; kd, sft or both.
        families: id -> its family; an id that is missing is a family of its own.

    Returns:
        The rows of base (a run's student before training), sft and kd (after it), each with its `family`.

    Raises:
        UserError: a run has no heldout.jsonl or a broken one, or the runs measured other rows or models.
    """
    # the student before training is measured by each run; where there are two, kd's is taken
    measured = {arm: _read_measured(Path(runs[arm]) / "heldout.jsonl") for arm in ("kd", "sft") if arm in runs}
    if len(measured) == 2:
        _refuse_other_measures(measured["sft"], measured["kd"])
    by_arm = {}
    for arm, run in measured.items():
        by_arm.setdefault("base", run.before)
        by_arm[arm] = run.after
    joined = []
    for arm, rows in by_arm.items():
        joined += [row | {"arm": arm, "family": families.get(row["id"], row["id"])} for row in rows.values()]
    return joined


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
            # a row with nothing but its step is no point
            found["curves"][arm] = [row for row in curves if len(row) > 1]
    return found


def make_results(samples: Sequence[Row], heldout: Sequence[Row], context: dict[str, Any], seed: int) -> Results:
    """The content of results.json; the order of the rows is of no account.

    Args:
        samples: the rows of samples.jsonl; `heldout` those of heldout.jsonl (may be empty).
        context: `CONTEXT`, taken over as it is.
        seed: of the bootstrap.
    """
    results: Results = {"schema_version": SCHEMA_VERSION, "headline": "", "verdict": "", **context}
    # sorted, so that no sum depends on the order in which rows were stored
    if heldout:
        results["heldout"] = heldout_section(
            sorted(heldout, key=lambda r: (r["arm"], r["id"], r["sample_index"])), seed
        )
    if samples:
        results["graded"] = graded_section(sorted(samples, key=lambda r: (r["id"], r["sample_index"])), seed)
    # in words, of the numbers above
    return results | {"headline": headline(results), "verdict": " ".join(sentences(results))}
