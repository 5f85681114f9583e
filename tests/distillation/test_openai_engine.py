"""The openai engine against a server that misbehaves in every way it can, on this machine."""

import doctest
import gzip
import json
import logging
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from src.distillation import openai_engine
from src.distillation.base import response_ids
from src.distillation.engines import Engine, opened
from src.distillation.openai_engine import (
    SERVERS,
    Failure,
    Reply,
    Server,
    closes_a_thought,
    extra_body,
    generate_from_server,
    known_teacher,
    one_line,
    read_reply,
    reply_row,
    wait_before,
)
from src.distillation.sft import Sampling, make_requests
from src.utils.answers import final_answer
from src.utils.common import UserError, append_jsonl, read_jsonl

ROWS = [{"id": f"row-{i}", "prompt": f"Say {i}.", "system": "Be brief."} for i in range(12)]
SAMPLING = Sampling(0.7, 0.8, 20, 32)
KEY = "sk-very-secret-0123456789"
FAULTS = ("429", "500", "503", "cut", "cut_late", "hang", "not_json", "html", "no_choice", "null")


@dataclass(frozen=True)
class Body:
    """What a server sends: JSON, or bytes as they are."""

    said: object
    status: int = 200
    headers: dict = field(default_factory=dict)

    def as_bytes(self):
        return self.said if isinstance(self.said, bytes) else json.dumps(self.said).encode()


def completion(content="Four.", reason="stop", usage=None, **message):
    """A chat completion without a token count, unless `usage` has one."""
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content} | message}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return body if usage is None else body | {"usage": usage}


def counted(content="Four.", reason="stop", tokens=7, **message):
    return completion(content, reason, {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 10}, **message)


class FaultServer(ThreadingHTTPServer):
    """Answers `prompt/seed`; `faults(prompt, try number)` names what happens instead, or is a `Body`, or None."""

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
        data = text if isinstance(text, bytes) else text.encode()
        self.server.statuses[status] += 1
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": length or len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply(200, "<html>welcome</html>", kind="text/html")

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
        good = json.dumps(counted(f"{prompt}/{key[1]}"))
        with server.lock:
            server.active -= 1
        if isinstance(fault, Body):
            self.reply(fault.status, fault.as_bytes(), **fault.headers)
        elif fault in ("429", "500", "503", "400", "401"):
            words = json.dumps({"error": {"message": f"no: {self.headers['Authorization']}"}})
            self.reply(int(fault), words, Retry_After="0.01")
        elif fault == "cut":
            self.close_connection = True
            self.connection.close()
        elif fault == "cut_late":
            self.close_connection = True
            self.reply(200, good[:40], length=len(good))
        elif fault == "hang":
            time.sleep(4)
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


def answers(server, rows=ROWS, samples=2, sampling=SAMPLING, url=None, thinking=False, tokenizer=None, **settings):
    requests = make_requests(rows, samples, 7, sampling)
    place = Server(url or server.url, "teacher", **({"timeout": 60.0, "tries": len(FAULTS) + 1} | settings))
    parts = generate_from_server(place, requests, thinking, tokenizer=tokenizer)
    return requests, [row for part in parts for row in part]


def only_answer(serve, body, **settings):
    """The row that one request becomes whose reply is `body`; it must be asked for once only."""
    server = serve(lambda *_: body if isinstance(body, Body) else Body(body))
    _, [row] = answers(server, ROWS[:1], 1, **settings)
    assert sum(server.tries.values()) == 1
    return row


def told(serve, body, tries=2, **settings):
    """The server, and the one line that a run ends with where every reply is `body`."""
    server = serve(lambda *_: body)
    with pytest.raises(UserError) as told:
        answers(server, tries=tries, **settings)
    assert "\n" not in str(told.value)
    return server, str(told.value)


