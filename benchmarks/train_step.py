"""Whole optimisation steps of a profile, ours against TRL's GKDTrainer and a plain torch loop, on the same rows.

    python benchmarks/train_step.py --output benchmarks/results/train_step.json
    python benchmarks/train_step.py --output FILE.json --model STUDENT --teacher TEACHER --experiment_dir FOLDER
    python benchmarks/train_step.py --output FILE.json --config configs/qwen3_30b_to_8b.yaml \
        --random_weights Qwen/Qwen3-8B Qwen/Qwen3-30B-A3B-Instruct-2507    # on one GPU; only configurations are read

Every contender takes the same rows twice, the profile's number to a step: the first time to warm up, the second under
the clock. Its gradient on one step's rows is held against full logits in fp32 from the same adapters. Of the profile's
objective T and alpha are kept; all take the forward KL to the whole distribution of the teacher at T.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.step_parts import parts_of_a_step, step_floor
from benchmarks.train_job import (
    add_flags,
    encoded,
    make_caches,
    make_job,
    shared,
    tokens_of_a_pass,
    train_ours,
    use_random_weights,
)
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
GKD_NOTE = "alpha = 1 and T = 1: it has no cross-entropy, its loss no temperature; padded batches in random order"
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
        name, build_config(KDConfig, job["profile"]).alpha
    )


def temperature_of(name: str, job: dict[str, Any]) -> float:
    return 1.0 if name.startswith("trl_gkd") else build_config(KDConfig, job["profile"]).temperature


def floor_of(name: str, job: dict[str, Any]) -> str:
    """Which of `step_floor`'s ways to train a contender of ours takes."""
    return OURS[name] if alpha_of(name, job) else "sft"


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
        found_loss = summed_loss(model, teacher, [pair], tokenizer, temperature_of(name, job), alpha_of(name, job))
        (found_loss / tokens).backward()
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
    ends: list[float] = [harness.now()]
    peaks: list[float] = []

    def end_of_step(*_: Any) -> None:
        ends.append(harness.now())
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
    result = {"seconds": seconds, "tokens_per_second": job["tokens"] / job["steps"] / seconds, "peak_mb": peaks[-1],
              "loss": sum(losses[-job["steps"] :]) / job["steps"], "alpha": alpha_of(name, job),
              "temperature": temperature_of(name, job), "seconds_to_first_update": ends[1] - ends[0],
              "note": NOTES.get(name), "parts": parts}  # fmt: skip
    return result | ({"tokens_per_batch": tokens_of_a_pass(Path(job["data"]))} if name in OURS else {})


def as_run(job: dict[str, Any], results: list[harness.Result]) -> dict[str, Any]:
    """The job with the tokens that the first of ours has really run together: on a GPU its passes are measured."""
    ran = [result["tokens_per_batch"] for result in results if "tokens_per_batch" in result]
    if not ran:
        return job
    _, rows, _ = encoded(job, Path(job["data"]))
    return job | {"shared": shared(build_config(KDConfig, job["profile"]), rows, ran[0])}


def look_apart(
    results: list[harness.Result], pythons: dict[str, str], job: dict[str, Any], floor: harness.Result
) -> list[harness.Result]:
    """Put into the results what is found apart from the clock, and how near each of ours is to its floor; returns what
    could not be found."""
    absent = [floor] if "absent" in floor else []
    for result in results:
        if "absent" in result:
            continue
        name, wanted = result["name"], {}
        if not job["random_weights"]:  # whose fp32 copies would fit nowhere
            wanted["gradient"] = "grad_rel_error"
        if name in OURS:
            wanted["parts"] = "parts"
        for what, key in wanted.items():
            found = harness.run_worker(pythons[name], f"{name}:{what}", job)
            result[key] = found.get(key)
            if "absent" in found:
                absent.append(found)
        if name in OURS and "absent" not in floor:
            result["share_of_matmul_rate"] = floor["floor"][floor_of(name, job)]["seconds"] / result["seconds"]
    for each in absent:
        print(f"{each['name']}: absent: {each['absent']}", file=sys.stderr)
    return absent


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
        # 2. all contenders in turn, then the products alone, of what ours have run
        results = harness.round_robin(pythons, lambda _: job, arguments.repeats)
        job = as_run(job, results)
        floor = harness.run_worker(sys.executable, "floor", job)
        # 3. apart from the clock: the gradient's error, and what our steps are made of
        absent = look_apart(results, pythons, job, floor)
    # 4. the record, and two tables
    bottom = floor.get("floor")
    floors = {name: bottom[floor_of(name, job)]["seconds"] for name in OURS} if bottom else {}
    report = {
        "results": results, "absent": absent, "floor_seconds": bottom and bottom["hidden"]["seconds"], "floor": bottom,
        "ratios": harness.ratios(results, tuple(OURS), floors),
        "shapes": {key: value for key, value in job.items() if key not in ("data", "probe")},
    }  # fmt: skip
    harness.print_table(
        results,
        {"seconds": ".2f", "tokens_per_second": ".0f", "peak_mb": ".0f", "loss": ".4f", "grad_rel_error": ".2e",
         "share_of_matmul_rate": ".0%", "seconds_to_first_update": ".1f"},
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
