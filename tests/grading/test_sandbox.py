"""Honest code passes; many tasks at once; what each level of the sandbox gives."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from src.grading import sandbox as module
from src.grading.sandbox import CLOSED, JAIL, Sandbox, Task, Verdict, open_sandbox, run_task, run_tasks
from tests.grading.hostile_code import ENDLESS, FORGED
from tests.grading.jailed import SPARE, probes, task, verdict

VALUES = r"""[
    None, True, 0, -7, 2**70, -(10**400), 0.1, float('inf'), 1e-300, 2j, '', 'ä\ud800\n', b'\x00\xff', (), (1,), [[]],
    {}, {1: (2, [3])}, {(1, 2): None}, {'handle': 1}, {1, 'a'}, frozenset({(1,)}), int, ValueError,
]"""


def test_values_cross_unchanged_in_both_directions(sandbox):
    tests = f"""
for sent in {VALUES}:
    back = f(sent)
    assert type(back) is type(sent) and back == sent, sent
    assert repr(f([sent])) == repr([sent])
assert str(f(float('nan'))) == 'nan' and str(f(-0.0)) == '-0.0'
assert f(x=3) == 3
"""
    assert verdict(sandbox, "def f(x):\n    return x", tests) == Verdict("passed", "")


HONEST = probes("""
# counter
from collections import Counter
def f(): return Counter('aab')
assert f() == {'a': 2, 'b': 1}
# defaultdict
from collections import defaultdict
def f():
    found = defaultdict(int)
    found[1] += 1
    return found
assert f() == {1: 1}
# namedtuple
from collections import namedtuple
def f(): return namedtuple('P', 'x')(1)
assert f() == (1,)
# whole_number_enum
import enum
class A(enum.IntEnum):
    x = 3
def f(): return A.x
assert f() == 3
# generator
def f():
    yield from 'abc'
assert list(f()) == ['a', 'b', 'c'] and sorted(f()) == ['a', 'b', 'c']
# range
def f(): return range(3)
assert [x for x in f()] == [0, 1, 2]
# own_objects
class P:
    def __init__(self, x): self.x = x
    def up(self, by): return self.x + by
def f(p): return p.x + p.y
p = P(1)
p.y = 2
assert f(p) == 3 and p.up(4) == 5
# built_in_exception
def f(x): raise KeyError('no ' + x)
try: f('a')
except KeyError as error: assert 'no a' in str(error)
# type_error
def f(x): return 'a' + x
try: f(1)
except TypeError as error: assert 'concatenate' in str(error)
# own_exception
class E(Exception): pass
def f(): raise E('no')
try: f()
except Exception as error: assert 'E: no' in str(error)
# module_not_imported_by_the_tests
def f(x): return x
assert math.floor(f(2.5)) == 2 and isinstance(f(1), int)
# future
from __future__ import annotations
def f(x: Nonsense) -> Nonsense: return x
assert f(1) == 1
# dataclass
import dataclasses
@dataclasses.dataclass
class D:
    x: 'int'
def f(): return D(4).x
assert f() == 4
# noise_and_demonstration
print('noise' * 1000)
def f():
    print('more')
    return 1
if __name__ == '__main__':
    input()
assert f() == 1
# file
import os
def f():
    with open('note', 'w') as file: file.write('x')
    return open('note').read() + os.environ['HOME'][:1]
assert f() == 'x/'
""")


@pytest.mark.parametrize("name", HONEST)
def test_honest_code_passes(sandbox, name):
    """The tests begin after the last line that is part of a definition or indented."""
    lines = HONEST[name].splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if line.startswith(("assert", "try:", "p = P"))]
    code, tests = "".join(lines[: starts[0]]), "".join(lines[starts[0] :])
    assert verdict(sandbox, code, tests) == Verdict("passed", "")


def test_set_up_is_out_of_reach(sandbox):
    """A helper that the prompt gives is the row's, whatever the answer makes of it."""
    setup = "def helper(x):\n    return x * 3\ndef f(x):\n    '''Undo helper.'''\n"
    tests = "def check(candidate):\n    assert candidate(helper(5)) == 5"
    honest = Task((setup, "def f(x): return x // 3"), setup, tests, ("f",), "f")
    assert run_task(honest, sandbox).kind == "passed"
    cheat = replace(honest, sources=(setup, "def helper(x): return x\ndef f(x): return x"))
    assert run_task(cheat, sandbox).kind == "failed"