def test_a_server_with_every_fault_loses_and_doubles_nothing(serve):
    """Each request meets all faults, every row in another order; then it is answered."""

    def faults(prompt, number):
        start = int(prompt[4:-1])
        return FAULTS[(start + number - 1) % len(FAULTS)] if number <= len(FAULTS) else None

    server = serve(faults)
    requests, rows = answers(server, ROWS[:6], timeout=2.0)
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
    assert body.get("stop_token_ids") == ([5] if kind in ("vllm", "sglang") else None)
    assert "stop_token_ids" not in extra_body(kind, off, True), "the end is not known"
    assert body.get("return_token_ids") is None
    assert extra_body(kind, off, True, keep_ids=True).get("return_token_ids") == (True if kind == "vllm" else None)
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
    place = Server(server.url, "teacher", concurrency=1, max_refused=0)
    rows = []

    def run():
        for part in generate_from_server(place, make_requests(ROWS, 1, 7, SAMPLING)):
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
    with pytest.raises(UserError, match=r"pip install -e .\.\[server\]"):
        answers(None, url="http://127.0.0.1:9/v1")


def test_waits_grow_and_heed_the_server():
    assert max(wait_before(1, None) for _ in range(99)) <= 0.5 < min(wait_before(3, None) for _ in range(99))
    assert max(wait_before(30, None) for _ in range(99)) <= 60
    assert wait_before(1, "7") == 7
    assert wait_before(1, "3600") == 60
    assert wait_before(1, "7.5") == 7.5


def test_a_retry_after_may_be_a_date():
    def after(seconds):
        return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)

    assert 25 < wait_before(1, after(30)) <= 30
    assert wait_before(1, after(86400)) == 60
    zoneless = after(30).replace("GMT", "-0000")
    assert 25 < wait_before(1, zoneless) <= 30
    for useless in (after(-30), "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "Wed, 99 Oct 2026", "-7", "nan", "²", ""):
        assert wait_before(1, useless) <= 0.5


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(openai_engine).failed == 0


HALF = b'{"choices": [{"finish_reason": "stop", "message": {"content": "%s"}}], "usage": {"completion_tokens": 7}}'


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        (rb"Yes \ud83d.", "Yes \ufffd."),
        (rb"Yes \ude00\ud83d", "Yes \ufffd\ufffd"),
        (rb"Yes \uD83D\uDE00.", "Yes 😀."),
        (rb"\ud83d\ud83d\ude00", "\ufffd😀"),
        (b"caf\xc3", "caf\ufffd"),  # bytes that are no UTF-8
        (b"\xed\xa0\xbd.", "\ufffd."),  # a half as bytes
    ],
)
def test_half_a_character_in_an_answer_is_replaced(serve, tmp_path, sent, stored):
    row = only_answer(serve, HALF % sent)
    assert row["response"] == stored
    append_jsonl(tmp_path / "rows.jsonl", [row])
    assert read_jsonl(tmp_path / "rows.jsonl") == [row]


def test_half_a_character_in_a_finish_reason_is_replaced(serve):
    assert only_answer(serve, counted(reason="odd \ud83d"))["finish_reason"] == "odd \ufffd"


@pytest.mark.parametrize("change", [{"prompt": "Say \ud83d."}, {"system": "Be \ude00."}])
def test_half_a_character_in_a_prompt_is_refused_by_its_row(serve, change):
    server = serve()
    with pytest.raises(UserError, match=f"row row-2: half a character .* in its {next(iter(change))}"):
        answers(server, [*ROWS[:2], ROWS[2] | change])
    assert not server.tries


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        ("eos", "stop"), ("eos_token", "stop"), ("end_turn", "stop"), ("stop_sequence", "stop"), ("STOP", "stop"),
        ("max_tokens", "length"), ("tool_calls", "tool_calls"), ("Odd word", "Odd word"), (None, "stop"),
        ("", "stop"), ("null", "stop"), ("EOS_TOKEN", "stop"),
    ],
)  # fmt: skip
def test_words_for_the_end_of_an_answer(serve, sent, stored):
    assert only_answer(serve, counted(reason=sent))["finish_reason"] == stored


def test_an_end_without_a_word_is_judged_by_the_tokens(serve):
    body = counted(reason=None, tokens=32)
    assert only_answer(serve, body)["finish_reason"] == "length"
    del body["choices"][0]["finish_reason"]
    assert only_answer(serve, body)["finish_reason"] == "length"
    body["usage"]["completion_tokens"] = 7
    assert only_answer(serve, body)["finish_reason"] == "stop"
    assert only_answer(serve, counted("Four.</s>", None, 32))["finish_reason"] == "stop", "it said its end"
    assert only_answer(serve, completion(reason=None))["finish_reason"] == "stop", "nobody knows better"


