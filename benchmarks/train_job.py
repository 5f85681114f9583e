"""A profile's rows and settings for the benchmarks that train, and a run of ours on them."""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import harness
from src.distillation import kd, teacher_cache
from src.distillation.base import encode_row, end_of_turn_id, load_model_config, load_tokenizer
from src.distillation.batching import Cutting, StepOrder, waste
from src.distillation.kd import CPU_TOKENS, SECTION, KDConfig, run_kd_pipeline
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache
from src.utils.common import UserError, read_json, read_jsonl, write_jsonl
from src.utils.config import build_config, read_profile

# What every contender can do, whatever the profile asks of ours: the forward KL at T to all of the teacher's
# distribution, the student's projections in full precision, on the given rows from fresh adapters.
ALIKE = {
    "divergence": "forward_kl", "teacher_temperature": None, "teacher_top_k": 0, "teacher_top_p": 1.0,
    "on_policy_rounds": 0, "init_from": None, "load_in_4bit": False,
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="configs/embedded.yaml", help="the profile")
    parser.add_argument("--model", help="folder of the student (the profile's)")
    parser.add_argument("--teacher", help="folder of the teacher (the profile's)")
    parser.add_argument("--experiment_dir", help="its sft/ holds the clean rows (the profile's)")
    parser.add_argument(
        "--random_weights",
        nargs=2,
        metavar=("STUDENT", "TEACHER"),
        help="folders or hub ids of which configuration and tokenizer alone are read: random weights of their true "
        "shapes, made-up rows; what a step costs does not depend on what is in them",
    )
    parser.add_argument("--steps", type=int, default=5, help="optimisation steps under the clock (5)")


def random_model(name: str, dtype: torch.dtype, device_map: Any = None, load_in_4bit: bool = False) -> PreTrainedModel:
    """What `load_model` would load, with random weights, on the device that is measured; in 4 bits it has none."""
    assert not load_in_4bit
    torch.manual_seed(0)
    config = load_model_config(name)
    # what is made meanwhile has this type; adapters, which are made later, are fp32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # on the device at once: no copy in the processor's memory
        with torch.device(harness.device()):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        torch.set_default_dtype(before)
    # `from_config` knows no name; peft writes the model's into an adapter's configuration
    model.name_or_path = model.config._name_or_path = name
    return model.eval()


def use_random_weights() -> None:
    """From now on, in this process, models are made and not loaded."""
    from benchmarks import train_peers

    # each module has bound the function's name for itself
    for module in (kd, teacher_cache, train_peers):
        module.load_model = random_model


WORDS = ("the", "sum", "of", "three", "numbers", "is", "twelve", "so", "one", "must", "be", "four", "and", "we")


def made_up_rows(count: int, folder: Path) -> None:
    """Clean rows as an experiment of their own: prompts of 100 words, answers of 50 to 800, most of them short."""
    draw = random.Random(0)
    for split, number in (("train", count), ("eval", 1)):
        rows = []
        for index in range(number):
            # the square of a number below 1 is small more often than not: half of the answers have at most 237 words
            words = [draw.choices(WORDS, k=length) for length in (100, 50 + int(750 * draw.random() ** 2))]
            # ("user", "the sum ..."), ("assistant", "is twelve ...")
            said = zip(("user", "assistant"), map(" ".join, words), strict=True)
            rows.append({"id": f"{split}-{index}", "messages": [{"role": r, "content": text} for r, text in said]})
        write_jsonl(folder / "sft" / f"sft_{split}_data_clean.jsonl", rows)


