"""The rules at the top of src/grading/numeric.py, one by one, and over generated ways of writing a number."""

import doctest
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.grading import notation, number_words, numeric
from src.grading.graders import grade
from src.grading.numeric import find_number, gold_number
from src.grading.rows import Grade, dataset_row
from src.utils.common import read_jsonl


@pytest.mark.parametrize("module", [notation, number_words])
def test_the_examples_in_the_docstrings(module):
    assert doctest.testmod(module).failed == 0


def test_every_example_of_the_rules_is_read_as_they_say():
    """Those of one number in the module's docstring; what it is stands in the tests below."""
    rules = numeric.__doc__.partition("The rules:")[2]
    examples = re.findall(r"`(####[^`]+|The answer[^`]+|Answer: [^`]+)`", rules)
    assert len(examples) > 10
    silent = {"The answer is one we can find", "#### none"}
    assert [example for example in examples if find_number(example) is None] == [e for e in examples if e in silent]


@pytest.mark.parametrize(
    ("response", "value", "strict"),
    [
        # 1. signs
        ("１８", 18, False),
        ("#### １８", 18, True),
        ("#### １，２３４．５", 1234.5, True),
        ("#### ＄１８", 18, True),
        ("#### ١٨", 18, True),
        ("#### –5", -5, True),
        ("#### —5", -5, True),
        ("#### ‑5", -5, True),
        ("#### －5", -5, True),
        ("#### −$5", -5, True),
        ("It takes 3–5", 5, False),
        ("#### 2½", 2.5, True),
        ("#### ½", 0.5, True),
        (r"\boxed{\textbf{18}} of 20", 18, False),
        (r"\boxed{\mathbf{18}} of 20", 18, False),
        (r"\boxed{18\text{ eggs}} of 20", 18, False),
        (r"\boxed{\text{She has 18 eggs}} of 20", 20, False),
        (r"\boxed{18\%} of 20", 18, False),
        (r"\boxed 18 of 20", 18, False),
        (r"\fbox{18} of 20", 18, False),
        (r"\boxed{\frac{3}{4}} of 20", 0.75, False),
        (r"\boxed{5} no, \boxed{18} of 20", 18, False),
        (r"#### 2\frac{1}{2}", 2.5, True),
        (r"#### 3 \times 10^{6}", 3000000, True),
        (r"\boxed{\text{\textbf{18}}} of 20", 18, False),
        (r"\boxed{{\bf 18}} of 20", 18, False),
        (r"\boxed{- 5} of 20", -5, False),
        ("The area is 72 cm^{2} or so", 72, False),
        ("#### 18\u200b\r\n", 18, True),
        ("#### __18__", 18, True),
        ("#### $$18$$", 18, True),
        (r"\#\#\#\# 18", 18, True),
        ("＃＃＃＃ １８", 18, True),
        ("The answer is —5.", -5, False),
        ("The answer is—18.", 18, False),
        ("答案是——18", 18, False),
        ("There were 20 —18 of them red", 18, False),
        # 2 and 3. the place, and the number it begins with
        ("#### 18. She ate 3 for breakfast.", 18, True),
        ("#### 18. (3 of 7 left)", 18, True),
        ("#### 18, of which 3 are left", 18, True),
        ("#### 18; 3 left", 18, True),
        ("#### 18\n", 18, True),
        ("Answer: 18. She ate 3.", 18, False),
        ("The final answer is 18. There were 20 at first.", 18, False),
        ("The answer should be 18, not 20.", 18, False),
        ("**Final Answer**: 18 of 20", 18, False),
        ("ANSWER: 18 of 20", 18, False),
        ("we convert the answer to weeks: 28 days = 4 weeks. It is 5", 5, False),
        ("答案：18元，共3人", 18, False),
        ("答案是 18 个，其中 3 个坏了", 18, False),
        ("所以答案为：18。共3人。", 18, False),
        ("最终答案：$18$，共3人", 18, False),
        ("答：一共18元，3人平分", 18, False),
        ("回答：先看3人，共18元", 18, False),
        ("答案：**18**元，3人", 18, False),
        ("Final Answer: The final answer is $18$ of 20", 18, False),
        ("The final answer is:\n$$\n18\n$$\nof 20", 18, False),
        ("The answer to the question is therefore 18 of 20", 18, False),
        ("<answer>18</answer> of 20", 18, False),
        ('{"answer": "18", "steps": 3}', 18, False),
        ("#### US$18 of 20", 18, True),
        ("#### 8: 3 of them are left\nThat took 5 minutes", 8, False),
        ("The third answer was 1800-400 = 1400\nAltogether 1800+1400 = 3200", 3200, False),
        ("Answer: Thus, 28 links, at 4 ounces each, weigh 112 ounces", 112, False),
        # 4. calculations
        ("#### 2^3 = 8", 8, True),
        ("#### 2**3 = 8", 8, True),
        ("#### 2³ = 8", 8, True),
        ("#### 10^3", 1000, True),
        ("#### 20% of 50 = 10", 10, True),
        ("Answer: 20% of 50 = 10", 10, False),
        ("The answer is 20% of 50 = 10", 10, False),
        ("Answer: 2 dozen eggs = 24", 24, False),
        ("#### 5 dozen = 60 eggs", 60, True),
        ("#### 18 = 9 * 2", 18, True),
        ("#### 5 * 3 = 15, so 15 + 3 = 18", 18, True),
        ("#### (1 + 2)^2 = 9", 9, True),
        ("#### 24x3 = 72", 72, True),
        ("#### 18元 + 3元 = 21元", 21, True),
        ("#### = 24 eggs, 2 dozen", 24, True),
        ("#### 55 / 3 ≈ 18.33", 18.33, True),
        ("#### 8 * 9 =", 9, False),
        ("#### 3 bags of 6 eggs", 3, True),
        ("#### 5 * 3 = <<5*3=15>>15", 15, True),
        (r"\boxed{\dfrac{3 \times 12}{2} = 18}, of 20", 18, False),
        ("The answer is 9 * 2 = 18, and 3 + 4 = 7 is the rest", 18, False),
        ("**Answer: 4** since one dollar equals 100 cents", 4, False),
        ("#### 4 since x = 10", 4, True),
        ("#### x=925(2/5)=370 stamps", 370, True),
        ("Answer: 15 gallons * 8 pints / gallon = 120 pints in 3 days", 120, False),
        # 5. headings
        ("#### 1. First we add\n3 + 4\n#### 2. Then we stop\nThat gives 7", 7, False),
        ("#### 3. Conclusion\nThe answer is 18.", 18, False),
        ("#### 1) Add\n#### 2) Stop\n#### 18", 18, True),
        ("#### 2. Add the eggs\n3 + 4 = 7", 7, False),
        ("#### 2: Find the eggs.\n3 + 4\n#### 3: Sell them.\nThat makes 7", 7, False),
        ("### 1. Add\n3 + 4\n### 2. Stop\n#### 3. Conclusion\nIt is 7", 7, False),
        ("#### 1. 先求和\n#### 2. 再相减\n得7", 7, False),
        ("#### 1. Add\n#### 2. Stop\n#### 18. She ate 3.", 18, True),
        ("Answer:\n\n1. We add 3 and 4.\n2. So it is 7.", 7, False),
        # 6. thousands
        ("#### 1 000", 1000, True),
        ("#### 118 000", 118000, True),
        ("#### 1 000 000 people", 1000000, True),
        ("#### 1'000", 1000, True),
        ("#### 1’000", 1000, True),
        ("#### 1_000", 1000, True),
        ("#### 1\u202f000", 1000, True),
        ("#### 1,18,000", 118000, True),
        ("#### 1 000 5", 1, True),
        ("#### 18 300 5", 18, True),
        ("in 2020 300 came", 300, False),
        ("#### 1.000.000", 1000000, True),
        (r"#### 1\,000", 1000, True),
        ("#### 3,5", 3, True),
        ("#### 5 100-dollar bills", 5, True),
        # 7. units
        ("#### 25 %", 25, True),
        ("#### 2 million", 2, True),
        # 8. words
        ("The answer is eighteen.", 18, False),
        ("#### eighteen", 18, False),
        ("Answer: twenty-one apples.", 21, False),
        ("The answer is one hundred and five.", 105, False),
        ("The answer is negative five.", -5, False),
        ("答案是十八个。", 18, False),
        ("It is eighteen, of 20", 20, False),
        ("The answer is one we can find: 18", 18, False),
        ("The answer is eighteen, not 20.", 18, False),
        ("The answer is eighteen. She ate 3.", 18, False),
        ("Answer: Two flew away, leaving 11 - 2 = 9", 9, False),
        ("答案：两个人走了，剩下 3 人", 3, False),
        ("答案是十八个，3人分", 18, False),
        # 9. what runs on
        ("#### 18\nQuestion: Tom has 5. How many?\n#### 5", 18, False),
        ("#### 18\n\nQ: Tom has 5.\nA: 5", 18, False),
        ("#### 18\n问题：还有几个？\n#### 5", 18, False),
        ("#### 18\n<|im_end|>\n<|im_start|>user\nNow 5?\n#### 5", 18, False),
        ("#### 18\nUser: and 5?\nAssistant: #### 5", 18, False),
        ("The answer is 18.\n\nQuestion: Tom has 5.\nThe answer is 5.", 18, False),
        ("Question: Tom has 5 and 13.\n#### 18", 18, True),
        ("#### 5\nNo, wait.\n#### 18", 18, True),
        ("#### 18\n### Instruction:\nNow 5\n### Response:\n#### 5", 18, False),
        ("#### 18</s>\n#### 5", 18, False),
        ("The answer is 5 so far.\nProblem: and the rest?\n#### 18", 18, True),
        # 10. strict
        ("#### 5\n#### none", 5, False),
        ("#### 5\n#### unknown\n", 5, False),
        ("#### 5\n\nThat is all.", 5, False),
        ("  #### 5", 5, True),
    ],
)
def test_what_is_read(response, value, strict):
    text, found, in_format = find_number(response)
    assert (found, in_format) == (Fraction(str(value)), strict), text


