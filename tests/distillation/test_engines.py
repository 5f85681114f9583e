"""The engines behind one call: sizes from head counts and memory, vLLM's replicas, and real servers on this machine."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoConfig

from src.distillation import engines, vllm_engine
from src.distillation.base import load_model, load_tokenizer
from src.distillation.engines import Engine, opened
from src.distillation.openai_engine import Server
from src.distillation.sft import MAX_BATCH, Sampling, fitting_batch_size, generate, make_requests
from src.distillation.vllm_engine import parallel_sizes, shard_of
from src.utils.common import ROOT, UserError

ROWS = [{"id": f"row-{i}", "prompt": "Count: " + "one two three " * (i % 5) + str(i)} for i in range(10)]
GREEDY = Sampling(0.0, 1.0, 0, 16)
# With a vLLM of your own: KD_VLLM_PYTHON=/path/to/venv/bin/python pytest -m vllm tests/distillation/test_engines.py
VLLM = os.environ.get("KD_VLLM_PYTHON", "")


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


def test_the_reference_teacher_on_six_gpus(real_data, monkeypatch):
    monkeypatch.setattr(engines, "compute_dtype", lambda: torch.bfloat16)
    teacher = str(real_data / "configs" / "qwen3-30b-a3b-instruct-2507")
    arguments, groups = engines.vllm_plan(
        Engine("vllm", teacher, devices=(0, 1, 2, 3, 4, 5), vllm_arguments={"seed": 3})
    )
    assert (arguments["tensor_parallel_size"], arguments["pipeline_parallel_size"]) == (2, 1)
    assert groups == [[0, 1], [2, 3], [4, 5]]
    assert (arguments["dtype"], arguments["seed"], arguments["generation_config"]) == ("bfloat16", 3, "vllm")


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"61.1 GB of weights do not fit on 1 GPUs of 36.0 GB"):
        parallel_sizes(32, 4, 48, 1, 61.1, 36.0)


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


FAKE_VLLM = """
import os
class SamplingParams:
    def __init__(self, **given): self.__dict__.update(given)
class Output:
    def __init__(self, text): self.text, self.finish_reason, self.token_ids = text, "stop", [1, 2, 3]
class Result:
    def __init__(self, text): self.outputs = [Output(text)]
class LLM:
    def __init__(self, **given): self.given = given
    def generate(self, prompts, parameters, use_tqdm, lora_request):
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if gpus == os.environ.get("KILL_REPLICA"): os._exit(3)
        return [Result(f"{gpus}|{len(p['prompt_token_ids'])}|{s.seed}|{s.top_k}|{self.given['tensor_parallel_size']}")
                for p, s in zip(prompts, parameters, strict=True)]
"""


def test_vllm_names_absent_gpus_too(tiny_teacher):
    absent = Engine("vllm", tiny_teacher, devices=(98, 99))
    with pytest.raises(UserError, match=r"GPUs \[98, 99\], but .* has none|GPU 98 is named"), opened(absent):
        pass


def test_without_vllm_its_requirements_are_named(monkeypatch, tiny_teacher):
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"requirements-vllm.txt"), opened(Engine("vllm", tiny_teacher)):
        pass


@pytest.fixture
def three_replicas(tmp_path, monkeypatch, tiny_teacher):
    """An engine of three replicas on two GPUs each; the module `vllm` of its processes only echoes."""
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(engines, "check_devices", lambda *_: None)
    monkeypatch.setattr(engines, "count_parameters", lambda model: 30_500_000_000)
    monkeypatch.setattr(engines, "compute_dtype", lambda: torch.bfloat16)
    return Engine("vllm", tiny_teacher, devices=(0, 1, 2, 3, 4, 5), gpu_memory_gb=36.0)


@pytest.mark.slow
def test_rows_are_sharded_by_id_and_merged_without_duplicates(three_replicas, monkeypatch):
    """Devices count among those that are visible, as they do for torch."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9,8,7,6,5,4")
    requests = make_requests(
        [{"id": f"row-{i}", "prompt": "x" * i} for i in range(40)], 2, 7, Sampling(0.7, 0.8, 0, 16)
    )
    done = frozenset(r for r in requests if (r.id, r.sample_index) in {("row-3", 0), ("row-4", 1)})
    with opened(three_replicas) as ask:
        first = [row for part in ask(requests, done) for row in part]
        second = [row for part in ask(requests[:6], frozenset()) for row in part]
    assert len(first) == 78
    assert {(r["id"], r["sample_index"]) for r in first} == {(r.id, r.sample_index) for r in requests if r not in done}
    assert {(r["id"], r["sample_index"]) for r in second} == {(r.id, r.sample_index) for r in requests[:6]}
    pairs = ["9,8", "7,6", "5,4"]
    assert {row["response"].split("|")[0] for row in first} == set(pairs)
    for row in first:
        gpus, _, seed, top_k, tensor = row["response"].split("|")
        assert gpus == pairs[shard_of(row["id"], 3)]
        assert (int(seed), top_k, tensor) == (row["seed"], "-1", "2")
        assert (row["finish_reason"], row["num_tokens"], row["engine"]) == ("stop", 3, "vllm")


