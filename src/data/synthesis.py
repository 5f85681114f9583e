"""Scenario packs: families of tasks written in YAML, rendered from a seed as dataset rows. No code per domain.

`data/domains/aiops.yaml` and `medical.yaml` show every feature; `templates.py` says what a template is. Slots are drawn
in the order they stand: `{int: [lo, hi, step]}`, `{decimal: [lo, hi, digits]}`, `{choice: [...]}` (templates, numbers
or mappings of those) and `{from: a list of the pack}`, each with an optional `distinct_from`, and `{expr: arithmetic}`.
A rubric phrase may hold several, `a | b`: so one choice of a family brings its own synonyms along.
"""

import ast
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from src.data.cleaning import words_of
from src.data.templates import FUNCTIONS, Values, at, calculate, expression, fill, near
from src.grading.rows import Row, dataset_row
from src.utils.common import UserError
from src.utils.config import read_yaml

SPLITS = ("train", "eval")
GRADERS = ("numeric", "rubric")
TRIES = 200  # draws for one row before a condition or a prompt not seen yet counts as impossible
NAME_WORDS = 6  # a list entry of up to so many words (or Han characters) and without a slot is a name

Kinds = Mapping[str, type | UnionType]
PACK: Kinds = {"name": str, "domain": str, "instruction": str | dict, "licence": str, "families": list}
PACK_MORE: Kinds = {"system": str, "lists": dict, "slots": dict, "pass_mark": object}
FAMILY: Kinds = {"name": str, "kind": str, "split": str, "prompt": str | list, "reference": str, "grader": str}
FAMILY_MORE: Kinds = {"slots": dict, "require": list, "groups": dict, "pass_mark": object}
KIND_NAMES = {str: "text", dict: "a mapping", list: "a list", str | dict: "text", str | list: "text"}


@dataclass(frozen=True)
class Slot:
    """One value of a row: an element of `options`, or the result of `expression` over the slots above it."""

    name: str
    options: Sequence[Any] = ()
    expression: ast.expr | None = None
    distinct_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One scenario, in one split. `groups` and `pass_mark` (share of groups) are for the rubric grader only."""

    name: str
    kind: str
    split: str
    slots: tuple[Slot, ...]
    require: tuple[ast.expr, ...]
    prompts: tuple[str, ...]
    instruction: str
    reference: str
    grader: str
    groups: dict[str, list[str]]
    pass_mark: float


@dataclass(frozen=True)
class Pack:
    """A validated scenario pack; the two splits of a list (name -> split -> entries) share no entry."""

    path: Path
    name: str
    domain: str
    system: str
    licence: str
    lists: dict[str, dict[str, list[Any]]]
    families: tuple[Family, ...]


def load_pack(path: str | Path) -> Pack:
    """Read and validate a scenario pack; every template is filled and every condition met once, as a trial.

    Raises:
        UserError: one line that names the file, the family (if it is in one), the field and the problem.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such scenario pack")
    raw = read_yaml(path)
    with at(path):
        _check(raw, PACK, PACK_MORE)
        for name, entry in raw.get("lists", {}).items():
            with at(f"lists: {name}"):
                _check(entry, dict.fromkeys(SPLITS, list))
                for split in SPLITS:
                    with at(split):
                        _check_options(entry[split])
                if shared := [option for option in entry["train"] if option in entry["eval"]]:
                    raise UserError(f"{shared[0]!r} stands in both splits; evaluation must stay unseen")
        families: dict[str, Family] = {}
        for number, entry in enumerate(raw["families"], start=1):
            with at(f"family {entry.get('name', number) if isinstance(entry, dict) else number}"):
                family = _family(entry, raw)
                if family.name in families:
                    raise UserError("name: stands twice; each family needs its own")
                families[family.name] = family
    return Pack(path, raw["name"], raw["domain"], raw.get("system", "").strip(), raw["licence"], raw.get("lists", {}),
                tuple(families.values()))  # fmt: skip


def _check(raw: Any, required: Kinds, more: Kinds | None = None) -> None:
    """A mapping with the required keys, perhaps some more, no others; each of its kind, the required not empty."""
    if not isinstance(raw, dict):
        raise UserError(f"expected a mapping, found {raw!r:.60}")
    known = {**required, **(more or {})}
    for key, value in raw.items():
        if key not in known:
            raise UserError(f"unknown key {key!r}{near(key, known)}")
        if not isinstance(value, known[key]) or (key in required and not value) or value == "":
            quote = " (quote it if it is meant as text)" if isinstance(value, int | float) else ""
            raise UserError(f"{key}: expected {KIND_NAMES[known[key]]}, found {value!r:.60}{quote}")
    if missing := [key for key in required if key not in raw]:
        raise UserError(f"missing {', '.join(missing)}")


