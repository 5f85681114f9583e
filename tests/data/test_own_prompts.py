"""A person's own prompts: every format gives the same rows, and a mistake is named where it stands."""

import csv
import datetime
import decimal
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from src.data import own_prompts
from src.data.own_prompts import Columns, read_own_prompts, split_by_question
from src.data.sources import CODE_INSTRUCTION, GSM8K_INSTRUCTION
from src.grading.rows import question_of
from src.utils.common import UserError

RECORDS = [
    {"prompt": "Name a colour.\n\nOne word.", "system": "Be brief."},
    {"prompt": 'What is "6", times 7?', "reference": "42", "grader": "numeric"},
    {"prompt": "Write f.", "grader": "python_tests", "grader_args": {"tests": "assert f()", "entry_point": "f"}},
]


def write(path, records):
    if path.suffix == ".gz":
        plain = write(path.with_suffix(""), records)
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    elif path.suffix == ".parquet":
        names = list(dict.fromkeys(name for record in records for name in record))
        columns = {name: [record.get(name) for record in records] for name in names}
        pyarrow.parquet.write_table(pyarrow.Table.from_pydict(columns), path)
    else:
        names = list(dict.fromkeys(name for record in records for name in record))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            for record in records:
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()})
    return path


def read(path, grader="", **columns):
    return read_own_prompts(str(path), Columns(**columns), "support", "train", "--prompts_file", grader)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    records = [record | {"grader_args": json.dumps(record.get("grader_args", {}))} for record in RECORDS]
    rows, origin, repeats = read(write(tmp_path / f"tickets{suffix}", [*records, records[0]]))
    assert repeats == 1
    assert f"tickets{suffix} (sha256" in origin
    added = ("", f"\n\n{GSM8K_INSTRUCTION}", f"\n\n{CODE_INSTRUCTION}")
    assert [row["prompt"] for row in rows] == [r["prompt"] + more for r, more in zip(RECORDS, added, strict=True)]
    assert [question_of(row) for row in rows] == [record["prompt"] for record in RECORDS]
    assert [row["grader"] for row in rows] == ["none", "numeric", "python_tests"]
    assert {(row["source"], row["domain"]) for row in rows} == {("tickets", "support")}
    assert (rows[0]["system"], rows[1]["reference"]) == ("Be brief.", "42")
    assert json.loads(rows[2]["grader_args"]) == {"tests": "assert f()", "entry_point": "f"}


def test_conversations_and_other_column_names(tmp_path):
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
    answered = [*talk, {"role": "assistant", "content": "Good day."}]
    for suffix in (".jsonl", ".csv", ".parquet"):
        path = write(tmp_path / f"talks{suffix}", [{"chat": talk, "gold": 5}, {"chat": answered, "gold": None}])
        rows, _, _ = read(path, messages="chat", reference="gold")
        assert [(row["system"], row["prompt"]) for row in rows] == [("Be kind.", "Hello?")] * 2
        assert [row["reference"] for row in rows] == ["5", "Good day."] if suffix != ".csv" else ["5", "null"]


@pytest.mark.parametrize(("record", "words"), [
    ({"question": "Why?"}, "no column prompt or messages; found question; name yours with --prompt_column"),
    ({"prompt": 5}, "prompt must be text, found int"),
    ({"prompt": "  "}, "the prompt is empty"),
    ({"prompt": "a", "grader": "vibes"}, "unknown grader 'vibes'; known are numeric, python_tests, rubric, none"),
    ({"prompt": "a", "grader": "numeric"}, "the numeric grader needs a number in the column reference"),
    ({"prompt": "a", "grader": "rubric"}, "the rubric grader needs groups, pass_mark in the column grader_args"),
    ({"prompt": "a", "grader_args": "{"}, "grader_args must be a JSON object"),
    ({"prompt": "a", "grader": "numeric", "reference": "42 apples"}, "reference '42 apples' is not a number; mend it"),
    ({"prompt": "a", "grader": "python_tests", "grader_args": {"tests": 5}}, "python_tests needs tests, as text"),
    ({"prompt": "a", "grader": "rubric", "grader_args": {"groups": [["ink"]], "pass_mark": 1}}, "a rubric needs"),
    ({"prompt": "a", "grader": "rubric", "grader_args": {"groups": [{"name": "x", "any": ["ink"]}], "pass_mark": "1"}},
     "a rubric needs a pass_mark and groups, each with a name and phrases in 'any'"),
    ({"messages": "hello"}, "messages: "),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                   {"role": "user", "content": "c"}]}, "one question is wanted, its roles are user, assistant, user"),
])  # fmt: skip
def test_a_wrong_record_is_named_by_its_line(tmp_path, record, words):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "Fine?"}\n\n' + json.dumps(record) + "\n")
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert words in str(error.value)


