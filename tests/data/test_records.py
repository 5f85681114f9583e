"""Records of a file: whatever the format, the same records, and a mistake is named where it stands."""

import codecs
import contextlib
import gzip
import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from src.data.records import format_of, name_of, read_records
from src.data.sources import from_file, humaneval_rows, mbpp_rows
from src.utils.common import UserError

RECORDS = [{"prompt": "Who; what, when?", "reference": "1"}, {"prompt": 'A "b"\tc | d', "reference": "2"}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def table(delimiter):
    """A header and two rows, every cell in quotes."""
    rows = [list(RECORDS[0]), *(record.values() for record in RECORDS)]
    quoted = [[f'"{cell.replace(chr(34), 2 * chr(34))}"' for cell in row] for row in rows]
    return "".join(delimiter.join(row) + "\r\n" for row in quoted)


def read(path, text, wanted=("prompt", "messages")):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_records(path, wanted, "name yours"))


TEXTS = {
    "lines.jsonl": LINES,
    "marked.jsonl": codecs.BOM_UTF8 + LINES.encode(),
    "list_in_a_line.jsonl": json.dumps(RECORDS),
    "list.jsonl": "\n" + json.dumps(RECORDS, indent=2),
    "list.json": json.dumps(RECORDS),
    "marked.json": codecs.BOM_UTF8 + json.dumps(RECORDS, indent=2).encode(),
    "lines.json": LINES,
    "in_an_object.json": json.dumps({"version": 1.1, "tags": ["a"], "data": RECORDS}),
    "commas.csv": table(","),
    "semicolons.csv": codecs.BOM_UTF8 + table(";").encode(),
    "tabs.csv": table("\t"),
    "bars.csv": table("|"),
    "tabs.tsv": table("\t"),
    "blanks.csv": table(",").replace('"prompt","reference"', "prompt , reference"),
    "packed.jsonl.gz": gzip.compress(LINES.encode(), mtime=0),
    "packed.JSON.GZ": gzip.compress(json.dumps(RECORDS).encode()),
    "packed.csv.gz": gzip.compress(codecs.BOM_UTF8 + table(";").encode()),
    "packed.tsv.gz": gzip.compress(table("\t").encode()),
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_format_gives_the_same_records(tmp_path, name):
    found = read(tmp_path / name, TEXTS[name])
    assert [record for _, record in found] == RECORDS


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("lines.jsonl", ":2"), ("lines.json", ":2"), ("packed.jsonl.gz", ":2"), ("list.json", ", record 2"),
        ("list.jsonl", ", record 2"), ("in_an_object.json", ", record 2"), ("semicolons.csv", ":3"),
    ],
)  # fmt: skip
def test_every_record_has_its_place(tmp_path, name, where):
    assert read(tmp_path / name, TEXTS[name])[1][0] == f"{tmp_path / name}{where}"


def test_names():
    assert [format_of(path) for path in map(Path, ("a.jsonl", "a.b.JSONL.GZ", "a.CSV", "a.parquet"))] == [
        ".jsonl", ".jsonl", ".csv", ".parquet",
    ]  # fmt: skip
    assert {format_of(Path(name)) for name in ("a.txt", "a.gz", "a.parquet.gz", "owner/name", "a.jsonl.zst")} == {""}
    assert [name_of(Path(name)) for name in ("x/mine.jsonl", "mine.jsonl.gz", "mine.v2.csv")] == [
        "mine", "mine", "mine.v2",
    ]  # fmt: skip


def test_the_list_that_is_read_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="kd"):
        read(tmp_path / "a.json", json.dumps({"meta": {}, "Instances": RECORDS}))
    assert "a.json: its records are the list 'Instances'" in caplog.text


def test_an_object_with_the_column_is_one_record(tmp_path):
    """Its list of messages is no list of records."""
    talk = {"messages": [{"role": "user", "content": "Why?"}]}
    for name in ("a.json", "a.jsonl"):
        assert [record for _, record in read(tmp_path / name, json.dumps(talk))] == [talk]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", json.dumps([{"prompt": "a"}, "b"]), ", record 2: expected a JSON object, found str"),
        ("a.json", json.dumps({"a": RECORDS, "b": RECORDS}), ": it holds several lists of records (a, b); keep one"),
        ("a.json", json.dumps({"question": {"0": "a"}, "n": [1]}), ": a list of JSON objects is wanted, or an object"),
        ("a.json", '"prompt"', ": a list of JSON objects is wanted, found str"),
        ("a.json", '[\n{"prompt": "a"},\n{"prompt" "b"}]', ":3: not valid JSON"),
        ("a.json", '[\n{"prompt": NaN}]', ":2: NaN is not a number that can be kept"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "\\ud83d"}', ":2: half a character"),
        ("a.jsonl", '[{"prompt": "a"},\n{"prompt": 1e999}]', ":2: 1e999 is not a number"),
        ("a.jsonl", '[{"role": "user"}]\n[{"role": "user"}]\n', ":1: expected a JSON object, found list"),
        ("a.json", "[", ":1: not valid JSON"),
        ("a.json", '{"prompt": "a"}'.encode("utf-16"), ": UTF-16 text; save the file as UTF-8"),
        ("a.csv", "prompt\nWhy?\n".encode("utf-16"), ": UTF-16 text; save the file as UTF-8"),
        ("a.csv", b"prompt\n\xe4\n", ": not UTF-8 text"),
        ("a.csv", gzip.compress(b"prompt\nWhy?\n", mtime=0), ": packed with gzip; unpack it"),
        ("a.csv.gz", gzip.compress(b"prompt\nWhy?\n", mtime=0)[:-5], ": cannot be unpacked ("),
        ("a.csv", "question;gold\na;b\n",
         ":2: no column prompt or messages; found question, gold, separated by ';' (semicolon); name yours"),
        ("a.tsv", "prompt,gold\na,b\n", ":2: no column prompt or messages; found prompt,gold, separated by tab"),
        ("a.csv", "prompt;gold\na\n", ":2: not as many fields as the header has (prompt, gold)"),
        ("a.csv", "prompt;gold;gold\na;1;2\n", ":2: the column gold stands twice in the header"),
        ("a.csv", 'prompt\n"a" b\n', ":2: not valid CSV"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_where_it_breaks(tmp_path, name, text, words):
    with pytest.raises(UserError) as caught:
        read(tmp_path / name, text)
    assert str(caught.value).startswith(f"{tmp_path / name}{words}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.json.gz"])
