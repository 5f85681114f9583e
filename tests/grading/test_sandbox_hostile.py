"""Hostile code: none passes, none gets out, none outlives its limit, none leaves anything."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.grading import sandbox as module
from src.grading.sandbox import JAIL, Sandbox, Verdict, run_task
from tests.grading.hostile_code import ENDLESS, FORGED
from tests.grading.jailed import SECRET, SPARE, gone, strangers, task, verdict


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
    found = verdict(sandbox, ENDLESS[name], tests, cpu_seconds=0.5, wall_seconds=1)
    assert found.kind in ("timeout", "failed"), found
    assert time.monotonic() - started < 1 + SPARE
    assert gone(before)


@pytest.mark.parametrize(("action", "kind"), [("SIG_IGN", "timeout"), ("SIG_DFL", "failed")])
def test_the_signal_of_a_limit_is_no_verdict(sandbox, action, kind):
    """A limit of its own, sooner than ours: deaf to its signal, it ends by our clock; ended by it, it has failed."""
    code = f"""
import resource, signal
resource.setrlimit(resource.RLIMIT_CPU, (1, resource.getrlimit(resource.RLIMIT_CPU)[1]))
signal.signal(signal.SIGXCPU, signal.{action})
def f(x):
    while True: pass
"""
    assert verdict(sandbox, code, cpu_seconds=1.5).kind == kind


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
        f"import sys; sys.path.insert(0, {str(JAIL.parents[2])!r})\n"
        "from src.grading.sandbox import Sandbox, Task, run_task\n"
        f"run_task(Task(('while True: pass',), '', 'f()', ('f',)), Sandbox('namespaces', python={sandbox.python!r}))"
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
    assert run_task(task("def f(x): return 1"), Sandbox("namespaces")).kind == "failed"


def test_a_jail_that_breaks_is_no_fault_of_the_candidate(monkeypatch, tmp_path):
    jail = tmp_path / "jail.py"
    jail.write_text("raise OSError('no room')")
    monkeypatch.setattr(module, "JAIL", jail)
    assert run_task(task("def f(x): return 1"), Sandbox("namespaces")) == Verdict(
        "unavailable", "the jail could not be kept: OSError: no room"
    )
