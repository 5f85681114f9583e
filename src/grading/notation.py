"""Numbers in the many ways that people and models write them, rewritten in plain ASCII."""

import re
import unicodedata

# Full-width signs, every kind of minus and hyphen, other currency and fraction signs
LOOKS_LIKE = str.maketrans(
    {ord(sign): chr(ord(sign) - 0xFEE0) for sign in "＋－．％＄／＝：（）＃＊＾＜＞［］｛｝"}
    | dict.fromkeys(map(ord, "‐‑‒–−﹣"), "-")
    | dict(zip(map(ord, "￥￡￦　⁄∕∗٫٬"), "¥£₩ //*.,", strict=True))
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")

GROUP = r"(?<![0-9A-Za-z_.,^])[1-9][0-9]{0,2}"  # the first one to three digits of a number
# "1'000", "1_000", "118 000" with a narrow blank; "1.000.000", where one full stop alone could be a decimal point
GROUPED = re.compile(
    rf"{GROUP}(?P<mark>['’_\u00a0\u2007\u2009\u202f])[0-9]{{3}}(?:(?P=mark)[0-9]{{3}})*(?![0-9A-Za-z_])|"
    rf"{GROUP}(?:\.[0-9]{{3}}){{2,}}(?!\.?[0-9])"
)
# "118 000", "1，234"; not before a further number ("1 000 5", "1 000/3") or a joined word ("5 100-dollar bills")
SPACED = re.compile(rf"{GROUP}(?P<mark>[ ，])[0-9]{{3}}(?:(?P=mark)[0-9]{{3}})*(?![0-9/]| [0-9]|-[A-Za-z])")


def ungrouped(match: re.Match[str]) -> str:
    return re.sub(r"[^0-9]", "", match[0])  # "1'000" -> "1000"


def ascii_digit(match: re.Match[str]) -> str:
    return str(unicodedata.decimal(match[0]))  # "８" -> "8"


def ascii_fraction(match: re.Match[str]) -> str:
    whole = f"{match[1]} " if match[1] else ""  # "2½" -> "2 1/2"; NFKC gives the slash U+2044
    return whole + unicodedata.normalize("NFKC", match[2]).replace("\u2044", "/")


def ascii_power(match: re.Match[str]) -> str:
    return "^" + match[0].translate(SUPERSCRIPTS)  # "³" -> "^3"


def slashed(match: re.Match[str]) -> str:
    return "/".join(part for part in match.groups() if part)  # ("1", "2", None, None) -> "1/2"


TEXT = r"\\(?:text\w*|math[a-z]+|mbox|underline|emph|bm|boldsymbol)\s*\{([^{}]*)\}"
SWITCH = r"\\(?:bf|rm|it|sf|large|Large|huge|Huge|displaystyle|left|right|[bB]igg?[lr]?)(?![A-Za-z])"
# in this order: a line may rely on what those above have made
REWRITES = (
    (r"\r\n?", "\n"),
    (r"[\u200b-\u200f\u2060\ufeff\u00ad]", ""),  # characters of no width
    (r"(?=[^\x00-\x7f])\d", ascii_digit),  # "１８", "١٨"
    (r"(?:([0-9]) ?)?([¼-¾⅐-⅞])", ascii_fraction),  # "2½", "2 ½", "½"
    (r"(?<=[0-9)])[⁰¹²³⁴-⁹⁻]+", ascii_power),  # "2³"; "m²" stays
    # LaTeX
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\\([$%#_&])", r"\1"),  # "\$18", "\#\#\#\# 18"
    (r"\{\\?,\}", ","),  # "1{,}234"
    (r"\\[,!;:]", ""),  # "1\,234"
    (r"\\(?:textcolor|color)\{\w+\}", ""),  # "\textcolor{red}{18}"
    (r"\\(?:times|cdot|ast)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\\approx(?![A-Za-z])", "≈"),
    (r"&=", "="),  # "x &= 18", a line of aligned equations
    (SWITCH, ""),  # "\left(18\right)", "{\bf 18}"
    (TEXT, r"\1"),  # "\text{18 eggs}"
    (TEXT, r"\1"),  # "\mathbf{\text{18}}"
    (TEXT, r"\1"),  # the innermost braces go first: three deep
    (r"(?<=[_^])\{([^{}]*)\}", r"\1"),  # "cm^{2}", "10^{6}"
    (r"(?<=[0-9])(?=\\frac)", " "),  # "2\frac{1}{2}"
    (r"\\frac\s*(?:([0-9])([0-9])|\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\})", slashed),  # "\frac{1}{2}", "\frac12"
    (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)"),  # "\frac{3 * 12}{2}"
    (r"(?<=\{)-\s+(?=[$0-9.])", "-"),  # "\boxed{- 5}"
    # Markdown, calculator marks, powers
    (r"(?<![A-Za-z0-9_)\]}])_{1,3}(?=[-$]?[0-9])", ""),  # "__18__"; "x_1" stays
    (r"<<[^<>\n]*>>(?=\s*[-$0-9])", ""),  # GSM8K's "5 * 3 = $<<5*3=15>>15"
    (r"(?<=[0-9)])\*\*(?=\(?-?[0-9])", "^"),  # "2**3"
    (r"(?<![A-Za-z0-9_^/.,])([0-9]+(?:\.[0-9]+)?)\s?[×*x·]\s?10\^(-?[0-9]{1,2})(?![0-9])", r"\1e\2"),  # "3 x 10^6"
    (GROUPED.pattern, ungrouped),
)
COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in REWRITES]


def plain_numbers(text: str) -> str:
    r"""Digits, signs, fractions, powers, LaTeX and thousands in ASCII; what is no part of a number stays as it is.

    >>> print(plain_numbers(r"１８, –5, 2½, 2³, \boxed{\textbf{\$1{,}234}}, 1'000"))
    18, -5, 2 1/2, 2^3, \boxed{$1,234}, 1000
    """
    text = re.sub(r"(?<=[０-９])，(?=[０-９])", ",", text)  # "１，２３４"; elsewhere it ends a clause
    text = text.translate(LOOKS_LIKE)
    for pattern, replacement in COMPILED:
        text = pattern.sub(replacement, text)
    return text
