"""The rubric grader: does an answer assert what it should, in its own words?

Phrases are searched clause by clause, so that "not the network but the disk" asserts the disk alone.
"""

import re
from typing import Any

from src.grading.rows import Grade, Row, arguments_of
from src.utils.common import UserError

NO_RUBRIC = (
    "a rubric needs a pass_mark and groups, each with a name and phrases in 'any'; the mark is above 0, at most 1"
)

# words of a labelled section, of a copied sentence, and before a phrase among which a negation counts
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
    # "won't" -> "will not", "can't" -> "cannot", "isn't" -> "is not"
    text = re.sub(r"\bwon't\b", "will not", text.lower().replace("’", "'"))
    text = re.sub(r"(?<=[a-z])n't\b", " not", re.sub(r"\bcan't\b", "cannot", text))
    # "**Root-cause**:  `disk_full`" -> "root cause: disk full"
    return re.sub(r"[-_\u2010\u2011 \t]+", " ", re.sub(r"[*`\"“”]", "", text))


def without_prompt(response: str, prompt: str) -> str:
    """The response without the lines and sentences of at least 8 words that stand verbatim in the prompt."""
    # words between blanks, so that a copy is found as a run of whole words
    given = f" {' '.join(WORD.findall(prompt.lower()))} "
    # "Disk full. Why?" -> "Disk full.", " ", "Why?": joined again, what stays is as it was
    parts = re.split(r"(\n|(?<=[.!?;])\s|(?<=[。！？；]))", response)
    pieces = [(part, WORD.findall(part.lower())) for part in parts]
    return "".join(piece for piece, words in pieces if len(words) < COPIED_WORDS or f" {' '.join(words)} " not in given)


def _whole(phrase: str) -> str:
    """The pattern of a phrase as whole words; a Han character at an end bounds itself."""
    # "disk" finds "disk", "disks", not "diskette"; "box" finds "boxes"; "磁盘" is found anywhere
    start = "(?<![a-z0-9])" if re.match(r"[a-z0-9]", phrase) else ""
    end = r"(?:e?s)?(?![a-z0-9])" if re.search(r"[a-z0-9]$", phrase) else ""
    return start + re.escape(phrase) + end


def mentions(text: str, phrases: list[str]) -> bool:
    """Whether `text` asserts one of the phrases: whole words, a plural s allowed, not negated within its clause."""
    wanted = "|".join(_whole(rubric_text(phrase).strip()) for phrase in phrases)
    for clause in CLAUSE.split(rubric_text(text)):
        for match in re.finditer(wanted, clause):
            # 1. the last four words before it in its clause: a negation further off is of something else
            before = " ".join(clause[: match.start()].split()[-NEGATION_WORDS:])
            # 2. what is missing is asserted: "no disk space left" is about the disk
            gone = ALL_GONE.search(f"{before}\n{clause[match.end() :]}")
            denied = NEGATED_BEFORE.search(before) and not gone
            # one mention that is not denied is enough
            if not denied and not NEGATED_AFTER.match(clause, match.end()):
                return True
    return False


def labelled_sections(text: str, names: list[str]) -> dict[str, str]:
    """Group name -> the text from its label (`Root cause:` for `root_cause`) to the next label; empty without one."""
    # "root_cause" -> "root[ _-]cause"
    labels = "|".join(re.escape(name).replace("_", "[ _-]") for name in names)
    # "## 1. Root-cause: disk\n**Actions**: free it" -> "Root-cause", " disk\n", "Actions", " free it"
    parts = re.split(rf"(?im)^[ \t>*#\-0-9.)]*({labels})[ \t*]*[:：]", text)[1:]
    # label, body, label, body, ...
    bodies: dict[str, list[str]] = {}  # a label may come twice
    for label, body in zip(parts[::2], parts[1::2], strict=True):
        bodies.setdefault(rubric_text(label), []).append(body)
    return {name: "\n".join(bodies.get(rubric_text(name), [])) for name in names}


def is_rubric(arguments: dict[str, Any]) -> bool:
    def is_group(group: object) -> bool:
        name, phrases = (group.get("name"), group.get("any")) if isinstance(group, dict) else (None, None)
        texts = [name, *phrases] if isinstance(phrases, list) else []  # a name and one phrase at least
        return len(texts) > 1 and all(isinstance(text, str) and text for text in texts)

    groups = arguments.get("groups")
    mark = arguments.get("pass_mark")
    marked = type(mark) in (int, float) and 0 < mark <= 1  # by type: True is an int to `isinstance`
    return marked and isinstance(groups, list) and bool(groups) and all(map(is_group, groups))


def grade_rubric(row: Row, response: str) -> Grade:
    """Score = share of groups of which the answer asserts a phrase; correct from `pass_mark` on (both to two decimals,
    so that 2 of 3 meets 0.67). The whole text counts for outcome and score. Strict also asks for every label, with text
    behind it, and for each group's phrase in its own labelled section. Copying does not pay: lines and sentences of the
    prompt (8 words or more) are taken out before anything is searched; a labelled section of more than 60 words is not
    searched.

    Raises:
        UserError: grader_args are not `{"groups": [{"name": ..., "any": [...]}, ...], "pass_mark": ...}`.
    """
    arguments = arguments_of(row)
    if not is_rubric(arguments):
        raise UserError(f"row {row['id']}: {NO_RUBRIC}")
    groups, pass_mark = arguments["groups"], arguments["pass_mark"]
    if not response.strip():
        return Grade("no_answer", "", False, 0.0)
    # 1. all of the text: outcome and score
    text = without_prompt(response, row["prompt"])
    hit = [group["name"] for group in groups if mentions(text, group["any"])]
    # 2. each group in its own section: the format
    sections = labelled_sections(text, [group["name"] for group in groups])
    searched = {
        name: body
        for name, body in sections.items()
        # two Han characters count as a word
        if len(body.split()) + len(re.findall(r"[\u4e00-\u9fff]", body)) // 2 <= MAX_SECTION_WORDS
    }
    in_place = [group["name"] for group in groups if mentions(searched.get(group["name"], ""), group["any"])]
    right, in_format = (round(len(found) / len(groups), 2) >= round(pass_mark, 2) for found in (hit, in_place))
    # 3. and every label must be there, with more behind it than a line end or the rest of its emphasis
    strict = right and in_format and all(rubric_text(body).strip() for body in sections.values())
    return Grade("correct" if right else "wrong", ", ".join(hit), strict, len(hit) / len(groups))
