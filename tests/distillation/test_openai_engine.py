"""The openai engine against a server that misbehaves in every way it can, on this machine."""

import json
import logging
import sys
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from src.distillation import openai_engine
from src.distillation.openai_engine import SERVERS, Server, extra_body, generate_from_server, wait_before
from src.distillation.sft import Sampling, make_requests
from src.utils.common import UserError

ROWS = [{"id": f"row-{i}", "prompt": f"Say {i}.", "system": "Be brief."} for i in range(12)]
SAMPLING = Sampling(0.7, 0.8, 20, 32)
KEY = "sk-very-secret-0123456789"
FAULTS = ("429", "500", "503", "cut", "cut_late", "hang", "not_json", "html", "no_choice", "null")


class FaultServer(ThreadingHTTPServer):
    """Answers `prompt/seed`; `faults(prompt, try number)` names what happens instead, or None."""

    daemon_threads = True
    request_queue_size = 128  # connections that wait; the default of 5 makes the kernel itself drop some

    def __init__(self, faults, capacity=10**6, seconds=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.capacity, self.seconds = faults, capacity, seconds
        self.bodies, self.keys, self.statuses = [], [], Counter()
        self.tries = defaultdict(int)
        self.active = self.peak = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that gave up on a hanging answer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, status, text, kind="application/json", length=None, **headers):
        self.server.statuses[status] += 1
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": length or len(text.encode()), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, key = body["messages"][-1]["content"], (body["messages"][-1]["content"], body["seed"])
        with server.lock:
            server.active += 1
            server.peak = max(server.peak, server.active)
            full = server.active > server.capacity
            server.tries[key] += 1
            number = server.tries[key]
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
        fault = "429" if full else server.faults(prompt, number)
        time.sleep(0 if full else server.seconds)
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": f"{prompt}/{key[1]}"},
        }
        good = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice],
                           "usage": {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}})  # fmt: skip
        with server.lock:
            server.active -= 1
        if fault in ("429", "500", "503", "400", "401"):
            words = json.dumps({"error": {"message": f"no: {self.headers['Authorization']}"}})
            self.reply(int(fault), words, Retry_After="0.01")
        elif fault == "cut":
            self.close_connection = True
            self.connection.close()
        elif fault == "cut_late":
            self.close_connection = True
            self.reply(200, good[:40], length=len(good))
        elif fault == "hang":
            time.sleep(1.5)
            self.close_connection = True
        elif fault == "not_json":
            self.reply(200, good[:-9])
        elif fault == "html":
            self.reply(200, "<html>the gateway is tired</html>", kind="text/html")
        elif fault == "no_choice":
            self.reply(200, json.dumps({"choices": [], "usage": {}}))
        elif fault == "null":
            self.reply(200, "null")
        else:
            self.reply(200, good)