USAGES = (None, [], "7", {}, {"prompt_tokens": 3}, {"completion_tokens": None}, {"completion_tokens": "7"},
          {"completion_tokens": -1}, {"completion_tokens": 0}, {"completion_tokens": True})  # fmt: skip


@pytest.mark.parametrize("usage", USAGES, ids=str)
def test_an_answer_without_a_count_of_tokens_is_kept_at_the_first_try(serve, usage, make_tokenizer):
    body = completion() | {"usage": usage}
    row = only_answer(serve, body)
    assert (row["response"], row["finish_reason"], row["num_tokens"]) == ("Four.", "stop", None)
    assert only_answer(serve, body, tokenizer=make_tokenizer())["num_tokens"] == 6  # a token a byte, and the end


def test_an_answer_without_usage_is_kept_at_the_first_try(serve):
    assert only_answer(serve, completion())["num_tokens"] is None


@pytest.mark.parametrize(
    ("told", "word", "kept"),
    [
        ([65, 66, 258], "stop", [65, 66]),
        ([65, 66, 258], "length", [65, 66, 258]),
        ([65, 66], "stop", [65, 66]),
        ([258], "stop", []),
        ([], "stop", []),
        (None, "stop", None),
        (["65"], "stop", None),
        ([True], "stop", None),
    ],
)
def test_the_ids_that_a_server_tells_are_kept_without_the_end(make_tokenizer, told, word, kept):
    choice = {"message": {"content": "AB"}, "finish_reason": word, "token_ids": told}
    reply = read_reply(json.dumps({"choices": [choice]}).encode())
    request = make_requests(ROWS[:1], 1, 0, SAMPLING)[0]
    teacher = known_teacher(make_tokenizer())
    assert reply_row(request, reply, teacher, keep_ids=True).get("token_ids") == kept
    assert "token_ids" not in reply_row(request, reply, teacher)


def test_the_teachers_tokenizer_counts_where_the_server_does_not(serve, make_tokenizer):
    own = make_tokenizer()
    cut = only_answer(serve, completion("Four.", "length"), tokenizer=own)
    assert (cut["finish_reason"], cut["num_tokens"]) == ("length", 5), "no end of turn to count"
    assert only_answer(serve, completion("é" * 16, None), tokenizer=own)["finish_reason"] == "length"
    assert only_answer(serve, completion("é" * 15, None), tokenizer=own)["num_tokens"] == 31
    thought = only_answer(serve, completion("Four.", reasoning_content="2 + 2"), tokenizer=own)
    assert (thought["response"], thought["num_tokens"]) == ("Four.", 11)
    assert only_answer(serve, counted(tokens=9), tokenizer=own)["num_tokens"] == 9, "the server's own count goes first"


def test_the_engine_takes_the_tokenizer_of_the_teacher_it_is_told(serve, tiny_teacher, caplog):
    """A teacher that cannot be loaded, or is not named, is no reason not to ask."""
    caplog.set_level(logging.INFO)
    server = serve(lambda *_: Body(completion("Four.[END]")))
    for model, tokens in ((tiny_teacher, 11), ("nobody/has-this", None), ("", None)):
        engine = Engine("openai", model, server=Server(server.url, "teacher"))
        with opened(engine) as ask:
            [[row]] = ask(make_requests(ROWS[:1], 1, 7, SAMPLING), frozenset())
        assert (row["response"], row["num_tokens"]) == ("Four.[END]", tokens)
    assert "'nobody/has-this' cannot be loaded" in caplog.text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("", ""),
        ([], ""),
        ([{"type": "text", "text": "Fo"}, {"type": "text", "text": "ur."}], "Four."),
        (["Fo", "ur."], "Four."),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "2 + 2"}]}, {"text": "Four."}], "Four."),
        ([{"type": "text", "text": None}], ""),
    ],
)
def test_content_in_parts_or_none(serve, content, text):
    row = only_answer(serve, counted(content))
    assert (row["response"], row["finish_reason"]) == (text, "stop")