def test_references_and_tests_as_the_public_sets_have_them(tmp_path):
    tests = {"tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
    path = write(tmp_path / "mine.jsonl", [
        {"prompt": "5 and 37?", "grader": "numeric", "reference": "5 + 37 = 42\n#### 42"},
        {"prompt": "Write add.", "grader": "python_tests", "reference": "def add(a, b): ...", "grader_args": tests},
    ])  # fmt: skip
    number, code = read(path)[0]
    assert number["reference"].strip() == "42"
    assert json.loads(code["grader_args"])["tests"] == "assert add(1, 2) == 3\nassert add(0, 0) == 0"


@pytest.mark.parametrize(("name", "text", "words"), [
    ("a.csv", 'prompt,reference\n"Two\nlines",1\nthree\n', "a.csv:4: not as many fields as the header has"),
    ("a.csv", "question\nWhy?\n", "a.csv:2: no column prompt or messages; found question"),
    ("a.csv", "prompt\n", "there are no rows in it"),
    ("a.parquet", "not parquet", "a.parquet: not a Parquet file"),
    ("a.json", "[]", "there are no rows in it; name another with --prompts_file"),
    ("a.txt", "[]", "prompts are read from .jsonl, .json, .csv, .tsv (any of these also as .gz), .parquet or a hub"),
    ("a.gz", "[]", "prompts are read from .jsonl"),
    ("a.json", '[{"prompt": "Fine?"}, {"prompt": ""}]', "a.json, record 2: the prompt is empty"),
    ("a.csv", "question;gold\nWhy?;1\n", "found question, gold, separated by ';' (semicolon); name yours with"),
    ("a.jsonl", "{\n", "a.jsonl:1: not valid JSON"),
])  # fmt: skip
def test_a_wrong_file_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert words in str(error.value)


def test_a_grader_is_named_once_for_all(tmp_path):
    """As GSM8K writes them; a record's own grader column wins."""
    path = write(tmp_path / "train.jsonl", [
        {"question": "5 and 37?", "answer": "5 + 37 = <<5+37=42>>42\n#### 42"},
        {"question": "A colour?", "answer": "red", "grader": "none"},
    ])  # fmt: skip
    rows, _, _ = read(path, "numeric", prompt="question", reference="answer")
    assert [(row["grader"], row["reference"].strip()) for row in rows] == [("numeric", "42"), ("none", "red")]
    assert [row["prompt"] for row in rows] == [f"5 and 37?\n\n{GSM8K_INSTRUCTION}", "A colour?"]
    with pytest.raises(UserError, match=r"train\.jsonl:1: the numeric grader needs a number in the column gold"):
        read(path, "numeric", prompt="question", reference="gold")
    code = write(tmp_path / "code.json", [{"prompt": "Write f.", "grader_args": {"tests": ["assert f()"]}}])
    [row] = read(code, "python_tests")[0]
    assert (row["grader"], row["prompt"]) == ("python_tests", f"Write f.\n\n{CODE_INSTRUCTION}")
    with pytest.raises(UserError, match=r"code\.json, record 1: the rubric grader needs groups, pass_mark"):
        read(code, "rubric")
    phrases = json.dumps({"groups": [{"name": "ink", "any": ["ink"]}], "pass_mark": 1})
    marked = write(tmp_path / "marked.csv", [{"prompt": "Black water?", "grader_args": phrases}])
    assert [row["grader"] for row in read(marked, "rubric")[0]] == ["rubric"]


def test_references_that_are_numbers(tmp_path):
    """JSON has 18 and 18.0; Parquet has decimals besides, and says NaN for what is missing."""
    path = write(tmp_path / "a.json", [{"prompt": f"{n}?", "reference": n} for n in (18, 18.0, -3, 2.5, 10**20)])
    assert [row["reference"] for row in read(path, "numeric")[0]] == ["18", "18.0", "-3", "2.5", str(10**20)]
    path = write(tmp_path / "a.json", [{"prompt": "Is it?", "reference": True}])
    with pytest.raises(UserError, match="record 1: reference must be text or a number, found bool"):
        read(path)
    path = write(tmp_path / "a.parquet", [{"prompt": f"{n}?", "reference": n} for n in (18.0, float("nan"))])
    assert [row["reference"] for row in read(path)[0]] == ["18.0", ""]
    with pytest.raises(UserError, match=r"a\.parquet, row 2: the numeric grader needs a number"):
        read(path, "numeric")
    path = write(tmp_path / "a.parquet", [{"prompt": "1?", "reference": float("inf")}])
    with pytest.raises(UserError, match="row 1: reference is inf; put a finite number"):
        read(path)
    path = write(tmp_path / "a.parquet", [{"prompt": "1?", "reference": decimal.Decimal("1.50")}])
    assert [row["reference"] for row in read(path, "numeric")[0]] == ["1.50"]


def test_nan_in_a_column_of_text_is_nothing(tmp_path):
    """pandas writes it for what is missing, where a column holds nothing else."""
    nothing = {name: float("nan") for name in ("system", "grader", "grader_args", "messages")}
    path = write(tmp_path / "a.parquet", [{"prompt": "Why?"} | nothing])
    [row] = read(path)[0]
    assert (row["system"], row["grader"], row["reference"]) == ("", "none", "")
    with pytest.raises(UserError, match=r"row 1: no column messages or system with something in it; found prompt"):
        read(path, prompt="messages", messages="system")


def test_what_a_parquet_struct_does_not_say_is_left_out(tmp_path):
    """Its records all have the same keys, and None where one has no such key."""
    rubric = {"groups": [{"name": "ink", "any": ["ink"]}], "pass_mark": 1.0, "tests": None, "entry_point": None}
    code = {"groups": None, "pass_mark": None, "tests": "assert f()", "entry_point": None}
    records = [{"prompt": "Ink?", "grader": "rubric", "grader_args": rubric},
               {"prompt": "Write f.", "grader": "python_tests", "grader_args": code}]  # fmt: skip
    rows = read(write(tmp_path / "a.parquet", records))[0]
    assert [json.loads(row["grader_args"]).keys() for row in rows] == [
        {"groups", "pass_mark"}, {"tests"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ('{"groups": [{"name": "x", "any": ["ink"]}], "pass_mark": NaN}', "NaN is not a number that can be kept"),
        ('{"groups": [{"name": "x", "any": ["ink"]}], "pass_mark": 1e999}', "1e999 is not a number that can be kept"),
        ('{"groups": [{"name": "x", "any": ["\\ud83d"]}], "pass_mark": 1}', "half a character (lone surrogate)"),
    ],
)
def test_grader_arguments_that_could_not_be_written(tmp_path, arguments, words):
    """In JSON, and as text in JSON or a CSV."""
    record = {"prompt": "Ink?", "grader": "rubric", "grader_args": arguments}
    text = f'{{"prompt": "Ink?", "grader": "rubric", "grader_args": {arguments}}}\n'
    (tmp_path / "a.jsonl").write_text(text)
    for path, where in ((tmp_path / "a.jsonl", ":1"), (write(tmp_path / "b.jsonl", [record]), ":1"),
                        (write(tmp_path / "a.csv", [record]), ":2")):  # fmt: skip
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}{where}: ")
        assert words in str(caught.value)


