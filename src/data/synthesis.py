"""Scenario packs: families of tasks written in YAML, rendered from a seed as dataset rows. No code per domain.

`data/domains/aiops.yaml` and `maths.yaml` show every feature. A template is text with `{slot}`, `{slot.field}` or
`{slot:02}` (a format for numbers); a brace that is meant as text is doubled. Slots are drawn in the order they stand:
`{int: [lo, hi, step]}`, `{decimal: [lo, hi, digits]}`, `{choice: [...]}` (templates, numbers, or mappings of those) and
`{from: a list of the pack}`, each with an optional `distinct_from`, and `{expr: arithmetic over the slots above}`.
"""

import ast
import difflib
import operator
import random
import re
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from src.data.sources import Row, dataset_row
from src.utils.common import UserError

SPLITS = ("train", "eval")
GRADERS = ("numeric", "rubric")
TRIES = 200  # draws for one row before a condition or a prompt not seen yet counts as impossible
PACK_KEYS = ("name", "domain", "instruction", "licence", "families")
FAMILY_KEYS = ("name", "kind", "split", "prompt", "reference", "grader")
FUNCTIONS = {"min": min, "max": max, "round": round, "abs": abs}
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip

Values = dict[str, Any]  # slot -> its value: a text, a number, or a mapping from field to those
Lists = dict[str, dict[str, tuple[Any, ...]]]  # list -> split -> entries
Groups = tuple[tuple[str, tuple[str, ...]], ...]  # (name, phrase templates) of each rubric group


@dataclass(frozen=True)
class Slot:
    """One value of a row: an element of `options`, or the result of `expression` over the slots above it."""

    name: str
    options: Sequence[Any]
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
    reference: str
    grader: str
    groups: Groups
    pass_mark: float


@dataclass(frozen=True)
class Pack:
    """A validated scenario pack; the two splits of a list share no entry."""

    path: Path
    name: str
    domain: str
    system: str
    instruction: str
    licence: str
    lists: Lists
    families: tuple[Family, ...]


# --- reading ---------------------------------------------------------------------------------------------------------