def test_content_that_is_not_there(serve):
    body = counted(reasoning_content="Let me think")
    del body["choices"][0]["message"]["content"]
    assert only_answer(serve, body)["response"] == ""


@pytest.mark.parametrize("word", ["reasoning_content", "reasoning"])
def test_a_thought_beside_the_answer_is_dropped(serve, word):
    for thinking in (False, True):
        row = only_answer(serve, counted("Cut at </think> then.", **{word: "Two and two"}), thinking=thinking)
        assert row["response"] == "Cut at </think> then."


@pytest.mark.parametrize("after", ["\n\nIt is 4.", "It is 4.", " It is 4."])
def test_a_thought_that_the_prompt_opened_is_stored_as_one(serve, after):
    sent = f"Two and two.</think>{after}"
    row = only_answer(serve, counted(sent), thinking=True)
    assert row["response"] == f"<think>\n{sent}"
    assert final_answer(row["response"]).strip() == "It is 4."
    assert only_answer(serve, counted(sent))["response"] == sent, "no thought was asked for"


def test_what_closes_a_thought():
    assert not closes_a_thought("<think>2 + 2</think>4")
    assert not closes_a_thought("It is 4.")
    assert not closes_a_thought("Use `</think>` there.")
    assert closes_a_thought("```python\nx = 4</think>It is 4.", opens_thought=True)
    assert not closes_a_thought("\n[THINK]2[/THINK]4", opens_thought=True)


def test_a_template_that_opens_the_thought_is_heeded(serve, make_tokenizer):
    own = make_tokenizer(hybrid=True)
    asked_to_think = "{%- else %}{{- '<think>\\n' }}{%- endif %}\n{%- endif %}"
    own.chat_template = own.chat_template.replace("{%- endif %}\n{%- endif %}", asked_to_think)
    sent = "```python\nx = 4</think>It is 4."
    assert only_answer(serve, counted(sent), thinking=True)["response"] == sent
    assert only_answer(serve, counted(sent), thinking=True, tokenizer=own)["response"] == f"<think>\n{sent}"


RATE = "Too many questions today"


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": RATE, "code": 429}},
        {"error": {"message": RATE, "code": "429"}},
        {"error": {"message": RATE, "type": "rate_limit_exceeded", "code": None}},
        {"error": {"message": RATE, "code": "overloaded"}},
        {"error": {"message": RATE, "code": "http_429", "type": "invalid_request_error"}},
        {"type": "error", "error": {"type": "overloaded_error", "message": RATE}},
        {"error": {"message": RATE}},
        {"error": RATE},
        {"error": RATE, "code": 429},
        {"object": "error", "message": RATE, "type": "RateLimitError", "code": 429},
        {"detail": RATE},
        {"detail": [{"msg": RATE}]},
        {"code": 429, "msg": RATE},
        [{"error": {"code": 429, "message": RATE, "status": "RESOURCE_EXHAUSTED"}}],
        {"choices": [{"error": {"code": 429, "message": RATE}, "finish_reason": "error"}]},
        {"error": {"code": 429, "message": "Provider returned error", "metadata": {"raw": RATE}}},
        {"choices": None, "error": {"code": 429, "message": RATE}},
    ],
    ids=str,
)
def test_an_error_body_slows_down_and_ends_in_the_servers_words(serve, error, caplog):
    caplog.set_level(logging.INFO)
    server, line = told(serve, Body(error), concurrency=4)
    assert "in 2 tries, the last: " in line
    assert RATE in line
    assert "2 requests at a time from now on" in caplog.text
    assert max(server.tries.values()) == 2

    good = serve(lambda prompt, number: Body(error) if number == 1 else None)
    assert len(answers(good, concurrency=4)[1]) == 24, "asked again, it answers"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (400, "max_refused"), ("context_length_exceeded", "max_refused"), ("content_filter", "max_refused"),
        (401, "refuses the key in OPENAI_API_KEY"), ("invalid_api_key", "refuses the key in OPENAI_API_KEY"),
        (403, "refuses the key in OPENAI_API_KEY"), (404, "set base_url"), ("model_not_found", "served_model_name"),
        (402, "see to the account"), (500, "in 2 tries"), ("internal_error", "in 2 tries"),
    ],
)  # fmt: skip
def test_an_error_body_is_taken_as_the_status_that_it_names(serve, code, words):
    server, line = told(serve, Body({"error": {"message": "My words.", "code": code}}), max_refused=0, concurrency=1)
    assert words in line
    assert "My words." in line
    assert sum(server.tries.values()) == 1 or words == "in 2 tries"


