"""A person's own prompts as dataset rows: JSONL, CSV, Parquet or a hub data set, split by question."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.data.sources import CODE_INSTRUCTION, GSM8K_INSTRUCTION, Row, dataset_row, from_hub, question_of
from src.evaluation.graders import check_dataset_row
from src.utils.common import UNGRADED, UserError, read_jsonl, sha256_file, sha256_text

GRADERS = ("numeric", "python_tests", "rubric", UNGRADED)
SUFFIXES = (".jsonl", ".csv", ".parquet")


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
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, kind):
        raise ValueError(f"found {type(found).__name__}")
    return found


def _conversation(value: Any) -> tuple[str, str, str]:
    """(system, prompt, answer) of a conversation with one question. Raises ValueError for another one."""
    messages = _as_json(value, list)
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
        raise ValueError("every message needs a role and a text as content")
    roles = [message.get("role") for message in messages]
    body = roles[1:] if roles[:1] == ["system"] else roles
    if body not in (["user"], ["user", "assistant"]):
        raise ValueError(f"one question is wanted, its roles are {', '.join(map(str, roles)) or 'none'}")
    by_role = {message["role"]: message["content"] for message in messages}
    return by_role.get("system", ""), by_role["user"], by_role.get("assistant", "")


def own_row(record: dict[str, Any], columns: Columns, source: str, domain: str) -> Row:
    """One record as a row. A numeric or code grader adds its answer-format instruction to the prompt.

    Raises:
        ValueError: what is wrong with the record, in words.
    """
    found = {k: v for k, v in record.items() if v is not None}
    texts = {}
    for name in ("prompt", "system", "reference", "grader"):
        column = getattr(columns, name)
        value = found.get(column, "")
        value = str(value) if name == "reference" and isinstance(value, int | float) else value
        if not isinstance(value, str):
            raise ValueError(f"{column} must be text, found {type(value).__name__}")
        texts[name] = value
    if columns.prompt in found:
        system, prompt, reference = texts["system"], texts["prompt"], texts["reference"]
    elif columns.messages in found:
        try:
            system, prompt, answer = _conversation(found[columns.messages])
        except ValueError as error:
            raise ValueError(f"{columns.messages}: {error}") from None
        system, reference = system or texts["system"], texts["reference"] or answer
    else:
        raise ValueError(
            f"no column {columns.prompt} or {columns.messages}; found {', '.join(map(str, record)) or 'none'}; "
            "name yours with --prompt_column or --messages_column"
        )
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    grader = texts["grader"] or UNGRADED
    if grader not in GRADERS:
        raise ValueError(f"unknown grader {grader!r}; known are {', '.join(GRADERS)}")
    if grader == "numeric":
        reference = reference.rpartition("####")[2]  # GSM8K's own answers end so
        if not reference.strip():
            raise ValueError(f"the numeric grader needs a number in the column {columns.reference}")
    try:
        arguments = _as_json(found.get(columns.grader_args) or "{}", dict)
    except ValueError as error:
        raise ValueError(f"{columns.grader_args} must be a JSON object: {error}") from None
    needed = {"python_tests": ["tests"], "rubric": ["groups", "pass_mark"]}.get(grader, [])
    if missing := [name for name in needed if name not in arguments]:
        raise ValueError(f"the {grader} grader needs {', '.join(missing)} in the column {columns.grader_args}")
    if isinstance(arguments.get("tests"), list):  # as MBPP has them
        arguments["tests"] = "\n".join(map(str, arguments["tests"]))
    instruction = {"numeric": GSM8K_INSTRUCTION, "python_tests": CODE_INSTRUCTION}.get(grader, "")
    row = dataset_row(
        source=source, domain=domain, split="train", system=system, prompt=prompt, instruction=instruction,
        reference=reference, grader=grader, grader_args=arguments,
    )  # fmt: skip
    if fault := check_dataset_row(row):
        raise ValueError(fault)
    return row


def _csv_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                where = f"{path}:{reader.line_num}"
                if None in record or None in record.values():
                    raise UserError(f"{where}: not as many fields as the header has ({', '.join(reader.fieldnames)})")
                yield where, {name: value for name, value in record.items() if value != ""}
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a Parquet file ({' '.join(str(error).split())[:120]})") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}, row {number}", record


def read_own_prompts(
    place: str, columns: Columns, domain: str, hub_split: str, hub_revision: str, flag: str
) -> tuple[list[Row], str, int]:
    """Rows of a file or hub data set, their origin in words, and how many were left out as exact repeats.

    Args:
        place: a path that ends in .jsonl, .csv or .parquet, or a hub id, `owner/name` or `owner/name:subset`.
        flag: the flag that named it, for error messages.

    Raises:
        UserError: it cannot be read, or a record is wrong; names file and line (or row), and the columns found.
    """
    path, rows = Path(place), []
    source = path.stem if path.suffix in SUFFIXES else place

    def complaint(record: dict[str, Any]) -> str | None:
        """Keep the record as a row, or say what is wrong with it."""
        try:
            rows.append(own_row(record, columns, source, domain))
        except ValueError as error:
            return str(error)
        return None

    def keep(records: Iterable[tuple[str, dict[str, Any]]]) -> None:
        for where, record in records:
            if wrong := complaint(record):
                raise UserError(f"{where}: {wrong}")

    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise UserError(f"{path}: no such file; name another with {flag}")
        if path.suffix == ".jsonl":
            read_jsonl(path, check=complaint)
        else:
            keep((_csv_records if path.suffix == ".csv" else _parquet_records)(path))
        origin = f"file {path} (sha256 {sha256_file(path)[:16]})"
    elif path.exists() or path.suffix in (".json", ".txt", ".tsv", ".xlsx", ".gz"):
        raise UserError(f"{place}: prompts are read from {', '.join(SUFFIXES)} or a hub data set; convert it")
    else:
        name, _, subset = place.partition(":")
        records, origin = from_hub(name, subset or None, hub_split, hub_revision, flag)
        keep((f"hub data set {place}, {hub_split} row {n}", record) for n, record in enumerate(records, start=1))
    if not rows:
        raise UserError(f"{place}: there are no rows in it; name another with {flag}")
    unique = {row["id"]: row for row in rows}
    return list(unique.values()), origin, len(rows) - len(unique)


def split_by_question(rows: list[Row], eval_fraction: float) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows: a function of each question's hash (case and blanks aside), so that added prompts
    move no other and a question asked twice stays on one side."""

    def held(row: Row) -> bool:
        question = " ".join(question_of(row).lower().split())
        return int(sha256_text(f"eval/{question}")[:8], 16) < eval_fraction * 2**32

    return [row for row in rows if not held(row)], [row | {"split": "eval"} for row in rows if held(row)]
