from fractions import Fraction

import pytest

from src.data.sources import gsm8k_rows
from src.grading.code import defined_names, extract_code
from src.grading.graders import grade
from src.grading.numeric import find_number
from src.grading.rows import Grade, dataset_row
from src.grading.rubric import mentions
from src.utils.common import UserError, read_jsonl


def make_row(grader, reference="72", prompt="How many?", **grader_args):
    return dataset_row(
        source="s", domain="d", split="eval", prompt=prompt, instruction="Say it.", reference=reference, grader=grader,
        grader_args=grader_args,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("response", "value", "strict"),
    [
        ("So it is 72.\n#### 72", "72", True),
        ("#### 5\nNo, wait.\n#### 72", "72", True),
        ("#### 72 apples", "72", True),
        ("#### **72**", "72", True),
        ("#### $1,234.50", "1234.5", True),
        ("#### \u221272", "-72", True),
        ("#### -$72", "-72", True),
        ("#### $-72", "-72", True),
        ("#### 8 * 9 = 72", "72", True),
        ("#### 72 (= 8 * 9)", "72", True),
        ("#### x = 72", "72", True),
        ("The answer is 24 x 3 = 72 peaches.", "72", False),
        ("#### 2 x (3 + 33) = 72", "72", True),
        ("The answer is: 6 months * $12 = $72.", "72", False),
        ("Answer: 6 months x 12 = 72", "72", False),
        ("Answer: 30 gallons + 42 gallons = 72 gallons of milk", "72", False),
        ("The answer is 72 apples, for 8 bags x 9 = 71 and one more", "72", False),
        ("The answer is 72 - that is all, 3 + 4 = 7", "72", False),
        ("#### 25%", "25", True),
        ("#### 1/3", "1/3", True),
        ("#### 2 1/2 cups", "2.5", True),
        ("#### .5", "0.5", True),
        ("#### 1e3", "1000", True),
        ("#### 72\nThat was fun, all 3 steps of it.", "72", False),
        ("The total is 72. #### 72", "72", False),
        ("#### 1. First we add\n3 + 4\n#### 2. Then we stop\nThat gives 7", "7", False),
        ("It ends with #### <number>, so 72", "72", False),
        ("\\boxed{72} out of 100", "72", False),
        ("\\boxed{\\$1{,}234} or so, in 3 steps", "1234", False),
        ("\\boxed{-\\dfrac{1}{2}} of 9", "-1/2", False),
        ("\\boxed{2\\frac{1}{2}} of 9", "5/2", False),
        ("\\boxed{9 \\times 2 = 18} of 9", "18", False),
        ("The final answer is $9 \\cdot 2 = 18$.", "18", False),
        ("#### 36 \\div 2 = 18", "18", True),
        ("\\boxed{\\text{72 apples}} in 3 bags", "72", False),
        ("The answer is 72, from 3 bags.", "72", False),
        ("**Answer:** 72 apples in 3 bags", "72", False),
        ("Final answer:\n\n$72 for 3", "72", False),
        ("Answer: She sold 48/2 = 24 in May, so 48 + 24 = 72 in all", "72", False),
        ("8 bags of 9 make 72.", "72", False),
        ("That makes **72**", "72", False),
        ("That makes \\(72\\)", "72", False),
        ("It is 80-8", "8", False),
        ("It is (80)-8", "8", False),
        ("- 72", "72", False),
        ("答案是72", "72", False),
        ("The area is 72 cm^2 or 72 m2", "72", False),
        ("It is...72", "72", False),
        ("It costs 72\u202f000 yen", "72000", False),
    ],
)
def test_number_is_found(response, value, strict):
    reference = str(float(Fraction(value))) if "/" not in value else value
    assert grade(make_row("numeric", reference), response) == Grade("correct", find_number(response)[0], strict, 1.0)
    shifted = grade(make_row("numeric", str(Fraction(reference) + 1)), response)
    assert (shifted.outcome, shifted.strict, shifted.score) == ("wrong", False, 0.0)


@pytest.mark.parametrize("response", ["", "   \n", "I do not know.", "#### <number>", "see x2 and cm^2", "1/0"])
def test_no_number_is_no_answer(response):
    assert grade(make_row("numeric"), response) == Grade("no_answer", "", False, 0.0)