def test_records_of_a_hub_are_python_objects(monkeypatch):
    """NaN in a struct and a date are no JSON."""
    given = {"value": 1}

    def from_hub(*_):
        return [{"prompt": "Ink?", "reference": float("nan"), "grader_args": {"x": given["value"]}}], "hub"

    monkeypatch.setattr(own_prompts, "from_hub", from_hub)
    assert read("some/set")[0][0]["reference"] == ""
    for value in (float("nan"), datetime.date(2025, 1, 1)):
        given["value"] = value
        with pytest.raises(UserError, match=r"some/set, train row 1: grader_args must be a JSON object: "):
            read("some/set")


def test_a_prompt_that_stands_as_it_is_keeps_its_last_paragraph():
    """Only the instruction that the row names is no part of the question."""
    row = {"prompt": "One.\n\nTwo."}
    assert question_of(row) == question_of(row | {"instruction": ""}) == "One.\n\nTwo."
    assert question_of(row | {"instruction": "Two."}) == "One."


def test_a_missing_file_and_a_row_of_parquet(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: no such file; name another with --prompts_file"):
        read(tmp_path / "none.csv")
    path = write(tmp_path / "a.parquet", [{"prompt": "Fine?"}, {"prompt": ""}])
    with pytest.raises(UserError, match=r"a\.parquet, row 2: the prompt is empty"):
        read(path)


@pytest.mark.parametrize(("place", "name", "subset", "revision"), [
    ("some/talks:small", "some/talks", "small", "main"),
    ("some/talks", "some/talks", None, "main"),
    ("some/talks:small@v1.2", "some/talks", "small", "v1.2"),
    ("some/talks@0123abc", "some/talks", None, "0123abc"),
])  # fmt: skip
def test_a_hub_data_set_is_asked_for_its_split_subset_and_revision(monkeypatch, place, name, subset, revision):
    given = [{"prompt": "Why?"}]

    def from_hub(*asked):
        assert asked == (name, subset, "train", revision, "--prompts_file")
        return given, "model hub, some/talks"

    monkeypatch.setattr(own_prompts, "from_hub", from_hub)
    rows, origin, _ = read(place)
    assert ([row["source"] for row in rows], origin) == ([place.partition("@")[0]], "model hub, some/talks")
    given.append({"prompt": None})
    with pytest.raises(UserError, match=f"hub data set {place}, train row 2: no column prompt"):
        read(place)
    with pytest.raises(UserError, match="some/talks@: a branch, tag or commit is wanted"):
        read("some/talks@")


def test_the_split_is_a_function_of_each_question(tmp_path):
    records = [{"prompt": f"Question number {i}?"} for i in range(400)]
    rows, _, _ = read(write(tmp_path / "many.jsonl", records))
    train, held = split_by_question(rows, 0.2)
    assert len(train) + len(held) == 400
    assert 50 < len(held) < 110
    assert {row["split"] for row in train} == {"train"}
    assert {row["split"] for row in held} == {"eval"}
    twice = [{"prompt": f"question  NUMBER {i}?"} for i in range(400)]
    more, _, _ = read(write(tmp_path / "more.jsonl", records + twice))
    more_train, more_held = split_by_question(more, 0.2)
    assert {row["prompt"] for row in held} <= {row["prompt"] for row in more_held}
    assert (len(more_train), len(more_held)) == (2 * len(train), 2 * len(held))


def test_what_is_not_read_is_said(tmp_path, caplog):
    """SVAMP's question stands in two columns; who names one of them hears of the other."""
    caplog.set_level("INFO")
    path = tmp_path / "svamp.json"
    record = {"Body": "Tom has 3.", "Question": "How many?", "Answer": 10**400}
    path.write_text(json.dumps([record | {"Answer": 3}, record | {"Answer": 3}]))
    rows, _, repeats = read_own_prompts(
        str(path), Columns(prompt="Question", reference="Answer"), "own", "train", "--prompts_file", "numeric"
    )
    assert (len(rows), repeats) == (1, 1)
    assert f"{path}: columns that are not read: Body" in caplog.text
    assert f"{path}: 1 rows say the same as others and are left out" in caplog.text
    path.write_text(json.dumps([record]))
    with pytest.raises(UserError, match="record 1: reference '1000"):
        read_own_prompts(str(path), Columns(prompt="Question", reference="Answer"), "own", "train", "--x", "numeric")