def test_an_empty_file_has_no_records(tmp_path, name):
    assert read(tmp_path / name, gzip.compress(b"\n", mtime=0) if name.endswith(".gz") else "\n") == []


def test_a_delimiter_in_a_name_is_no_delimiter(tmp_path):
    """The header is cut where the asked-for column stands in it, not where it has the most columns."""
    text = "a;b,prompt\n1;2,Why?\n"
    assert read(tmp_path / "a.csv", text)[0][1] == {"a;b": "1;2", "prompt": "Why?"}
    assert read(tmp_path / "a.csv", text, wanted=("b,prompt",))[0][1] == {"a": "1", "b,prompt": "2,Why?"}


def test_columns_without_a_name_may_stand_behind_the_others(tmp_path):
    """As a workbook leaves them."""
    assert read(tmp_path / "a.csv", "prompt,,\nWhy?,,\n")[0][1]["prompt"] == "Why?"


def test_the_official_files_as_they_are_published(tmp_path, humaneval):
    """HumanEval is packed, sanitized MBPP is a JSON list that names its imports and its text otherwise."""
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in humaneval).encode()))
    records, origin = from_file(str(packed), ("task_id", "prompt"))
    assert humaneval_rows(records, "train") == humaneval_rows(humaneval, "train")
    assert origin.startswith(f"file {packed} (sha256 ")
    sanitized = tmp_path / "sanitized-mbpp.json"
    problem = {"task_id": 11, "prompt": "Write f.", "code": "def f(): ...", "test_imports": ["import math"],
               "test_list": ["assert f() == math.pi"]}  # fmt: skip
    sanitized.write_text(json.dumps([problem, {"task_id": 12}]))
    with pytest.raises(UserError, match=r"sanitized-mbpp\.json, record 2: missing code, test_list; found task_id"):
        from_file(str(sanitized), ("task_id", "code", "test_list"))
    [row] = mbpp_rows([problem], "eval")
    assert json.loads(row["grader_args"])["setup"] == "import math"
    sanitized.write_text("[]")
    with pytest.raises(UserError, match=r"sanitized-mbpp\.json: the file holds no rows"):
        from_file(str(sanitized), ("task_id",))


@pytest.mark.parametrize("line", ["sep=;\n", "sep=;\r\n"])
def test_the_line_that_excel_puts_before_the_header(tmp_path, line):
    text = f"{line}prompt;reference\nHow many, 1 or 2?;18\n;\nAnd now?;5\n;\n"
    records = read(tmp_path / "a.csv", text)
    assert [record for _, record in records] == [
        {"prompt": "How many, 1 or 2?", "reference": "18"}, {"prompt": "And now?", "reference": "5"},
    ]  # fmt: skip
    assert records[1][0] == f"{tmp_path / 'a.csv'}:5"


def test_blanks_before_quoted_cells(tmp_path):
    text = '"prompt", "reference", "grader"\n"One, or two?", "18", "numeric"\n'
    [(_, record)] = read(tmp_path / "a.csv", text)
    assert record == {"prompt": "One, or two?", "reference": "18", "grader": "numeric"}


def test_several_marks_before_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(codecs.BOM_UTF8 * 2 + b'{"prompt": "a"}\n')
    assert [record for _, record in read_records(path, ("prompt",))] == [{"prompt": "a"}]


def test_short_floats_of_parquet_are_what_was_written(tmp_path):
    table = pyarrow.table({"prompt": ["a"], "reference": pyarrow.array([0.1], pyarrow.float32())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    [(_, record)] = read_records(tmp_path / "a.parquet", ("prompt",))
    assert record["reference"] == "0.1"


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [f"What is {i}?" for i in range(500)]}), path)
    whole = path.read_bytes()
    for place in range(4, len(whole) - 200, 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with contextlib.suppress(UserError):  # anything else would be a traceback
            list(read_records(path, ("prompt",)))


def test_mbpp_as_a_table_is_refused(tmp_path):
    """Its lists have become text there; one test a letter would be run."""
    path = tmp_path / "mbpp.csv"
    path.write_text("task_id,text,code,test_list\n11,Write f.,def f(): pass,\"['assert f() is None']\"\n")
    records, _ = from_file(str(path), ("task_id", "code", "test_list"))
    with pytest.raises(UserError, match="MBPP task 11: test_list must be a list of texts; bring the JSONL file"):
        mbpp_rows(records, "eval")


def test_an_official_file_with_holes_is_one_line(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    for answer, words in (("null", "missing answer"), ("18", "answer must be text, found int")):
        path.write_text(f'{{"question": "How many?", "answer": {answer}}}\n')
        with pytest.raises(UserError, match=f"gsm8k.jsonl:1: {words}"):
            from_file(str(path), ("question", "answer"))
