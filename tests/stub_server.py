"""A program called `vllm` (or anything else) that takes vLLM's command line, and answers without a model."""

import json
import sys
from pathlib import Path
from typing import Any

# Knows the model and the LoRA modules by their names, and no other; says who was asked, and how.
PROGRAM = """#!{python}
import http.server, json, os, sys, time
words = sys.argv[1:]
note = {{"words": words, "pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}}
with open({notes!r}, "a") as file:
    file.write(json.dumps(note) + "\\n")
names, taken = {{words[1]}}, False
for word in words:
    taken = word == "--lora-modules" or (taken and not word.startswith("--"))
    if taken and "=" in word:
        names.add(word.split("=")[0])
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.reply({{"data": [{{"id": name}} for name in sorted(names)]}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep({seconds})
        if asked["model"] not in names:
            return self.reply({{"error": {{"message": "no model " + asked["model"], "code": 404}}}}, 404)
        said = f"{{asked['model']}} at {{asked['temperature']}} from {{asked['top_k']}}"
        choice = {{"index": 0, "message": {{"role": "assistant", "content": said}}, "finish_reason": "stop"}}
        if asked.get("return_token_ids"):
            choice["token_ids"] = [65, 66, 258]  # two words and the end of the turn
        self.reply({{"choices": [choice], "usage": {{"completion_tokens": 4}}}})
port = int(words[words.index("--port") + 1])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def write_stub(folder: Path, name: str = "vllm", seconds: float = 0.0) -> Path:
    """The program's path; it takes `seconds` for an answer, and notes its starts in started.jsonl beside it."""
    path = folder / name
    notes = str(folder / "started.jsonl")
    path.write_text(PROGRAM.format(python=sys.executable, notes=notes, seconds=seconds))
    path.chmod(0o755)
    return path


def starts(folder: Path) -> list[dict[str, Any]]:
    """What was noted of each start: `words` of the command line, `pid`, and `gpus`, CUDA_VISIBLE_DEVICES."""
    path = folder / "started.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