def choose_rows(profile: dict[str, Any], count: int, folder: Path) -> list[Any]:
    """Write `count` training rows, spread over all lengths, as an experiment of their own; one row is held out."""
    # 1. the rows that fit, sorted by their length; ids settle ties
    tokenizer = load_tokenizer(profile["model_name_or_path"])
    end_id = end_of_turn_id(tokenizer)
    source = Path(profile["experiment_dir"]) / "sft"
    rows = {}
    for split in ("train", "eval"):
        path = source / f"sft_{split}_data_clean.jsonl"
        found = [(encode_row(tokenizer, row, end_id), row) for row in read_jsonl(path, ("id", "messages"))]
        found = [pair for pair in found if len(pair[0]) <= profile.get("max_length", 1024)]
        rows[split] = sorted(found, key=lambda pair: (len(pair[0]), pair[0].id))
    if len(rows["train"]) < count:
        raise UserError(f"{source}: {len(rows['train'])} rows, {count} are needed; run the stages before training")
    if not rows["eval"]:
        raise UserError(f"{source}: no held-out row has at most {profile.get('max_length', 1024)} tokens (max_length)")
    # 2. the middle of each of `count` equal parts: of 100 rows and 4 the ones at 12, 37, 62 and 87
    chosen = [rows["train"][(2 * i + 1) * len(rows["train"]) // (2 * count)] for i in range(count)]
    write_jsonl(folder / "sft" / "sft_train_data_clean.jsonl", [row for _, row in chosen])
    write_jsonl(folder / "sft" / "sft_eval_data_clean.jsonl", [rows["eval"][0][1]])
    return [encoded for encoded, _ in chosen]


def make_job(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What every contender is told; `data` holds the rows of all steps, `probe` those of a single one.

    Of the profile's objective T and alpha are kept, see `ALIKE`.
    """
    # this machine's passes, whatever it is
    profile = read_profile(arguments.config, SECTION, KDConfig, hardware="none") | ALIKE
    # 1. the profile, with the folders that the command line names
    if arguments.random_weights:
        arguments.model, arguments.teacher = arguments.random_weights
    given = {
        "model_name_or_path": arguments.model, "teacher_model_name_or_path": arguments.teacher,
        "experiment_dir": arguments.experiment_dir,
    }  # fmt: skip
    for name, value in given.items():
        if value:  # a folder, wherever the workers run, or a hub id
            profile[name] = str(Path(value).resolve()) if Path(value).exists() else value
    # 2. rows: made up, or the profile's
    config = build_config(KDConfig, profile)
    steps = 2 if arguments.quick else arguments.steps
    if arguments.random_weights:
        made_up_rows(2 * steps * config.rows_per_step, folder / "made_up")
        profile |= {"experiment_dir": str(folder / "made_up"), "student_devices": [], "teacher_devices": []}  # one GPU
    rows = choose_rows(profile, steps * config.rows_per_step, folder / "data")
    choose_rows(profile, config.rows_per_step, folder / "probe")
    # 3. the job, which is written as JSON: no objects, but what every worker needs to make them
    return {
        "profile": profile | {"overwrite": True}, "steps": steps, "epochs": 2, "max_grad_norm": config.max_grad_norm,
        "rows": len(rows), "tokens": sum(map(len, rows)), "answers": sum(len(row.response_ids) for row in rows),
        "shared": shared(config, rows, config.tokens_per_batch),
        "lora_r": config.lora_r, "data": str(folder / "data"), "probe": str(folder / "probe"),
        "random_weights": bool(arguments.random_weights),
    }  # fmt: skip


def shared(config: KDConfig, rows: list[Any], tokens: int | None) -> float:
    """The share of the rows' tokens that our packs run with another row's, in passes of so many tokens (None: as on a
    CPU)."""
    cutting = Cutting(CPU_TOKENS if tokens is None else tokens, config.gradient_accumulation_steps, 1, config.packing)
    # [2]: the share that shared beginnings spare
    return waste(rows, StepOrder(len(rows), config.rows_per_step, config.data_seed), cutting)[2]


def make_caches(job: dict[str, Any]) -> dict[str, Any]:
    """The teacher's hidden states of both folders, as `scripts/cache_teacher.py` keeps them."""
    for folder in (job["data"], job["probe"]):
        make_cache(cache_config(job, folder))
    return {"seconds": 0.0}


def cache_config(job: dict[str, Any], folder: str, **settings: Any) -> CacheTeacherConfig:
    names = ("teacher_model_name_or_path", "max_length", "bf16")
    # what is not named has the defaults of `CacheTeacherConfig`
    settings |= {name: job["profile"][name] for name in names if name in job["profile"]}
    return CacheTeacherConfig(experiment_dir=folder, validation_fraction=0.0, **settings)


def encoded(job: dict[str, Any], folder: Path) -> tuple[Any, list[Any], list[dict[str, Any]]]:
    rows = read_jsonl(folder / "sft" / "sft_train_data_clean.jsonl")
    tokenizer = load_tokenizer(job["profile"]["model_name_or_path"])
    return tokenizer, [encode_row(tokenizer, row, end_of_turn_id(tokenizer)) for row in rows], rows


def train_ours(job: dict[str, Any], folder: Path, signal: str, alpha: float, **settings: Any) -> list[float]:
    """A run of ours over the folder's rows, `job["epochs"]` times; the loss of every step."""
    # a folder of its own: a second run of equal settings would find the first one finished
    run = folder / f"run_{time.time_ns()}"
    run_kd_pipeline(
        job["profile"]
        | {"experiment_dir": str(folder), "output_dir": str(run), "teacher_signal": signal, "alpha": alpha}
        # no validation and no checkpoints within the steps that are timed
        | {"validation_fraction": 0, "eval_steps": 0, "save_steps": 0, "max_steps": -1}
        | {"epochs": job["epochs"], "max_grad_norm": job["max_grad_norm"]}
        | settings
    )
    # rows of the log without a loss are validations
    return [row["loss"] for row in read_jsonl(run / "metrics.jsonl") if "loss" in row]


def tokens_of_a_pass(folder: Path) -> int:
    """Most tokens in a pass of the newest run of ours in this folder, which a GPU's run has measured."""
    # run_<nanoseconds>, all of 19 digits
    return read_json(max(folder.glob("run_*")) / "kd_config.json")["took_effect"]["tokens_per_batch"]
