"""The shape of results.json, field by field; checked whenever it is written or read.

A share is between 0 and 1, and so is a difference of shares between -1 and 1 (0.05 is 5 points). An interval is one of
95 %, and null where nothing says how wide it is (a family of prompts alone). docs/files.md has the words.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic's own requirement: it takes typing's from Python 3.12 on only

from src.utils.common import UserError, read_json, write_json

SCHEMA_VERSION = 5

Arm = Literal["base", "sft", "kd", "teacher"]
Metric = Literal["kl_to_teacher", "nll", "top1_agreement", "expected_acceptance"]
Decision = Literal["better", "worse", "not shown", "withheld"]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]  # low and high end

ARMS: tuple[Arm, ...] = get_args(Arm)
PAIRS: tuple[tuple[Arm, Arm], ...] = (("kd", "base"), ("kd", "sft"), ("sft", "base"), ("teacher", "base"))
METRICS: dict[Metric, str] = {
    "kl_to_teacher": "kl_sum",
    "nll": "nll_sum",
    "top1_agreement": "agreement_sum",
    "expected_acceptance": "acceptance_sum",
}


class Closed(TypedDict):
    """No other fields; numbers are numbers (an int will do for a float, a bool or a text will not) and finite."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Recovered(Closed):
    """The share of the way from the student before to the teacher (or to a KL of 0) that training went."""

    value: float  # 1 is all of it; negative: away from the teacher
    interval: Interval | None  # of the value


class Measures(Closed):
    """Means per response token of held-out teacher text."""

    kl_to_teacher: float  # KL(teacher, arm) in nats
    nll: float  # negative log-likelihood of the teacher's text in nats
    top1_agreement: float  # share of tokens at which arm and teacher find the same token most likely
    expected_acceptance: float  # share of tokens, drafted by the arm, that speculative decoding would accept


class MeasureIntervals(Closed):
    """Of one arm's `Measures`, in their units."""

    kl_to_teacher: Interval | None  # nats per token
    nll: Interval | None  # nats per token
    top1_agreement: Interval | None  # share of tokens
    expected_acceptance: Interval | None  # share of tokens


class HeldoutDifference(Closed):
    """One measure of two arms on the same held-out rows."""

    a: Arm  # the first arm
    b: Arm  # the arm that it is compared with
    metric: Metric  # which of the measures
    difference: float  # a - b, in the metric's unit
    interval: Interval | None  # of the difference; families of prompts resampled
    real: bool  # the interval excludes 0


class HeldoutRecovered(Closed):
    """Of one arm; null where the interval of the whole way contains 0."""

    kl_to_teacher: Recovered | None  # of the KL to the teacher, down to 0
    nll: Recovered | None  # of the NLL, down to the teacher's


class CurvesByPosition(Closed):
    """One arm's means in each bin of response positions."""

    kl_to_teacher: list[float]  # nats per token
    top1_agreement: list[float]  # share of tokens


class ByPosition(Closed):
    """How the measures change along an answer."""

    start: list[int]  # the response position at which each bin starts, from 0
    tokens: list[int]  # response tokens in each bin
    arms: dict[Arm, CurvesByPosition]  # of each arm that was measured


class Heldout(Closed):
    """Closeness to the teacher on held-out text that the teacher wrote."""

    rows: int  # held-out answers read by every arm
    prompts: int  # different prompts among them
    families: int  # families of these prompts: the units of every interval
    response_tokens: int  # tokens of the answers
    kl_is: str  # "exact", or of which tokens every KL here is a lower bound: the teacher's server says no more
    expected_acceptance_is: str  # the same of every expected acceptance
    arms: dict[Arm, Measures]  # of each arm, the teacher among them
    intervals: dict[Arm, MeasureIntervals]  # of each arm but the teacher
    differences: list[HeldoutDifference]  # per pair of arms and measure
    gap_recovered: dict[Arm, HeldoutRecovered]  # of the trained arms
    by_position: ByPosition  # the measures along the answer


class Cell(Closed):
    """Where answers were given; every cell is judged by itself."""

    domain: str  # of the prompts, such as maths; "all" in `Overall`
    preset: str  # of the sampling: raw or recommended
    temperature: float  # of the sampling; 0 is greedy decoding


class Outcomes(Closed):
    """Answers by outcome; they add up to the answers."""

    correct: int  # answers that are right
    wrong: int  # answers that are not
    no_answer: int  # answers without anything that could be judged
    truncated: int  # answers that were cut at the token limit; they count as wrong
    error: int  # answers to rows that no answer can be judged by
    not_executed: int  # code answers that were not run


class Score(Cell):
    """One arm in one cell; what needs the right answers is null where some were not executed."""

    arm: Arm  # who answered
    prompts: int  # prompts answered
    families: int  # families of these prompts: the units of the intervals
    answers: int  # answers to them
    outcomes: Outcomes  # the answers by outcome
    mean_tokens: float  # tokens per answer
    repetition: float  # share of an answer's 4-grams of words that stood in it before, mean over prompts
    repetition_interval: Interval | None  # of the repetition
    accuracy: float | None  # share of right answers, mean over prompts
    interval: Interval | None  # of the accuracy
    strict_accuracy: float | None  # share of answers that are right and in the asked-for format
    mean_score: float | None  # mean grade in [0, 1]; other than the accuracy where a rubric gives parts
    pass_at_k: dict[str, float]  # k -> the chance that of k answers one is right; empty with one answer a prompt
    majority_at_k: float | None  # share of prompts whose most frequent number is right; null where not all have numbers


