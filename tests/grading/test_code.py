"""Where a fenced block ends, and which is meant."""

import time

import pytest

from src.grading.code import Block, extract_code, fenced_blocks, is_only_block
from src.grading.graders import grade, grade_all
from src.grading.rows import dataset_row

EXAMPLE = 'def f(x):\n    """Add one.\n\n    ```\n    >>> f(1)\n    2\n    ```\n    """\n    return x + 1'
NAMED = EXAMPLE.replace("```\n    >>>", "```python\n    >>>", 1)


@pytest.mark.parametrize(
    "code",
    [
        EXAMPLE,
        NAMED,
        EXAMPLE.replace('"""', "'''"),
        'def f(x):\n    r"""\n```\nflush left\n```\n    """\n    return x + 1',
        'FENCE = """\n```\n"""\ndef f(x):\n    return x + 1',
        "def f(x):\n    # it's ``` here\n    return x + 1",
        'def f(x):\n    return x + 1  # "```"',
        'def f(x):\n    """A\n```\n1\n```\nB\n```python\n2\n```\n    """\n    return x + 1',
        'def f(x):\n    """One that is left open:\n    ```\n    """\n    return x + 1',
        "def f(x):\n    # don't\n    '''It\\'''s\n~~~\n1\n~~~\n```\n2\n```\n    '''\n    return x + 1",
        'def f(x):\n    return f"""\n```\n{x}\n```"""',
    ],
)
def test_a_fence_inside_a_string_closes_nothing(code):
    for response in (
        f"```python\n{code}\n```",
        f"Sure:\n\n```\n{code}\n```\n\nIt's done; don't worry.",
        f"```py\n{code}",
    ):
        assert extract_code(response, {"f"}) == code


def test_a_right_function_with_an_example_is_correct(sandbox):
    row = dataset_row(
        source="s", domain="code", split="eval", prompt="Write it.", instruction="Say it.", reference="def f(x): pass",
        grader="python_tests", grader_args={"tests": "assert f(1) == 2", "entry_point": ""},
    )  # fmt: skip
    answers = [(row, f"```python\n{code}\n```", "stop") for code in (EXAMPLE, NAMED)]
    assert [(g.outcome, g.strict) for g in grade_all(answers, sandbox)] == [("correct", True)] * 2
    thought = f"<think>```python\ndef f(x): return x\n```</think>\n{answers[0][1]}"
    assert [(g.outcome, g.strict) for g in grade_all([(row, thought, "eos")], sandbox)] == [("correct", True)]
    assert grade(row, f"<think>{answers[0][1]}").outcome == "no_answer"


def test_blocks_are_kept_apart():
    """Prose between two blocks belongs to neither, also where the first does not parse or leaves a string open."""
    second = "def f(x):\n    return x + 1"
    for first in ("def f(x:\n    pass", 'def f(x):\n    """Left open.', "print('it')"):
        response = f"```python\n{first}\n```\nNo, that's wrong:\n```python\n{second}\n```\nDone."
        assert [block.code for block in fenced_blocks(response)] == [first, second]
        assert extract_code(response, {"f"}).endswith(second)


@pytest.mark.parametrize(
    ("response", "blocks"),
    [
        ("````markdown\n```python\nx = 1\n```\n````", [Block("markdown", "```python\nx = 1\n```", True)]),
        ("~~~\n```\nx = 1\n```\n~~~", [Block("", "```\nx = 1\n```", True)]),
        ("```python\nx = 1```", [Block("python", "x = 1", False)]),
        ("```python\nx = 1```\nThat is all.", [Block("python", "x = 1", False)]),
        ("```python\nx = 1\n", [Block("python", "x = 1", False)]),
        ("1. So:\n   ```python\n   x = 1\n   ```\n2. Done", [Block("python", "x = 1", True)]),
        ("```x = 1``` is inline\nand this is text", []),
        ("```bash\nls\n```\n```\nx = 1\n```.", [Block("bash", "ls", True), Block("", "x = 1", True)]),
        ("no code", []),
        ("- ```python\n  x = 1\n  ```", [Block("python", "x = 1", True)]),
        ("2. ```python\n   x = 1\n   ```", [Block("python", "x = 1", True)]),
        ("```python\nx = 1\n```python\nx = 2\n```", [Block("python", "x = 1", False), Block("python", "x = 2", True)]),
        ("```\nSo:\n```python\nx = 1\n```", [Block("", "So:", False), Block("python", "x = 1", True)]),
        ("```markdown\n```python\nx = 1\n```", [Block("markdown", "", False), Block("python", "x = 1", True)]),
        ("```{python}\nx = 1\n````  \nDone.", [Block("", "x = 1", True)]),
        ("~~~python\nx = '```'\n~~~", [Block("python", "x = '```'", True)]),
        ("```python\nx = 1\n    ```", [Block("python", "x = 1", True)]),
    ],
)
def test_fenced_blocks(response, blocks):
    assert fenced_blocks(response) == blocks


def test_code_in_a_block_of_markdown():
    assert extract_code("````markdown\n# So\n```python\ndef f(x): return x\n```\n````", {"f"}) == "def f(x): return x"


def test_bare_code_with_an_example_in_its_docstring():
    assert extract_code(EXAMPLE, {"f"}) == EXAMPLE
    assert extract_code(f'Use """ for docstrings:\n```python\n{EXAMPLE}\n```', {"f"}) == EXAMPLE


def test_the_asked_for_format_is_one_closed_block():
    assert is_only_block(f"Here:\n```python\n{EXAMPLE}\n```\nDone.")
    assert not is_only_block(f"```python\n{EXAMPLE}")
    assert not is_only_block(f"```python\n{EXAMPLE}\n```\n```python\nf(1)\n```")
    assert not is_only_block(EXAMPLE)


@pytest.mark.parametrize(
    "text",
    [
        "```python\nx = 1\n```\n" * 4000,
        '```python\nx = """\n```\n' * 3000,
        '"""\n```\n' * 6000,
        "```python\n# '''\n```\n" * 4000,
        "x```\n" * 10000,
        "'" * 30000,
        '```python\n"""' + "\\" * 30000,
        "(" * 10**5,
    ],
)
def test_an_answer_in_a_loop_is_read_in_no_time(text):
    """Half a minute where every block looks for its end through the whole text."""
    start = time.perf_counter()
    extract_code(text, {"f"})
    assert time.perf_counter() - start < 5
