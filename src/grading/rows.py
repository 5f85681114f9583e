"""A row of `{train,eval}_dataset.jsonl`: what is asked, what is right, and who judges it; and what a grade is.

Every value is text. `prompt` is what a model reads: the question and, as its last paragraph, the `instruction`, the
answer format that the strict grade asks for.
"""

import functools
import json
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from src.utils.common import parse_json, sha256_text

Row = dict[str, str]

KEYS = ("id", "source", "domain", "prompt", "reference", "grader", "grader_args")  # what every row must have
OPTIONAL = ("split", "system", "instruction", "family")  # empty where a row brought by a person lacks them
UNGRADED = "none"  # the grader of a row whose answers nothing can judge
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


def dataset_row(*, source: str, domain: str, split: str, prompt: str, instruction: str, reference: str, grader: str,
                grader_args: dict[str, Any] | None = None, system: str = "", family: str = "") -> Row:  # fmt: skip
    """One row of `{train,eval}_dataset.jsonl`; every value is a string.

    Args:
        source: the data set (`gsm8k`, `humaneval`, `mbpp`, or the name of a scenario pack).
        domain: `maths`, `code`, `aiops`, ...
        split: `train` or `eval`.
        prompt: the question alone; `instruction` becomes the last paragraph of the stored prompt.
        instruction: the answer format that the strict grade asks for; empty where the prompt is to stand as it is.
        reference: the reference answer as text.
        grader: `numeric`, `python_tests`, `rubric` or `none`.
        grader_args: what that grader needs besides the reference; stored as JSON text.
        system: the system message, empty for none.
        family: rows of one family are variants of one another and no independent evidence; empty for a row by itself.

    Returns:
        The row; its `id` hashes everything but the split, so that a row that sits in both splits has one id.
    """
    row = {
        "source": source,
        "domain": domain,
        "split": split,
        "system": system,
        "prompt": f"{prompt.strip()}\n\n{instruction}" if instruction else prompt,
        "instruction": instruction,
        "family": family,
        "reference": reference,
        "grader": grader,
        "grader_args": json.dumps(grader_args or {}, sort_keys=True, ensure_ascii=False),
    }
    # sorted: the id does not depend on the order in which the fields stand
    content = json.dumps({key: value for key, value in row.items() if key != "split"}, sort_keys=True)
    return {"id": sha256_text(content)[:16], **row}  # 64 bits


def question_of(row: Row) -> str:
    """The prompt without its answer-format instruction; all of it where it has none.

    >>> question_of({"prompt": "How many?\\n\\nEnd with a number.", "instruction": "End with a number."})
    'How many?'
    """
    instruction = row.get("instruction", "")
    return row["prompt"].removesuffix(f"\n\n{instruction}") if instruction else row["prompt"]


def family_of(row: Row) -> str:
    """The rows that count as one piece of evidence: those of a family of one source; a row without one, by itself."""
    return f"{row['source']}/{row['family']}" if row.get("family") else row["id"]


# an evaluation grades a row once an arm, temperature and sample; a mapping that cannot be changed may be shared
@functools.lru_cache(maxsize=65_536)
def _parsed(text: str) -> MappingProxyType[str, Any]:
    arguments = parse_json(text or "{}")
    if not isinstance(arguments, dict):
        raise TypeError(f"grader_args must be a JSON object, found {type(arguments).__name__}")
    return MappingProxyType(arguments)


def arguments_of(row: Row) -> MappingProxyType[str, Any]:
    """What the row's grader needs besides the reference; parsed once, and not to be changed.

    Raises:
        json.JSONDecodeError, TypeError: it is no JSON object (`graders.check_dataset_row` says so of every row read).
    """
    return _parsed(row["grader_args"])
