"""The engines behind one call: which of them answers, what a batch holds, and real servers on this machine."""

import json
import os
import shlex
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from src.distillation.base import load_model, load_tokenizer
from src.distillation.engines import (
    Engine,
    EngineSettings,
    engine_name,
    make_engine,
    opened,
    planned_servers,
    stage_serve,
    started,
)
from src.distillation.lora import merge_adapter
from src.distillation.server import answers
from src.distillation.serving import students_server, teacher_server, with_open_port
from src.distillation.sft import MAX_BATCH, Sampling, fitting_batch_size, generate, make_requests
from src.utils.common import ROOT, UserError

ROWS = [{"id": f"row-{i}", "prompt": "Count: " + "one two three " * (i % 5) + str(i)} for i in range(10)]
GREEDY = Sampling(0.0, 1.0, 0, 16)
# With a vLLM of your own: KD_VLLM_PYTHON=/path/to/venv/bin/python pytest -m vllm tests/distillation/test_engines.py
VLLM = os.environ.get("KD_VLLM_PYTHON", "")


def test_the_batch_size_follows_the_memory(tiny_teacher):
    config = AutoConfig.from_pretrained(tiny_teacher)
    sizes = [fitting_batch_size(config, 1e6, memory, 100, torch.float32) for memory in (5e6, 2e7, 1e12)]
    assert 1 <= sizes[0] < sizes[1] < sizes[2] == MAX_BATCH
    assert fitting_batch_size(config, 1e6, 2e7, 1000, torch.float32) < sizes[1]
    with pytest.raises(UserError, match="one row of 100 tokens do not fit"):
        fitting_batch_size(config, 1e6, 1.1e6, 100, torch.float32)


def test_a_derived_batch_size_answers_like_a_given_one(tiny_teacher):
    requests = make_requests(ROWS, 1, 7, GREEDY)
    found = []
    for batch_size in (0, len(ROWS)):  # the machine has room for all of them
        with opened(Engine("transformers", tiny_teacher, batch_size)) as ask:
            found.append({row["id"]: row["response"] for part in ask(requests, frozenset()) for row in part})
    assert found[0] == found[1]


SERVE = '{"command": "vllm"}'


