"""Scenario packs: families of tasks written in YAML, rendered from a seed as dataset rows. No code per domain.

`data/domains/aiops.yaml` and `medical.yaml` show every feature. Slots are drawn in the order they stand:
`{int: [lo, hi, step]}`, `{decimal: [lo, hi, digits]}`, `{choice: [...]}` (texts, numbers or mappings of those) and
`{from: a list of the pack}`, each with an optional `distinct_from`, and `{expr: arithmetic}`. A rubric phrase may hold
several, `a | b`: so one choice of a family brings its own synonyms along.

Texts are Jinja templates and `expr` and `require` are Jinja expressions, cut down to values: `{{ slot }}`,
`{{ slot.field }}`, `{{ slot | form('02') }}`, arithmetic, comparisons, `a if b else c`, and min, max, round, abs.
A pack is data: it has no statements, no loops and no attributes of Python objects, and what it computes is bounded.
"""

import contextlib
import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from jinja2 import StrictUndefined, TemplateError, UndefinedError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from src.data.cleaning import words_of
from src.grading.rows import Row, dataset_row
from src.utils.common import UserError
from src.utils.config import nearest, read_yaml

Split = Literal["train", "eval"]
Grader = Literal["numeric", "rubric"]
SPLITS: tuple[Split, ...] = get_args(Split)
GRADERS: tuple[Grader, ...] = get_args(Grader)
TRIES = 200  # draws for one row before a condition or a prompt not seen yet counts as impossible
NAME_WORDS = 6  # a list entry of up to so many words (or Han characters) and without a slot is a name

Values = dict[str, Any]  # slot -> its value: a text, a number, or a mapping from field to those


