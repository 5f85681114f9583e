"""Records of a file that a person brings: JSON Lines, JSON, CSV, TSV or Parquet, each with its place in the file."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from src.utils.common import UnwritableJSON, UserError, json_lines, logger, open_text, parse_json, read_text

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
READ_FROM = ".jsonl, .json, .csv, .tsv (any of these also as .gz), .parquet"  # for those who brought something else
DELIMITERS = {",": "',' (comma)", ";": "';' (semicolon)", "\t": "tab", "|": "'|' (bar)"}

SEPARATOR_LINE = re.compile(r"sep=([,;\t|])\r?\n")  # "sep=;", which Excel writes and reads before the header

Record = dict[str, Any]


def format_of(path: Path) -> str:
    """What a file holds by its name, `.jsonl` for mine.jsonl and Mine.JSONL.gz; empty for what is not read."""
    packed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem).suffix.lower() if packed else path.suffix.lower()  # "Mine.JSONL.gz" -> ".jsonl"
    if suffix not in FORMATS or (packed and suffix == ".parquet"):  # Parquet packs itself
        return ""
    return suffix


def name_of(path: Path) -> str:
    """A file's name without what says its format: `mine` for mine.jsonl and mine.jsonl.gz."""
    # "mine.jsonl.gz" -> "mine.jsonl" -> "mine"
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def read_records(path: Path, wanted: Sequence[str], hint: str = "") -> Iterator[tuple[str, Record]]:
    """Every record and the place where it stands, in words (`mine.jsonl:7`, `mine.json, record 7`).

    Args:
        path: its name says what it holds (see `format_of`); one that says nothing is read as JSON Lines.
        wanted: names of columns. One that has any of them is what tells a header's delimiter, and a single record.
        hint: what to do where a header has none of them.

    Raises:
        UserError: there is no such file, or it is broken; names file and line, or record.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    kind = format_of(path)
    if kind == ".parquet":
        yield from _parquet_records(path)
    elif kind == ".csv":
        yield from _table_records(path, list(DELIMITERS), wanted, hint)
    elif kind == ".tsv":
        yield from _table_records(path, ["\t"], wanted, hint)
    elif kind == ".json" or _begins_a_list(path):
        yield from _json_records(path, wanted)
    else:
        yield from _line_records(path)


def _begins_a_list(path: Path) -> bool:
    with open_text(path) as file:
        start = file.read(4096)  # bytes, for a byte order mark may come first
    return start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _line_records(path: Path) -> Iterator[tuple[str, Record]]:
    for number, record in json_lines(path):
        yield f"{path}:{number}", record


def _json_records(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, Record]]:
    """The records of a JSON list, or of an object with one such list in it; of JSON Lines under that name."""
    text = read_text(path)
    if not text.strip():
        return
    try:
        whole = parse_json(text)
    except UnwritableJSON as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None
    except json.JSONDecodeError as error:
        # its first line is JSON by itself: JSON Lines under another name
        if not _is_json(text.lstrip().partition("\n")[0]):
            raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); mend it there") from None
        yield from _line_records(path)
        return
    for number, record in enumerate(_list_in(path, whole, wanted), start=1):
        where = f"{path}, record {number}"
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}")
        yield where, record


def _is_json(line: str) -> bool:
    """Whether a line is JSON by itself."""
    try:
        parse_json(line)
    except json.JSONDecodeError:
        return False
    return True


def _list_in(path: Path, whole: Any, wanted: Sequence[str]) -> list[Any]:
    """The list of records that a JSON file holds: all of it, the one in its object, or its one record."""
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict):
        raise UserError(f"{path}: a list of JSON objects is wanted, found {type(whole).__name__}")
    if any(name in whole for name in wanted):  # an object with a prompt in it
        return [whole]
    lists = []
    for name, value in whole.items():
        if isinstance(value, list) and any(isinstance(record, dict) for record in value):
            lists.append(name)
    if len(lists) > 1:
        raise UserError(f"{path}: it holds several lists of records ({', '.join(lists)}); keep one of them in the file")
    if not lists:
        names = ", ".join(list(whole)[:10]) or "no keys"
        raise UserError(f"{path}: a list of JSON objects is wanted, or an object that holds one; found {names}")
    logger.info("%s: its records are the list %r", path, lists[0])
    return whole[lists[0]]


def _columns(text: str, delimiter: str) -> list[str]:
    """The names in a table's header, cut at this delimiter; none where it cannot be cut so."""
    # newline: the reader must see the ends of lines inside quotes; strict: a broken quote is an error
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        return [name.strip() for name in next(lines, [])]
    except csv.Error:
        return []


def _delimiter(text: str, delimiters: Sequence[str], wanted: Sequence[str]) -> str:
    """The first delimiter under which a wanted column stands in the header; else the one with the most columns."""
    for delimiter in delimiters:
        if any(name in _columns(text, delimiter) for name in wanted):
            return delimiter
    return max(delimiters, key=lambda delimiter: len(_columns(text, delimiter)))


def _check_header(where: str, names: Sequence[str], delimiter: str, wanted: Sequence[str], hint: str) -> None:
    """Raise a UserError unless a wanted column is there, and every column once."""
    found = f"{', '.join(names)}, separated by {DELIMITERS[delimiter]}"
    if not any(name in names for name in wanted):
        raise UserError(f"{where}: no column {' or '.join(wanted)}; found {found}; {hint}")
    for name in names:
        if name and names.count(name) > 1:  # a workbook leaves columns without a name behind its own
            raise UserError(f"{where}: the column {name} stands twice in the header ({found}); rename one")


def _table_records(
    path: Path, delimiters: Sequence[str], wanted: Sequence[str], hint: str
) -> Iterator[tuple[str, Record]]:
    """The rows under a header; an empty cell is None."""
    csv.field_size_limit(2**31 - 1)  # by itself Python refuses a field of more than 131,072 characters
    text, skipped = read_text(path), 0
    said = SEPARATOR_LINE.match(text)
    if said:
        text, skipped, delimiters = text[said.end() :], 1, [said[1]]
    delimiter = _delimiter(text, delimiters, wanted)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
        for record in reader:
            where = f"{path}:{reader.line_num + skipped}"
            if not any(record.values()):  # workbooks leave rows of empty cells behind their own
                continue
            _check_header(where, names, delimiter, wanted, hint)
            # DictReader's words: surplus fields are under None, missing ones are None
            if None in record or None in record.values():
                raise UserError(f"{where}: not as many fields as the header has ({', '.join(names)})")
            yield where, {name: value or None for name, value in record.items()}
    except csv.Error as error:
        line = reader.reader.line_num + skipped  # the other reader's is that of the row before
        raise UserError(f"{path}:{line}: not valid CSV ({error})") from None


def _parquet_records(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        for index, column in enumerate(table.schema):
            if column.type in (pyarrow.float16(), pyarrow.float32()):  # 0.1 would become 0.10000000149011612
                table = table.set_column(index, column.name, table.column(index).cast(pyarrow.string()))
        records = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not a Parquet file ({' '.join(str(error).split())[:120]})") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}, row {number}", record