@pytest.mark.parametrize(
    ("settings", "name"),
    [({}, "transformers"), ({"engine": "openai"}, "openai"), ({"serve": SERVE}, "openai"),
     ({"serve": SERVE, "engine": "openai"}, "openai"), ({"serve": " ", "engine": "transformers"}, "transformers")],
)  # fmt: skip
def test_serve_decides_what_answers_unless_an_engine_is_named(settings, name):
    assert engine_name(EngineSettings(**settings)) == name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "vllm"}, r"engine vllm is a server now, .* say serve: \{command: vllm\}"),
        ({"engine": "sglang"}, "engine 'sglang': there are transformers and openai"),
        ({"serve": SERVE, "engine": "transformers"}, "keep one: --serve '' leaves the profile's server out"),
        ({"serve": SERVE, "base_url": "http://elsewhere:8000/v1"}, "base_url http://elsewhere:8000/v1 names another"),
    ],
)
def test_two_things_that_answer_are_refused(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        stage_serve(EngineSettings(**settings))
    assert "\n" not in str(caught.value)


def test_a_dry_run_lists_the_servers_of_a_stage(tiny_teacher, tiny_student):
    settings = EngineSettings(serve=SERVE)
    assert planned_servers(EngineSettings(), tiny_teacher, tiny_student) == []
    assert [one.answers_for for one in planned_servers(settings, tiny_teacher)] == ["teacher"]
    students, teacher = planned_servers(settings, tiny_teacher, tiny_student, {"kd": "not/there/yet"}, rank=64)
    assert students.words[:3] == ("vllm", "serve", tiny_student)
    assert students.words[-5:] == ("--enable-lora", "--max-lora-rank", "64", "--lora-modules", "kd=not/there/yet")
    assert teacher.words[:3] == ("vllm", "serve", tiny_teacher)
    line = EngineSettings(serve=json.dumps({"command": "start {base} {kd} {teacher} {port}", "port": 9000}))
    [arms] = planned_servers(line, tiny_teacher, tiny_student, {"kd": "kd folder"})
    assert arms.words == ("start", tiny_student, "kd folder", tiny_teacher, "9000")


def test_absent_gpus_are_named_before_a_server_is_started(tmp_path, tiny_teacher):
    serve = stage_serve(EngineSettings(serve='{"devices": [98, 99], "tensor_parallel": 2, "command": "no-such/vllm"}'))
    absent = pytest.raises(UserError, match=r"GPUs \[98, 99\], but .* has none|GPU 98 is named")
    with absent, started(teacher_server(serve, tiny_teacher, ()), tmp_path / "server.log"):
        pass
    assert not (tmp_path / "server.log").exists()


def test_without_the_client_no_server_is_started(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    planned = teacher_server(stage_serve(EngineSettings(serve=SERVE)), tiny_teacher, ())
    with pytest.raises(UserError, match=r"pip install -e .\.\[server\]"), started(planned, tmp_path / "server.log"):
        pass
    assert not (tmp_path / "server.log").exists()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(settings, model, log, adapters=None):
    """Start the server that the settings name, of a teacher or of a student with its adapters; yields its `Serve`."""
    serve = with_open_port(stage_serve(settings))
    planned = students_server(serve, model, adapters, ()) if adapters else teacher_server(serve, model, ())
    with started(planned, log):
        yield serve


def local_answers(model, adapter=""):
    """In the servers' float32, whatever the processor would have."""
    own = load_model(model, torch.float32), load_tokenizer(model)
    own = (merge_adapter(own[0], adapter), own[1]) if adapter else own
    return sorted_rows(generate(*own, make_requests(ROWS, 1, 7, GREEDY), 4))


def sorted_rows(parts):
    rows = sorted((row for part in parts for row in part), key=lambda row: row["id"])
    return [{name: value for name, value in row.items() if name != "engine"} for row in rows]


def served_answers(settings, model, serve, name="", requests=None, done=frozenset()):
    engine = make_engine(settings, model, (), serve, name)
    with opened(engine) as ask:
        return sorted_rows(ask(requests or make_requests(ROWS, 1, 7, GREEDY), done))


@pytest.mark.slow
def test_transformers_serve_gives_the_answers_of_the_local_engine(tmp_path, ending_teacher):
    """A real OpenAI-compatible server, started by a whole command line: at temperature 0 the same text, finish reasons
    and token counts."""
    pytest.importorskip("fastapi")
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", "{teacher}", "--port", "{port}", "--host", "127.0.0.1",
               "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    settings = EngineSettings(
        serve=json.dumps({"command": shlex.join(command), "port": 0}), server="transformers", request_timeout=60,
        concurrency=4,
    )  # fmt: skip
    asked = make_requests(ROWS, 1, 7, GREEDY)
    with served(settings, ending_teacher, tmp_path / "server.log") as serve:
        found = served_answers(settings, ending_teacher, serve, "", asked, frozenset(asked[:1]))
    local = local_answers(ending_teacher)
    assert {row["finish_reason"] for row in local} == {"stop", "length"}
    for row in (*found, *local):
        row["response"] = row["response"].strip()  # the server drops blanks at the end
    assert found == local[1:]


needs_vllm = pytest.mark.skipif(not VLLM, reason="KD_VLLM_PYTHON does not name a Python with vLLM")
EMBEDDED = ROOT / "outputs" / "models" / "smollm2-135m-instruct"  # made by scripts/prepare_models.py


def vllm_settings():
    arguments = {"dtype": "float32", "gpu-memory-utilization": 0.3, "max-model-len": 512}
    command = str(Path(VLLM).with_name("vllm"))
    serve = json.dumps({"command": command, "port": 0, "arguments": arguments})
    return EngineSettings(serve=serve, request_timeout=300, concurrency=8)


@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize("teacher", ["tiny", "embedded"])
def test_vllm_answers_as_the_local_engine_does(tmp_path, ending_teacher, teacher):
    if teacher == "embedded" and not EMBEDDED.is_dir():
        pytest.skip("scripts/prepare_models.py has not made the embedded teacher")
    model, settings = ending_teacher if teacher == "tiny" else str(EMBEDDED), vllm_settings()
    with served(settings, model, tmp_path / "server.log") as serve:
        found = served_answers(settings, model, serve)
    assert not answers(serve.base_url)
    agree_mostly(found, local_answers(model))


@pytest.mark.vllm
@needs_vllm
def test_vllm_answers_as_each_of_its_lora_modules(tmp_path, ending_teacher):
    adapters = {arm: str(tmp_path / arm) for arm in ("sft", "kd")}
    for seed, folder in enumerate(adapters.values()):
        torch.manual_seed(seed)
        student = get_peft_model(load_model(ending_teacher, torch.float32), LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
            task_type="CAUSAL_LM",
        ))  # fmt: skip
        student.save_pretrained(folder)
    settings = vllm_settings()
    with served(settings, ending_teacher, tmp_path / "server.log", adapters=adapters) as serve:
        found = {arm: served_answers(settings, ending_teacher, serve, arm) for arm in adapters}
        base = served_answers(settings, ending_teacher, serve)
    agree_mostly(base, local_answers(ending_teacher))
    for arm, folder in adapters.items():
        agree_mostly(found[arm], local_answers(ending_teacher, folder))
    texts = [[row["response"] for row in rows] for rows in (base, *found.values())]
    assert texts[0] != texts[1] != texts[2] != texts[0], "the adapters answer alike"


def agree_mostly(theirs, ours):
    """Other kernels round otherwise, so greedy text may part at a near-tie; keys, seeds and prompts may not."""
    fixed = ("id", "sample_index", "prompt", "sampling", "seed")
    assert [[row[name] for name in fixed] for row in theirs] == [[row[name] for name in fixed] for row in ours]
    same = sum(
        a["response"] == b["response"] and a["num_tokens"] == b["num_tokens"] for a, b in zip(theirs, ours, strict=True)
    )
    assert same >= 0.7 * len(ours), f"{same} of {len(ours)} answers agree"
