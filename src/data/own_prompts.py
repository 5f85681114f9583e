"""A person's own prompts as dataset rows, out of a file (see `records`) or a hub data set; split by question."""

import decimal
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from src.data.records import READ_FROM, format_of, name_of, read_records
from src.data.sources import CODE_INSTRUCTION, GSM8K_INSTRUCTION, from_hub, split_revision
from src.grading.graders import check_dataset_row
from src.grading.rows import UNGRADED, Row, dataset_row, question_of
from src.utils.common import UserError, logger, parse_json, sha256_file, sha256_text

GRADERS = ("numeric", "python_tests", "rubric", UNGRADED)
INSTRUCTIONS = {"numeric": GSM8K_INSTRUCTION, "python_tests": CODE_INSTRUCTION}
NEEDED = {"python_tests": ("tests",), "rubric": ("groups", "pass_mark")}  # in grader_args
NAME_COLUMNS = "name yours with --prompt_column or --messages_column"
OTHER_FORMATS = (".txt", ".xlsx", ".xls", ".gz", ".zip", ".zst", ".xz", ".bz2", ".ndjson", ".arrow")


@dataclass(frozen=True)
class Columns:
    """Which column holds what; only a prompt or messages must be there."""

    prompt: str = "prompt"
    messages: str = "messages"
    system: str = "system"
    reference: str = "reference"
    grader: str = "grader"
    grader_args: str = "grader_args"


def _as_json(value: Any, kind: type) -> Any:
    """`value`, or what its text says in JSON (a CSV has only text). Raises ValueError for anything but `kind`."""
    found = parse_json(value) if isinstance(value, str) else value
    if not isinstance(found, kind):
        raise ValueError(f"found {type(found).__name__}")
    return found


def _conversation(value: Any) -> tuple[str, str, str]:
    """(system, prompt, answer) of a conversation with one question. Raises ValueError for another one."""
    messages = _as_json(value, list)
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        raise ValueError("every message needs a role and a text as content")
    roles = [message.get("role") for message in messages]
    # ["system", "user", "assistant"] -> ["user", "assistant"]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if body not in (["user"], ["user", "assistant"]):
        raise ValueError(f"one question is wanted, its roles are {', '.join(map(str, roles)) or 'none'}")
    by_role = {message["role"]: message["content"] for message in messages}
    return by_role.get("system", ""), by_role["user"], by_role.get("assistant", "")