@contextlib.contextmanager
def at(where: object) -> Iterator[None]:
    """Put `where: ` before the line of a UserError raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def unknown(what: str, name: object, known: Collection[str]) -> str:
    # "did you mean", or all that are known
    hint = nearest(str(name), list(known)) or f"; known: {', '.join(known) or 'none'}"
    return f"unknown {what} {name!r:.60}{hint}"


def _as_list(raw: Any) -> list[Any]:
    return raw if isinstance(raw, list) else [raw]


def _for_each_grader(raw: Any) -> Any:
    return dict.fromkeys(GRADERS, raw) if isinstance(raw, str) else raw


def _paragraph(text: str) -> str:
    if re.search(r"\n\s*\n", text):  # an empty line: "a\n\nb"
        raise ValueError("must be one paragraph, or one for each grader")
    return text.strip()


def _slot_name(name: str) -> str:
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", name) or name in FUNCTIONS or name in KEYWORDS:  # such as: per_kg2
        raise ValueError("is no name for a slot (small letters, digits and underscores; no function, no word of Jinja)")
    return name


def _options(raw: Any) -> list[Any]:
    """Texts and numbers, or mappings to those that all hold the same fields."""
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"expected a list with at least one entry, found {raw!r:.60}")
    for option in raw:
        for value in option.values() if isinstance(option, dict) else [option]:
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise ValueError(f"{value!r:.60} is neither text nor a number (quote it if it is meant as text)")
    # the fields of a mapping; None for plain entries
    if len({frozenset(option) if isinstance(option, dict) else None for option in raw}) != 1:
        raise ValueError("entries must be all of one sort: plain ones, or mappings with the same fields")
    return raw


def _splits(entries: dict[str, list[Any]]) -> dict[str, list[Any]]:
    for split in SPLITS:
        if split not in entries:
            raise ValueError(f"missing {split}")
    for option in entries["train"]:
        if option in entries["eval"]:
            raise ValueError(f"{option!r:.60} stands in both splits; evaluation must stay unseen")
    return entries


def _integers(numbers: list[int]) -> range:
    """All values of `[lo, hi]` or `[lo, hi, step]`, both ends included."""
    lo, hi, step = [*numbers, 1][:3]  # [2, 8] -> 2, 8, 1; [2, 8, 3] -> 2, 8, 3
    if lo > hi or step < 1 or (hi - lo) // step > 1e7:
        raise ValueError(f"expected [lo, hi] or [lo, hi, step] with lo <= hi and 1e7 values at most: {numbers}")
    return range(lo, hi + 1, step)


def _decimals(numbers: list[float]) -> list[float]:
    """All values of `[lo, hi]` or `[lo, hi, digits]`, both ends included, with one digit if not given."""
    lo, hi, digits = [*numbers, 1][:3]
    if not lo <= hi or digits not in range(1, 7) or (hi - lo) * 10**digits > 1e6:
        raise ValueError(
            f"expected [lo, hi] or [lo, hi, digits] with lo <= hi, 1 to 6 digits and 1e6 values at most: {numbers}"
        )
    # counted in whole numbers, so that 0.1 + 0.1 + 0.1 adds no error: [0.1, 0.3] -> 0.1, 0.2, 0.3
    return [number / 10**digits for number in range(round(lo * 10**digits), round(hi * 10**digits) + 1)]


Text = Annotated[str, Field(min_length=1)]
Expression = Annotated[str, BeforeValidator(str)]  # YAML reads a bare 5 as a number
LOW_HIGH_MORE = Field(min_length=2, max_length=3)
Options = Annotated[Any, AfterValidator(_options)]
Instruction = Annotated[dict[Grader, Annotated[Text, AfterValidator(_paragraph)]], BeforeValidator(_for_each_grader)]
PassMark = Annotated[float, Field(gt=0, le=1)]


class Shape(BaseModel):
    """A mapping of the YAML: no key that is not named here, and nothing converted (`strict`: 7 is no text).

    A default of None is not checked: such a key may be absent, but not null.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _keys(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise ValueError(f"expected a mapping, found {raw!r:.60}")
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in raw:
            if key not in known:
                raise ValueError(unknown("key", key, known))
        return raw


class SlotShape(Shape):
    """One slot; `integers` and `decimals` hold all the values to draw from."""

    integers: Annotated[list[int], LOW_HIGH_MORE, AfterValidator(_integers)] = Field(None, alias="int")
    decimals: Annotated[list[float], LOW_HIGH_MORE, AfterValidator(_decimals)] = Field(None, alias="decimal")
    choice: Options = None
    list_name: Text = Field(None, alias="from")
    expr: Expression = None
    distinct_from: Annotated[list[str], BeforeValidator(_as_list)] = []

    @model_validator(mode="after")
    def _one_kind(self) -> "SlotShape":
        # fields that the YAML names, not those with a default
        if len(self.model_fields_set - {"distinct_from"}) != 1:
            raise ValueError("expected exactly one of int, decimal, choice, from, expr")
        return self


Slots = dict[Annotated[str, AfterValidator(_slot_name)], SlotShape]


class FamilyShape(Shape):
    name: Text
    kind: Text
    split: Split
    prompt: Annotated[list[Text], Field(min_length=1), BeforeValidator(_as_list)]
    reference: Text
    grader: Grader
    slots: Slots = {}
    require: list[Expression] = []
    groups: dict[str, Annotated[list[Text], Field(min_length=1)]] = {}
    pass_mark: PassMark = None


class PackShape(Shape):
    name: Text
    domain: Text
    instruction: Instruction
    licence: Text
    families: Annotated[list[FamilyShape], Field(min_length=1)]
    system: str = ""
    lists: dict[str, Annotated[dict[Split, Options], AfterValidator(_splits)]] = {}
    slots: Slots = {}
    pass_mark: PassMark = None


def _shape_of(raw: Any) -> PackShape:
    """The pack, checked; of several mistakes the first one is told, as a UserError of one line."""
    try:
        return PackShape.model_validate(raw)
    except ValidationError as error:
        # 1. where, as pydantic has it: ("families", 2, "slots", "hh")
        mistake = error.errors(include_url=False)[0]
    path = list(mistake["loc"])
    if path[-1:] == ["[key]"]:
        path[-2:] = [str(path[-2])]  # the key itself is wrong, and a number is no entry's place
    # 2. what, in words of ours
    if mistake["type"] == "missing":
        problem = f"missing {path.pop()}"
    elif mistake["type"] == "value_error":
        problem = str(mistake["ctx"]["error"])
    else:
        problem = f"{mistake['msg']}, found {mistake['input']!r:.60}"
        if mistake["type"] == "string_type":
            problem += " (quote it if it is meant as text)"
    # 3. where, in words: family flat_battery: slots: hh
    where = []
    if path[:1] == ["families"] and len(path) > 1:
        family, number = raw["families"][path[1]], path[1] + 1
        where.append(f"family {family.get('name', number) if isinstance(family, dict) else number}")
        path = path[2:]
    where += [f"entry {part + 1}" if isinstance(part, int) else part for part in path]
    raise UserError(": ".join([*where, problem]))


def rounded(number: float, digits: int | None = None) -> float:
    if digits is not None and abs(digits) > 15:
        raise ValueError("round takes at most 15 digits")  # the power of ten would be computed first
    return round(number, digits)


def form(value: Any, spec: str) -> str:
    """A number in Python's format: `form('02')` is 07, `form('.2f')` is 7.00, `form(',')` is 7,000."""
    if not re.fullmatch(r"0?\d?,?(\.\d)?[df]?", spec):  # one digit each for width and precision: 02, .2f, ",", 02d
        raise ValueError(f"no format {spec!r:.40} (such as '02', '.2f' or ',')")
    return format(value, spec)


def shown(value: Any) -> Any:
    """How a value stands in a text: floats to six digits, and 3.0 as 3."""
    if isinstance(value, dict):
        raise ValueError(f"a mapping; name one of its fields: {', '.join(map(str, value))}")
    if not isinstance(value, str | int | float):
        raise ValueError(f"{value!r:.40} is neither text nor a number")
    if not isinstance(value, float):
        return value
    value = round(value, 6)
    return format(value, "" if value % 1 else ".0f")  # 2.50 -> "2.5", 3.0 -> "3"


FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "round": rounded, "abs": abs}
KEYWORDS = {"and", "or", "not", "in", "is", "if", "else", "true", "false", "none", "self"}
LARGEST = 1e15  # a computed number; slots that square one another would grow without end
LONGEST = 100_000  # characters of a filled text; slots that repeat one another would
OLD_SLOT = re.compile(r"(?<!\{)\{([a-z_][a-z0-9_]*)(\.\w+)?(:[^{}\s]+)?\}")  # {svc}, {zones.old} or {hh:02}
FAULTS = (TemplateError, ArithmeticError, TypeError, ValueError,  # and what deep nesting and 1e999 end in:
          SyntaxError, RecursionError, MemoryError, NameError)  # fmt: skip


