"""Memory as planned against memory as measured, each stage really run, on models wide enough to be what counts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

from src.distillation.base import LORA_TARGETS, config_folder
from src.distillation.kd_config import KDConfig
from src.distillation.teacher_cache import CacheTeacherConfig
from src.planning.answering import Answering, Merging, plan_answering, plan_merging
from src.planning.caching import Caching, plan_caching
from src.planning.hardware import Device, Hardware
from src.planning.rows import Rows
from src.planning.shapes import read_shapes
from src.planning.training import Training, adapters_of, plan_training
from src.utils.config import build_config

pytestmark = pytest.mark.slow
MEASURE = Path(__file__).with_name("measure.py")
SMOLLM2 = "outputs/models/smollm2-135m-instruct"
ROWS, RANK = 8, 16
SIZES = {
    "vocab_size": 288, "hidden_size": 512, "layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "intermediate_size": 1536, "initializer_range": 0.02,
}  # fmt: skip
EXPERTS = {name: value for name, value in SIZES.items() if name != "layers"} | {
    "num_hidden_layers": 4, "moe_intermediate_size": 256, "num_experts": 16, "num_experts_per_tok": 4,
    "max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 258,
    "pad_token_id": None,
}  # fmt: skip


def measure(*stages):
    """What each stage took, one after the other in a process of their own."""
    # freed memory goes back to the system at once: what is measured is what was alive
    own = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, str(MEASURE), json.dumps(stages)], capture_output=True, text=True, env=os.environ | own
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.strip().splitlines()[-1])


def taken(found):
    """Bytes that a stage took beyond what the process had before it."""
    return found["peak"] - found["before"]


def predicted(memory):
    """The same of a plan for a processor whose process takes nothing."""
    return memory.peak * 1e9


NOTHING_ELSE = Hardware(0, Device("processor", 64, 0.05, 20, 0.0, torch.float32))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_model, make_tokenizer, save_model, write_sft):
    """A wide Qwen3-MoE teacher, a Qwen3 student, and rows that are all alike in length: 110 tokens and 101."""
    root = tmp_path_factory.mktemp("planned")
    torch.manual_seed(1)
    save_model(root / "teacher", Qwen3MoeForCausalLM(Qwen3MoeConfig(**EXPERTS)).eval(), make_tokenizer())
    save_model(root / "student", make_model(**SIZES), make_tokenizer())
    rows = []
    for n in range(48):
        messages = [
            {"role": "user", "content": f"{n:03d} " * 22},
            {"role": "assistant", "content": f"{n:03d}." * 25},
        ]
        rows.append({"id": f"row-{n}", "sample_index": 0, "messages": messages})
    write_sft(root / "experiment", rows[:40], rows[40:])
    return root


PLANNED_ROWS = Rows(40, 8, 110, 101, "")


def training(folders, checkpointing):
    return {
        "model_name_or_path": str(folders / "student"), "teacher_model_name_or_path": str(folders / "teacher"),
        "experiment_dir": str(folders / "experiment"), "output_dir": str(folders / f"run_{checkpointing}"),
        "teacher_signal": "online", "gradient_checkpointing": checkpointing, "batch_size": ROWS,
        "gradient_accumulation_steps": 1, "max_steps": 2, "warmup_steps": 0, "lora_r": RANK, "tokens_per_batch": 4096,
        "max_length": 512, "bf16": False, "compile_loss": False, "eval_steps": 0,
    }  # fmt: skip


CACHING = {"tokens_per_batch": 8192, "max_length": 512, "bf16": False}
ANSWERING = {"words": 25, "rows": 48, "new_tokens": 32}


@pytest.fixture(scope="module")
def found(folders):
    """Stage -> bytes that it took."""
    stages = {}
    for name in ("teacher", "student"):
        where = {"teacher_model_name_or_path": str(folders / name), "experiment_dir": str(folders / "experiment")}
        stages[f"cache {name}"] = ("cache", CACHING | where | {"overwrite": True})
        stages[f"answer {name}"] = ("answer", ANSWERING | {"model": str(folders / name)})
    stages["train"] = ("train", training(folders, False))
    stages["train, checkpointing"] = ("train", training(folders, True))
    adapter = str(folders / "run_False" / "final_model")
    stages["merge"] = ("merge", {"model": str(folders / "student"), "adapter": adapter, "to": str(folders / "merged")})
    return dict(zip(stages, map(taken, measure(*stages.values())), strict=True))


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_a_pass_for_the_cache(folders, found, name):
    work = Caching(read_shapes(str(folders / name)), CacheTeacherConfig(**CACHING), ())
    [use] = plan_caching(work, PLANNED_ROWS, NOTHING_ELSE).uses
    assert predicted(use.memory) == pytest.approx(found[f"cache {name}"], rel=0.15)


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_answers(folders, found, name):
    work = Answering("", read_shapes(str(folders / name)), ANSWERING["rows"], ANSWERING["new_tokens"], (), 36, rows=256)
    rows = Rows(ANSWERING["rows"], 0, 4 * ANSWERING["words"] + 22, 32, "")
    [(_, memory)] = plan_answering(work, rows, NOTHING_ELSE).named
    assert predicted(memory) == pytest.approx(found[f"answer {name}"], rel=0.15)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_the_teacher_resident(folders, found, checkpointing):
    config = build_config(KDConfig, training(folders, checkpointing))
    shapes = [read_shapes(str(folders / name)) for name in ("student", "teacher")]
    [use] = plan_training(Training("kd", *shapes, config, (), ()), PLANNED_ROWS, NOTHING_ELSE).uses
    assert predicted(use.memory) == pytest.approx(found["train, checkpointing" if checkpointing else "train"], rel=0.15)


def test_merging(folders, found):
    student = str(folders / "student")
    work = Merging(read_shapes(student), adapters_of(student, RANK, tuple(LORA_TARGETS))[0], RANK)
    [use] = plan_merging(work, NOTHING_ELSE).uses
    assert predicted(use.memory) == pytest.approx(found["merge"], rel=0.15)


@pytest.fixture(scope="module")
def steps_of_the_embedded_teacher():
    """With and without checkpointing, at SmolLM2-135M's shapes with random weights."""
    settings = {"config": config_folder(SMOLLM2), "rank": RANK, "length": 64, "rows": 4, "teacher_width": 576}
    stages = [("step", settings | {"checkpointing": checkpointing}) for checkpointing in (False, True)]
    return dict(zip((False, True), map(taken, measure(*stages)), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_steps_of_the_embedded_teacher(steps_of_the_embedded_teacher, checkpointing):
    config = KDConfig(
        model_name_or_path=SMOLLM2, lora_r=RANK, gradient_checkpointing=checkpointing, per_device_train_batch_size=4,
        gradient_accumulation_steps=1, max_length=256, tokens_per_batch=256, bf16=False, compile_loss=False,
    )  # fmt: skip
    # a pass is never planned shorter than the longest row may be; here four rows of 64 make up one
    shapes = dataclasses.replace(read_shapes(SMOLLM2), stored=torch.float32)
    work = Training("kd", shapes, shapes, config, (), ())
    [use] = plan_training(work, Rows(100, 10, 32, 32, ""), NOTHING_ELSE).uses
    assert predicted(use.memory) == pytest.approx(steps_of_the_embedded_teacher[checkpointing], rel=0.15)