def _check_options(raw: list[Any]) -> None:
    """Texts and numbers, or mappings to those that all hold the same fields."""
    for option in raw:
        for value in option.values() if isinstance(option, dict) else [option]:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise UserError(f"{value!r} is neither text nor a number (quote it if it is meant as text)")
    if len({frozenset(option) if isinstance(option, dict) else None for option in raw}) != 1:
        raise UserError("needs at least one entry, and all of one sort: plain ones, or mappings with the same fields")


def _family(raw: Any, pack: dict[str, Any]) -> Family:
    _check(raw, FAMILY, FAMILY_MORE)
    if raw["split"] not in SPLITS or raw["grader"] not in GRADERS:
        raise UserError(
            f"split must be train or eval, grader numeric or rubric; found {raw['split']!r} and {raw['grader']!r}"
        )
    shared, own = pack.get("slots", {}), raw.get("slots", {})
    if again := [name for name in own if name in shared]:
        raise UserError(f"slots: {again[0]}: is a slot of the whole pack already; use another name")
    slots: dict[str, Slot] = {}
    sample: Values = {}  # the first option of each slot, to try what refers to it
    for name, spec in (shared | own).items():
        with at(f"slots: {name}"):
            slots[name] = _slot(name, spec, pack.get("lists", {}), raw["split"], sample)
    with at("require"):
        require = tuple(expression(condition) for condition in raw.get("require", []))
        for condition in require:
            calculate(condition, sample)
    groups, pass_mark = {}, 0.0
    if raw["grader"] == "rubric":
        groups, pass_mark = raw.get("groups"), raw.get("pass_mark", pack.get("pass_mark"))
        if type(pass_mark) not in (int, float) or not 0 < pass_mark <= 1:
            raise UserError(f"pass_mark: must be a number above 0 and at most 1, found {pass_mark!r}")
        if not groups or not all(isinstance(phrases, list) and phrases for phrases in groups.values()):
            raise UserError("groups: needs at least one group, and each group a list of phrases")
    prompts = raw["prompt"] if isinstance(raw["prompt"], list) else [raw["prompt"]]
    family = Family(raw["name"], raw["kind"], raw["split"], tuple(slots.values()), require, tuple(prompts),
                    _instruction(pack["instruction"], raw["grader"]), raw["reference"].strip(), raw["grader"], groups,
                    pass_mark)  # fmt: skip
    values = _draw(family, random.Random(family.name))
    for prompt in prompts:
        with at("prompt"):
            _check({"prompt": prompt}, {"prompt": str})
            fill(prompt, values)
    _grading(family, values)
    return family


def _instruction(raw: str | dict[str, str], grader: str) -> str:
    """The answer format of one grader: the pack's only one, or the one it has for this grader."""
    with at("instruction"):
        text = raw.get(grader) if isinstance(raw, dict) else raw
        if not isinstance(text, str) or re.search(r"\n\s*\n", text):
            raise UserError(f"must be one paragraph, or one for each of {', '.join(GRADERS)} that the families use")
    return text


def _slot(name: str, spec: Any, lists: dict[str, Any], split: str, sample: Values) -> Slot:
    """One slot from its YAML; puts its first option, filled, into `sample`."""
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", str(name)) or name in FUNCTIONS:
        raise UserError("is no name for a slot (small letters, digits and underscores; not a function)")
    kinds = [key for key in spec if key != "distinct_from"] if isinstance(spec, dict) else []
    if len(kinds) != 1 or kinds[0] not in ("int", "decimal", "choice", "from", "expr"):
        raise UserError(f"expected one of int, decimal, choice, from, expr; found {', '.join(map(str, kinds)) or spec}")
    kind, value, distinct = kinds[0], spec[kinds[0]], spec.get("distinct_from", [])
    distinct = tuple(distinct) if isinstance(distinct, list) else (distinct,)
    if unknown := [other for other in distinct if str(other) not in sample]:
        raise UserError(f"distinct_from: unknown slot {unknown[0]!r}; it must stand above this one")
    if kind == "expr":
        tree = expression(value)
        sample[name] = calculate(tree, sample)
        return Slot(name, expression=tree)
    if kind in ("int", "decimal"):
        options = _numbers(kind, value)
    elif kind == "choice":
        _check({"choice": value}, {"choice": list})
        _check_options(value)
        options = value
    elif value in lists:
        options = lists[value][split]
    else:
        raise UserError(f"unknown list {value!r}{near(value, lists)}")
    filled = [fill(option, sample) for option in options] if kind in ("choice", "from") else options
    sample[name] = filled[0]
    return Slot(name, options, distinct_from=distinct)