class Templates(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without the attributes of Python objects and with arithmetic on numbers alone."""

    # all of them, which also keeps Jinja from computing constants while it compiles
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def getattr(self, obj: Any, attribute: Any) -> Any:
        """A field of a mapping, also one called `items` or `keys`; nothing else has any."""
        if isinstance(obj, dict) and attribute in obj:
            return obj[attribute]
        raise UndefinedError(unknown("field", attribute, obj if isinstance(obj, dict) else ()))

    getitem = getattr

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for side in (left, right):
            if not isinstance(side, int | float):
                raise TypeError(f"{side!r:.40} is not a number")
        if operator == "**":
            raise SecurityError("** is not allowed, for it grows too fast")
        result = self.binop_table[operator](left, right)
        if abs(result) > LARGEST:
            raise OverflowError(f"a number above {LARGEST:.0e}")
        return result


TEMPLATES = Templates(undefined=StrictUndefined, finalize=shown, keep_trailing_newline=True)
TEMPLATES.globals, TEMPLATES.filters, TEMPLATES.tests = dict(FUNCTIONS), {"form": form}, {}


@dataclass(frozen=True)
class Compiled:
    """A template or an expression, and the names in it: of slots and functions."""

    source: str
    names: frozenset[str]
    function: Callable[[Values], Any]


@lru_cache(maxsize=10_000)  # families share the entries of the pack's lists
def _compiled(source: str, is_expression: bool) -> Compiled:
    try:
        # an expression is parsed as the text {{ it }}, to see its names
        tree = TEMPLATES.parse(f"{{{{ {source} }}}}" if is_expression else source)
        for part in tree.body:
            if not isinstance(part, nodes.Output):
                raise SecurityError("a pack has no statements {% %}")
        if is_expression:
            function = TEMPLATES.compile_expression(source, undefined_to_none=False)
        else:
            function = TEMPLATES.from_string(tree).render
    except FAULTS as error:
        raise UserError(f"{source!r:.80} cannot be read: {_line(error)}") from None
    return Compiled(source, frozenset(meta.find_undeclared_variables(tree)), function)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def expression(source: str, sample: Values, is_expression: bool = True) -> Compiled:
    """Compiled, and of the slots in `sample` alone, which are those that stand above."""
    compiled = _compiled(source, is_expression)
    for name in sorted(compiled.names):
        if name not in sample and name not in FUNCTIONS:
            raise UserError(unknown("slot", name, [*sample, *FUNCTIONS]))
    return compiled


def template(text: str, sample: Values) -> Compiled | str:
    """A text, compiled; one without braces stays as it is."""
    if "{" not in text:
        return text
    for old in OLD_SLOT.finditer(text):
        if old[1] in sample:
            raise UserError(f"{old[0]} would stand in the text as it is; a slot is written {{{{ {old[1]} }}}}")
    return expression(text, sample, is_expression=False)


def option_template(option: Any, sample: Values) -> Any:
    """An option of a slot: a text, a number, or a mapping from field to those."""
    if isinstance(option, dict):
        return {field: option_template(value, sample) for field, value in option.items()}
    return template(option, sample) if isinstance(option, str) else option


def run(compiled: Compiled, values: Values) -> Any:
    try:
        return compiled.function(values)
    except FAULTS as error:
        raise UserError(f"{compiled.source!r:.80} cannot be computed: {_line(error)}") from None


def calculate(compiled: Compiled, values: Values) -> int | float:
    result = run(compiled, values)
    if not isinstance(result, int | float):
        raise UserError(f"{compiled.source!r:.80} gives {result!r:.40}, not a number")
    return result


def fill(option: Any, values: Values) -> Any:
    """A template with its slots filled in; a mapping field by field; anything else as it is."""
    if isinstance(option, dict):
        return {field: fill(value, values) for field, value in option.items()}
    if not isinstance(option, Compiled):
        return option
    text = run(option, values)
    if len(text) > LONGEST:
        raise UserError(f"{option.source!r:.80} gives a text of over {LONGEST:,} characters")
    return text


@dataclass(frozen=True)
class Slot:
    """One value of a row: an element of `options`, or the result of `expression` over the slots above it."""

    name: str
    options: Sequence[Any] = ()
    expression: Compiled | None = None
    distinct_from: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One scenario, in one split. `groups` and `pass_mark` (share of groups) are for the rubric grader only."""

    name: str
    kind: str
    split: Split
    slots: tuple[Slot, ...]
    require: tuple[Compiled, ...]
    prompts: tuple[Compiled | str, ...]
    instruction: str
    reference: Compiled | str
    grader: Grader
    groups: dict[str, list[Compiled | str]]
    pass_mark: float


@dataclass(frozen=True)
class Pack:
    """A validated scenario pack; the two splits of a list (name -> split -> entries) share no entry."""

    path: Path
    name: str
    domain: str
    system: str
    licence: str
    lists: dict[str, dict[Split, list[Any]]]
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
    families: dict[str, Family] = {}
    with at(path):
        # 1. the shape of the YAML
        pack = _shape_of(raw)
        # 2. each family: templates compiled, tried once
        for entry in pack.families:
            with at(f"family {entry.name}"):
                if entry.name in families:
                    raise UserError("name: stands twice; each family needs its own")
                families[entry.name] = _family(entry, pack)
    return Pack(path, pack.name, pack.domain, pack.system.strip(), pack.licence, pack.lists, tuple(families.values()))


def _family(entry: FamilyShape, pack: PackShape) -> Family:
    """A family with its templates compiled, each of them filled once."""
    slots, sample = _family_slots(entry, pack)
    with at("require"):
        require = tuple(expression(condition, sample) for condition in entry.require)
    with at("prompt"):
        prompts = tuple(template(prompt, sample) for prompt in entry.prompt)
    with at("reference"):
        reference = template(entry.reference.strip(), sample)
    if entry.grader not in pack.instruction:
        raise UserError(f"instruction: the pack has none for the grader {entry.grader}")
    groups, pass_mark = {}, 0.0
    if entry.grader == "rubric":
        pass_mark = entry.pass_mark or pack.pass_mark
        if not pass_mark:
            raise UserError("missing pass_mark: the share of groups to hit, here or for the whole pack")
        if not entry.groups:
            raise UserError("groups: needs at least one group")
        for name, phrases in entry.groups.items():
            with at(f"groups: {name}"):
                groups[name] = [template(phrase, sample) for phrase in phrases]
    family = Family(entry.name, entry.kind, entry.split, slots, require, prompts, pack.instruction[entry.grader],
                    reference, entry.grader, groups, pass_mark)  # fmt: skip
    # the trial: what no draw can fill is a mistake of the pack, told now and not at some row
    values = _draw(family, random.Random(family.name))
    with at("prompt"):
        for prompt in prompts:
            fill(prompt, values)
    _grading(family, values)
    return family


def _family_slots(entry: FamilyShape, pack: PackShape) -> tuple[tuple[Slot, ...], Values]:
    """The slots of the pack and then the family's own; and the first value of each, to try what refers to it."""
    slots: list[Slot] = []
    sample: Values = {}
    for name in entry.slots:
        if name in pack.slots:
            raise UserError(f"slots: {name}: is a slot of the whole pack already; use another name")
    # in their order: a slot may refer to those above it, which `sample` has
    for name, shape in (pack.slots | entry.slots).items():
        with at(f"slots: {name}"):
            for other in shape.distinct_from:
                if other not in sample:
                    raise UserError(f"distinct_from: {unknown('slot', other, sample)} (it must stand above this one)")
            if shape.expr is not None:
                slots.append(Slot(name, expression=expression(shape.expr, sample)))
                sample[name] = calculate(slots[-1].expression, sample)
                continue
            options = _slot_options(shape, pack, entry.split, sample)
            slots.append(Slot(name, options, distinct_from=tuple(shape.distinct_from)))
            sample[name] = fill(options[0], sample)
    return tuple(slots), sample


def _slot_options(shape: SlotShape, pack: PackShape, split: Split, sample: Values) -> Sequence[Any]:
    """What a slot is drawn from, texts compiled and each filled once."""
    if shape.list_name is not None:
        if shape.list_name not in pack.lists:
            raise UserError(unknown("list", shape.list_name, pack.lists))
        options = pack.lists[shape.list_name][split]
    elif shape.choice is not None:
        options = shape.choice
    else:
        return shape.integers or shape.decimals
    compiled = [option_template(option, sample) for option in options]
    for option in compiled:
        fill(option, sample)
    return compiled


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
        # 1. the family whose turn it is, and a generator of this row's own
        family, turn = families[number % len(families)], number // len(families)
        rng = random.Random(f"{seed}/{family.name}/{turn}")
        with at(f"{pack.path}: family {family.name}"):
            # 2. draws until the prompt is a new one
            for _ in range(TRIES):
                values = _draw(family, rng)
                prompt = fill(rng.choice(family.prompts), values).strip()
                if prompt not in seen:
                    break
            else:
                raise UserError(f"prompt: no distinct prompt left after {turn}; ask for fewer rows or widen its slots")
            # 3. what is right, from the same values
            reference, grader_args = _grading(family, values)
        seen.add(prompt)
        rows.append(
            dataset_row(source=pack.name, domain=domain or pack.domain, split=split, prompt=prompt,
                        instruction=family.instruction, reference=reference, grader=family.grader,
                        grader_args=grader_args, system=pack.system, family=family.name)
        )  # fmt: skip
    return rows


def names_of(pack: Pack) -> set[str]:
    """The names a pack fills in: what its lists hold that is short and has no slot of its own."""
    texts: list[str] = []
    for splits in pack.lists.values():
        for split in SPLITS:
            for entry in splits[split]:
                # a mapping brings the texts of all its fields
                texts += map(str, entry.values() if isinstance(entry, dict) else [entry])
    return {text for text in texts if "{" not in text and len(words_of(text)) <= NAME_WORDS}


def _draw(family: Family, rng: random.Random) -> Values:
    """Slot values that meet the family's conditions."""
    for _ in range(TRIES):
        values: Values = {}
        for slot in family.slots:
            with at(f"slots: {slot.name}"):
                values[slot.name] = _draw_slot(slot, values, rng)
        with at("require"):
            if all(calculate(condition, values) for condition in family.require):
                return values
    raise UserError(f"require: not met in {TRIES} draws; loosen it or narrow the slots")


def _draw_slot(slot: Slot, values: Values, rng: random.Random) -> Any:
    if slot.expression is not None:
        return calculate(slot.expression, values)
    if not slot.distinct_from:
        return fill(rng.choice(slot.options), values)
    # compared as they read when filled: two options may give one text
    taken = [values[name] for name in slot.distinct_from]
    filled = [fill(option, values) for option in slot.options]
    free = [value for value in filled if value not in taken]
    if not free:
        raise UserError(f"no option is distinct from {', '.join(slot.distinct_from)}")
    return rng.choice(free)


def _grading(family: Family, values: Values) -> tuple[str, dict[str, Any]]:
    """The reference and the grader's arguments; phrases in lower case, for the rubric ignores case."""
    with at("reference"):
        reference = fill(family.reference, values)
        if family.grader == "numeric" and not re.fullmatch(r"-?\d+(\.\d+)?", reference):  # -3 or 2.5
            raise UserError(f"the numeric grader needs a plain number, found {reference!r}")
    if family.grader == "numeric":
        return reference, {}
    groups = []
    for name, phrases in family.groups.items():
        with at(f"groups: {name}"):
            # ["disk | volume", "{{ svc.disk }}"] -> ["disk", "volume", ...]: one phrase may hold several
            filled = "|".join(fill(phrase, values) for phrase in phrases).lower().split("|")
            groups.append({"name": name, "any": [phrase.strip() for phrase in filled if phrase.strip()]})
    return reference, {"groups": groups, "pass_mark": family.pass_mark}
