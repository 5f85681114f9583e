"""A server's command is started, waited for and ended; what goes wrong with it is one line."""

import os
import subprocess
import sys
import time

import pytest

from src.distillation import server
from src.distillation.server import answers, running
from src.utils.common import ROOT, UserError
from tests.distillation.test_engines import free_port

SERVER = """
import http.server, os, subprocess, sys
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
worker = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
worker.stdout.readline()
print("worker", worker.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def command(tmp_path):
    """`command(port, text=SERVER)`: what starts a server on that port."""

    def write(port: int, text: str = SERVER) -> str:
        (tmp_path / "a server.py").write_text(text)
        return f"{sys.executable} '{tmp_path / 'a server.py'}' {port}"

    return write


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be cleared away does not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_answers_inside_the_block_and_its_workers_end_with_it(command, tmp_path, monkeypatch):
    """Even one that does not listen; and a server that answers there already is not taken for ours."""
    monkeypatch.setattr(server, "FAREWELL", 1.0)
    port = free_port()
    url, log = f"http://127.0.0.1:{port}/v1", tmp_path / "logs" / "server.log"
    with running(command(port), url, log):
        assert answers(url)
        worker = int(log.read_text().split()[1])
        assert alive(worker)
        with (
            pytest.raises(UserError, match="a server answers there already"),
            running(command(port), url, tmp_path / "second.log"),
        ):
            pass
    assert not answers(url)
    deadline = time.monotonic() + 5
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(worker)


KILLED = """
import sys
from pathlib import Path
from src.distillation.server import running
with running(sys.argv[1], sys.argv[2], Path(sys.argv[3])):
    print("up", flush=True)
    sys.stdin.read()
"""


def test_a_stage_that_is_killed_leaves_no_server(command, tmp_path):
    port = free_port()
    url, log = f"http://127.0.0.1:{port}/v1", tmp_path / "server.log"
    stage = subprocess.Popen([sys.executable, "-c", KILLED, command(port), url, str(log)], cwd=ROOT,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert stage.stdout.readline() == "up\n"
    worker = int(log.read_text().split()[1])
    stage.kill()
    stage.communicate()
    deadline = time.monotonic() + 20
    while (alive(worker) or answers(url)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)
    assert not answers(url)


@pytest.mark.parametrize(
    ("text", "patience", "words"),
    [
        ("print('no GPU here'); raise SystemExit(3)", 60.0, r"exit code 3: no GPU here; its log is .*server\.log"),
        ("import time; time.sleep(60)", 0.5, r"no answer within 0.5 s of starting the server"),
    ],
)
def test_a_server_that_does_not_come_up_is_one_line(command, tmp_path, text, patience, words):
    port = free_port()
    with (
        pytest.raises(UserError, match=words) as error,
        running(command(port, text), f"http://127.0.0.1:{port}/v1", tmp_path / "server.log", patience),
    ):
        pass
    assert "\n" not in str(error.value)


def test_a_command_that_is_not_there_and_none_at_all(tmp_path, monkeypatch):
    url = f"http://127.0.0.1:{free_port()}/v1"
    log = tmp_path / "server.log"
    for wrong, words in (("no-such-server", "server_command: no-such-server"), ("a 'quote", "No closing quotation")):
        with pytest.raises(UserError, match=words), running(wrong, url, log):
            pass
    monkeypatch.setattr(server.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with running("", url, log):
        assert os.listdir(tmp_path) == ["server.log"]