def load_pack(path: str | Path) -> Pack:
    """Read and validate a scenario pack; every template is filled and every condition met once, as a trial.

    Raises:
        UserError: one line that names the file, the family (if it is in one), the field and the problem.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such scenario pack")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    where = str(path)
    _check_keys(raw, where, PACK_KEYS, ("system", "lists", "slots", "pass_mark"))
    name, domain, instruction, licence = (_text(raw[key], f"{where}: {key}") for key in PACK_KEYS[:4])
    system = _text(raw["system"], f"{where}: system") if "system" in raw else ""
    if re.search(r"\n\s*\n", instruction):
        _fail(f"{where}: instruction", "must be one paragraph, without an empty line")
    lists: Lists = {}
    for key, entry in _typed(raw.get("lists", {}), dict, f"{where}: lists").items():
        _check_keys(entry, f"{where}: lists: {key}", SPLITS)
        lists[key] = {split: _options(entry[split], f"{where}: lists: {key}: {split}") for split in SPLITS}
        if shared := [option for option in lists[key]["train"] if option in lists[key]["eval"]]:
            _fail(f"{where}: lists: {key}", f"{shared[0]!r} stands in both splits; evaluation must stay unseen")
    families: dict[str, Family] = {}
    for number, entry in enumerate(_typed(raw["families"], list, f"{where}: families"), start=1):
        label = f"{where}: family {entry.get('name', number) if isinstance(entry, dict) else number}"
        family = _family(entry, label, raw, lists)
        if family.name in families:
            _fail(f"{label}: name", "stands twice; each family needs its own")
        families[family.name] = family
    if not families:
        _fail(f"{where}: families", "needs at least one family")
    return Pack(path, name, domain, system, instruction, licence, lists, tuple(families.values()))


def _fail(where: str, problem: str) -> NoReturn:
    raise UserError(f"{where}: {problem}")


def _near(name: Any, known: Collection[str]) -> str:
    match = difflib.get_close_matches(str(name), known, n=1)
    if match:
        return f"; did you mean {match[0]}?"
    return f"; known: {', '.join(known) or 'none'}" if len(known) <= 8 else ""


def _check_keys(raw: Any, where: str, required: Collection[str], optional: Collection[str] = ()) -> None:
    known = [*required, *optional]
    for key in _typed(raw, dict, where):
        if key not in known:
            _fail(where, f"unknown key {key!r}{_near(key, known)}")
    if missing := [key for key in required if key not in raw]:
        _fail(where, f"missing {', '.join(missing)}")


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        _fail(where, f"expected a {'mapping' if kind is dict else 'list'}, found {value!r:.60}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        _fail(where, f"expected text, found {value!r:.60} (quote it if it is meant as text)")
    return value.strip()


def _options(raw: Any, where: str) -> tuple[Any, ...]:
    """A list of texts and numbers, or of mappings to those that all hold the same fields."""
    for option in _typed(raw, list, where):
        for value in option.values() if isinstance(option, dict) else [option]:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                _fail(where, f"{value!r} is neither text nor a number (quote it if it is meant as text)")
    if len({frozenset(option) if isinstance(option, dict) else None for option in raw}) != 1:
        _fail(where, "needs at least one entry, and all of one sort: plain ones, or mappings with the same fields")
    return tuple(raw)


def _family(raw: Any, where: str, pack: dict[str, Any], lists: Lists) -> Family:
    _check_keys(raw, where, FAMILY_KEYS, ("slots", "require", "groups", "pass_mark"))
    name, kind, reference = (_text(raw[key], f"{where}: {key}") for key in ("name", "kind", "reference"))
    split, grader, groups, pass_mark = raw["split"], raw["grader"], (), 0.0
    if split not in SPLITS or grader not in GRADERS:
        _fail(where, f"split must be train or eval, grader numeric or rubric; found {split!r} and {grader!r}")
    shared, own = (_typed(level.get("slots", {}), dict, f"{where}: slots") for level in (pack, raw))
    if again := [slot for slot in own if slot in shared]:
        _fail(f"{where}: slots: {again[0]}", "is a slot of the whole pack already; use another name")
    slots: list[Slot] = []
    sample: Values = {}  # the first option of each slot, to try what refers to it
    for slot_name, spec in (shared | own).items():
        slots.append(_slot(slot_name, spec, lists, split, sample, f"{where}: slots: {slot_name}"))
    prompts = raw["prompt"] if isinstance(raw["prompt"], list) and raw["prompt"] else [raw["prompt"]]
    prompts = tuple(_text(prompt, f"{where}: prompt") for prompt in prompts)
    require = _typed(raw.get("require", []), list, f"{where}: require")
    conditions = tuple(_expression(condition, sample, f"{where}: require")[0] for condition in require)
    if grader == "rubric":
        groups, pass_mark = _rubric(raw, where), raw.get("pass_mark", pack.get("pass_mark"))
        if type(pass_mark) not in (int, float) or not 0 < pass_mark <= 1:
            _fail(f"{where}: pass_mark", f"must be a number above 0 and at most 1, found {pass_mark!r}")
    family = Family(name, kind, split, tuple(slots), conditions, prompts, reference, grader, groups, pass_mark)
    values = _draw(family, random.Random(name), where)
    for prompt in prompts:
        _fill(prompt, values, f"{where}: prompt")
    _grading(family, values, where)
    return family


def _slot(name: Any, spec: Any, lists: Lists, split: str, sample: Values, where: str) -> Slot:
    """One slot from its YAML; puts its first option, filled, into `sample`."""
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", str(name)) or name in FUNCTIONS:
        _fail(where, "is no name for a slot (small letters, digits and underscores; not a function)")
    kinds = [key for key in _typed(spec, dict, where) if key != "distinct_from"]
    if len(kinds) != 1 or kinds[0] not in ("int", "decimal", "choice", "from", "expr"):
        _fail(where, f"expected one of int, decimal, choice, from, expr; found {', '.join(map(str, kinds)) or 'none'}")
    kind, value, distinct = kinds[0], spec[kinds[0]], spec.get("distinct_from", [])
    distinct = tuple(distinct) if isinstance(distinct, list) else (distinct,)
    if unknown := [other for other in distinct if str(other) not in sample]:
        _fail(f"{where}: distinct_from", f"unknown slot {unknown[0]!r}; it must stand above this one")
    if kind == "expr":
        expression, sample[name] = _expression(value, sample, where)
        return Slot(name, (), expression)
    if kind == "from" and (not isinstance(value, str) or value not in lists):
        _fail(where, f"unknown list {value!r}{_near(value, lists)}")
    if kind in ("int", "decimal"):
        options = _numbers(kind, value, where)
        sample[name] = options[0]
    else:
        options = lists[value][split] if kind == "from" else _options(value, where)
        filled = [_fill_option(option, sample, where) for option in options]
        sample[name] = filled[0]
    return Slot(name, options, None, distinct)


def _numbers(kind: str, value: Any, where: str) -> Sequence[int | float]:
    """`[lo, hi]` (both included) and, third, a step (int) or a number of digits (decimal); 1 if not given."""
    types, hint = ((int,), "step") if kind == "int" else ((int, float), "digits")
    lo, hi, third = [*value, 1][:3] if isinstance(value, list) and len(value) in (2, 3) else (None, None, 1)
    if type(lo) not in types or type(hi) not in types or type(third) is not int or third < 1 or lo > hi:
        _fail(where, f"expected [lo, hi] or [lo, hi, {hint}] with lo <= hi, found {value!r}")
    if kind == "int":
        return range(lo, hi + 1, third)
    if third > 6 or (hi - lo) * 10**third > 1e6:
        _fail(where, f"{value!r} has over a million values; use fewer digits or a narrower range")
    return [number / 10**third for number in range(round(lo * 10**third), round(hi * 10**third) + 1)]


def _rubric(raw: dict[str, Any], where: str) -> Groups:
    groups = _typed(raw.get("groups"), dict, f"{where}: groups")
    if not groups or not all(isinstance(phrases, list) and phrases for phrases in groups.values()):
        _fail(f"{where}: groups", "needs at least one group, and each group a list of phrases")
    return tuple(
        (name, tuple(_text(phrase, f"{where}: groups: {name}") for phrase in phrases))
        for name, phrases in groups.items()
    )


def _expression(text: Any, sample: Values, where: str) -> tuple[ast.expr, Any]:
    """The parsed expression and its value on the sample; nothing but `_value` ever evaluates it."""
    try:
        tree = ast.parse(str(text), mode="eval").body
    except (SyntaxError, ValueError):
        _fail(where, f"{text!r} is not an expression")
    return tree, _calculate(tree, sample, where)


# --- rendering -------------------------------------------------------------------------------------------------------


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
        _fail(f"{pack.path}: families", f"none belongs to split {split!r}")
    rows: list[Row] = []
    seen: set[str] = set()
    for number in range(count):
        family, turn = families[number % len(families)], number // len(families)
        where = f"{pack.path}: family {family.name}"
        rng = random.Random(f"{seed}/{family.name}/{turn}")
        for _ in range(TRIES):
            values = _draw(family, rng, where)
            prompt = _fill(rng.choice(family.prompts), values, f"{where}: prompt")
            if prompt not in seen:
                break
        else:
            _fail(f"{where}: prompt", f"no distinct prompt left after {turn}; ask for fewer rows or widen its slots")
        seen.add(prompt)
        reference, grader_args = _grading(family, values, where)
        rows.append(
            dataset_row(source=pack.name, domain=domain or pack.domain, split=split, prompt=prompt,
                        instruction=pack.instruction, reference=reference, grader=family.grader,
                        grader_args=grader_args, system=pack.system)
        )  # fmt: skip
    return rows


def _draw(family: Family, rng: random.Random, where: str) -> Values:
    """Slot values that meet the family's conditions."""
    for _ in range(TRIES):
        values: Values = {}
        for slot in family.slots:
            place = f"{where}: slots: {slot.name}"
            if slot.expression is not None:
                values[slot.name] = _calculate(slot.expression, values, place)
                continue
            taken = [values[name] for name in slot.distinct_from]
            options = [option for option in slot.options if option not in taken] if taken else slot.options
            if not options:
                _fail(place, f"no option is distinct from {', '.join(slot.distinct_from)}")
            values[slot.name] = _fill_option(rng.choice(options), values, place)
        if all(_calculate(condition, values, f"{where}: require") for condition in family.require):
            return values
    _fail(f"{where}: require", f"not met in {TRIES} draws; loosen it or narrow the slots")