@pytest.mark.parametrize("response", ["<think>Maybe 18.</think> I cannot tell.", "<think>It is 18.", "#### none"])
def test_no_answer(response):
    row = dataset_row(source="s", domain="d", split="eval", prompt="How many?", instruction="Say it.", reference="18",
                      grader="numeric")  # fmt: skip
    assert grade(row, response) == Grade("no_answer", "", False, 0.0)


def test_what_is_graded_stands_behind_the_thought():
    row = dataset_row(source="s", domain="d", split="eval", prompt="How many?", instruction="Say it.", reference="18",
                      grader="numeric")  # fmt: skip
    assert grade(row, "<think>5? #### 5</think>\n\n#### 18") == Grade("correct", "18", True, 1.0)
    assert grade(row, "<think>#### 18</think>\n\n#### 5").outcome == "wrong"
    assert grade(row, "<think>#### 18", "max_tokens").outcome == "truncated"


def plain(number):
    return str(number)


def in_groups(mark):
    return lambda number: f"{number:,}".replace(",", mark)


def full_width(number):
    return str(number).translate(str.maketrans("0123456789-", "０１２３４５６７８９－"))


WAYS = [plain, full_width, *(in_groups(mark) for mark in (",", "'", "_", "\u202f", "\u00a0"))]
for form in (
    "{}.00",
    "**{}**",
    "`{}`",
    "${}$",
    "\\textbf{{{}}}",
    "{} eggs",
    "{}%",
    "\\text{{{} eggs}}",
    "7 + 3 - 2 = {}",
):
    WAYS.append(form.format)