def _is_missing(value: Any) -> bool:
    """Whether a record has no value there: Parquet files written by pandas say NaN for that."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _texts(record: dict[str, Any], columns: Columns) -> dict[str, str]:
    """The columns of text, a missing one empty. A reference may be a number. Raises ValueError for anything else."""
    texts = {}
    for name in ("prompt", "system", "reference", "grader"):
        column = getattr(columns, name)
        value = record.get(column, "")
        # True is an int to Python, and no reference
        if name == "reference" and isinstance(value, int | float | decimal.Decimal) and not isinstance(value, bool):
            # an int may be too large for a float, and is finite
            if not isinstance(value, int) and not math.isfinite(value):
                raise ValueError(f"{column} is {value}; put a finite number, or leave it out")
            value = str(value)
        if not isinstance(value, str):
            kinds = "text or a number" if name == "reference" else "text"
            raise ValueError(f"{column} must be {kinds}, found {type(value).__name__}")
        texts[name] = value
    return texts


def _arguments(record: dict[str, Any], columns: Columns, grader: str) -> dict[str, Any]:
    """What the grader needs besides the reference. Raises ValueError where something is missing or no JSON."""
    try:
        given = _as_json(record.get(columns.grader_args) or "{}", dict)
        said = {}
        for name, value in given.items():
            if value is not None:  # a Parquet struct names in each record what any record has
                said[name] = value
        # there and back: what could not be stored as JSON is refused here, with its place
        arguments = parse_json(json.dumps(said))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{columns.grader_args} must be a JSON object: {error}") from None
    missing = [name for name in NEEDED.get(grader, ()) if name not in arguments]
    if missing:
        raise ValueError(f"the {grader} grader needs {', '.join(missing)} in the column {columns.grader_args}")
    if isinstance(arguments.get("tests"), list):  # as MBPP has them
        arguments["tests"] = "\n".join(map(str, arguments["tests"]))
    return arguments


def own_row(record: dict[str, Any], columns: Columns, source: str, domain: str, grader: str = "") -> Row:
    """One record as a row. A numeric or code grader adds its answer-format instruction to the prompt.

    Args:
        grader: of a record that names none.

    Raises:
        ValueError: what is wrong with the record, in words.
    """
    # 1. system, prompt and reference, from a column each or from a conversation
    found = {name: value for name, value in record.items() if not _is_missing(value)}
    texts = _texts(found, columns)
    if columns.prompt in found:
        system, prompt, reference = texts["system"], texts["prompt"], texts["reference"]
    elif columns.messages in found:
        try:
            system, prompt, answer = _conversation(found[columns.messages])
        except ValueError as error:
            raise ValueError(f"{columns.messages}: {error}") from None
        # what a column says goes before the conversation's answer
        system, reference = system or texts["system"], texts["reference"] or answer
    else:
        # why there is neither: the column is empty, or its name is another
        wanted = f"{columns.prompt} or {columns.messages}"
        if columns.prompt in record or columns.messages in record:
            wanted += " with something in it"
        names = ", ".join(map(str, record)) or "none"
        raise ValueError(f"no column {wanted}; found {names}; {NAME_COLUMNS}")
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    # 2. the grader: the record's own, the one named for all, or none
    grader = texts["grader"].strip() or grader or UNGRADED
    if grader not in GRADERS:
        raise ValueError(f"unknown grader {grader!r}; known are {', '.join(GRADERS)}")
    # 3. what it needs: "6 x 7 = 42\n#### 42" -> " 42"; a text without the mark stays whole
    if grader == "numeric":
        reference = reference.rpartition("####")[2]  # GSM8K's own answers end so
        if not reference.strip():
            raise ValueError(f"the numeric grader needs a number in the column {columns.reference}")
    row = dataset_row(
        source=source, domain=domain, split="train", system=system, prompt=prompt, reference=reference, grader=grader,
        instruction=INSTRUCTIONS.get(grader, ""), grader_args=_arguments(found, columns, grader),
    )  # fmt: skip
    if fault := check_dataset_row(row):
        raise ValueError(fault)
    return row


def _records(
    place: str, columns: Columns, hub_split: str, flag: str
) -> tuple[str, str, Iterable[tuple[str, dict[str, Any]]]]:
    """The name of a file or hub data set, its origin in words, and its records with the place where each stands."""
    path = Path(place)
    # a name that ends like a file is one, also where it is not there: no hub is asked for it
    if format_of(path):
        if not path.is_file():
            raise UserError(f"{path}: no such file; name another with {flag}")
        origin = f"file {path} (sha256 {sha256_file(path)[:16]})"
        return name_of(path), origin, read_records(path, (columns.prompt, columns.messages), NAME_COLUMNS)
    if path.exists() or path.suffix.lower() in OTHER_FORMATS:
        raise UserError(f"{place}: prompts are read from {READ_FROM} or a hub data set; convert it")
    source, revision = split_revision(place)  # rows keep their source's name whatever it is pinned to
    name, _, subset = source.partition(":")
    found, origin = from_hub(name, subset or None, hub_split, revision, flag)
    return source, origin, _numbered(found, f"hub data set {place}, {hub_split} row")


def _numbered(records: Iterable[dict[str, Any]], what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, record in enumerate(records, start=1):
        yield f"{what} {number}", record


def read_own_prompts(
    place: str, columns: Columns, domain: str, hub_split: str, flag: str, grader: str = ""
) -> tuple[list[Row], str, int]:
    """Rows of a file or hub data set, their origin in words, and how many were left out as exact repeats.

    Args:
        place: a path that ends as `READ_FROM` says, or a hub id, `owner/name[:subset][@revision]`.
        flag: the flag that named it, for error messages.
        grader: of the records that name none.

    Raises:
        UserError: it cannot be read, or a record is wrong; names file and line (or record), and the columns found.
    """
    source, origin, records = _records(place, columns, hub_split, flag)
    rows, unread = [], {}
    for where, record in records:
        # a set that keeps the order of the columns
        unread |= dict.fromkeys(name for name in record if name not in astuple(columns))
        try:
            rows.append(own_row(record, columns, source, domain, grader))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None
    if not rows:
        raise UserError(f"{place}: there are no rows in it; name another with {flag}")
    unique = {row["id"]: row for row in rows}  # an id hashes all that a row says
    if unread:
        logger.info("%s: columns that are not read: %s", place, ", ".join(map(str, unread)))
    if len(unique) < len(rows):
        logger.info("%s: %d rows say the same as others and are left out", place, len(rows) - len(unique))
    return list(unique.values()), origin, len(rows) - len(unique)


def split_by_question(rows: list[Row], eval_fraction: float) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows: a function of each question's hash (case and blanks aside), so that added prompts
    move no other and a question asked twice stays on one side."""

    def held(row: Row) -> bool:
        question = " ".join(question_of(row).lower().split())
        # 8 hex digits: a number spread evenly over 0 to 2**32
        return int(sha256_text(f"eval/{question}")[:8], 16) < eval_fraction * 2**32

    return [row for row in rows if not held(row)], [row | {"split": "eval"} for row in rows if held(row)]
