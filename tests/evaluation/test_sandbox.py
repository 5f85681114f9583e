"""Hostile code does not pass, does not stay, does not outlive its time. Honest code does."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from src.evaluation import sandbox as module
from src.evaluation.sandbox import CLOSED, JAIL, Sandbox, Task, Verdict, open_sandbox, run_task, run_tasks

SECRET = str(random.Random().randrange(10**8, 10**9))  # what the tests expect; no candidate can know it
SPARE = 3.0  # seconds that starting and clearing away may take on a busy machine


def task(code: str, tests: str = "", **changes) -> Task:
    return replace(Task((code,), "", tests or f"assert f(1) == {SECRET}", ("f",)), **changes)


def verdict(sandbox: Sandbox, code: str, tests: str = "", seconds: int = 10, **changes) -> Verdict:
    return run_task(task(code, tests, **changes), sandbox.level, sandbox.python, seconds)


def strangers() -> set[str]:
    """Processes that live in another network namespace than this one."""
    ours, found = os.readlink("/proc/self/ns/net"), set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{process}/ns/net") != ours:
                found.add(process)
        except OSError:
            continue
    return found


def gone(before: set[str]) -> bool:
    """Whether nothing is left of what was started; a killed process needs a moment to be cleared away."""
    deadline = time.monotonic() + SPARE
    while strangers() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    return not strangers() - before


def probes(text: str) -> dict[str, str]:
    """Programs by the name in the comment that stands before each."""
    parts = re.split(r"^# (\w+)\n", text, flags=re.MULTILINE)[1:]
    return {name: code.replace("SECRET", SECRET) for name, code in zip(parts[::2], parts[1::2], strict=True)}


# --- honest code -----------------------------------------------------------------------------------------------------

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
    assert run_task(honest, sandbox.level, sandbox.python).kind == "passed"
    cheat = replace(honest, sources=(setup, "def helper(x): return x\ndef f(x): return x"))
    assert run_task(cheat, sandbox.level, sandbox.python).kind == "failed"


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
    found = run_task(Task(("def f(x): return x",), "", tests, ("f",)), sandbox.level, sandbox.python)
    assert found.kind == "error"
    assert detail in found.detail


# --- hostile code ----------------------------------------------------------------------------------------------------


LIES = """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 1
    def __bool__(self): return True
    def __getattr__(self, name): return lambda *a: True
"""
# Each must fail against `assert f(1) == SECRET`; one that says `return SECRET` has got out if it passes.
FORGED = {name: LIES + code for name, code in probes("""
# always_equal
def f(x): return Yes()
# always_equal_class
def f(x): return Yes
# always_equal_number
class Number(Yes, int): pass
def f(x): return Number(1)
# always_equal_in_a_list
def f(x): return [Yes()]
# always_equal_metaclass
class Meta(type):
    def __eq__(self, other): return True
    __hash__ = None
class Thing(metaclass=Meta): pass
def f(x): return Thing
""").items()}  # fmt: skip
FORGED |= probes(r"""
# exit_at_load
import sys
sys.exit(0)
# exit_in_call
import sys
def f(x): sys.exit(0)
# os_exit_at_load
import os
os._exit(0)
# os_exit_in_call
import os
def f(x): os._exit(0)
# exec_in_call
import os, sys
def f(x): os.execv(sys.executable, [sys.executable, '-c', 'pass'])
# kill_self
import os
def f(x): os.kill(os.getpid(), 9)
# crash
import ctypes
def f(x): ctypes.string_at(0)
# verdict_on_every_descriptor
import os
def f(x):
    for fd in range(64):
        try: os.write(fd, b'["", "passed", ""]')
        except OSError: pass
    os._exit(0)
# frames
import re, sys
def f(x):
    frame, seen = sys._getframe(), ''
    while frame:
        seen += repr([frame.f_locals, frame.f_globals, frame.f_code.co_consts])
        frame = frame.f_back
    return int(re.search(r'f\(1\) == ([0-9]{8,9})', seen)[1])
# heap
import gc, re
def f(x):
    for thing in gc.get_objects():
        for value in gc.get_referents(thing):
            if isinstance(value, str) and (found := re.search(r'f\(1\) == ([0-9]{8,9})', value)):
                return int(found[1])
# memory_of_this_process
import re
def f(x):
    return int(re.search(rb'f\(1\) == ([0-9]{8,9})', open('/proc/self/mem', 'rb').read())[1])