def _fill(text: str, values: Values, where: str) -> str:
    """A template with its slots filled in."""
    filled = ""
    try:
        for literal, name, form, _ in string.Formatter().parse(text):
            filled += literal
            if name is not None:
                value = _look_up(name, values, where)
                if isinstance(value, float) and not form:
                    value, form = round(value, 6), "" if value % 1 else ".0f"
                filled += format(value, form or "")
    except ValueError as error:
        _fail(where, f"{error} in {text!r:.80} (double a brace that is meant as text)")
    return filled


def _look_up(name: str, values: Values, where: str) -> Any:
    """The value of `slot` or `slot.field`."""
    slot, _, field = name.partition(".")
    if slot not in values:
        _fail(where, f"unknown slot {slot!r}{_near(slot, values)}")
    value = values[slot]
    fields = value if isinstance(value, dict) else {"": value}
    if field not in fields:
        _fail(where, f"no value {name!r}; the fields of {slot}: {', '.join(filter(None, fields)) or 'none'}")
    return fields[field]


def _fill_option(option: Any, values: Values, where: str) -> Any:
    if isinstance(option, dict):
        return {field: _fill_option(value, values, where) for field, value in option.items()}
    return _fill(option, values, where) if isinstance(option, str) else option


def _grading(family: Family, values: Values, where: str) -> tuple[str, dict[str, Any]]:
    """The reference and the grader's arguments; phrases in lower case, for the rubric ignores case."""
    reference = _fill(family.reference, values, f"{where}: reference")
    if family.grader == "rubric":
        groups = [
            {"name": name, "any": [_fill(phrase, values, f"{where}: groups: {name}").lower() for phrase in phrases]}
            for name, phrases in family.groups
        ]
        return reference, {"groups": groups, "pass_mark": family.pass_mark}
    if not re.fullmatch(r"-?\d+(\.\d+)?", reference):
        _fail(f"{where}: reference", f"the numeric grader needs a plain number, found {reference!r}")
    return reference, {}


def _calculate(node: ast.expr, values: Values, where: str) -> Any:
    try:
        return _value(node, values, where)
    except (ZeroDivisionError, TypeError, ValueError) as error:
        _fail(where, f"{ast.unparse(node)!r} cannot be computed: {error}")


def _value(node: ast.expr, values: Values, where: str) -> Any:
    """Walk the tree; what is not listed here is refused, so no name or attribute of Python is ever reached."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name() | ast.Attribute(value=ast.Name()):
            return _look_up(ast.unparse(node), values, where)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, values, where)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, values, where), _value(right, values, where))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*[_value(argument, values, where) for argument in arguments])
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in OPERATORS for op in ops):
            sides = [_value(side, values, where) for side in (left, *rest)]
            return all(OPERATORS[type(op)](*pair) for op, *pair in zip(ops, sides, sides[1:], strict=False))
    raise TypeError(
        f"{ast.unparse(node)} is not allowed (numbers, slots, + - * / // %, comparisons, min max round abs)"
    )