@pytest.mark.slow
def test_a_replica_is_lost_and_the_others_answer_all_of_theirs(three_replicas, monkeypatch):
    monkeypatch.setenv("KILL_REPLICA", "2,3")
    requests = make_requests([{"id": f"row-{i}", "prompt": "x"} for i in range(40)], 1, 7, GREEDY)
    rows = []

    def run():
        with opened(three_replicas) as ask:
            for part in ask(requests, frozenset()):
                rows.extend(part)

    with pytest.raises(UserError, match=r"vLLM replica 1 \(GPUs \[2, 3\]\) ended with exit code 3"):
        run()
    assert {row["id"] for row in rows} == {r.id for r in requests if shard_of(r.id, 3) != 1}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command, port, log):
    """A server process: waits until it is ready, stops it by its process id."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"NO_COLOR": "1"})
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def local_answers(model):
    """In the servers' float32, whatever the processor would have."""
    own = load_model(model, torch.float32), load_tokenizer(model)
    return sorted_rows(generate(*own, make_requests(ROWS, 1, 7, GREEDY), 4))


def sorted_rows(parts):
    rows = sorted((row for part in parts for row in part), key=lambda row: row["id"])
    return [{name: value for name, value in row.items() if name != "engine"} for row in rows]


@pytest.mark.slow
def test_transformers_serve_gives_the_answers_of_the_local_engine(tmp_path, ending_teacher):
    """A real OpenAI-compatible server: at temperature 0 the same text, finish reasons and token counts."""
    pytest.importorskip("fastapi")
    port = free_port()
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", ending_teacher, "--port", str(port), "--host", "127.0.0.1",
               "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    with running(command, port, tmp_path / "server.log") as url:
        place = Server(url, ending_teacher, "transformers", concurrency=4, timeout=60)
        with opened(Engine("openai", ending_teacher, server=place)) as ask:
            asked = make_requests(ROWS, 1, 7, GREEDY)
            served = sorted_rows(ask(asked, frozenset(asked[:1])))
    local = local_answers(ending_teacher)
    assert {row["finish_reason"] for row in local} == {"stop", "length"}
    for row in (*served, *local):
        row["response"] = row["response"].strip()  # the server drops blanks at the end
    assert served == local[1:]


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM, reason="KD_VLLM_PYTHON does not name a Python with vLLM")
def test_a_vllm_server_answers_every_request(tmp_path, ending_teacher):
    port = free_port()
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", ending_teacher, "--port", str(port),
               "--host", "127.0.0.1", "--max-model-len", "512", "--dtype", "float32",
               "--gpu-memory-utilization", "0.3"]  # fmt: skip
    with running(command, port, tmp_path / "server.log") as url:
        place = Server(url, ending_teacher, "vllm", concurrency=8, timeout=120)
        with opened(Engine("openai", ending_teacher, server=place)) as ask:
            served = sorted_rows(ask(make_requests(ROWS, 1, 7, GREEDY), frozenset()))
    agree_mostly(served, local_answers(ending_teacher))


OFFLINE = """
import json, sys
from src.distillation.engines import Engine, opened
from src.distillation.sft import Sampling, make_requests
if __name__ == "__main__":
    model, rows, target = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    requests = make_requests(rows, 1, 7, Sampling(0.0, 1.0, 0, 16))
    with opened(Engine("vllm", model, vllm_arguments=json.loads(sys.argv[4]))) as ask:
        found = [row for part in ask(requests, frozenset()) for row in part]
    json.dump(found, open(target, "w"))
"""


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM, reason="KD_VLLM_PYTHON does not name a Python with vLLM")
def test_vllms_offline_engine_answers_every_request(tmp_path, ending_teacher):
    (tmp_path / "offline.py").write_text(OFFLINE)
    done = subprocess.run(
        [VLLM, str(tmp_path / "offline.py"), ending_teacher, json.dumps(ROWS), str(tmp_path / "rows.json"),
         json.dumps({"max_model_len": 512, "dtype": "float32", "gpu_memory_utilization": 0.3})],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    agree_mostly(sorted_rows([json.loads((tmp_path / "rows.json").read_text())]), local_answers(ending_teacher))


def agree_mostly(theirs, ours):
    """Other kernels round otherwise, so greedy text may part at a near-tie; keys, seeds and prompts may not."""
    fixed = ("id", "sample_index", "prompt", "sampling", "seed")
    assert [[row[name] for name in fixed] for row in theirs] == [[row[name] for name in fixed] for row in ours]
    same = sum(
        a["response"] == b["response"] and a["num_tokens"] == b["num_tokens"] for a, b in zip(theirs, ours, strict=True)
    )
    assert same >= 0.7 * len(ours), f"{same} of {len(ours)} answers agree"