# builtins
import builtins
builtins.AssertionError = type('A', (), {})
builtins.isinstance = lambda *a: True
builtins.type = lambda *a: int
builtins.compile = builtins.exec = lambda *a, **k: None
def f(x): return True
# modules
import sys, types
main, fake = sys.modules['__main__'], types.ModuleType('json')
fake.dumps = lambda message: '["value", {"handle": "f"}]'
main.json = sys.modules['json'] = fake
main.receive = lambda fd: ['call', {'handle': 'f'}, [1], {'dict': []}]
def f(x): return 1
# protocol_handle
import sys
sys.modules['__main__'].encode = lambda *a: {'handle': []}
def f(x): return 1
# protocol_type
import sys
sys.modules['__main__'].encode = lambda *a: {'type': 'eval'}
def f(x): return 1
# protocol_unhashable
import sys
sys.modules['__main__'].encode = lambda *a: {'set': [[]]}
def f(x): return 1
# protocol_two_keys
import sys
sys.modules['__main__'].encode = lambda *a: {'int': '1', 'set': []}
def f(x): return 1
# protocol_deep
import json
json.dumps = lambda message: '[' * 99999 + ']' * 99999
def f(x): return 1
# protocol_replies_ahead
import os
for fd in range(64):
    try: os.write(fd, b'\0\0\0\x0f["value", true]' * 9)
    except OSError: pass
def f(x): return True
# protocol_length
import os
def f(x):
    for fd in range(64):
        try: os.write(fd, b'\xff' * 8)
        except OSError: pass
# raise_exit
def f(x): raise SystemExit(0)
# raise_interrupt
def f(x): raise KeyboardInterrupt
# raise_stop
def f(x): raise StopIteration
# raise_named
E = type('SystemExit', (Exception,), {})
def f(x): raise E(0)
# long_answer
def f(x): return 'x' * (1 << 25)
# deep_answer
def f(x):
    a = []
    for _ in range(10**5): a = [a]
    return a
# recursion
def f(x): return f(x)
# atexit
import atexit, os
atexit.register(lambda: os._exit(0))
def f(x): raise SystemExit(0)
# close_all
import os
os.closerange(0, 64)
def f(x): return SECRET
# kill_everybody
import os
def f(x):
    for process in (1, os.getppid(), -1):
        for number in range(1, 65):
            try: os.kill(process, number)
            except OSError: pass
    os.killpg(0, 9)
# attach
import ctypes, os
def f(x):
    for process in {0, 1, *range(99), os.getppid()} - {os.getpid()}:
        if ctypes.CDLL(None).ptrace(16, process, 0, 0) == 0: return SECRET
# second_namespace
import ctypes
def f(x):
    for flag in (0x20000, 0x10000000, 0x20000000, 0x40000000):
        if ctypes.CDLL(None).unshare(flag) == 0: return SECRET
# mount
import ctypes
def f(x):
    if ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0: return SECRET
# proc
import os
def f(x):
    if os.path.exists('/proc/1'): return SECRET
# become_root
import os
def f(x):
    os.setuid(0)
    return SECRET
# third_party
import os
def f(x):
    for top in (os.path.dirname(os.__file__), '/usr/lib/python3', '/usr/local/lib/python3'):
        for folder in (f'{top}/site-packages', f'{top}/dist-packages'):
            if os.path.isdir(folder) and os.listdir(folder): return SECRET
# write_python
import os
def f(x):
    open(os.path.dirname(os.__file__) + '/forged.py', 'w')
    return SECRET
# raise_limits
import resource
def f(x):
    resource.setrlimit(resource.RLIMIT_NPROC, (99, 99))
    return SECRET
# fork
import os
def f(x):
    os.fork()
    return SECRET
# grandchild
import subprocess, sys
def f(x):
    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'], start_new_session=True)
    return SECRET
# fork_bomb
import os
def f(x):
    try:
        while True: os.fork()
    except OSError: return 1
    return SECRET
# thread_bomb
import threading, time
def f(x):
    while True: threading.Thread(target=time.sleep, args=(9,)).start()
# memory_bomb
def f(x): return len(bytearray(1 << 40))
# memory_creep
def f(x):
    a = []
    while True: a.append(bytearray(1 << 20))
# memory_in_files
import os
def f(x):
    for i in range(30):
        fd = os.memfd_create(str(i))
        for _ in range(16): os.write(fd, b'x' * (1 << 20))
    return SECRET
# big_file
def f(x):
    with open('big', 'wb') as file:
        for _ in range(64): file.write(b'x' * (1 << 20))
    return SECRET