def test_absurd_numbers_are_passed_over():
    assert find_number("3/0 or " + "9" * 5000 + " or 72 or 5/0") == ("72", 72, False)


@pytest.mark.parametrize(
    ("reference", "response", "outcome"),
    [
        ("1/3", "#### 0.3333333333333", "correct"),
        ("1/3", "#### 0.3333", "wrong"),
        ("1234", "#### 1,234", "correct"),
        ("1,234", "#### 1234.0", "correct"),
        ("25%", "#### 25", "correct"),
        ("25", "#### 0.25", "wrong"),
        ("-5", "#### 5", "wrong"),
        ("72", "#### 71.999999", "wrong"),
        ("12345678901234567890", "#### 12345678901234567891", "wrong"),
    ],
)
def test_numbers_are_compared_exactly(reference, response, outcome):
    assert grade(make_row("numeric", reference), response).outcome == outcome


@pytest.mark.parametrize("reference", ["", "many", "72 apples", "7 or 8", "1/0"])
def test_malformed_reference_names_the_row(reference):
    row = make_row("numeric", reference)
    with pytest.raises(UserError, match=row["id"]):
        grade(row, "#### 72")


def test_official_solutions_are_correct_and_shifted_ones_never(real_data):
    records = read_jsonl(real_data / "gsm8k" / "test.jsonl")
    assert len(records) == 1319
    for row, record in zip(gsm8k_rows(records, "eval", "test.jsonl"), records, strict=True):
        steps, _, gold = record["answer"].rpartition("#### ")
        assert grade(row, record["answer"]) == Grade("correct", gold.replace(",", ""), True, 1.0)
        shifted = str(Fraction(row["reference"]) + 1)
        for ending in (f"#### {shifted}", f"The answer is ${shifted}.", f"\\boxed{{{shifted}}}", f"It is {shifted}"):
            assert grade(row, steps + ending).outcome == "wrong"
        assert grade(row, f"{steps}The answer is ${gold}.") == Grade("correct", gold.replace(",", ""), False, 1.0)


@pytest.mark.parametrize("grader", ["numeric", "python_tests", "rubric"])
def test_cut_answer_is_truncated_whatever_it_says(grader):
    row = make_row(grader, groups=[{"name": "root_cause", "any": ["disk full"]}], pass_mark=1, entry_point="f")
    response = "Root cause: disk full\n```python\ndef f(): pass\n```\n#### 72"
    result = grade(row, response, "length")
    assert (result.outcome, result.strict, result.score) == ("truncated", False, 0.0)
    assert result.extracted == {"numeric": "72", "python_tests": "def f(): pass", "rubric": "root_cause"}[grader]


