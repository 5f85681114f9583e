"""Arms behind servers that the stage starts: each model is asked by its name, and nothing is left running."""

import json
import sys

import pytest

from src.distillation.server import answers
from src.evaluation.evaluator import run_evaluation
from src.utils.common import read_jsonl
from tests.distillation.test_engines import free_port
from tests.evaluation.tiny import config_for, refused

# answers every question with the name it was asked by, and notes its command line
SERVER = """
import http.server, json, sys
with open(sys.argv[2], "a") as file:
    file.write(json.dumps(sys.argv[3:]) + "\\n")
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def reply(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.reply({"data": []})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = f"{asked['model']} at {asked['temperature']} from {asked['top_k']}"
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        self.reply({"choices": [choice], "usage": {"completion_tokens": 4}})
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def served(trained, tmp_path):
    """An evaluation whose students and teacher have a server each, started by the stage."""
    (tmp_path / "server.py").write_text(SERVER)
    ports = [free_port(), free_port()]
    start = [f"{sys.executable} {tmp_path / 'server.py'} {port} {tmp_path / 'started.jsonl'}" for port in ports]
    return config_for(
        trained, tmp_path / "out", engine="openai", temperatures=[0.1, 0.7],
        base_url=f"http://127.0.0.1:{ports[0]}/v1", server_command=f"{start[0]} {{base}} sft={{sft}} kd={{kd}}",
        teacher_base_url=f"http://127.0.0.1:{ports[1]}/v1", teacher_server_command=f"{start[1]} {{teacher}}",
    )  # fmt: skip


def test_every_arm_is_asked_by_its_name_at_its_own_server(served, tmp_path):
    pytest.importorskip("openai", reason="the client openai is not installed (requirements-dev.txt)")
    results = run_evaluation(served)
    arms = results["arms"]
    said = {}
    for row in read_jsonl(tmp_path / "out" / "answers.jsonl"):
        said.setdefault(row["arm"], set()).add(row["response"])
    names = {"base": arms["base"], "sft": "sft", "kd": "kd", "teacher": arms["teacher"]}
    assert said == {arm: {f"{name} at {t} from 20" for t in (0.1, 0.7)} for arm, name in names.items()}
    started = [json.loads(line) for line in (tmp_path / "started.jsonl").read_text().splitlines()]
    assert started == [[arms["base"], f"sft={arms['sft']}", f"kd={arms['kd']}"], [arms["teacher"]]]
    assert not answers(served.base_url)
    assert not answers(served.teacher_base_url)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": "transformers"}, "engine transformers"),
        (
            {"engine": "transformers", "server_command": ""},
            "teacher_server_command: engine transformers asks no server",
        ),
        ({"teacher_server_command": "", "teacher_base_url": ""}, "set teacher_server_command, or teacher_base_url"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_started(served, tmp_path, changes, words):
    for name, value in changes.items():
        setattr(served, name, value)
    refused(served, words)
    assert not (tmp_path / "started.jsonl").exists()