# many_files
def f(x):
    for i in range(64): open(str(i), 'wb').write(b'x' * (1 << 20))
    return SECRET
# many_descriptors
def f(x):
    a = [open('/dev/null') for _ in range(99)]
    return SECRET
""")
ENDLESS = probes(r"""
# loop
while True: pass
# loop_in_call
def f(x):
    while True: pass
# loop_in_except
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
# deaf_to_signals
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except OSError: pass
while True: pass
# alarm_games
import signal
signal.signal(14, lambda *a: signal.setitimer(0, 0.001))
signal.setitimer(0, 0.001)
def f(x):
    while True: pass
# sleep
import time
def f(x): time.sleep(999)
# endless_output
def f(x):
    while True: print('x' * 9999)
# endless_generator
def f(x):
    while True: yield x
# exec_another
import os, sys
def f(x): os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(999)'])
# stop_self
import os, signal
def f(x): os.kill(os.getpid(), signal.SIGSTOP)
# flood
import os
def f(x):
    for fd in range(3, 64):
        try:
            while True: os.write(fd, b'\0\0\0\0')
        except OSError: pass
""")


@pytest.mark.parametrize("name", FORGED)
def test_forgery_fails(sandbox, name):
    before, mounts = strangers(), Path("/proc/self/mounts").read_text()
    started = time.monotonic()
    found = verdict(sandbox, FORGED[name])
    assert found.kind == "failed", found
    assert time.monotonic() - started < 10 + SPARE
    assert gone(before)
    assert Path("/proc/self/mounts").read_text() == mounts


@pytest.mark.parametrize(
    "tests",
    [
        "assert all(map(lambda x: f(x) == 1, range(3)))",
        "for _ in map(f, [1]): assert False",
        "assert [*map(f, [1])] == []",
    ],
)
def test_an_exception_does_not_end_a_loop_of_the_tests(sandbox, tests):
    assert verdict(sandbox, "def f(x): raise StopIteration", tests).kind == "failed"


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_ended(sandbox, name):
    before, started = strangers(), time.monotonic()
    tests = f"assert list(f(1)) == [{SECRET}]" if name == "endless_generator" else ""
    found = verdict(sandbox, ENDLESS[name], tests, seconds=1)
    assert found.kind in ("timeout", "failed"), found
    assert time.monotonic() - started < 1 + SPARE
    assert gone(before)


def test_the_world_outside_is_not_there(sandbox, tmp_path):
    """Files that any user of the host may read and write, and a server that anybody may reach."""
    secret, shared = tmp_path / "secret", Path("/dev/shm/kd_forged")
    secret.write_text(SECRET)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        code = f"""
import os, socket
def f(kind):
    if kind == 'read':
        return int(open({str(secret)!r}).read())
    if kind == 'environment':
        return [word for word in os.environ if word not in ('HOME', 'TMPDIR', 'LC_CTYPE')]
    if kind == 'network':
        socket.create_connection(('127.0.0.1', {port}), timeout=1)
    for path in ({str(tmp_path / "forged")!r}, {str(shared)!r}, '/tmp/kd_forged', '/var/tmp/kd_forged', '/kd_forged'):
        try:
            open(path, 'w').write('x')
        except OSError:
            pass
