"""Numbers written as words: English up to the millions, Chinese up to 九千九百九十九."""

import re
from fractions import Fraction

ONES = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19,
}  # fmt: skip
TENS = {"twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90}
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6}
# Words that make another number of the one before them: "two dozen", "five or six", "two and a half"
CHANGES = {"and", "or", "to", "point", "half", "third", "quarter", "quarters", "dozen", "billion", "of", "more", "less",
           "plus", "minus", "times", "over", "than", "by", "as"}  # fmt: skip

ENGLISH_WORD = "|".join([*ONES, *TENS, *SCALES])
# "eighteen", "twenty-one", "one hundred and five", "a thousand"; "minus five", "negative five"
ENGLISH = re.compile(
    rf"(?P<sign>(?:minus|negative)\s+)?"
    rf"(?P<words>(?:an?\s+(?=hundred|thousand|million)|(?:{ENGLISH_WORD})\b)(?:(?:\s+and\s+|[\s-]+)(?:{ENGLISH_WORD})\b)*)"
)
# What may stand behind it: at most two words (" apples", " apples left") and then the end or a sentence mark
ENDS = r"[\s*_`\"'”’」)\]}$\\]*(?:[.!?。！？]|\Z|(?P<comma>[,;，；]))"
ENGLISH_UNIT = re.compile(rf"(?P<unit>(?:[\s-]+[^\W\d_]+){{0,2}}){ENDS}")

HAN_DIGITS = {"零": 0, "一": 1, "二": 2, "两": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9}
HAN = "[一二两三四五六七八九]"
# "十八", "一百零五", "两千三百"; not "两百五", which is 250 to some
CHINESE = re.compile(
    rf"(?P<sign>负)?(?:零(?!{HAN})|(?:(?P<thousands>{HAN})千)?(?:零?(?P<hundreds>{HAN})百)?(?:零?(?P<tens>{HAN}?)(?P<ten>十))?"
    rf"(?:(?:零|(?<![千百]))(?P<ones>{HAN}))?)(?![十百千万亿])"
)
# What may stand behind it: a measure word with at most four characters ("个苹果"), and then the same
CHINESE_UNIT = re.compile(
    r"(?:(?:小时|分钟|公里|[个只元块角人天年岁颗本页次米克斤吨升枚张条杯瓶支件名位箱盒包棵朵双套])"
    rf"(?P<unit>(?:(?!半)[^\W\d_]){{0,4}}))?{ENDS}"
)


def english_value(words: list[str]) -> int | None:
    """The value of number words in a row; None where they are no one number ("two three", "twenty twelve").

    >>> english_value("one hundred and twenty one".split()), english_value(["two", "three"])
    (121, None)
    """
    total = current = 0
    fresh = True  # nothing since the last thousand
    for word in words:
        if word in SCALES:
            factor = 1 if fresh else current  # "hundred" alone is 100
            # "zero hundred", "one hundred hundred"; "twelve hundred" is 1200
            if factor == 0 or (word == "hundred" and factor > 99):
                return None
            if word == "hundred":
                current = 100 * factor
            elif total and total < 1000 * SCALES[word]:  # "two thousand three million": scales fall
                return None
            else:
                total, current = total + factor * SCALES[word], 0
            fresh = word != "hundred"
        elif word in ONES or word in TENS:
            below = current % 100
            # "twenty one" fits; "one two" and "twenty twelve" do not
            fits = below == 0 or (below in TENS.values() and 0 < ONES.get(word, 0) < 10)
            if not fits or (not fresh and current == 0):  # "zero five"
                return None
            current += ONES.get(word, 0) + TENS.get(word, 0)
            fresh = False
    return total + current


def _is_statement(span: str, rest: re.Match[str] | None) -> bool:
    """Whether nothing else is said of the number: "two flew away, leaving 9" begins a sentence about other numbers."""
    if not rest:
        return False
    goes_on = rest["comma"] and rest["unit"]
    return not goes_on or not re.search("[0-9]", span[rest.end() :])


def _english(span: str) -> int | None:
    match = ENGLISH.match(span)
    rest = ENGLISH_UNIT.match(span, match.end()) if match else None
    if not _is_statement(span, rest):
        return None
    words, unit = re.findall(r"[a-z]+", match["words"]), re.findall(r"[^\W\d_]+", rest["unit"])
    # the words behind it make another number of it
    if {*unit} & {*ONES, *TENS, *SCALES, *CHANGES} or (words == ["one"] and len(unit) > 1):
        return None  # "two or three"; "one we can find"
    value = english_value(words)
    return -value if value and match["sign"] else value


def _chinese(span: str) -> int | None:
    match = CHINESE.match(span)
    if not match or not match[0].strip("负") or not _is_statement(span, CHINESE_UNIT.match(span, match.end())):
        return None
    value = HAN_DIGITS.get(match["ones"], 0) if match["ones"] else 0
    if match["ten"]:  # "十八": no digit before 十 is one ten
        value += 10 * HAN_DIGITS.get(match["tens"], 1)
    value += 100 * HAN_DIGITS.get(match["hundreds"], 0) + 1000 * HAN_DIGITS.get(match["thousands"], 0)
    return -value if match["sign"] else value


def worded_number(span: str) -> tuple[str, Fraction] | None:
    """The number that a span starts with in words, in digits and as a value.

    Only where nothing but a unit of two words follows it in its sentence: other words could make another number of it.

    >>> worded_number("eighteen apples left."), worded_number("十八个。"), worded_number("two thirds of it")
    (('18', Fraction(18, 1)), ('18', Fraction(18, 1)), None)
    """
    value = _english(span.lower())
    if value is None:
        value = _chinese(span)
    return None if value is None else (str(value), Fraction(value))