@pytest.mark.parametrize(
    ("tests", "detail"),
    [
        ("", "never call the candidate"),
        ("assert True", "never call the candidate"),
        ("def check(candidate):\n    assert candidate(1)", "never call the candidate"),
        ("assert f(1", "do not compile"),
        ("import no_such_module\nassert f(1)", "fail before they call anything"),
        ("f(lambda: 1)", "pass a function"),
    ],
)
def test_a_row_that_cannot_judge_is_an_error(sandbox, tests, detail):
    found = run_task(Task(("def f(x): return x",), "", tests, ("f",)), sandbox)
    assert found.kind == "error"
    assert detail in found.detail


def test_results_keep_the_order_of_the_tasks(sandbox):
    waits = "import time\ntime.sleep(0.3)\n"
    tasks = [task(waits * (i == 0) + f"def f(x): return {i}", f"assert f(1) == {i % 3}") for i in range(9)]
    kinds = [found.kind for found in run_tasks(tasks, sandbox)]
    assert kinds == ["passed"] * 3 + ["failed"] * 6


def test_a_jail_that_could_not_be_built_is_tried_once_more(monkeypatch):
    """That alone: a timeout or a broken row is the same a second time."""
    kinds = {"fine": ["passed"], "loop": ["timeout"], "broken": ["error"], "crowded": ["unavailable", "passed"],
             "never": ["unavailable", "unavailable"]}  # fmt: skip
    left = {code: iter(found) for code, found in kinds.items()}
    monkeypatch.setattr(module, "PAUSE", 0)
    monkeypatch.setattr(module, "run_task", lambda one, _: Verdict(next(left[one.sources[0]]), ""))
    verdicts = run_tasks([task(code) for code in kinds], Sandbox("namespaces", workers=2))
    assert [found.kind for found in verdicts] == ["passed", "timeout", "error", "passed", "error"]
    assert [next(found, "none") for found in left.values()] == ["none"] * 5


LOOP = "def f(x):\n    while True: pass"
BURN = """
import time
def f(x):
    while time.process_time() < 0.7: pass
    return x
"""


