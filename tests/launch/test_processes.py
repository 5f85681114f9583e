"""A stage as a process: its exit code, the signals that it hears of, the end of all that it started, the GPUs it waits
for. Real processes and signals; nvidia-smi is a script."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from src.launch.processes import run_to_end, wait_until_free
from src.utils.common import ROOT


def run(program: str, *arguments: object, grace: float = 30) -> int:
    return run_to_end([sys.executable, "-c", program, *map(str, arguments)], os.environ, ROOT, grace)


@contextlib.contextmanager
def signals(*numbers: int, once: Path) -> Iterator[None]:
    """Send these signals to this process as soon as a stage has made a file, which it does when this listens."""

    def send() -> None:
        deadline = time.monotonic() + 60
        while not once.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert once.exists()
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    sender = threading.Thread(target=send)
    sender.start()
    yield
    sender.join()


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("program", "code"), [
    ("pass", 0), ("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 128 + 9),
])  # fmt: skip
def test_exit_codes_are_a_shells(program, code):
    assert run(program) == code


def test_what_a_stage_is_given(tmp_path):
    program = "import os, sys; open('found', 'w').write(os.environ['GIVEN'] + sys.stdin.read())"
    assert run_to_end([sys.executable, "-c", program], {"GIVEN": "this"}, tmp_path) == 0
    assert (tmp_path / "found").read_text() == "this"  # and nothing to read, at which it would wait for ever


LISTENS = """
import os, signal, sys, time
def end(number, _):
    open(sys.argv[2], "a").write(f"{number} ")
    sys.exit(0)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, end)
open(sys.argv[1], "w").write(str(os.getpgid(0)))
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_waited_for(tmp_path, number):
    ready, heard = tmp_path / "ready", tmp_path / "heard"
    before = signal.getsignal(number)
    with signals(number, once=ready):
        assert run(LISTENS, ready, heard) == 128 + number
    assert heard.read_text() == f"{int(number)} "
    assert int(ready.read_text()) != os.getpgid(0)  # a terminal's Ctrl-C does not reach it a second time
    assert signal.getsignal(number) is before


DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True)
open(sys.argv[1] + ".tmp", "w").write(str(worker.pid))
import os; os.rename(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(120)
"""


@pytest.mark.parametrize(("numbers", "grace"), [
    ([signal.SIGTERM], 0.3), ([signal.SIGTERM, signal.SIGTERM], 300),
])  # fmt: skip
def test_a_stage_that_does_not_end_is_killed_with_what_it_started(tmp_path, numbers, grace):
    """After its time, or at a second signal; a worker in a session of its own is no exception."""
    ready, started = tmp_path / "ready", time.monotonic()
    with signals(*numbers, once=ready):
        assert run(DEAF, ready, grace=grace) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 30
    assert wait_until_gone(int(ready.read_text()))


SERVER = """
import http.server, os, socketserver, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
with socketserver.TCPServer(("127.0.0.1", 0), Answer) as server:
    open(sys.argv[1] + ".tmp", "w").write(f"{server.server_address[1]} {os.getpid()}")
    os.rename(sys.argv[1] + ".tmp", sys.argv[1])
    server.serve_forever()
"""
STAGE = """
import sys, time
from pathlib import Path
from src.distillation import server
place, ready = Path(sys.argv[1]), Path(sys.argv[2])
server.answers = lambda url: place.exists()  # its port is free to choose, so none is asked
server._wait = lambda *_: [time.sleep(0.02) for _ in iter(lambda: place.exists(), True)]
with server.running(f"{sys.executable} {sys.argv[3]} {place}", "http://127.0.0.1:1/v1", ready.with_name("log")):
    ready.touch()
    time.sleep(120)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_of_a_stage_ends_with_it(tmp_path, number):
    """SIGINT ends a stage in order; of SIGTERM it dies, and then a guard ends its server."""
    program = tmp_path / "server.py"
    program.write_text(SERVER)
    with signals(number, once=tmp_path / "ready"):
        assert run(STAGE, tmp_path / "place", tmp_path / "ready", program) == 128 + number
    assert wait_until_gone(int((tmp_path / "place").read_text().split()[1]))


# GPUs


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A nvidia-smi that knows GPU 3 of 40,960 MiB: `smi(used, ...)` MiB of it, from one question to the next."""

    def write(*used: str) -> Path:
        for number, value in enumerate(used):
            (tmp_path / f"used_{number}").write_text(value)
        script = tmp_path / "nvidia-smi"
        script.write_text(f"""#!/usr/bin/env bash
echo "$@" >> {tmp_path}/asked
[[ "$*" == *compute-apps* ]] && {{ echo "4711, python"; exit 0; }}
[ "$2" = 3 ] || exit 6
number=$(($(wc -l < {tmp_path}/asked) - 1))
while [ ! -e {tmp_path}/used_$number ]; do number=$((number - 1)); done
echo "3, $(cat {tmp_path}/used_$number), 40960"
""")
        script.chmod(0o755)
        return tmp_path / "asked"

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return write


def test_memory_that_is_given_back_is_waited_for(smi, caplog):
    asked = smi("30000", "12")
    assert wait_until_free(["3"], patience=30) is True
    assert len(asked.read_text().splitlines()) == 2
    assert caplog.text == ""


def test_who_holds_a_gpu_is_named(smi, caplog):
    smi("30000")
    assert wait_until_free(["3"], patience=0) is False
    assert "GPU 3: 29.3 of 40.0 GiB are held by python (process 4711)" in caplog.text


@pytest.mark.parametrize("used", ["4000", "[N/A]"])
def test_what_a_desktop_holds_and_what_a_driver_does_not_say_is_free(smi, used):
    smi(used)
    assert wait_until_free(["3"], patience=0) is True


def test_nothing_is_waited_for_where_nothing_can_be_asked(smi, monkeypatch, tmp_path):
    asked = smi("30000")
    assert wait_until_free([], patience=0) is True
    assert not asked.exists()
    assert wait_until_free(["7"], patience=0) is True  # nvidia-smi does not know it
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert wait_until_free(["3"], patience=0) is True