@pytest.fixture
def serve(monkeypatch):
    """`serve(faults, **settings)`: a running FaultServer; waits between tries are short."""
    pytest.importorskip("openai")
    monkeypatch.setattr(openai_engine, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = []

    def start(faults=lambda prompt, number: None, **settings):
        servers.append(FaultServer(faults, **settings))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def answers(server, rows=ROWS, samples=2, sampling=SAMPLING, url=None, **settings):
    requests = make_requests(rows, samples, 7)
    place = Server(url or server.url, "teacher", **({"timeout": 0.5, "tries": len(FAULTS) + 1} | settings))
    return requests, [row for part in generate_from_server(place, requests, sampling) for row in part]


def test_a_server_with_every_fault_loses_and_doubles_nothing(serve):
    """Each request meets all faults, every row in another order; then it is answered."""

    def faults(prompt, number):
        start = int(prompt[4:-1])
        return FAULTS[(start + number - 1) % len(FAULTS)] if number <= len(FAULTS) else None

    server = serve(faults)
    requests, rows = answers(server, ROWS[:6])
    assert len(rows) == len(requests) == 12
    by_key = {(row["id"], row["sample_index"]): row for row in rows}
    assert by_key.keys() == {(request.id, request.sample_index) for request in requests}
    for request in requests:
        row = by_key[request.id, request.sample_index]
        assert row["response"] == f"{request.prompt}/{request.seed & 0x7FFFFFFF}"
        assert (row["finish_reason"], row["num_tokens"], row["engine"]) == ("stop", 7, "openai")
        assert (row["prompt"], row["seed"]) == (request.prompt, request.seed)
        assert row["sampling"] == {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_new_tokens": 32}
    assert set(server.tries.values()) == {len(FAULTS) + 1}


def test_concurrency_is_bounded_and_gives_way_to_429(serve):
    rows = [{"id": f"row-{i}", "prompt": f"Say {i}."} for i in range(60)]
    server = serve(seconds=0.02)
    assert len(answers(server, rows, concurrency=6)[1]) == 120
    assert 2 <= server.peak <= 6

    crowded = serve(seconds=0.02, capacity=4)
    assert len(answers(crowded, rows, concurrency=32, tries=50)[1]) == 120
    assert crowded.statuses[200] == 120
    assert 0 < crowded.statuses[429] < 60, "a fixed concurrency of 32 would be refused again and again"


def test_every_sampling_field_is_sent(serve):
    server = serve()
    requests, _ = answers(server, rows=ROWS[:1], samples=1)
    [body] = server.bodies
    assert body == {
        "model": "teacher", "messages": requests[0].messages, "temperature": 0.7, "top_p": 0.8, "max_tokens": 32,
        "n": 1, "frequency_penalty": 0, "presence_penalty": 0, "seed": requests[0].seed & 0x7FFFFFFF, "top_k": 20,
        "min_p": 0.0, "repetition_penalty": 1.0, "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("kind", SERVERS)
def test_what_each_kind_of_server_is_told(kind):
    off = Sampling(0.0, 1.0, 0, 9)
    if kind == "plain":
        assert extra_body(kind, off, False) == {}
        with pytest.raises(UserError, match="no top_k; set --top_k 0"):
            extra_body(kind, SAMPLING, False)
        return
    body = extra_body(kind, off, True, [5])
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    if kind == "transformers":
        settings = json.loads(body["generation_config"])
        assert (settings["do_sample"], settings["top_k"], settings["eos_token_id"]) == (False, 0, [5])
    else:
        assert (body["top_k"], body["min_p"]) == (-1, 0.0)


def test_the_key_is_sent_and_never_shown(serve, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    server = serve(lambda prompt, number: "500" if number == 1 else None)
    _, rows = answers(server)
    assert set(server.keys) == {f"Bearer {KEY}"}
    with pytest.raises(UserError) as refused:
        answers(serve(lambda *_: "400"))
    assert "no: Bearer ***" in str(refused.value)
    with pytest.raises(UserError, match="refuses the key in OPENAI_API_KEY") as unknown:
        answers(serve(lambda *_: "401"))
    with pytest.raises(UserError, match="in 2 tries") as failed:
        answers(serve(lambda *_: "500"), tries=2)
    shown = [json.dumps(rows), caplog.text, *capfd.readouterr(), *(str(e.value) for e in (refused, unknown, failed))]
    assert not any(KEY in text for text in shown)


def test_a_key_from_another_variable(serve, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "another")
    server = serve()
    answers(server, rows=ROWS[:1], key_variable="OTHER_KEY")
    assert set(server.keys) == {"Bearer another"}


def test_a_refused_request_stops_the_run_and_keeps_what_was_answered(serve):
    server = serve(lambda prompt, number: "400" if prompt == "Say 7." else None)
    place = Server(server.url, "teacher", concurrency=1)
    rows = []

    def run():
        for part in generate_from_server(place, make_requests(ROWS, 1, 7), SAMPLING):
            rows.extend(part)

    with pytest.raises(UserError, match=r"refuses row row-7: Error code: 400") as refused:
        run()
    assert "\n" not in str(refused.value)
    assert [row["id"] for row in rows] == [f"row-{i}" for i in range(7)]
    assert server.statuses[400] == 1, "the same request would be refused again"


def test_a_server_that_is_not_there_is_named(serve):
    with pytest.raises(
        UserError, match=r"http://127.0.0.1:9/v1: no answer to row row-\d+ in 2 tries, the last: connection"
    ):
        answers(None, url="http://127.0.0.1:9/v1", tries=2)


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install -e .\.\[openai\]"):
        answers(None, url="http://127.0.0.1:9/v1")


def test_waits_grow_and_heed_the_server():
    assert max(wait_before(1, None) for _ in range(99)) <= 0.5 < min(wait_before(3, None) for _ in range(99))
    assert max(wait_before(30, None) for _ in range(99)) <= 60
    assert wait_before(1, "7") == 7
    assert wait_before(1, "Wed, 21 Oct 2026 07:28:00 GMT") <= 0.5