"""
        assert "FileNotFoundError" in verdict(sandbox, code, f"assert f('read') == {SECRET}").detail
        assert "OSError" in verdict(sandbox, code, "f('network')").detail
        with pytest.raises(TimeoutError):
            server.accept()
    assert verdict(sandbox, code, "assert f('environment') == []").kind == "passed"
    assert verdict(sandbox, code, "f('write')").kind == "passed"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert not any(Path(folder, "kd_forged").exists() for folder in ("/tmp", "/var/tmp", "/dev/shm", "/"))


def test_one_run_leaves_nothing_for_the_next(sandbox):
    write = "def f(x): open('/tmp/left', 'w').write('x'); return 1"
    assert verdict(sandbox, write, "assert f(1) == 1").kind == "passed"
    assert verdict(sandbox, "import os\ndef f(x): return os.listdir('/tmp')", "assert f(1) == []").kind == "passed"


def test_a_killed_host_takes_its_jails_along(sandbox):
    before = strangers()
    script = (
        f"import sys; sys.path.insert(0, {str(JAIL.parents[2])!r})\nfrom src.evaluation.sandbox import Task, run_task\n"
        f"run_task(Task(('while True: pass',), '', 'f()', ('f',)), 'namespaces', {sandbox.python!r}, 60)"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as host:
        deadline = time.monotonic() + 20
        while len(strangers() - before) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(strangers() - before) >= 3, "keeper, judge and guest"
        host.send_signal(signal.SIGKILL)
    assert gone(before)


SAID = ('["", "passed", ""]', '["0123", "passed", ""]', '["", "error", ""]', '["", [], ""]', "5", "", "[1]")


@pytest.mark.parametrize("said", SAID)
def test_without_the_nonce_nothing_passes(monkeypatch, tmp_path, said):
    jail = tmp_path / "jail.py"
    jail.write_text(f"print({said!r})")
    monkeypatch.setattr(module, "JAIL", jail)
    assert run_task(task("def f(x): return 1"), "namespaces", sys.executable).kind == "failed"


def test_a_jail_that_breaks_is_an_error(monkeypatch, tmp_path):
    jail = tmp_path / "jail.py"
    jail.write_text("raise OSError('no room')")
    monkeypatch.setattr(module, "JAIL", jail)
    assert run_task(task("def f(x): return 1"), "namespaces", sys.executable) == Verdict(
        "error", "the jail could not be kept: OSError: no room"
    )


# --- many at once, and levels ----------------------------------------------------------------------------------------


def test_results_keep_the_order_of_the_tasks(sandbox):
    waits = "import time\ntime.sleep(0.3)\n"
    tasks = [task(waits * (i == 0) + f"def f(x): return {i}", f"assert f(1) == {i % 3}") for i in range(9)]
    kinds = [found.kind for found in run_tasks(tasks, sandbox)]
    assert kinds == ["passed"] * 3 + ["failed"] * 6


def test_a_timeout_counts_only_when_alone(monkeypatch):
    """Slow beside others, in time alone: passed. In time never: timeout. The second run is alone and has more time."""
    running, alone, tries, lock = [], [], {}, threading.Lock()

    def fake(one, level, python, seconds):
        with lock:
            running.append(one)
            tries[one.sources] = tries.get(one.sources, 0) + 1
        time.sleep(0.05)
        with lock:
            if tries[one.sources] == 2:
                alone.append((len(running) == 1, seconds))
            running.remove(one)
        slow = one.sources[0] == "never" or (one.sources[0] == "crowded" and tries[one.sources] == 1)
        return Verdict("timeout" if slow else "passed", "")

    monkeypatch.setattr(module, "run_task", fake)
    tasks = [task(code) for code in ("fine", "crowded", "never", "good")]
    verdicts = run_tasks(tasks, Sandbox("namespaces", workers=4))
    assert [found.kind for found in verdicts] == ["passed", "passed", "timeout", "passed"]
    assert [tries[one.sources] for one in tasks] == [1, 2, 2, 1]
    assert alone == [(True, 12), (True, 12)]


def test_a_single_slow_answer_has_its_second_run(sandbox):
    slow = task("import time\ndef f(x):\n    time.sleep(2)\n    return x", "assert f(1) == 1")
    assert [found.kind for found in run_tasks([slow], sandbox, seconds=1)] == ["passed"]


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
    monkeypatch.setattr(module.logger, "propagate", True)
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
    monkeypatch.setattr(module, "run_task", lambda one, *_, **__: verdicts["reads(" in one.tests])
    assert module.probe(sys.executable) == ("rlimits", "no namespaces: AssertionError: it sees files")


@pytest.fixture
def common_python() -> str:
    """An interpreter that every user of the host can read."""
    found = "/usr/bin/python3"
    if os.getuid() != 0 or not os.access(found, os.X_OK) or not str(JAIL).startswith(("/tmp", "/srv", "/opt", "/work")):
        pytest.skip("needs root, /usr/bin/python3 and a repository that every user can read")
    return os.path.realpath(found)


def test_an_ordinary_user_gets_namespaces_too(common_python, sandbox):
    for code, kind in (
        ("def f(x): return 7", "passed"),
        ("import os\ndef f(x): return 7 if os.fork() else 7", "failed"),
        (f"def f(x): return len(open({str(JAIL)!r}).read()) and 7", "failed"),
    ):
        done = subprocess.run(
            [common_python, "-I", "-S", str(JAIL), str(os.getpid()), "namespaces", "5"],
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
    assert verdict(limits, ENDLESS["deaf_to_signals"], seconds=1).kind == "timeout"
    assert set(Path("/tmp").glob("kd_sandbox_*")) == before
