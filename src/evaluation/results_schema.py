"""The shape of results.json, checked whenever it is written or read. README.md, "results.json", says what is in it."""

from pathlib import Path
from types import NoneType
from typing import Any

from src.utils.common import UserError, read_json, write_json

SCHEMA_VERSION = 3

ARMS = ("base", "sft", "kd", "teacher")
PAIRS = (("kd", "base"), ("kd", "sft"), ("sft", "base"), ("teacher", "base"))
METRICS = {"kl_to_teacher": "kl_sum", "nll": "nll_sum", "top1_agreement": "agreement_sum",
           "expected_acceptance": "acceptance_sum"}  # fmt: skip

# A type; {field: shape} with exactly these fields ("?" at the end: may be missing) or {str: shape} with any; [shape] or
# [shape, length]; a tuple of alternatives; a text for itself.
NUMBER = (int, float)
INTERVAL = ([NUMBER, 2], NoneType)
ESTIMATE = ({"value": NUMBER, "interval": INTERVAL}, NoneType)
CELL = {"domain": str, "preset": str, "temperature": NUMBER}
MEASURES = {"kl_to_teacher": NUMBER, "nll": NUMBER, "top1_agreement": NUMBER, "expected_acceptance": NUMBER}
SHAPE = {
    "schema_version": int,
    "headline": str,
    "verdict": str,
    "arms": {str: str},
    "missing_arms": {str: str},
    "training": {str: {str: object}},
    "curves": {str: [{str: (int, float, NoneType)}]},
    "settings": {str: object},
    "provenance": {str: object},
    "heldout?": {
        "rows": int,
        "prompts": int,
        "response_tokens": int,
        "arms": {str: MEASURES},
        "intervals": {str: {str: INTERVAL}},
        "differences": [{"a": str, "b": str, "metric": str, "difference": NUMBER, "interval": INTERVAL, "real": bool}],
        "gap_recovered": {str: {"kl_to_teacher": ESTIMATE, "nll": ESTIMATE}},
        "by_position": {
            "start": [int],
            "tokens": [int],
            "arms": {str: {"kl_to_teacher": [NUMBER], "top1_agreement": [NUMBER]}},
        },
    },
    "graded?": {
        "cap_hit_rate": NUMBER,
        "scores": [
            CELL
            | {
                "arm": str,
                "prompts": int,
                "answers": int,
                "outcomes": {str: int},
                "mean_tokens": NUMBER,
                "repetition": NUMBER,
                "repetition_interval": INTERVAL,
                "accuracy": (int, float, NoneType),
                "interval": INTERVAL,
                "strict_accuracy": (int, float, NoneType),
                "mean_score": (int, float, NoneType),
                "pass_at_k": {str: NUMBER},
                "majority_at_k": (int, float, NoneType),
            }
        ],
        "comparisons": [
            CELL
            | {
                "a": str,
                "b": str,
                "prompts": int,
                "difference": NUMBER,
                "interval": INTERVAL,
                "won": int,
                "lost": int,
                "p": NUMBER,
                "p_holm": NUMBER,
                "family": int,
                "minimum_detectable": (int, float, NoneType),
                "cut": [int, 2],
                "difference_if_cut_right": NUMBER,
                "decision": ("better", "worse", "not shown", "withheld"),
            }
        ],
        "gap_recovered": [CELL | {"arm": str, "score": ESTIMATE}],
    },
}


def complaint(value: Any, shape: Any, where: str = "results") -> str | None:
    """The first place where a value has not the shape, in words; None if there is none."""
    if isinstance(shape, tuple):
        complaints = [complaint(value, one, where) for one in shape]
        nested = [c for c, one in zip(complaints, shape, strict=True) if isinstance(one, dict | list)]
        return None if None in complaints else (nested if isinstance(value, dict | list) and nested else complaints)[0]
    if isinstance(shape, str):
        return None if value == shape else f"{where}: unknown value {value!r}"
    if isinstance(shape, type):
        fits = isinstance(value, shape) and (shape in (bool, object) or not isinstance(value, bool))
        return None if fits else f"{where}: expected {shape.__name__}, found {type(value).__name__}"
    if not isinstance(value, type(shape)):
        return f"{where}: expected {type(shape).__name__}, found {type(value).__name__}"
    if isinstance(shape, list):
        if len(shape) == 2 and len(value) != shape[1]:
            return f"{where}: expected {shape[1]} items, found {len(value)}"
        items = [(shape[0], one, f"{where}[{i}]") for i, one in enumerate(value)]
    elif str in shape:
        items = [(shape[str], one, f"{where}.{name}") for name, one in value.items()]
    else:
        fields = {name.removesuffix("?"): one for name, one in shape.items()}
        if unknown := sorted(value.keys() - fields.keys()):
            return f"{where}: unknown field {unknown[0]}"
        if missing := [name for name in shape if name not in value and not name.endswith("?")]:
            return f"{where}: field {missing[0]} is missing"
        items = [(fields[name], one, f"{where}.{name}") for name, one in value.items()]
    return next((c for one, item, place in items if (c := complaint(item, one, place))), None)


def check_results(results: Any, path: str | Path) -> None:
    """Refuse content of results.json that has another version or shape, or whose outcomes do not add up.

    Raises:
        UserError: names the file, the place and the way out.
    """
    if isinstance(results, dict) and results.get("schema_version") != SCHEMA_VERSION:
        wrong = f"schema_version is {results.get('schema_version')}, this code has {SCHEMA_VERSION}"
    else:
        wrong = complaint(results, SHAPE)
    for score in results["graded"]["scores"] if not wrong and "graded" in results else ():
        if sum(score["outcomes"].values()) != score["answers"]:
            wrong = f"the outcomes of {score['arm']} in {score['domain']} do not add up to its answers"
    if wrong:
        raise UserError(f"{path}: {wrong}; evaluate again with --overwrite, or into another folder")


def read_results(path: str | Path) -> dict[str, Any]:
    results = read_json(path)
    check_results(results, path)
    return results


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    check_results(results, path)
    write_json(path, results)
