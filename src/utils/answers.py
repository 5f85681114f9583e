"""What a model's answer says, whoever gave it: why it ended, and its text behind a thought.

The filter on teacher answers, the engines and the graders call the same functions on the same text.
"""

import re

# Why an answer ended, in the words of the servers that people use; the first word of each is the one that is stored.
ENDED = ("stop", "eos", "eos_token", "end_turn", "end_of_turn", "stop_sequence", "stop_token", "endoftext", "complete",
         "completed", "end")  # fmt: skip
CUT = ("length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length", "token_limit",
       "model_context_window_exceeded")  # fmt: skip
REFUSED = ("refused", "content_filter", "safety", "refusal", "sensitive", "prohibited_content")

# "<think>", "<thinking>", "<seed:think>", "[THINK]" and what closes them
OPENS = r"(?:<(?:\w+:)?think(?:ing)?>|\[THINK\])"
CLOSES = r"(?:</(?:\w+:)?think(?:ing)?>|\[/THINK\])"
THINK_TAG = re.compile(f"{OPENS}|{CLOSES}", re.IGNORECASE)
OPENED = re.compile(rf"\s*{OPENS}", re.IGNORECASE)
CLOSE = re.compile(CLOSES, re.IGNORECASE)

# Where a tag is spelt and not said: "```...```" (or open to the end), "`...`", and beside a quote: `split("</think>")`
# \1: a fence is closed by one of its kind, as long or longer
FENCED = re.compile(r"^[ \t]*(```+|~~~+).*?(?:^[ \t]*\1|\Z)", re.MULTILINE | re.DOTALL)
# as many backticks at the end as at the beginning, on one line
INLINE = re.compile(r"(`+)(?!`)[^\n]*?(?<!`)\1(?!`)")
# a spelt "\n" may stand between quote and tag: "</think>\n\n"
QUOTED = re.compile(rf"(?<=[\"'])(?:\\n)*(?:{OPENS}|{CLOSES})|(?:{OPENS}|{CLOSES})(?:\\n)*(?=[\"'])", re.IGNORECASE)

# "4</s>", "4 <|im_end|>": the end of the turn as a server without the right stop words leaves it in the text
END_WORDS = re.compile(
    r"(?:\s*(?:</s>|<eos>|<end_of_turn>|<\|(?:im_end|eot_id|eom_id|end_of_text|endoftext|end|return|eos)\|>|"
    r"<｜end▁of▁sentence｜>))+\s*\Z"
)


def finish_word(reason: str | None, num_tokens: int | None = None, limit: int | None = None) -> str:
    """`stop` (the model ended its turn), `length` (it was cut), `refused` (a filter), or the server's word as it is.

    Args:
        reason: what the server said; where that is nothing, an answer of `limit` tokens was cut, a shorter one ended.

    >>> finish_word("eos_token"), finish_word("MAX_TOKENS"), finish_word(None, 5, 64), finish_word(None, 64, 64)
    ('stop', 'length', 'stop', 'length')
    """
    if not reason:
        return "length" if num_tokens is not None and limit is not None and num_tokens >= limit else "stop"
    word = reason.strip().lower()
    for known in (ENDED, CUT, REFUSED):
        if word in known:
            return known[0]
    return reason


def without_code(text: str) -> str:
    """The text with every character of code, and every think tag beside a quote, as a blank: places stay what they are.

    >>> without_code("a `b` c")
    'a     c'
    """
    for pattern in (FENCED, INLINE, QUOTED):
        # line ends stay: `final_answer` asks what a line ends with
        text = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    return text


def final_answer(response: str) -> str | None:
    """What an answer says behind its thought; all of it where it has none; None where the thought does not end.

    A thought is what stands between `<think>` at the start and the first `</think>`. A template may have opened it in
    the prompt: then only its end is in the answer, on a line that ends with it. A tag spelt in code, or quoted, is
    text.

    >>> final_answer("<think>18?</think>\\n\\nIt is 18."), final_answer("18?\\n</think>\\n\\nIt is 18.")
    ('It is 18.', 'It is 18.')
    >>> final_answer("Use `x.split('</think>')[-1]`."), final_answer("<think>18?")
    ("Use `x.split('</think>')[-1]`.", None)
    """
    said = without_code(response)
    # the answer opens the thought
    if OPENED.match(response):
        close = CLOSE.search(said) or CLOSE.search(response)  # a fence that the thought leaves open hides its end
        if close is None:
            return None
        # places in `said` are those in the response, for code is blanked and not cut
        response = response[close.end() :].lstrip("\n")
    else:
        # the prompt may have: then the first tag closes, and nothing but blanks follows on its line
        tag = THINK_TAG.search(said)
        if tag and CLOSE.fullmatch(tag[0]) and re.match(r"[ \t]*(?:\n|\Z)", said[tag.end() :]):
            response = response[tag.end() :].lstrip("\n")
    return response


def answer_text(response: str) -> str:
    """The text of an answer that is filtered, graded and trained on; empty where its thought has no end."""
    return (final_answer(response) or "").strip()


def has_think_tag(text: str) -> bool:
    """Whether a think tag is said in the text, other than spelt in its code."""
    return THINK_TAG.search(without_code(text)) is not None
