"""Whole optimisation steps of a profile, ours against TRL's GKDTrainer and a plain torch loop, on the same rows.

    python benchmarks/train_step.py --output benchmarks/results/train_step.json
    python benchmarks/train_step.py --output FILE.json --model STUDENT --teacher TEACHER --experiment_dir FOLDER
    python benchmarks/train_step.py --output FILE.json --config configs/qwen3_30b_to_8b.yaml \
        --random_weights Qwen/Qwen3-8B Qwen/Qwen3-30B-A3B-Instruct-2507    # on one GPU; only configurations are read

Every contender takes the same rows twice, the profile's number to a step: the first time to warm up, the second under
the clock. Its gradient on one step's rows is held against full logits in fp32 from the same adapters.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.step_parts import parts_of_a_step, step_floor
from benchmarks.train_job import add_flags, encoded, make_caches, make_job, train_ours, use_random_weights
from benchmarks.train_peers import models, plain_torch, summed_loss, trl_gkd, trl_sft
from src.distillation.kd import KDConfig
from src.distillation.lora import add_lora
from src.utils.common import UserError
from src.utils.config import build_config

OURS = {"ours_hidden": "hidden", "ours_online": "online", "ours_sft": "hidden", "ours_hidden_compiled": "hidden",
        "ours_checkpointed": "hidden", "ours_as_batch_size": "hidden"}  # fmt: skip
# what a contender sets beyond the profile
SETTINGS = {
    "ours_hidden_compiled": {"compile_loss": True, "compile_layers": True},
    "ours_checkpointed": {"gradient_checkpointing": True},
    "ours_as_batch_size": {"tokens_per_batch": 0},
}
ON_GPU = ("ours_checkpointed", "ours_as_batch_size", "trl_sft_liger")  # beside the others there, and not on a CPU
GKD_NOTE = "alpha = 1: it has no cross-entropy; padded batches in random order"
NOTES = {
    "ours_hidden_compiled": "the loss and the layers compiled, which the warm-up pays for",
    "ours_checkpointed": "activations are computed again in the backward pass",
    "ours_as_batch_size": "passes of the profile's batch_size rows, not as many tokens as memory holds",
    "trl_sft_liger": "alpha = 0: TRL's SFTTrainer with Liger's kernels and its fused cross-entropy",
    "ours_sft": "alpha = 0, the same rows and code: what a step costs without a teacher",
    "trl_gkd": GKD_NOTE + "; without gradient checkpointing, which costs it a forward pass",
    "trl_gkd_default": GKD_NOTE + "; gradient checkpointing, TRL's default",
    "plain_torch": "full logits, padded batches in random order",
}


def alpha_of(name: str, job: dict[str, Any]) -> float:
    return {"ours_sft": 0.0, "trl_sft_liger": 0.0, "trl_gkd": 1.0, "trl_gkd_default": 1.0}.get(
        name, job["profile"]["alpha"]
    )


def ours(name: str, job: dict[str, Any], folder: Path) -> list[float]:
    return train_ours(job, folder, OURS[name], alpha_of(name, job), **SETTINGS.get(name, {}))


# name -> a function of (name, job, folder) that trains on the folder's rows and returns the loss of every step
CONTENDERS: dict[str, Callable[[str, dict[str, Any], Path], list[float]]] = {
    **dict.fromkeys(OURS, ours), "plain_torch": plain_torch, "trl_gkd": trl_gkd, "trl_gkd_default": trl_gkd,
    "trl_sft_liger": trl_sft,
}  # fmt: skip


def gradient_error(name: str, job: dict[str, Any], folder: Path) -> float:
    """The adapters' gradient on one step's rows against fp32 with full logits, from the contender's own adapters."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    # before the update: values that the gradient belongs to, and the gradient; copies, for neither stays
    def catch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found.extend((p.detach().float().clone(), p.grad.float().clone()) for g in optimizer.param_groups
                     for p in g["params"])  # fmt: skip

    hook = register_optimizer_step_pre_hook(catch)
    # one step of the probe's rows; a norm that nothing reaches, so that nothing is clipped
    CONTENDERS[name](name, job | {"epochs": 1, "max_grad_norm": 1e9}, folder)
    hook.remove()
    # the same rows in fp32: models, and the contender's own adapters in them
    config = build_config(KDConfig, job["profile"])
    tokenizer, pairs, _ = encoded(job, folder)
    student, teacher = (model.float() for model in models(config))
    model = add_lora(student, config.lora_r, config.lora_alpha, 0.0, config.lora_target_modules, fused=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for own, (value, _) in zip(parameters, found, strict=True):
        own.data.copy_(value)
    tokens = sum(len(pair.response_ids) for pair in pairs)
    # a row at a time: nothing is padded, and the gradients add up
    for pair in pairs:
        (summed_loss(model, teacher, [pair], tokenizer, config.temperature, alpha_of(name, job)) / tokens
         ).backward()  # fmt: skip
    # all parameters as one vector, found and wanted
    flat = [torch.cat([g.flatten() for g in grads]) for grads in ([g for _, g in found], [p.grad for p in parameters])]
    return harness.relative_error(*flat)


def measure(name: str, job: dict[str, Any]) -> dict[str, Any]:
    # "ours_hidden:parts" -> "ours_hidden", "parts"
    name, _, what = name.partition(":")
    if job.get("random_weights"):
        use_random_weights()
    if name == "floor":
        return step_floor(job)
    if name == "caches":
        return make_caches(job)
    if what == "gradient":
        return {"seconds": 0.0, "grad_rel_error": gradient_error(name, job, Path(job["probe"]))}
    # the start, and the end of every step
    ends: list[float] = [time.perf_counter()]
    peaks: list[float] = []

    def end_of_step(*_: Any) -> None:
        # what the step has queued is part of it
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        peaks.append(harness.peak_mb())

    hook = register_optimizer_step_post_hook(end_of_step)
    # the first epoch, job["steps"] steps, warms up
    with parts_of_a_step(job["steps"]) if what == "parts" else contextlib.nullcontext() as parts:
        losses = CONTENDERS[name](name, job, Path(job["data"]))
    hook.remove()
    if len(ends) != 2 * job["steps"] + 1:
        raise UserError(f"{name} took {len(ends) - 1} steps, not {2 * job['steps']}")
    # the second epoch alone
    seconds = (ends[-1] - ends[job["steps"]]) / job["steps"]
    # the first epoch and what came before it, less an epoch of warm steps
    warm_up = ends[job["steps"]] - ends[0] - seconds * job["steps"]
    return {"seconds": seconds, "tokens_per_second": job["tokens"] / job["steps"] / seconds, "peak_mb": peaks[-1],
            "loss": sum(losses[-job["steps"] :]) / job["steps"], "alpha": alpha_of(name, job),
            "loading_and_warm_up_seconds": warm_up, "note": NOTES.get(name), "parts": parts}  # fmt: skip


def parent(arguments: argparse.Namespace) -> None:
    names = arguments.only or [name for name in CONTENDERS if harness.device() == "cuda" or name not in ON_GPU]
    before = harness.machine()
    rivals = harness.rivals_python() if any(name.startswith("trl") for name in names) else ""
    # TRL's contenders run in the peers' environment
    pythons = {name: rivals if name.startswith("trl") else sys.executable for name in names}
    with tempfile.TemporaryDirectory() as folder:
        # 1. rows, and the cache of the teacher's states, which all share
        job = make_job(arguments, Path(folder))
        made = harness.run_worker(sys.executable, "caches", job)
        if "absent" in made:
            raise UserError(f"the teacher cache failed: {made['absent']}")
        # 2. the products alone, then all contenders in turn
        bottom = harness.run_worker(sys.executable, "floor", job)["floor"]
        results = harness.round_robin(pythons, lambda _: job, arguments.repeats)
        # 3. apart from the clock: the gradient's error, and what our steps are made of
        for result in results:
            if "absent" in result:
                continue
            name = result["name"]
            if not job["random_weights"]:  # whose fp32 copies would fit nowhere
                found = harness.run_worker(pythons[name], f"{name}:gradient", job)
                result["grad_rel_error"] = found.get("grad_rel_error")
            if name in OURS:
                result["parts"] = harness.run_worker(sys.executable, f"{name}:parts", job).get("parts")
                kind = name.split("_")[1]
                result["share_of_matmul_rate"] = bottom[kind]["seconds"] / result["seconds"]
    # 4. the record, and two tables
    report = {
        "results": results, "floor_seconds": bottom["hidden"]["seconds"], "floor": bottom,
        "ratios": harness.ratios(results, tuple(OURS), dict.fromkeys(OURS, bottom["hidden"]["seconds"])),
        "shapes": {key: value for key, value in job.items() if key not in ("data", "probe")},
    }  # fmt: skip
    harness.print_table(
        results,
        {"seconds": ".2f", "tokens_per_second": ".0f", "peak_mb": ".0f", "loss": ".4f", "grad_rel_error": ".2e",
         "share_of_matmul_rate": ".0%", "loading_and_warm_up_seconds": ".1f"},
    )  # fmt: skip
    harness.print_table(
        [{"name": r["name"], **r["parts"]} for r in results if r.get("parts")],
        {part: ".3f" for part in ("teacher", "student_forward", "loss", "backward", "optimizer", "rest")},
    )
    harness.write_report(arguments.output, report, before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=tuple(CONTENDERS), help="these contenders alone")
    harness.main(parser, parent, measure)