class Comparison(Cell):
    """Two arms on the same prompts of one cell."""

    a: Arm  # the first arm
    b: Arm  # the arm that it is compared with
    prompts: int  # prompts that both answered
    families: int  # families of these prompts: the units of interval and test
    difference: float  # accuracy of a - accuracy of b
    interval: Interval | None  # of the difference
    won: int  # prompts on which a has more right answers
    lost: int  # prompts on which a has fewer
    p: float  # of the exact sign-flip test over families, two-sided
    p_holm: float  # p after Holm's correction; 1 where `could_differ` is false
    corrected_over: int  # how many cells of this pair the correction is over: those that could differ
    could_differ: bool  # p could be 0.05 or less if all families that differ did so for one arm
    minimum_detectable: float | None  # least true difference found with 80 % power; null: none is large enough
    cut: Annotated[list[int], Field(min_length=2, max_length=2)]  # answers of a and of b that were cut
    difference_if_cut_right: float  # the difference if all cut answers were right
    decision: Decision  # about a; withheld: it would be another if all cut answers were right


class GradedRecovered(Cell):
    """The share of the way to the teacher's accuracy that training went, in one cell."""

    arm: Arm  # which trained arm
    score: Recovered | None  # null where the interval of (teacher - student before) contains 0


class Overall(Closed):
    """The prompts of several domains as one, per preset and temperature; both lists are empty where no domain is left.

    Its comparisons are corrected by themselves, over the cells of a pair.
    """

    domains: list[str]  # the domains whose prompts are pooled
    left_out: dict[str, str]  # domain -> why nothing can be learnt from it
    scores: list[Score]  # per preset, temperature and arm
    comparisons: list[Comparison]  # per pair of arms, preset and temperature


class Graded(Closed):
    """Graded answers to prompts that were not trained on."""

    cap_hit_rate: float  # share of all answers that were cut at the token limit
    scores: list[Score]  # per cell and arm
    comparisons: list[Comparison]  # per pair of arms and cell in which both are judged
    gap_recovered: list[GradedRecovered]  # per cell and trained arm
    overall: Overall  # domains together


class Results(Closed):
    """results.json."""

    schema_version: int  # SCHEMA_VERSION
    headline: str  # one sentence for everybody
    verdict: str  # the particulars in words
    arms: dict[Arm, str]  # arm -> the model evaluated as it
    missing_arms: dict[Arm, str]  # arm -> why it was not evaluated
    training: dict[Arm, dict[str, Any]]  # trained arm -> its run's kd_results.json
    curves: dict[Arm, list[dict[str, float | None]]]  # trained arm -> rows of metrics.jsonl: step, losses, validation
    settings: dict[str, Any]  # what was asked for
    provenance: dict[str, Any]  # command, commit, versions, machine, time
    heldout: NotRequired[Heldout]  # missing where held-out text was not read
    graded: NotRequired[Graded]  # missing where no answers were graded


SHAPE = TypeAdapter(Results)
WORDS = {"missing": "this field is missing", "extra_forbidden": "unknown field"}  # pydantic's names of errors


def _place(way: tuple[int | str, ...]) -> str:
    """A place in the file: ("graded", "scores", 3, "accuracy") is graded.scores[3].accuracy."""
    place = ""
    for step in way:
        if isinstance(step, int):
            place += f"[{step}]"
        elif step != "[key]":  # so pydantic marks a key that is refused, behind the key itself
            place += f".{step}" if place else step
    return place or "the whole"


def complaint(results: Any) -> str | None:
    """The first place where a value has not the shape of `Results`, and what was expected; None if there is none."""
    try:
        SHAPE.validate_python(results)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] in WORDS:
            return f"{_place(first['loc'])}: {WORDS[first['type']]}"
        found = repr(first["input"])
        found = found if len(found) <= 60 else f"{found[:60]} ..."
        return f"{_place(first['loc'])}: {first['msg'].replace('Input should be', 'expected')}, found {found}"
    return None


def check_results(results: Any, path: str | Path) -> None:
    """Refuse content of results.json that has another version or shape, or whose outcomes do not add up.

    Raises:
        UserError: names the file, the place and the way out.
    """
    if isinstance(results, dict) and results.get("schema_version") != SCHEMA_VERSION:
        wrong = f"schema_version is {results.get('schema_version')}, this code has {SCHEMA_VERSION}"
    else:
        wrong = complaint(results) or _wrong_sum(results)
    if wrong:
        raise UserError(f"{path}: {wrong}; make it again with --from results, or evaluate into another folder")


def _wrong_sum(results: Results) -> str | None:
    if "graded" not in results:
        return None
    for score in results["graded"]["scores"] + results["graded"]["overall"]["scores"]:
        if sum(score["outcomes"].values()) != score["answers"]:
            return f"the outcomes of {score['arm']} in {score['domain']} do not add up to its answers"
    return None


def read_results(path: str | Path) -> Results:
    results = read_json(path)
    check_results(results, path)
    return results


def write_results(path: str | Path, results: Results) -> None:
    check_results(results, path)
    write_json(path, results)
