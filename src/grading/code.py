"""The code that an answer proposes: fenced blocks, which of them is meant, and what it needs of the others.

Nothing is parsed by Python's own parser here: the text is a model's, and a parser can be brought down by it.
"""

import re
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from src.grading.rows import Row, arguments_of

# "```python", "   ~~~", "1. ````" at the start of a line; backticks may not have backticks behind them
OPENING = re.compile(
    r"^[ \t]*(?:(?:[-*+]|[0-9]{1,2}[.)])[ \t]+)?"
    r"(?:(?P<ticks>```+)[ \t]*(?P<word>[\w+-]*)[^`\n]*|(?P<tildes>~~~+)[ \t]*([\w+-]*).*)$"
)
NAMED_FENCE = re.compile(r"(?:```+|~~~+)[ \t]*[\w{]")  # "```python", "```{python}"; not "```" and "```."
# A comment, the start of a string that may span lines, or a string of one line: `# it's`, `"""`, `'a'`
LITERAL = re.compile(r'#.*|(?P<long>"""|\'\'\')|"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'')
# The rest of a string that spans lines, up to its three quotes: `say \"""so"""`
LONG_ENDS = {quotes: re.compile(rf"(?:\\.|(?!{quotes})[^\\])*{quotes}") for quotes in ('"""', "'''")}
PYTHON_TAGS = ("", "python", "python3", "py")

RETURNS = re.compile(r"^[ \t]*(?:return|yield)\b", re.MULTILINE)  # "    return x"
# "def f(", "class A:", "LIMIT = 3", "import re", "from re import", "@cache"
CODE_START = re.compile(r"(?:async )?def \w+ ?\(|class \w+ ?[(:]|[A-Z_][A-Z0-9_]* = |import \w|from [\w.]+ import |@\w")
# "    x", "", "if x:", "else:", "]", "assert x", "print(", "x.y += 1", "x: int = 1"
CODE_LINE = re.compile(
    r"\s|$|(?:if|for|while|with|elif|except)\b.*:|(?:else|try|finally):|[#)\]}]|assert |[A-Za-z_][\w.]*\(|"
    r"[A-Za-z_][\w.,\[\] ]*(?::[^=]+)?[-+*/%|&^]?=[^=]"
)
BODY_LINE = re.compile(rf"(?:return|yield|raise)\b|{CODE_LINE.pattern}")  # "return x", and the above


@dataclass(frozen=True)
class Block:
    """A fenced block. tag: the word behind its opening fence, lower case; closed: it has a closing fence of its own."""

    tag: str
    code: str
    closed: bool


def fenced_blocks(response: str) -> list[Block]:
    """The fenced blocks of an answer, by the rules of CommonMark with these exceptions.

    A fence inside a string of three quotes (an example in a docstring) closes nothing; the fence may also stand at the
    end of the last line of code; a block that is left open ends where another begins, else with the text.
    """
    lines = response.split("\n")
    examples = _lines_in_bare_strings(lines)
    blocks: list[Block] = []
    number = 0
    while number < len(lines):
        opening = OPENING.match(lines[number])  # a fence, perhaps with a language
        number += 1
        if not opening or number - 1 in examples:
            continue
        # 1. the lines of the block
        fence, tag = opening["ticks"] or opening["tildes"], (opening["word"] or opening[4] or "").lower()
        end = _block_end(lines, number, fence, tag in PYTHON_TAGS)
        body, number, closed = lines[number:end], end + 1, False
        # 2. what ended it: another block, which begins there; a fence, or code with a fence behind it; or the text
        if end < len(lines) and _opens_another(lines[end], fence):
            number = end
        elif end < len(lines):
            closed = _is_fence(lines[end], fence)
            if not closed:  # "    return x```"
                body.append(lines[end].rstrip().rstrip(fence[0]))
        blocks.append(Block(tag, textwrap.dedent("\n".join(body)).strip("\n").rstrip(), closed))
    return blocks


def _is_fence(line: str, fence: str) -> bool:
    """Whether a line begins with a fence of this kind that is at least as long."""
    return line.strip().startswith(fence)


def _opens_another(line: str, fence: str) -> bool:
    return _is_fence(line, fence) and bool(NAMED_FENCE.match(line.strip()) and OPENING.match(line))


def _block_end(lines: list[str], start: int, fence: str, is_python: bool) -> int:
    """The line at which a block ends: its closing fence, the opening of another block, or a line of code with the fence
    behind it; the number of lines where none ends it."""
    behind_code = len(lines)
    for number in _lines_outside_strings(lines, start) if is_python else range(start, len(lines)):
        if _opens_another(lines[number], fence):
            return min(number, behind_code)
        if _is_fence(lines[number], fence):  # "```", "```."
            return number
        if lines[number].rstrip().endswith(fence) and behind_code == len(lines):
            behind_code = number
    return behind_code


def _lines_outside_strings(lines: list[str], start: int) -> Iterator[int]:
    """The lines from `start` on that do not begin inside a string of three quotes, in their order.

    Such a string holds whole examples: of its fences each second one is bare. Else it is one that was left open, and
    the fences are the blocks' own.
    """
    quotes = ""  # those of the string that is open
    inside: list[int] = []  # its lines so far
    fences = 0  # and how many of them are fences
    for number in range(start, len(lines)):
        if not quotes:
            yield number
        else:
            inside.append(number)
            opening = OPENING.match(lines[number])
            fences += opening is not None
            if opening and fences % 2 == 0 and (opening["word"] or opening[4]):
                yield from inside
                quotes, inside, fences = "", [], 0
                continue
        quotes = _quotes_after(lines[number], quotes)
        if not quotes:
            inside, fences = [], 0
    yield from inside


def _quotes_after(line: str, quotes: str) -> str:
    """The three quotes of the string that is open at the end of a line, empty for none; `quotes`: at its start."""
    place = 0
    while found := LONG_ENDS[quotes].match(line, place) if quotes else LITERAL.search(line, place):
        place = found.end()
        quotes = "" if quotes else found["long"] or ""
    return quotes


def _lines_in_bare_strings(lines: list[str]) -> set[int]:
    """The lines inside the strings of code without a fence, which begins before any fence does."""
    for number, line in enumerate(lines):
        if OPENING.match(line):
            return set()
        if CODE_START.match(line):
            return set(range(number, len(lines))) - set(_lines_outside_strings(lines, number))
    return set()


def defined_names(code: str) -> set[str]:
    """Names of the functions and classes a text defines at its outer level."""
    # "def f(", "class A", "f = lambda"
    found = re.findall(r"^(?:(?:async def|def|class) +(\w+)|(\w+) *= *lambda\b)", code, re.MULTILINE)
    return {defined or assigned for defined, assigned in found}


def function_names(row: Row) -> set[str]:
    """What a code row asks for: its entry point, else the functions of its reference that its tests name."""
    arguments = arguments_of(row)
    if arguments.get("entry_point"):
        return {arguments["entry_point"]}
    return defined_names(row["reference"]) & set(re.findall(r"\w+", arguments.get("tests", "")))


def offered_names(code: str) -> set[str]:
    """What a block has for others: functions, classes, imports, and constants in capitals."""
    # "import re, os as o" -> "re, os as o"; "from re import sub" -> "sub"
    imports = ",".join(re.findall(r"^(?:from [\w.]+ )?import +(.+)$", code, re.MULTILINE)).split(",")
    imported = {re.split(r"\s+as\s+", part.strip(" ()"))[-1].partition(".")[0] for part in imports}
    constants = set(re.findall(r"^([A-Z][A-Z0-9_]*) *=(?!=)", code, re.MULTILINE))  # "LIMIT = 3"
    return defined_names(code) | imported | constants


def with_helpers(code: str, earlier: list[str]) -> str:
    """Code, after those of the earlier blocks that offer something it uses and does not have itself."""
    # the nearest first: what is taken may itself need something from those before it
    for block in reversed(earlier):
        if (offered_names(block) - offered_names(code)) & set(re.findall(r"\w+", code)):
            code = f"{block}\n\n{code}"
    return code


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def as_body(code: str) -> str:
    """The lines of a function's body, indented by four. In a continued prompt only the first may lack them."""
    first, *rest = [line for line in code.splitlines() if line.strip()]  # lines that are not empty
    # how deep the second line is says whether the first alone has lost its blanks
    expected = 4 if first.rstrip().endswith(":") else 0
    continued = rest and min(map(indentation, rest)) > 0 and indentation(rest[0]) >= expected + 4
    return f"    {code}" if continued else textwrap.indent(code, "    ")


def extract_code(response: str, names: Collection[str] = ()) -> str:
    """The Python code of a chat answer, empty if there is none.

    Of several fenced blocks: the last that defines one of `names`, else the last that defines anything, else the last,
    after earlier ones that it needs; one in another language only where it defines something and none is Python. A
    block of Markdown stands for the blocks in it.
    Without a fence: from the first line that must be code on, or all of it if it reads like the body of a function.
    """
    # 1. the blocks, those inside Markdown among them
    fenced = []
    for block in fenced_blocks(response):
        fenced += fenced_blocks(block.code) if block.tag in ("markdown", "md") else [block]
    # 2. Python's, else what defines something under another language's name
    blocks = [block.code for block in fenced if block.code.strip() and block.tag in PYTHON_TAGS]
    if not blocks:
        blocks = [block.code for block in fenced if defined_names(block.code)]
    if not fenced:
        return _bare_code(response)
    if not blocks:
        return ""
    # 3. the last of the highest rank
    last = len(blocks) - 1
    # (defines what is asked for, defines anything)
    ranks = [(bool(defined_names(code) & {*names}), bool(defined_names(code))) for code in blocks]
    chosen = last - ranks[::-1].index(max(ranks))
    return with_helpers(blocks[chosen], blocks[:chosen])


def _bare_code(response: str) -> str:
    """The code of an answer without fences."""
    lines = response.splitlines()
    # 1. the lines from the first that must be code on, as long as they look like it
    first = next((number for number, line in enumerate(lines) if CODE_START.match(line)), len(lines))
    last = first
    while last < len(lines) and (CODE_START.match(lines[last]) or CODE_LINE.match(lines[last])):
        last += 1
    code = "\n".join(lines[first:last]).rstrip()
    if code:
        return code
    # 2. a body without its function: every line reads like code, and one returns
    bare = textwrap.dedent(response).strip("\n").rstrip()
    is_body = RETURNS.search(bare) and all(BODY_LINE.match(line) for line in bare.splitlines())
    return bare if is_body else ""


def is_only_block(response: str) -> bool:
    """Whether an answer has one fenced block, and that is closed: the format that the prompt asks for."""
    blocks = fenced_blocks(response)
    return len(blocks) == 1 and blocks[0].closed
