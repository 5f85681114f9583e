"""What scenario packs are written in: text with slots, and arithmetic over slots. Nothing of a pack is run as code.

A template is text with `{slot}`, `{slot.field}` or `{slot:02}` (a format for numbers); a literal brace is doubled.
Errors are a `UserError` without a place; `at` puts the place before it.
"""

import ast
import contextlib
import difflib
import operator
import string
from collections.abc import Collection, Iterator
from typing import Any

from src.utils.common import UserError

FUNCTIONS = {"min": min, "max": max, "round": round, "abs": abs}
OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip

Values = dict[str, Any]  # slot -> its value: a text, a number, or a mapping from field to those


@contextlib.contextmanager
def at(where: object) -> Iterator[None]:
    """Put `where: ` before the line of a UserError raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def near(name: object, known: Collection[str]) -> str:
    match = difflib.get_close_matches(str(name), known, n=1)
    if match:
        return f"; did you mean {match[0]}?"
    return f"; known: {', '.join(known) or 'none'}" if len(known) <= 8 else ""


def fill(template: Any, values: Values) -> Any:
    """A template with its slots filled in; a mapping field by field; a number as it is."""
    if isinstance(template, dict):
        return {field: fill(value, values) for field, value in template.items()}
    if not isinstance(template, str):
        return template
    filled = ""
    try:
        for literal, name, form, _ in string.Formatter().parse(template):
            filled += literal
            if name is not None:
                value = look_up(name, values)
                if isinstance(value, float) and not form:
                    value, form = round(value, 6), "" if value % 1 else ".0f"
                filled += format(value, form or "")
    except ValueError as error:
        raise UserError(f"{error} in {template!r:.80} (double a brace that is meant as text)") from None
    return filled


def look_up(name: str, values: Values) -> Any:
    """The value of `slot` or `slot.field`."""
    slot, _, field = name.partition(".")
    if slot not in values:
        raise UserError(f"unknown slot {slot!r}{near(slot, values)}")
    fields = values[slot] if isinstance(values[slot], dict) else {"": values[slot]}
    if field not in fields:
        raise UserError(f"no value {name!r}; the fields of {slot}: {', '.join(filter(None, fields)) or 'none'}")
    return fields[field]


def expression(text: object) -> ast.expr:
    try:
        return ast.parse(str(text), mode="eval").body
    except (SyntaxError, ValueError):
        raise UserError(f"{text!r} is not an expression") from None


def calculate(node: ast.expr, values: Values) -> Any:
    try:
        return _value(node, values)
    except (ZeroDivisionError, TypeError, ValueError) as error:
        raise UserError(f"{ast.unparse(node)!r} cannot be computed: {error}") from None


def _value(node: ast.expr, values: Values) -> Any:
    """Walk the tree; what is not listed here is refused, so no name or attribute of Python is ever reached."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name() | ast.Attribute(value=ast.Name()):
            return look_up(ast.unparse(node), values)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, values)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left, values), _value(right, values))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*[_value(argument, values) for argument in arguments])
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in OPERATORS for op in ops):
            sides = [_value(side, values) for side in (left, *rest)]
            return all(OPERATORS[type(op)](*pair) for op, *pair in zip(ops, sides, sides[1:], strict=False))
    raise TypeError(
        f"{ast.unparse(node)} is not allowed (numbers, slots, + - * / // %, comparisons, min max round abs)"
    )
