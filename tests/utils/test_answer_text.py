import doctest

import pytest

from src.utils import answers
from src.utils.answers import END_WORDS, final_answer, finish_word, has_think_tag, without_code


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(answers).failed == 0


@pytest.mark.parametrize("word", ["stop", "eos", "eos_token", "end_turn", "stop_sequence", "STOP", " Stop "])
def test_words_for_an_answer_that_ended(word):
    assert finish_word(word) == "stop"


@pytest.mark.parametrize("word", ["length", "max_tokens", "MAX_TOKENS", "model_length"])
def test_words_for_an_answer_that_was_cut(word):
    assert finish_word(word) == "length"


def test_other_words():
    assert finish_word("content_filter") == "refused"
    assert finish_word("tool_calls") == "tool_calls"
    assert finish_word("", 7, 8) == finish_word(None) == finish_word(None, 7) == "stop"
    assert finish_word(None, 8, 8) == "length"


FENCE = "```python\n{}\n```"


@pytest.mark.parametrize(
    ("response", "text"),
    [
        ("It is 18.", "It is 18."),
        ("    return x", "    return x"),
        ("<think>18?</think>It is 18.", "It is 18."),
        ("\n<think>\n18?\n</think>\n\nIt is 18.", "It is 18."),
        ("<thinking>18?</thinking>\nIt is 18.", "It is 18."),
        ("[THINK]18?[/THINK]It is 18.", "It is 18."),
        ("<think></think>", ""),
        ("<think>18?", None),
        ("<think>", None),
        # opened in the prompt
        ("18?\n</think>\n\nIt is 18.", "It is 18."),
        ("18?</think>\nIt is 18.", "It is 18."),
        ("18?\n</think>", ""),
        # only the first end ends a thought; what is spelt in it does not
        ("<think>a</think>b</think>c", "b</think>c"),
        ('<think>`</think>` or "</think>"?</think>The latter.', "The latter."),
        ("<think>```python\nx = 1</think>\n18", "18"),
        # text about tags is text
        (FENCE.format('return s.split("</think>")[-1]'), FENCE.format('return s.split("</think>")[-1]')),
        (FENCE.format("# </think>\nx"), FENCE.format("# </think>\nx")),
        ("```\n</think>\nopen to the end", "```\n</think>\nopen to the end"),
        ("~~~\n</think>\n~~~\ndone", "~~~\n</think>\n~~~\ndone"),
        ("Cut at `</think>`\nand go on.", "Cut at `</think>`\nand go on."),
        ('Cut at "</think>"\nand go on.', 'Cut at "</think>"\nand go on.'),
        ('    return s.split("</think>")[-1]\n', '    return s.split("</think>")[-1]\n'),
        ("The tag </think> ends it.", "The tag </think> ends it."),
        ("Write\n<think>\nthen\n</think>\nand go on.", "Write\n<think>\nthen\n</think>\nand go on."),
    ],
)
def test_final_answer(response, text):
    assert final_answer(response) == text


def test_tags_that_are_said():
    assert has_think_tag("The tag </think> ends it.")
    assert has_think_tag("so <think> again")
    assert not has_think_tag('Use `<think>`, or "</think>".')
    assert not has_think_tag("I think <b>so</b>.")


def test_code_is_blanked_in_place():
    text = "a `b` c\n```\nd\n```\ne"
    assert without_code(text) == "a     c\n   \n \n   \ne"
    assert len(without_code(text)) == len(text)


@pytest.mark.parametrize("word", ["</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", " </s> </s>\n"])
def test_end_words_at_the_end(word):
    assert END_WORDS.sub("", f"It is 18.{word}") == "It is 18."
    assert END_WORDS.sub("", f"<s>old</s> new {word} more") == f"<s>old</s> new {word} more"
