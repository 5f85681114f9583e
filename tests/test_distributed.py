"""Two processes learn what one learns, each with its share of a step's rows and the teacher read from its cache.

Real processes on gloo and tiny models. DDP is accelerate's own; FSDP2 on a CPU needs the patch in fsdp_on_cpu.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights

from src.distillation.kd import run_kd_pipeline
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache
from src.utils.common import read_json, read_jsonl

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture
def settings(tmp_path, tiny_teacher, tiny_student, clean_rows, write_sft):
    experiment = write_sft(tmp_path / "tiny", clean_rows(40), clean_rows(8, start=100))
    make_cache(CacheTeacherConfig(tiny_teacher, str(experiment), bf16=False))
    return {
        "model_name_or_path": tiny_student, "teacher_model_name_or_path": tiny_teacher,
        "experiment_dir": str(experiment), "batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 6,
        "learning_rate": 1e-2, "warmup_steps": 0, "lora_r": 4, "bf16": False, "save_steps": 3, "compile_loss": False,
        "tokens_per_batch": 0,
    }  # fmt: skip


LAUNCHER = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29631")


def run(*command: str) -> str:
    """What the command says; one thread a process, for a product's sums go by the number of threads."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def on_two_processes(kind: str, settings: dict) -> str:
    if kind == "ddp":
        return run(*LAUNCHER, "scripts/run_improved_kd.py", *flags(settings))
    return run(*LAUNCHER, "tests/fsdp_on_cpu.py", json.dumps(settings))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_learn_the_same_bit_for_bit(settings, tmp_path, kind):
    """A step of two micro-batches has one sum, in whatever order: one process with both, or two with one each."""
    settings |= {"batch_size": 4, "gradient_accumulation_steps": 2}
    settings |= {"max_grad_norm": 1e9} if kind == "fsdp2" else {}  # its norm is summed over shards, in another order
    run("scripts/run_improved_kd.py", *flags(settings | {"output_dir": str(tmp_path / "one")}))
    output = on_two_processes(kind, settings | {"output_dir": str(tmp_path / "two")})
    assert "8 rows in 2.0 passes over 2 processes" in output
    adapters = [load_peft_weights(str(tmp_path / name / "final_model")) for name in ("one", "two")]
    assert adapters[0].keys() == adapters[1].keys()
    for name in adapters[0]:
        assert torch.equal(adapters[0][name], adapters[1][name]), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_go_on_from_a_checkpoint_bit_for_bit(settings, tmp_path, kind):
    """As if killed after the checkpoint of step 3 of 6: all that came later is gone."""
    folder = tmp_path / "two"
    settings |= {"output_dir": str(folder), "save_total_limit": 2}
    on_two_processes(kind, settings)
    whole = load_peft_weights(str(folder / "final_model"))
    losses = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    for name in ("final_model", "checkpoint-6"):
        shutil.rmtree(folder / name)
    (folder / "kd_results.json").unlink()
    output = on_two_processes(kind, settings)
    assert "going on from step 3" in output
    again = load_peft_weights(str(folder / "final_model"))
    assert whole.keys() == again.keys()
    for name in whole:
        assert torch.equal(whole[name], again[name]), name
    assert [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row] == losses


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_take_the_rounds_of_one(settings, tmp_path, kind):
    """One of them answers and caches, the other waits for it; the answers are those of one process, bit for bit."""
    settings |= {"batch_size": 4, "gradient_accumulation_steps": 2, "on_policy_rounds": 2}
    settings |= {"on_policy_max_new_tokens": 24}
    settings |= {"max_grad_norm": 1e9} if kind == "fsdp2" else {}
    run("scripts/run_improved_kd.py", *flags(settings | {"output_dir": str(tmp_path / "one")}))
    on_two_processes(kind, settings | {"output_dir": str(tmp_path / "two")})
    files = [sorted((tmp_path / name / "rounds").glob("*/sft/*.jsonl")) for name in ("one", "two")]
    assert len(files[0]) == 4
    for ours, theirs in zip(*files, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    adapters = [load_peft_weights(str(tmp_path / name / "final_model")) for name in ("one", "two")]
    for name in adapters[0]:
        assert torch.equal(adapters[0][name], adapters[1][name]), name
    rows = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    own = [[row["on_policy_kd_loss"] for row in part if "loss" in row] for part in rows]
    assert own[0] == pytest.approx(own[1], rel=1e-6)


def test_a_sharded_run_killed_after_its_last_step_is_only_finished(settings, tmp_path):
    folder = tmp_path / "two"
    settings |= {"output_dir": str(folder)}
    on_two_processes("fsdp2", settings)
    whole, results = load_peft_weights(str(folder / "final_model")), read_json(folder / "kd_results.json")
    for lost in ("final_model", None):
        (folder / "kd_results.json").unlink()
        if lost:
            shutil.rmtree(folder / lost)
        on_two_processes("fsdp2", settings)
        again = load_peft_weights(str(folder / "final_model"))
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        for arm in ("before", "after", "teacher"):
            assert read_json(folder / "kd_results.json")[arm] == pytest.approx(results[arm], rel=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(settings, tmp_path, kind):
    """Losses, tokens, adapter and held-out numbers; fp32 sums in another order may differ in the last digits."""
    run_kd_pipeline(settings | {"output_dir": str(tmp_path / "one")})
    two = settings | {"output_dir": str(tmp_path / "two")}
    output = on_two_processes(kind, two)
    assert "8 rows in 4.0 passes over 2 processes" in output
    adapters = [load_peft_weights(str(tmp_path / name / "final_model")) for name in ("one", "two")]
    assert adapters[0].keys() == adapters[1].keys()
    for name in adapters[0]:
        assert (adapters[0][name] - adapters[1][name]).abs().max() < 5e-6
    rows = [[r for r in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in r] for name in ("one", "two")]
    assert len(rows[0]) == 6
    for ours, theirs in zip(*rows, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for name in ("loss", "kd_loss", "ce_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    results = [read_json(tmp_path / name / "kd_results.json") for name in ("one", "two")]
    for arm in ("before", "after"):
        assert results[0][arm] == pytest.approx(results[1][arm], rel=1e-5)