@pytest.mark.parametrize("status", [401, 403, 404, 402, 405])
def test_a_status_that_would_come_again_is_fatal_at_once(serve, status):
    server, line = told(serve, Body({"error": {"message": "My words."}}, status), concurrency=1)
    assert f"Error code: {status} - My words." in line
    assert sum(server.tries.values()) == 1


def test_the_key_is_not_in_the_servers_words(serve, caplog):
    caplog.set_level(logging.DEBUG)
    long = "x" * 280
    bodies = [
        Body({"error": f"{long} {KEY}"}),
        Body({"error": {"message": f"{KEY} again", "code": 401}}),
        Body({"error": {"message": KEY, "code": 400}}),
        Body(f"{long} {KEY}".encode()),
        Body(counted(reason=["x" * 60, KEY])),
        Body({"choices": [], "x" * 60: KEY}),
        Body({"error": {"message": f"\x1b[31m{KEY}\r\n\nmany\tlines"}}, 500),
    ]
    shown = [told(serve, body)[1] for body in bodies]
    assert "\x1b" not in shown[-1]
    assert not any(KEY[:9] in text for text in (*shown, caplog.text))
    assert all(len(text) < 700 for text in shown)
    assert one_line("a\n b\x00" + "c" * 400).startswith("a b c")
    assert len(one_line("c" * 400)) == 300


