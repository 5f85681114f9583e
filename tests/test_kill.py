"""SIGKILL at any moment and the same command again: every stage ends with what an uninterrupted run leaves.

Real processes and tiny models. Times, memory, paths and versions may differ; nothing else may.
"""

import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from peft import load_peft_weights

from src.utils.common import read_json, read_jsonl, write_jsonl

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow


def start(script: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


# Its processes have their libraries already: thirty starts would spend minutes on reading them
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(["src.distillation.kd", "src.evaluation.evaluator", "src.data.sources"])


def be_script(script: str, arguments: Sequence[str], log: Path) -> None:
    """Become the script, which writes into `log`."""
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(ROOT)
    os.environ |= ENVIRONMENT
    path = ROOT / "scripts" / f"{script}.py"
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


@dataclass
class Warm:
    """A script that runs in a warm process; its output is in `log`."""

    script: str
    arguments: Sequence[str]
    log: Path

    def __post_init__(self) -> None:
        self.process = WARM.Process(target=be_script, args=(self.script, self.arguments, self.log))
        self.process.start()

    def finish(self) -> None:
        self.process.join(timeout=300)
        assert self.process.exitcode == 0, self.log.read_text()

    def kill(self) -> None:
        assert self.process.is_alive(), f"{self.script} ended before it could be killed: {self.log.read_text()}"
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL


def kill_when(path: Path, lines: int, running: Warm) -> None:
    """Kill the script once `path` has this many lines."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.process.is_alive():
        if path.is_file() and path.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.005)
    running.kill()


@pytest.fixture
def profile(tmp_path, tiny_teacher, tiny_student):
    """Two experiments on the same prompts, one to interrupt and one to leave alone: (name) -> `--config` arguments."""

    def write(name: str) -> list[str]:
        values = {
            "data_dir": str(tmp_path / "data"),
            "experiment_dir": str(tmp_path / name / "tiny"),
            "teacher_model_name_or_path": tiny_teacher,
            "model_name_or_path": tiny_student,
            "download_datasets": {"domains": ["maths"], "domain_train_rows": [120], "domain_eval_rows": [24]},
            "generate_sft_data": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 24, "batch_size": 8,
                                  "num_samples": 2},
            "cache_teacher": {"tokens_per_batch": 300, "tokens_per_shard": 100, "bf16": False},
            "run_improved_kd": {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 40, "save_steps": 5,
                                "learning_rate": "1e-2", "warmup_steps": 2, "lora_r": 4, "bf16": False,
                                "eval_steps": 10, "compile_loss": False},
            "evaluate_distillation": {"output_dir": str(tmp_path / name / "evaluation"), "mode": "quick",
                                      "max_new_tokens": 24, "batch_size": 4, "num_samples": 2},
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return ["--config", str(path)]

    return write


def by_key(path: Path, *keys: str) -> dict:
    rows = read_jsonl(path)
    made = {tuple(row[key] for key in keys): row for row in rows}
    assert len(made) == len(rows), f"{path} holds a row twice"
    return made


def test_killed_stages_end_as_uninterrupted_ones(profile, tmp_path, clean_rows, write_sft):
    whole, cut = profile("whole"), profile("cut")

    def warm(script: str, *arguments: str) -> Warm:
        return Warm(script, arguments, tmp_path / "last.log")

    warm("download_datasets", *whole).finish()
    folders = {name: tmp_path / name for name in ("whole", "cut")}
    answers = {name: folder / "tiny" / "sft" / "sft_train_data.jsonl" for name, folder in folders.items()}

    warm("generate_sft_data", *whole).finish()
    for lines in (8, 60, 150):
        kill_when(answers["cut"], lines, warm("generate_sft_data", *cut))
        with answers["cut"].open("a") as file:  # what a kill in the middle of a write leaves
            file.write('{"id": "torn')
    warm("generate_sft_data", *cut).finish()
    assert by_key(answers["cut"], "id", "sample_index") == by_key(answers["whole"], "id", "sample_index")
    for name in folders:  # a random teacher hardly ever ends its turn, so the training rows are others
        write_sft(tmp_path / name / "tiny", clean_rows(100), clean_rows(12, start=200))

    warm("cache_teacher", *whole).finish()
    caches = {name: tmp_path / name / "tiny" / "teacher_cache" for name in folders}
    for file in ("shard_00002", "shard_00009"):
        kill_when(caches["cut"] / f"{file}.safetensors", 0, warm("cache_teacher", *cut))
    warm("cache_teacher", *cut).finish()
    shards = {name: {p.name: p.read_bytes() for p in folder.glob("shard_*")} for name, folder in caches.items()}
    assert shards["cut"] == shards["whole"]
    assert len(shards["whole"]) > 12

    run = {name: folder / "run" for name, folder in folders.items()}
    control = {name: folder / "control" for name, folder in folders.items()}
    warm("run_improved_kd", *whole, "--output_dir", str(run["whole"])).finish()
    for steps in (3, 12, 27):
        kill_when(run["cut"] / "metrics.jsonl", steps, warm("run_improved_kd", *cut, "--output_dir", str(run["cut"])))
    warm("run_improved_kd", *cut, "--output_dir", str(run["cut"])).finish()
    for name, folder in control.items():
        warm("run_improved_kd", *profile(name), "--alpha", "0", "--output_dir", str(folder)).finish()
    measured = ("tokens_per_second", "peak_memory_mb", "train_seconds")
    metrics, results = {}, {}
    for name, folder in run.items():
        rows = read_jsonl(folder / "metrics.jsonl")
        metrics[name] = [{k: v for k, v in row.items() if k not in measured} for row in rows]
        results[name] = {k: v for k, v in read_json(folder / "kd_results.json").items() if k not in measured}
    assert metrics["cut"] == metrics["whole"]
    assert results["cut"] == results["whole"]
    ours, theirs = (load_peft_weights(str(run[name] / "final_model")) for name in run)
    assert all((ours[name] == theirs[name]).all() for name in ours | theirs)

    flags = {n: ["--model_path", str(run[n]), "--sft_model_path", str(control[n])] for n in run}
    warm("evaluate_distillation", *whole, *flags["whole"]).finish()
    evaluation = folders["cut"] / "evaluation"
    kill_when(evaluation / "answers.jsonl", 60, warm("evaluate_distillation", *cut, *flags["cut"]))
    for step in ("grade", "results", "report"):
        kill_when(evaluation / f"step_{step}.json", 0, warm("evaluate_distillation", *cut, *flags["cut"]))
    warm("evaluate_distillation", *cut, *flags["cut"]).finish()
    for name in ("answers.jsonl", "samples.jsonl"):
        assert (evaluation / name).read_bytes() == (folders["whole"] / "evaluation" / name).read_bytes(), name
    sections = []
    for folder in folders.values():
        stored = read_json(folder / "evaluation" / "results.json")
        sections.append(json.dumps([stored[name] for name in ("heldout", "graded", "verdict")]))
    assert sections[0] == sections[1]


def two_at_once(file: Path, lines: int, script: str, *arguments: str) -> None:
    """Start the script, and again once `file` has this many lines: the first ends well, the second is refused."""
    first = start(script, *arguments)
    while first.poll() is None and not (file.is_file() and file.read_bytes().count(b"\n") >= lines):
        time.sleep(0.005)
    second = start(script, *arguments)
    refusal = second.communicate(timeout=300)[0]
    output = first.communicate(timeout=300)[0]
    assert first.returncode == 0, output
    assert second.returncode == 2, refusal
    assert f"{script} (process {first.pid} on {os.uname().nodename}) is working on it" in refusal


def test_two_at_once_do_not_mix(profile, tmp_path, clean_rows, write_sft):
    """Two equal starts of a stage: one set of answers, one run, each as if it had been alone."""
    arguments = profile("twice")
    sft = tmp_path / "twice" / "tiny" / "sft"
    Warm("download_datasets", arguments, tmp_path / "last.log").finish()
    two_at_once(sft / "sft_train_data.jsonl", 1, "generate_sft_data", *arguments, "--max_new_tokens", "96")
    assert len(by_key(sft / "sft_train_data.jsonl", "id", "sample_index")) == 240
    write_sft(tmp_path / "twice" / "tiny", clean_rows(100), clean_rows(12, start=200))
    training = [*arguments, "--teacher_signal", "online", "--max_steps", "200"]
    root = tmp_path / "twice"
    both = [start("run_improved_kd", *training) for _ in range(2)]  # at once: neither finds a folder of the other
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], outputs
    refused = [process.returncode for process in both].index(2)
    assert f"run_improved_kd (process {both[1 - refused].pid} on " in outputs[refused]
    [run] = root.glob("gpu_optimized_kd_*")
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl") if "loss" in row] == list(range(1, 201))


def test_twenty_kills_at_random_moments_lose_double_and_change_nothing(tmp_path, tiny_teacher):
    """300 rows at temperature 0, SIGKILL wherever it falls: start-up, a forward pass, a write."""
    prompts = [
        {"id": f"sum-{i:03d}", "source": "sums", "domain": "maths", "prompt": f"{i} + {i * i}?" + " Say it." * (i % 7),
         "reference": str(i), "grader": "numeric", "grader_args": "{}"}
        for i in range(300)
    ]  # fmt: skip
    write_jsonl(tmp_path / "data" / "train_dataset.jsonl", prompts)
    files = {}

    def process(name: str) -> multiprocessing.process.BaseProcess:
        files[name] = tmp_path / name / "sft" / "sft_train_data.jsonl"
        folders = ["--data_dir", str(tmp_path / "data"), "--experiment_dir", str(tmp_path / name)]
        arguments = [*folders, "--teacher_model", tiny_teacher, "--splits", "train", "--temperature", "0",
                     "--max_new_tokens", "48", "--batch_size", "5"]  # fmt: skip
        return Warm("generate_sft_data", arguments, tmp_path / f"{name}.log").process

    process("warm").join()  # the fork server starts with the first process
    begin = time.monotonic()
    whole = process("whole")
    while whole.is_alive() and not files["whole"].is_file():
        time.sleep(0.005)
    start_up = time.monotonic() - begin
    whole.join()
    one_batch = (time.monotonic() - begin - start_up) / 59
    assert whole.exitcode == 0

    draw, grown, size = random.Random(0), 0, 0
    for _ in range(20):
        killed = process("cut")
        end = time.monotonic() + draw.uniform(0, 3 * start_up)
        while time.monotonic() < end and (not files["cut"].is_file() or files["cut"].stat().st_size == size):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, one_batch))  # a batch was stored: somewhere in the next one, so that 20 kills fit
        assert killed.is_alive(), "it ended before it could be killed"
        killed.kill()
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        now = files["cut"].stat().st_size if files["cut"].is_file() else 0
        grown, size = grown + (now > size), now
    last = process("cut")
    last.join()
    assert last.exitcode == 0
    assert grown >= 3, "most kills should fall into generation"
    lines = files["cut"].read_bytes().splitlines(keepends=True)
    assert len(lines) == 300
    assert all(line.endswith(b"\n") for line in lines)
    assert by_key(files["cut"], "id", "sample_index") == by_key(files["whole"], "id", "sample_index")
    summary = read_json(files["cut"].with_name("generate_train.json"))
    assert summary["answers"] == sum(summary["finish_reasons"].values()) == 300
    assert summary["tokens"] == sum(row["num_tokens"] for row in read_jsonl(files["cut"]))
    assert summary["last_session"]["tokens_per_second"] > 0