def _numbers(kind: str, value: Any) -> Sequence[int | float]:
    """`[lo, hi]` (both included) and, third, a step (int) or a number of digits (decimal); 1 if not given."""
    types = (int,) if kind == "int" else (int, float)
    lo, hi, third = [*value, 1][:3] if isinstance(value, list) and len(value) in (2, 3) else (None, None, 1)
    if type(lo) not in types or type(hi) not in types or type(third) is not int or third < 1 or lo > hi:
        hint = "step" if kind == "int" else "digits"
        raise UserError(f"expected [lo, hi] or [lo, hi, {hint}] with lo <= hi, found {value!r}")
    if kind == "int":
        return range(lo, hi + 1, third)
    if third > 6 or (hi - lo) * 10**third > 1e6:
        raise UserError(f"{value!r} has over a million values; use fewer digits or a narrower range")
    return [number / 10**third for number in range(round(lo * 10**third), round(hi * 10**third) + 1)]


def render_rows(pack: Pack, split: str, count: int, seed: int, domain: str | None = None) -> list[Row]:
    """`count` rows with distinct prompts, the split's families in turn: a function of the arguments alone.

    The first rows of a larger count are the rows of a smaller one.

    Args:
        pack: from `load_pack`.
        split: `train` or `eval`; it picks the families and the entries of the pack's lists.
        count: rows wanted.
        seed: each row is drawn from `Random("{seed}/{family}/{turn}")`.
        domain: instead of the pack's own.

    Raises:
        UserError: the split has no family, or a family cannot give enough distinct prompts.
    """
    families = [family for family in pack.families if family.split == split]
    if not families:
        raise UserError(f"{pack.path}: families: none belongs to split {split!r}")
    rows: list[Row] = []
    seen: set[str] = set()
    for number in range(count):
        family, turn = families[number % len(families)], number // len(families)
        rng = random.Random(f"{seed}/{family.name}/{turn}")
        with at(f"{pack.path}: family {family.name}"):
            for _ in range(TRIES):
                values = _draw(family, rng)
                prompt = fill(rng.choice(family.prompts), values).strip()
                if prompt not in seen:
                    break
            else:
                raise UserError(f"prompt: no distinct prompt left after {turn}; ask for fewer rows or widen its slots")
            reference, grader_args = _grading(family, values)
        seen.add(prompt)
        rows.append(
            dataset_row(source=pack.name, domain=domain or pack.domain, split=split, prompt=prompt,
                        instruction=family.instruction.strip(), reference=reference, grader=family.grader,
                        grader_args=grader_args, system=pack.system, family=family.name)
        )  # fmt: skip
    return rows


def names_of(pack: Pack) -> set[str]:
    """The names a pack fills in: what its lists hold that is short and has no slot of its own."""
    entries = [entry for splits in pack.lists.values() for split in SPLITS for entry in splits[split]]
    texts = [str(text) for entry in entries for text in (entry.values() if isinstance(entry, dict) else [entry])]
    return {text for text in texts if "{" not in text and len(words_of(text)) <= NAME_WORDS}


def _draw(family: Family, rng: random.Random) -> Values:
    """Slot values that meet the family's conditions."""
    for _ in range(TRIES):
        values: Values = {}
        for slot in family.slots:
            with at(f"slots: {slot.name}"):
                if slot.expression is not None:
                    values[slot.name] = calculate(slot.expression, values)
                    continue
                taken = [values[name] for name in slot.distinct_from]
                options = (
                    [option for option in slot.options if fill(option, values) not in taken] if taken else slot.options
                )
                if not options:
                    raise UserError(f"no option is distinct from {', '.join(slot.distinct_from)}")
                values[slot.name] = fill(rng.choice(options), values)
        with at("require"):
            if all(calculate(condition, values) for condition in family.require):
                return values
    raise UserError(f"require: not met in {TRIES} draws; loosen it or narrow the slots")


def _grading(family: Family, values: Values) -> tuple[str, dict[str, Any]]:
    """The reference and the grader's arguments; phrases in lower case, for the rubric ignores case."""
    with at("reference"):
        reference = fill(family.reference, values)
        if family.grader == "numeric" and not re.fullmatch(r"-?\d+(\.\d+)?", reference):
            raise UserError(f"the numeric grader needs a plain number, found {reference!r}")
    if family.grader == "numeric":
        return reference, {}
    groups = []
    for name, phrases in family.groups.items():
        with at(f"groups: {name}"):
            if wrong := [phrase for phrase in phrases if not isinstance(phrase, str)]:
                raise UserError(f"expected text, found {wrong[0]!r} (quote it if it is meant as text)")
            filled = "|".join(fill(phrase, values) for phrase in phrases).lower().split("|")
            groups.append({"name": name, "any": [phrase.strip() for phrase in filled if phrase.strip()]})
    return reference, {"groups": groups, "pass_mark": family.pass_mark}