def test_a_key_with_a_line_end_is_sent_without(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")
    server = serve()
    answers(server, ROWS[:1])
    assert set(server.keys) == {f"Bearer {KEY}"}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u2013dash")
    with pytest.raises(UserError, match="the key in OPENAI_API_KEY holds characters that no key has"):
        answers(server, ROWS[:1])


@pytest.mark.parametrize(
    ("sent", "stored"),
    [
        ("Four.</s>", "Four."), ("Four.<eos>", "Four."), ("Four.\n<|im_end|>\n", "Four."), ("Four.</s></s>", "Four."),
        ("</s>", ""), ("Close <s>old</s> with `</s>` in HTML.", "Close <s>old</s> with `</s>` in HTML."),
        ("Four.<|fim|>", "Four.<|fim|>"),
    ],
)  # fmt: skip
def test_end_words_left_in_an_answer_are_taken_off(serve, sent, stored):
    assert only_answer(serve, counted(sent))["response"] == stored


def test_the_teachers_own_end_words_are_taken_off(serve, make_tokenizer):
    own = make_tokenizer()
    own.add_special_tokens({"eos_token": "<|fim|>"})
    for sent in ("Four.<|fim|>", "Four. <|fim|></s>\n", "Four.<|im_end|><|fim|>"):
        row = only_answer(serve, completion(sent), tokenizer=own)
        assert (row["response"], row["num_tokens"]) == ("Four.", len(response_ids(own, "Four.")) + 1)
    assert only_answer(serve, completion("a <|fim|> b"), tokenizer=own)["response"] == "a <|fim|> b"


REFUSALS = (
    Body({"error": {"message": "My words."}}, 400),
    Body({"error": {"message": "My words."}}, 413),
    Body({"detail": "My words."}, 422),
    Body({"error": {"message": "My words.", "code": 400}}),
    Body({"error": {"message": "My words.", "code": "content_filter"}}),
    Body({"error": {"message": "My words. Prompt flagged by moderation.", "code": 403}}, 403),
    Body(counted("", "content_filter", refusal="My words.")),
    Body(counted(None, "stop", refusal="My words.")),
)


@pytest.mark.parametrize("body", REFUSALS, ids=str)
def test_a_refused_prompt_is_passed_over_and_recorded(serve, body):
    server = serve(lambda prompt, number: body if prompt == "Say 3." else None)
    requests, rows = answers(server, samples=1, concurrency=2)
    assert len(rows) == len(requests) == 12
    [refused] = [row for row in rows if row["id"] == "row-3"]
    rows.remove(refused)
    assert all(row["finish_reason"] == "stop" and "refusal" not in row for row in rows)
    assert (refused["id"], refused["response"], refused["finish_reason"], refused["num_tokens"]) == (
        "row-3", "", "refused", 0,
    )  # fmt: skip
    assert "My words." in refused["refusal"]
    assert refused.keys() == rows[0].keys() | {"refusal"}
    assert sum(server.tries.values()) == 12, "it would be refused again"


def test_a_filtered_answer_leaves_no_text(serve):
    cut = Body(counted("Half an ans", "content_filter"))
    server = serve(lambda prompt, number: cut if prompt == "Say 3." else None)
    [refused] = [row for row in answers(server, samples=1)[1] if row["id"] == "row-3"]
    assert (refused["response"], refused["refusal"]) == ("", "finish_reason content_filter")
    server = serve(lambda prompt, number: Body({"choices": [{"finish_reason": "content_filter"}]}))
    assert answers(server, ROWS[:1], 1)[1][0]["refusal"] == "finish_reason content_filter", "no message at all"


def many(number):
    return [{"id": f"row-{i}", "prompt": f"Say {i}."} for i in range(number)]


@pytest.mark.parametrize(
    ("share", "answers_wanted", "refused"),
    [(0.02, 100, 2), (0.02, 149, 2), (0.02, 10, 1), (0.29, 100, 29), (0, 100, 0), (1, 10, 10)],
)
def test_refusals_are_allowed_up_to_their_share(serve, share, answers_wanted, refused):
    rows = many(answers_wanted)
    server = serve(lambda prompt, number: REFUSALS[0] if int(prompt[4:-1]) < refused else None)
    found = answers(server, rows, 1, max_refused=share)[1]
    assert Counter(row["finish_reason"] for row in found) == Counter(refused=refused, stop=answers_wanted - refused)
    if refused == answers_wanted:
        return
    server = serve(lambda prompt, number: REFUSALS[0] if int(prompt[4:-1]) <= refused else None)
    line = rf"{refused + 1} of {answers_wanted} answers refused, max_refused {share:g} allows {refused}: .* raise max_"
    with pytest.raises(UserError, match=rf"refuses row row-\d+: Error code: 400 - My words\.; {line}"):
        answers(server, rows, 1, max_refused=share)


def test_a_wrong_setting_stops_early_and_records_nothing(serve):
    server = serve(lambda *_: REFUSALS[0])
    rows = []
    place = Server(server.url, "teacher", concurrency=4)

    def run():
        for part in generate_from_server(place, make_requests(many(200), 1, 7, SAMPLING)):
            rows.extend(part)

    with pytest.raises(UserError, match="5 of 200 answers refused"):
        run()
    assert rows == []
    assert sum(server.tries.values()) <= 12


def test_the_share_is_of_all_answers_also_in_a_later_session(serve):
    server = serve(lambda prompt, number: REFUSALS[0] if int(prompt[4:-1]) < 2 else None)
    requests = make_requests(many(100), 1, 7, SAMPLING)
    done = frozenset(requests[3:])
    with opened(Engine("openai", "", server=Server(server.url, "teacher"))) as ask:
        rows = [row for part in ask(requests, done) for row in part]
    assert sorted(row["finish_reason"] for row in rows) == ["refused", "refused", "stop"]


def test_stored_refusals_are_not_asked_again_and_count_in_the_share(serve):
    """2 of 100 may be refused, and were before the kill; a third ends the run and says where the other two are."""
    server = serve(lambda prompt, number: REFUSALS[0] if int(prompt[4:-1]) < 3 else None)
    requests = make_requests(many(100), 1, 7, SAMPLING)
    with opened(Engine("openai", "", server=Server(server.url, "teacher"))) as ask:
        rows = [row for part in ask(requests, frozenset(requests[:3]), 2) for row in part]
        assert {row["finish_reason"] for row in rows} == {"stop"}
        line = r"3 of 100 answers refused \(2 of them stored before: delete their rows to ask again\), .* allows 2: "
        with pytest.raises(UserError, match=line):
            list(ask(requests, frozenset(requests[:2]), 2))


def test_a_refusal_is_handed_on_with_the_next_answer(serve):
    """So that a kill finds it stored, but not before anything was answered at all."""
    server = serve(lambda prompt, number: REFUSALS[0] if prompt in ("Say 0.", "Say 3.") else None)
    place = Server(server.url, "teacher", concurrency=1, max_refused=0.5)
    parts = generate_from_server(place, make_requests(ROWS[:5], 1, 7, SAMPLING))
    assert [[row["id"] for row in part] for part in parts] == [
        ["row-1", "row-0"], ["row-2"], ["row-4", "row-3"],
    ]  # fmt: skip


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_from_0_to_1(share):
    with pytest.raises(UserError, match="max_refused must be a share from 0"):
        Server("http://127.0.0.1:9/v1", "teacher", max_refused=share)


def test_a_server_that_throttles_with_a_400_is_asked_again(serve):
    busy = Body({"error": {"message": RATE, "code": "rate_limit_exceeded"}}, 400)
    server = serve(lambda prompt, number: busy if number == 1 else None)
    assert {row["finish_reason"] for row in answers(server, max_refused=0)[1]} == {"stop"}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"", "an empty body"),
        (b"<html>tired</html>", "<html>tired</html>"),
        (b'data: {"choices": []}\n\ndata: [DONE]', "a stream, though none was asked for: data: {"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\x1f\x8bnot gzip", "not gzip"),
        ([], "no choices in []"),
        ([counted()], "no choices in [{"),
        ({"id": "x"}, 'no choices in {"id": "x"}'),
        ({"choices": None}, 'no choices in {"choices": null}'),
        ({"choices": [None]}, 'no choices in {"choices": [null]}'),
        ({"choices": [{"finish_reason": "stop"}]}, "message is null"),
        ({"choices": [{"finish_reason": "stop", "message": "Four."}]}, 'message is "Four."'),
        (counted(reason=7), "finish_reason is 7"),
        (counted(7), "content is 7"),
        (counted({"text": "Four."}), 'content is {"text": "Four."}'),
        (counted(["Four.", 7]), 'content is ["Four.", 7]'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_a_chat_completion_says_what_was_found(serve, body, found):
    reply = read_reply(Body(body).as_bytes())
    assert (reply.status, reply.words[:23]) == (0, "not a chat completion: ")
    assert found in reply.words
    _, line = told(serve, Body(body))
    assert f"in 2 tries, the last: not a chat completion: {found}" in line or found == "not gzip"


def test_an_answer_is_read_whatever_it_is_packed_in(serve):
    good = json.dumps(counted()).encode()
    packed = gzip.compress(good)
    assert read_reply(b"\xef\xbb\xbf" + good) == read_reply(b"\n\n  " + good) == Reply("Four.", "stop", 7)
    bodies = (Body(b"\xef\xbb\xbf" + good), Body(packed, headers={"Content_Encoding": "gzip"}), Body(packed))
    assert [only_answer(serve, body)["response"] for body in bodies] == ["Four."] * 3


def test_an_empty_error_beside_an_answer_is_none(serve):
    for error in (None, {}, "", {"message": "", "code": None}):
        assert only_answer(serve, counted() | {"error": error})["response"] == "Four."


def test_an_error_beside_an_answer_is_one():
    assert read_reply(Body(counted() | {"error": {"message": "Cut.", "code": 502}}).as_bytes()) == Failure(502, "Cut.")


def test_an_error_page_of_a_gateway_keeps_its_status():
    assert read_reply(b"<html>tired</html>", 502) == Failure(502, "Error code: 502 - <html>tired</html>")
    assert read_reply(b"", 503) == Failure(503, "Error code: 503 - an empty body")


def test_a_redirect_keeps_the_question_or_is_named(serve):
    target = serve()
    place = f"{target.url}/chat/completions"
    moved = serve(lambda *_: Body(b"", 308, {"Location": place}))
    assert len(answers(moved, ROWS[:2])[1]) == 4
    for status in (301, 302, 303):
        lost = Body(b"", status, {"Location": place})
        assert f"redirects to {place}, and the question is lost on the way; set base_url" in told(serve, lost)[1]
