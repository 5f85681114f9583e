"""Which number does an answer give? One reading, for the filter on teacher answers and for the score of the student.

The rules:

 1. Signs are read for what they stand for: digits of full width or another script (`１８`, `١٨`), any hyphen or dash
    before a digit as minus (`−5`, `–5`; between digits, as in `3–5`, it is none), `2½`, `2³`, `3 x 10^6`, and LaTeX
    (`\\frac{1}{2}`, `\\textbf{18}`, `\\$18`, `2 \\times 9`).
 2. The answer stands at the first of these that holds a number, of several of one kind at the last: a marked line
    (`#### 18`), a box (`\\boxed{18}`), words that say so (`The answer is 18`, `Answer: 18`, `答案：18元`); else it is
    the last number of all (`So 9 bags of 2 make 18 eggs.`).
 3. There it is the number that the place begins with, whatever follows: `#### 18. She ate 3 for breakfast.`,
    `#### 18 (3 of 7 left)`, `答案：18元，共3人`. Before it may stand emphasis, brackets, a currency sign or `x =`.
 4. A calculation is followed to behind its last equals sign: `#### 2^3 = 8`, `Answer: 2 dozen eggs = 24`,
    `#### 20% of 50 = 10`. A side that has still to be calculated is no result: `#### 18 = 9 * 2`.
 5. A marked line of a number, a full stop and words is a heading, and no answer, where such lines count up
    (`#### 1. First we add`, `#### 2. Then we stop`), or where one digit has a title, not a sentence, and a number
    stands below it (`#### 3. Conclusion`, `The answer is 18.`). So is `1. We add`, the first line of a list, below
    `Answer:`.
 6. Thousands may be set apart by `,` (also `1,18,000`), `'`, `_` or a narrow blank, in groups of three; by a common
    blank only at the places of rule 2 and before no further number: `#### 118 000` is 118000, but `in 2020 300 came`
    and `#### 1 000 5` hold no thousands. `3,5` is no decimal: the comma ends the number.
 7. A percent sign and units are dropped: `25 %` and `25 eggs` are 25. None is guessed: `2 million` is 2.
 8. Number words count at the places of rule 2, where they are all of the statement but its unit:
    `The answer is eighteen.`, `答案是十八个。`; not `The answer is one we can find`.
 9. A new exercise that the answer runs on into does not count: whatever follows `Question:`, `User:`,
    `### Instruction`, `<|im_end|>` or their like behind a place of the kind that is read (`#### 18`, then
    `Question: ...` and `#### 5`, is 18). It counts where no such place stands before it.
10. Strict, the asked-for format: the last line begins with `####`, the number is read there, in digits, and nothing
    runs on. `#### 5` and below it `#### none` is 5, but not strict.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from src.grading.notation import SPACED, plain_numbers, ungrouped
from src.grading.number_words import worded_number

MAX_DIGITS = 60  # a longer run of digits is a model in a loop, not an answer
MAX_SPAN = 1000  # characters of a place that are read: a loop without line ends makes every one as long as the text

# "-$1,234.50", "$-5", "2 1/2", "1/3", ".5", "1,18,000", "1e3", "2^3". Not inside a word, an index or a power ("H2",
# "cm^2", "s^-2"); a minus after a digit or bracket is an operator.
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_^])(?<!\^-)(?P<sign>(?<![)\]}%])-)?(?:[$€£¥₹₩₽₺₫₱฿₦₪]\s?(?P<inner_sign>-)?)?"
    r"(?P<body>[0-9]+ [0-9]+/[0-9]+|[0-9]+/[0-9]+|(?<![\w.])\.[0-9]+|"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,2}(?:,[0-9]{2})+,[0-9]{3}(?![0-9])|[0-9]+)"
    r"(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2}(?![0-9A-Za-z]))?)"
    r"(?:\^(?P<power>-?[0-9]{1,2})(?![0-9]))?"
)

# "#### 18 apples"
MARKED = re.compile(r"(?<!#)####(?!#)([^\n#]*)")
# "\boxed{18}", "\fbox{18}", "\boxed{{\frac{1}{x}}}", "\boxed 18"
NESTED = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"
BOXED = re.compile(rf"\\f?box(?:ed)?(?:\s*\{{|(?=[ 0-9]))((?<=\{{){NESTED}(?=\}})|(?<!\{{)[^{{}}\n]+)")
# "answer is", "**Answer:**", "Final answer (in dollars):", "the answer to the question should be", '"answer":'; but
# not "we convert the answer to weeks: 28 days"
TOPIC = r"[*_\"'` \t]*(?:\([^()\n]*\)[*_ \t]*)?"
VERB = (
    r"(?:is|equals|comes (?:out )?to|(?:should|would|must|will|has to) be)\b(?:[ ,]+(?:therefore|thus|hence|then)\b)?"
)
ENGLISH = rf"(?:\b(?:answer|ans)\b\.?(?:{TOPIC}(?:{VERB}|[:=])| to(?: [\w'’$-]+){{1,8}}? {VERB})|<answer>)"
# "exactly 18", "a total of 18"
HEDGE = r"(?:(?:exactly|about|approximately|roughly|around|simply|just|only|equal to|a total of)\b)"
# "答案是", "最终答案：", "答案应为", "答：一共是"; not "回答：" or "解答："
CHINESE = (
    r"(?:答案[*_ \t]*(?:就|应该|应|便)?(?:是|为|等于|[:=])|(?<![回解问应])答[*_ \t]*:)[\s:*]*(?:一共|总共|共|约)?是?"
)
# A dash written onto these words is no minus: "The answer is—18", "答案是——18"
ANSWER_IS = re.compile(
    rf"(?:{CHINESE}[—―]*[\s:*]*|{ENGLISH}[—―]*[\s:*,]*(?:{HEDGE}[\s,]*)*(?:(?:\$\$|\\\[)\s*)?)(?=([^\n]*))",
    re.IGNORECASE,
)

# What may stand before the number of a place: " **$", " (", " = ", ' "', " → ", " US$", " USD ", " Rs. "
DECORATION = re.compile(
    r"(?:[\s*`~≈:<>\[({\\+=$\"'“‘「【《→⇒]|(?<![A-Za-z])(?:[A-Z]{1,3}(?=[$€£¥])|"
    r"(?:USD|EUR|GBP|INR|CNY|RMB|JPY|AUD|CAD|Rs\.?)(?=\s)))*"
)
LONG_DASH = re.compile(r"(?<![—―])[—―](?=[$0-9.])")  # "—5", at the start of a place only
NAMED = re.compile(r"[A-Za-z](?:_\w+)?\s*=")  # "x = 18"
LETTER_X = re.compile(r"(?<=[0-9)])(\s?)[xX](?=\s?[$(]?[0-9])")  # "24x3", "24 x 3"
# Between two numbers of a calculation: what closes the first, its unit, and an operator or an equals sign:
# ") *", "% of", " dozen eggs =", " dollars per egg x", " m^2 +", " pints / gallon =", and nothing in "925(2/5)"
NO_UNIT = r"(?:since|because|as|for|and|or|if|so|that|when|where|which|from|with|is|are|was|were|in|at|to|by|but|on)\b"
WORD = rf"(?!(?i:{NO_UNIT}))[^\W\d_]+(?:\^[0-9])?"
BETWEEN = r"(?:x|X|of|out of|of the|times|plus|minus|over|(?:divided|multiplied) by)(?![A-Za-z])"
JOINT = re.compile(
    rf"[\s%°)\]}}*`$\\]*(?:\^-?[0-9]+\s*)?(?:{WORD}(?:(?:[ -]| ?/ ?){WORD}){{0,2}}[\s)\]}}*`$\\]*)?"
    rf"(?:(?P<equals>=+>?|≈|equals\b|is equal to\b|等于)|[-+/×÷·*]|(?<=[0-9)])(?=\([0-9])|{BETWEEN})"
)
NEXT_SUM = re.compile(rf"\s*(?:{WORD}(?: {WORD}){{0,2}})?\s*[,;]\s*(?:(?:so|then|thus|therefore|hence)\b)?")  # ", so "

# "#### 2. Then we add", "#### **2.** Then", "#### 2) Then", "#### 2、然后"
ITEM = re.compile(r"[ \t*_`(]*([0-9]{1,2})(?:\*\*)?(?:[.):](?:\*\*)?[ \t]+[^\s*]|[.)、][ \t]*[\u4e00-\u9fff])")
HEADINGS = re.compile(rf"^[ \t]*#+{ITEM.pattern}", re.MULTILINE)
SECOND = re.compile(r"^[\s*]*2[.)]", re.MULTILINE)  # "2. Then we add"
SENTENCE_END = re.compile(r"[.!?。！？][\s*_`\"”')]*\Z")

# "Question:", "**Q2:**", "### Instruction", "Next problem:", "User:", "问题：", "<|im_start|>user", "</s>"
EXERCISE = r"(?:(?:next|new|another) )?(?:question|problem|exercise|example|instruction|task)"
RUN_ON = re.compile(
    rf"^[>*_ \t]*(?:{EXERCISE}|Q|user|human|prompt|问题|题目|例题|用户|问)\s?[0-9]{{0,3}}[*_ ]*:|"
    rf"^#+[*_ \t]*(?:{EXERCISE}|user|human|问题|题目|例题|用户)\b|<\|\w+\|>|<｜[\w▁]+｜>|</?s>|<eos>|"
    r"<(?:start|end)_of_turn>|\[/?INST\]",
    re.MULTILINE | re.IGNORECASE,
)


@dataclass(frozen=True)
class Place:
    """Where an answer is stated. start, end: of the whole statement in the text; digits: not written in words."""

    start: int
    end: int
    number: tuple[str, Fraction]
    digits: bool


def number_value(match: re.Match[str] | None) -> tuple[str, Fraction] | None:
    """Text (without commas and currency) and exact value of a NUMBER match; None for a/0 or absurd length."""
    body = match["body"].replace(",", "") if match else ""  # "1,234.50" -> "1234.50"
    if not match or len(body) > MAX_DIGITS or re.search(r"/0+$", body):  # "5/0" is no number
        return None
    whole, _, part = body.rpartition(" ")  # "2 1/2" -> "2", "1/2"; "18" -> "", "18"
    value = int(whole or 0) + Fraction(part)
    if power := match["power"]:
        if value == 0 and int(power) <= 0:  # 0^-1, 0^0
            return None
        value **= int(power)
        body = str(value)
        if len(body) > MAX_DIGITS:
            return None
    negative = bool(match["sign"] or match["inner_sign"])
    return ("-" if negative else "") + body, -value if negative else value


@dataclass(frozen=True)
class Sum:
    """A calculation, or one number. result: where its result stands, None where it has none; end: behind its last
    number; worked: it has an operator, an equals sign and a result."""

    result: int | None
    end: int
    worked: bool


def behind_decoration(span: str, place: int) -> int:
    return DECORATION.match(span, place).end()


def follow_sum(span: str, start: int) -> Sum:
    """The calculation that starts at `start`. Its result is the last of its sides that is one number: `8 * 9 = 72` and
    `72 = 8 * 9` have 72, `8 * 9 =` has none; where no side is (`72 - 3`), what the last begins with."""
    # "2 x 9 = 18": sides at "2" and "18", counts [2, 1]
    sides, counts = [start], [0]  # where each begins, and how many numbers it has
    place = end = start
    while number := NUMBER.match(span, place):
        counts[-1] += 1
        end = number.end()
        joint = JOINT.match(span, end)
        if not joint:  # no operator, no equals sign: the sum ends here
            break
        place = behind_decoration(span, joint.end())
        if joint["equals"]:
            sides.append(place)
            counts.append(0)
    # the last side with one number, else the beginning of the last
    result = sides[-1] if counts[-1] else None
    for side, count in zip(sides, counts, strict=True):
        if count == 1:
            result = side
    return Sum(result, end, len(sides) > 1 and counts[0] > 1 and result is not None)


def leading_number(span: str) -> tuple[str, Fraction] | None:
    """The number that a place gives (rules 3, 4 and 6), None where it begins with none."""
    # 1. thousands set apart by blanks, and x between numbers as a sign
    span = LETTER_X.sub(r"\1×", SPACED.sub(ungrouped, span[:MAX_SPAN]))
    # 2. past what may stand before the number: " **$", "x = "
    start = behind_decoration(span, 0)
    if LONG_DASH.match(span, start):
        span = f"{span[:start]}-{span[start + 1 :]}"
    if named := NAMED.match(span, start):
        start = behind_decoration(span, named.end())
    # 3. the calculation there, and those that follow it
    found = follow_sum(span, start)
    while found.worked and (further := NEXT_SUM.match(span, found.end)):  # "3 * 5 = 15, so 15 + 3 = 18"
        following = follow_sum(span, behind_decoration(span, further.end()))
        if not following.worked:
            break
        found = following
    return None if found.result is None else number_value(NUMBER.match(span, found.result))


def is_item(text: str, match: re.Match[str], headings: set[int]) -> bool:
    """Whether a statement is no answer but a heading or the first line of a list (rule 5).

    Args:
        headings: the numbers of all numbered headings of the text.
    """
    item = ITEM.match(match[1])
    if not item or match.re is BOXED:  # a box is an answer, whatever is in it
        return False
    number, below = int(item[1]), match.end(1)
    if match.re is ANSWER_IS:
        # below "Answer:" a list may begin on the next line
        own_line = "\n" in text[match.start() : match.start(1)]
        return number == 1 and (own_line or SECOND.search(text, below) is not None)
    if headings & {number - 1, number + 1}:  # such lines count up
        return True
    # "#### 3. Conclusion": one digit, a word, no full stop at its end
    is_title = number < 10 and match[1][item.end() - 1].isalpha() and not SENTENCE_END.search(match[1])
    return is_title and NUMBER.search(text, below) is not None


def places_of(text: str, pattern: re.Pattern[str]) -> list[Place]:
    """The places of one kind that hold a number, in their order."""
    headings = {int(heading) for heading in HEADINGS.findall(text)}
    places = []
    for match in pattern.finditer(text):
        number = leading_number(match[1])
        digits = number is not None
        if not digits:
            # number words, where the place holds no digits that count
            span = match[1][:MAX_SPAN]
            number = worded_number(span[behind_decoration(span, 0) :])
        if number and not is_item(text, match, headings):
            places.append(Place(match.start(), match.start(1), number, digits))
    return places


def is_last_line(text: str, place: Place) -> bool:
    """Whether the marked line at `place` is the last that is not empty, and its only mark the first thing on it."""
    text = text.rstrip()
    line = text.rfind("\n") + 1
    return not text[line : place.start].strip() and line <= place.start and not MARKED.search(text, place.end)


def find_number(response: str) -> tuple[str, Fraction, bool] | None:
    """The final answer as (text, value, strict), by the rules above; None where there is no number."""
    text = plain_numbers(response)
    # 1. the first kind of place that holds a number; of several the last, before the answer runs on
    for pattern in (MARKED, BOXED, ANSWER_IS):
        places = places_of(text, pattern)
        if not places:
            continue
        run_on = RUN_ON.search(text, places[0].end)
        if run_on:
            places = [place for place in places if place.start < run_on.start()]
        last = places[-1]
        strict = pattern is MARKED and last.digits and not run_on and is_last_line(text, last)
        return *last.number, strict
    # 2. else the last number of all
    numbers = [number for match in NUMBER.finditer(text) if (number := number_value(match))]
    return (*numbers[-1], False) if numbers else None


def gold_number(row: dict[str, str]) -> tuple[str, Fraction] | None:
    """The reference as text and value; None if it is not a number."""
    text = plain_numbers(row["reference"]).strip().removesuffix("%").rstrip()
    return number_value(NUMBER.fullmatch(SPACED.sub(ungrouped, text)))
