"""The engine against examples/plain_kd.py: full logits and autograd, written to be read."""

import importlib.util
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights
from transformers import set_seed

from src.distillation.batching import StepOrder
from src.distillation.kd import run_kd_pipeline
from src.utils.common import ROOT, read_jsonl, write_jsonl


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("plain_kd", ROOT / "examples" / "plain_kd.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_engine_learns_what_the_example_learns(
    example, tmp_path, tiny_teacher, hybrid_student, clean_rows, write_sft
):
    """Three steps of AdamW from one seed: the same losses and adapter, the student's prompt a think block longer."""
    experiment = write_sft(tmp_path / "experiment" / "tiny", clean_rows(24), clean_rows(4, start=100))
    objective = {"temperature": 2.5, "alpha": 0.8, "learning_rate": 1e-2, "lora_r": 4, "lora_alpha": 8}
    engine = run_kd_pipeline(
        objective
        | {"model_name_or_path": hybrid_student, "teacher_model_name_or_path": tiny_teacher}
        | {"experiment_dir": str(experiment), "batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 3}
        | {"warmup_steps": 0, "lr_scheduler_type": "constant", "weight_decay": 0.01, "max_grad_norm": 0.0}
        | {"validation_fraction": 0.0, "teacher_signal": "online", "bf16": False, "compile_loss": False}
    )
    # the engine's order of rows: the example takes them as they stand
    rows = clean_rows(24)
    order = StepOrder(24, 8, 42)
    ordered = [rows[index] for step in range(3) for index in order.rows_of(step)]
    write_jsonl(tmp_path / "ordered.jsonl", ordered)
    set_seed(42)
    student, losses = example.train(
        hybrid_student, tiny_teacher, tmp_path / "ordered.jsonl", steps=3, rows_per_step=8, **objective
    )
    metrics = [row for row in read_jsonl(Path(engine["run_dir"]) / "metrics.jsonl") if "loss" in row]
    assert [row["loss"] for row in metrics] == pytest.approx(losses, rel=1e-5)
    made = load_peft_weights(engine["final_model"])
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(made[name.replace(".default", "")], parameter.data, atol=2e-5, rtol=0)
