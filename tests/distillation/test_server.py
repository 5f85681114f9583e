"""A server's command is started, waited for and ended; what goes wrong with it is one line; sizes of its copies."""

import logging
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from src.distillation import server
from src.distillation.server import answers, parallel_sizes, running
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
        running(command(port, text), f"http://127.0.0.1:{port}/v1", tmp_path / "server.log", patience=patience),
    ):
        pass
    assert "\n" not in str(error.value)


def test_waiting_shows_the_servers_last_words(command, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(server, "SIGN_OF_LIFE", 0.3)
    port = free_port()
    text = "import time; print('shard 3 of 7\\n\\n', flush=True); time.sleep(60)"
    with (
        caplog.at_level(logging.INFO, "kd"),
        pytest.raises(UserError, match="no answer within 2 s"),
        running(command(port, text), f"http://127.0.0.1:{port}/v1", tmp_path / "server.log", patience=2.0),
    ):
        pass
    assert re.search(r"no answer yet, [12] of 2 s; it says: shard 3 of 7", caplog.text)


def test_a_server_that_cannot_list_its_models_is_asked_for_its_health():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else self.server.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as place:
        threading.Thread(target=place.serve_forever, daemon=True).start()
        found = {}
        for place.status in (200, 401, 404, 500, 503):
            found[place.status] = answers(f"http://127.0.0.1:{place.server_port}/v1")
        place.shutdown()
    assert found == {200: True, 401: True, 404: False, 500: True, 503: False}


def test_a_command_that_is_not_there_and_none_at_all(tmp_path, monkeypatch):
    url = f"http://127.0.0.1:{free_port()}/v1"
    log = tmp_path / "server.log"
    for wrong, words in (
        ("no-such-server", "serve: no-such-server: No such file"),
        ("a 'quote", "No closing quotation"),
    ):
        with pytest.raises(UserError, match=words), running(wrong, url, log):
            pass
    monkeypatch.setattr(server.subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    with running("", url, log):
        assert os.listdir(tmp_path) == ["server.log"]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "layers", "gpus", "weight_gb", "sizes"),
    [
        (32, 4, 48, 6, 61.1, (2, 1, 3)),  # Qwen3-30B-A3B on six: 6 divides neither
        (32, 4, 48, 8, 61.1, (2, 1, 4)),
        (32, 8, 36, 8, 16.4, (1, 1, 8)),  # Qwen3-8B: fits on one, so every GPU is a replica
        (32, 8, 36, 1, 16.4, (1, 1, 1)),
        (64, 8, 64, 4, 65.0, (2, 1, 2)),
        (64, 4, 94, 8, 280.0, (8, 1, 1)),  # KV heads replicated: 8 is a multiple of 4
        (40, 10, 40, 8, 280.0, (2, 4, 1)),  # 4 and 8 neither divide 10 nor are multiples of it
        (9, 3, 30, 6, 150.0, (3, 2, 1)),
        (9, 3, 30, 2, 60.0, (1, 2, 1)),
    ],
)
def test_parallel_sizes(heads, kv_heads, layers, gpus, weight_gb, sizes):
    assert parallel_sizes(heads, kv_heads, layers, gpus, weight_gb, 36.0) == sizes


@pytest.mark.parametrize("gpus", range(1, 17))
def test_parallel_sizes_obey_vllms_rule_and_use_every_gpu(gpus):
    for heads, kv_heads in ((32, 4), (32, 8), (40, 10), (9, 3), (16, 16), (12, 1)):
        for weight_gb in (10.0, 70.0, 30.0 * gpus):
            try:
                tensor, pipeline, data = parallel_sizes(heads, kv_heads, 24, gpus, weight_gb, 36.0)
            except UserError:
                assert weight_gb > 36.0 * gpus
                continue
            assert tensor * pipeline * data == gpus
            assert heads % tensor == 0
            assert kv_heads % tensor == 0 or tensor % kv_heads == 0
            assert weight_gb / (tensor * pipeline) <= 36.0


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"61.1 GB of weights do not fit on 1 GPUs of 36.0 GB"):
        parallel_sizes(32, 4, 48, 1, 61.1, 36.0)