WRITTEN = st.sampled_from(WAYS)
NUMBERS = st.integers(1, 10**7)
# sentences with other numbers, none of which says that it is the answer
OTHERS = st.sampled_from(
    ["She has 7 bags of 12 eggs.", "At 5:30 there were 1,200 of 3/4 size.", "So 2 x 3 = 6.", "其中 3 个坏了。", ""]
)
STATED = st.sampled_from(
    ["#### {}", "\\boxed{{{}}}", "The answer is {}.", "Answer: {}", "Final answer: {}", "答案：{}"]
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(number=NUMBERS, write=WRITTEN, state=STATED, before=OTHERS, after=OTHERS, same_line=st.booleans())
def test_a_stated_number_is_read_however_it_is_written(number, write, state, before, after, same_line):
    """Before and after any sentence with other numbers, on the same line (as a sentence of its own) or on the next."""
    said = state.format(write(number))
    if not said.endswith("."):
        said += "."
    response = f"{before}\n{said}{' ' if same_line else chr(10)}{after}"
    found = find_number(response)
    assert found is not None
    assert found[1] == number, response


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    number=NUMBERS, write=st.sampled_from([plain, full_width, in_groups(","), in_groups(" ")]), negative=st.booleans()
)
def test_a_marked_last_line_is_strict_and_signed(number, write, negative):
    sign = "–" if negative else ""
    assert find_number(f"So 2 x 3 = 6.\n#### {sign}{write(number)}")[1:] == (-number if negative else number, True)


@pytest.mark.parametrize("split", ["train", "test"])
def test_references_are_read(real_data, split):
    """Every official solution of GSM8K, and its number alone as a reference."""
    for record in read_jsonl(real_data / "gsm8k" / f"{split}.jsonl"):
        answer = record["answer"]
        gold = answer.rpartition("####")[2].strip()
        value = Fraction(gold.replace(",", ""))
        assert gold_number({"reference": gold})[1] == value
        assert find_number(answer)[1:] == (value, True), answer


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"#### {number % 9}. Add\n" for number in range(6000)),
        "the answer is " * 6000,
        "#### " + "1 + " * 20000,
        "#### 1" + " 000" * 20000,
        "\\boxed{" * 9000,
        "Question: 5\n" * 6000 + "#### 5",
        "<<" * 30000,
        "9" * 60000,
    ],
)
def test_an_answer_in_a_loop_is_read_in_no_time(text):
    start = time.perf_counter()
    find_number(text)
    assert time.perf_counter() - start < 2