def test_unknown_grader_names_the_row_and_the_known():
    row = make_row("vibes")
    with pytest.raises(UserError, match=rf"{row['id']}.*'vibes'.*numeric, python_tests, rubric"):
        grade(row, "72")


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("Here:\n```python\ndef f(x):\n    return x\n```\nDone.", "def f(x):\n    return x"),
        ("```\ndef f(x):\n    return x\n```", "def f(x):\n    return x"),
        ("```Python\ndef f(x):\n    return x\n```", "def f(x):\n    return x"),
        ("~~~py\ndef f(x):\n    return x\n~~~", "def f(x):\n    return x"),
        ("1. Do this:\n   ```python\n   def f(x):\n       return x\n   ```", "def f(x):\n    return x"),
        ("```python\ndef f(x):\n    return x", "def f(x):\n    return x"),
        ("```python\ndef f(x):\n    return x```", "def f(x):\n    return x"),
        ("```bash\npip install x\n```\n```python\ndef f(): pass\n```\n```text\n3\n```", "def f(): pass"),
        ("```python\ndef f(): pass\n```\nUse:\n```python\nprint(f())\n```", "def f(): pass"),
        ("```python\ndef f(): pass\n```\nUse:\n```python\ndef main(): f()\n```", "def f(): pass"),
        ("```python\ndef f(): return 1\n```\nBetter:\n```python\ndef f(): return 2\n```", "def f(): return 2"),
        ("```python\n    return x\n```", "return x"),
        ("```code\ndef f(): pass\n```", "def f(): pass"),
        ("def f(x):\n    y = x\n\n    return y", "def f(x):\n    y = x\n\n    return y"),
        ("Sure.\nimport re\nx = 1\n\ndef f():\n    pass\n\nThis is it.", "import re\nx = 1\n\ndef f():\n    pass"),
        ("A = 1\ndef g (): pass\ndef f (): pass\nDone.", "A = 1\ndef g (): pass\ndef f (): pass"),
        ("```bash\nls\n```", ""),
        ("```python\n```", ""),
        ("I would define a function.", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_code_is_extracted(response, code):
    assert extract_code(response, {"f"}) == code
    outcome = Grade("not_executed", code, None, None) if code else Grade("no_answer", "", False, 0.0)
    assert grade(make_row("python_tests", entry_point="f", tests=""), response) == outcome
    assert grade(make_row("python_tests", entry_point="", tests="assert f(1) == 1"), response) == outcome


def test_defined_names_are_the_outer_ones():
    assert defined_names("class A:\n    def b(self): pass\nasync def c(): pass\ndef d():\n    pass") == {"A", "c", "d"}


RUBRIC = {
    "groups": [
        {"name": "root_cause", "any": ["memory leak", "heap exhaustion"]},
        {"name": "component", "any": ["payments-api"]},
        {"name": "first_actions", "any": ["restart", "roll back"]},
    ],
    "pass_mark": 0.67,
}
LABELLED = "Root cause: memory leak\nComponent: payments-api\nFirst actions: restart the pods"
PROMPT = "The payments-api pods restart every hour and memory leak alerts fire all day.\nName root cause and component."


def rubric(response, prompt="What is wrong?", **changes):
    return grade(make_row("rubric", prompt=prompt, **(RUBRIC | changes)), response)


@pytest.mark.parametrize(
    ("response", "outcome", "strict", "groups"),
    [
        (LABELLED, "correct", True, 3),
        (LABELLED.lower(), "correct", True, 3),
        (LABELLED.replace(": ", ":** ").replace("Root", "**Root"), "correct", True, 3),
        (LABELLED.replace("Root cause:", "Root-cause:\n").replace("Component", "## Component"), "correct", True, 3),
        (LABELLED.replace("restart the pods", "wait"), "correct", True, 2),
        ("A memory leak in payments-api; restart it.", "correct", False, 3),
        (LABELLED.replace("Component:", "Where:"), "correct", False, 3),
        ("Root cause: payments-api\nComponent: memory leak\nFirst actions: restart", "correct", False, 3),
        (LABELLED.replace("restart the pods", ""), "correct", False, 2),
        (LABELLED.replace("restart the pods", "\n"), "correct", False, 2),
        (LABELLED.replace("Component: payments-api", "Component:"), "correct", False, 2),
        (LABELLED.replace("Component: payments-api", "**Component:**\n-"), "correct", False, 2),
        (LABELLED.replace("Root cause:", "Root cause: " + "well " * 60), "correct", True, 3),
        (LABELLED.replace(": ", ": " + "well " * 60), "correct", False, 3),
        ("Memory-Leaks in Payments API", "correct", False, 2),
        ("Component: payments_api", "wrong", False, 1),
        ("memory leakage in nonpayments-api, prestart", "wrong", False, 0),
        ("   ", "no_answer", False, 0),
    ],
)
def test_rubric(response, outcome, strict, groups):
    result = rubric(response)
    assert (result.outcome, result.strict, result.score) == (outcome, strict, groups / 3)
    assert len(result.extracted.split(", ")) == max(groups, 1)


@pytest.mark.parametrize(
    ("response", "hit"),
    [
        ("It is a memory leak.", True),
        ("This is not a memory leak.", False),
        ("It isn't a memory leak.", False),
        ("It isn’t a memory leak.", False),
        ("We can rule out a memory leak.", False),
        ("There is no sign of a memory leak.", False),
        ("A disk fault rather than a memory leak.", False),
        ("The memory leak was ruled out.", False),
        ("A memory leak is unlikely.", False),
        ("A memory leak isn't the cause.", False),
        ("It is not only a memory leak.", True),
        ("It is not the disk, it is a memory leak.", True),
        ("It is not the disk but a memory leak.", True),
        ("The pods are not ready due to a memory leak.", True),
        ("It is not due to a memory leak.", False),
        ("It is not a memory leak.\nCorrection: a memory leak it is.", True),
        ("Not the disk: memory leak", True),
    ],
)
def test_negated_phrases_do_not_count(response, hit):
    assert ("root_cause" in rubric(response).extracted) == hit


@pytest.mark.parametrize(
    ("phrases", "response", "hit"),
    [
        (["not exist", "file"], "The file doesn't exist.", True),
        (["cannot be found"], "The file can’t be found.", True),
        (["will not resolve"], "The name won't resolve.", True),
        (["not renewed"], "The certificate wasn't renewed.", True),
        (["disk space"], "There is no disk space left on the host.", True),
        (["disk space"], "There is not enough disk space.", True),
        (["disk space"], "The host does not have enough disk space.", True),
        (["disk space"], "Old dumps consume all the disk space.", True),
        (["disk space"], "There is no disk space problem.", False),
        (["disk space"], "It isn't the disk space that is left.", False),
        (["certificate"], "It wasn't the certificate.", False),
    ],
)
def test_what_is_missing_is_no_denial(phrases, response, hit):
    assert mentions(response, phrases) == hit


def test_a_copied_prompt_earns_nothing():
    assert rubric(PROMPT, PROMPT) == Grade("wrong", "", False, 0.0)
    assert rubric(f"Root cause: see above.\n{PROMPT}", PROMPT).score == 0.0
    assert rubric(PROMPT.replace("\n", " "), PROMPT).score == 0.0
    assert rubric(f"{PROMPT}\n{LABELLED}", PROMPT).strict is True


CHINESE = {
    "groups": [{"name": "根因", "any": ["内存泄漏"]}, {"name": "组件", "any": ["payments-api"]}],
    "pass_mark": 1.0,
}


@pytest.mark.parametrize(
    ("response", "score", "strict"),
    [
        ("根因：内存泄漏\n组件：payments-api", 1.0, True),
        ("**根因**：服务发生内存泄漏，对象未释放\n**组件**：payments-api的堆", 1.0, True),
        ("payments-api存在内存泄漏。", 1.0, False),
        ("根因：2GB内存泄漏3次\n组件：payments-api", 1.0, True),
        ("根因：内存泄漏\n组件：payments-api2", 0.5, False),
        ("根因：不是内存泄漏\n组件：payments-api", 0.5, False),
        ("根因：并非由于内存泄漏，而是磁盘写满\n组件：payments-api", 0.5, False),
        ("根因：内存泄漏的可能性很小\n组件：payments-api", 0.5, False),
        ("根因：不是磁盘写满，而是内存泄漏\n组件：payments-api", 1.0, True),
        ("根因：内存泄漏" + "好" * 120 + "\n组件：payments-api", 1.0, False),
        ("凌晨起告警，payments-api每小时重启一次，怀疑内存泄漏。", 0.0, False),
    ],
)
def test_chinese_rubric(response, score, strict):
    result = rubric(response, "凌晨起告警，payments-api每小时重启一次，怀疑内存泄漏。请定位。", **CHINESE)
    assert (result.score, result.strict) == (score, strict)


@pytest.mark.parametrize("share", [(1, 0.5, "wrong"), (1, 0.33, "correct"), (2, 0.67, "correct"), (2, 0.68, "wrong")])
def test_pass_mark(share):
    hits, pass_mark, outcome = share
    text = ", ".join(["memory leak", "restart"][:hits])
    assert rubric(text, pass_mark=pass_mark).outcome == outcome


@pytest.mark.parametrize("broken", [{"groups": []}, {"pass_mark": None}, {"groups": [{"name": "x", "any": []}]}])
def test_malformed_rubric_names_the_row(broken):
    with pytest.raises(UserError, match=r"row [0-9a-f]{16}: a rubric needs"):
        rubric(LABELLED, **broken)