@pytest.fixture
def busy_machine():
    """One core for this process, those it starts, and three programs that never rest."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    rivals = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    yield
    os.sched_setaffinity(0, cores)
    for rival in rivals:
        rival.kill()
        rival.wait()


def test_a_busy_machine_does_not_decide(sandbox, busy_machine):
    """0.7 s of CPU time take far more than 1 s beside others, and are within a limit of 1 s all the same."""
    started = time.monotonic()
    assert verdict(sandbox, BURN, "assert f(1) == 1", cpu_seconds=1) == Verdict("passed", "")
    assert time.monotonic() - started > 1
    assert verdict(sandbox, LOOP, cpu_seconds=1) == Verdict("timeout", "no verdict within 1 s of CPU time")


@pytest.mark.parametrize(
    ("code", "tests", "limits", "detail"),
    [
        (LOOP, "f(1)", {"cpu_seconds": 0.3}, "no verdict within 0.3 s of CPU time"),
        ("def f(x): return x", "while True: f(1)", {"cpu_seconds": 0.3}, "no verdict within 0.3 s of CPU time"),
        (BURN, "assert f(1) == 1", {"cpu_seconds": 0.3}, "no verdict within 0.3 s of CPU time"),
        ("import time\ndef f(x): time.sleep(99)", "f(1)", {"wall_seconds": 0.3}, "no verdict within 0.3 s"),
    ],
    ids=["candidate", "both", "ends_too_late", "sleeper"],
)
def test_which_time_ran_out(sandbox, code, tests, limits, detail):
    started = time.monotonic()
    assert verdict(sandbox, code, tests, **limits) == Verdict("timeout", detail)
    assert time.monotonic() - started < 0.3 + SPARE


@pytest.mark.parametrize(
    ("level", "allow", "executes", "used"),
    [
        ("namespaces", False, True, "namespaces"),
        ("namespaces", True, True, "namespaces"),
        ("rlimits", False, False, "none"),
        ("rlimits", True, True, "rlimits"),
        ("none", True, False, "none"),
    ],
)
def test_less_than_namespaces_must_be_allowed(monkeypatch, caplog, level, allow, executes, used):
    monkeypatch.setattr(module, "probe", lambda python: (level, "because"))
    with caplog.at_level("INFO", "kd"):
        opened = open_sandbox(allow)
    assert (opened.executes, opened.used_level) == (executes, used)
    [record] = caplog.records
    assert level in record.message
    assert ("--allow_unsafe_execution" in record.message) == (level == "rlimits" and not allow)
    assert ("not executed" in record.message) == (not executes)


def test_closed_sandbox_executes_nothing():
    assert not CLOSED.executes
    with pytest.raises(AssertionError):
        run_tasks([task("def f(x): return 1")], CLOSED)


def test_the_probe_believes_what_it_sees(monkeypatch):
    """A host whose namespaces hide nothing is not called isolated."""
    verdicts = {True: Verdict("failed", "AssertionError: it sees files"), False: Verdict("passed", "")}
    monkeypatch.setattr(module, "run_task", lambda one, _: verdicts["reads(" in one.tests])
    assert module.probe(sys.executable) == ("rlimits", "no namespaces: AssertionError: it sees files")


@pytest.fixture
def common_python() -> str:
    """An interpreter that every user of the host can read."""
    found = "/usr/bin/python3"
    open_to_all = all(folder.stat().st_mode & 0o001 for folder in JAIL.parents)
    if os.getuid() != 0 or not os.access(found, os.X_OK) or not open_to_all:
        pytest.skip("needs root, /usr/bin/python3 and a repository that every user can read")
    return os.path.realpath(found)


def test_an_ordinary_user_gets_namespaces_too(common_python, sandbox):
    for code, kind in (
        ("def f(x): return 7", "passed"),
        ("import os\ndef f(x): return 7 if os.fork() else 7", "failed"),
        (f"def f(x): return len(open({str(JAIL)!r}).read()) and 7", "failed"),
    ):
        done = subprocess.run(
            [common_python, "-I", "-S", str(JAIL), str(os.getpid()), "namespaces", "5", "20"],
            input=json.dumps(vars(task(code, "assert f(1) == 7")) | {"nonce": "n"}), capture_output=True, text=True,
            user=4242, group=4242, extra_groups=[], env={}, cwd="/",
        )  # fmt: skip
        assert json.loads(done.stdout)[:2] == ["n", kind], done


def test_limits_alone_still_judge(common_python):
    """Level rlimits: verdicts cannot be forged over the channel, nothing can be started, the folder is removed."""
    limits = Sandbox("rlimits", python=common_python, allow_unsafe=True)
    before = set(Path("/tmp").glob("kd_sandbox_*"))
    assert verdict(limits, "def f(x): return 7", "assert f(1) == 7").kind == "passed"
    for name in ("always_equal", "os_exit_in_call", "verdict_on_every_descriptor", "heap", "fork_bomb", "memory_bomb",
                 "attach", "grandchild", "big_file", "builtins", "modules"):  # fmt: skip
        assert verdict(limits, FORGED[name]).kind == "failed", name
    closed = "import os\nos.makedirs('a/b/c'); open('a/b/x', 'w'); os.chmod('a', 0)\ndef f(x): return 7"
    assert verdict(limits, closed, "assert f(1) == 7").kind == "passed"
    assert verdict(limits, ENDLESS["deaf_to_signals"], cpu_seconds=0.5).kind == "timeout"
    assert set(Path("/tmp").glob("kd_sandbox_*")) == before
