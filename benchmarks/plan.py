"""What a profile's stages take on this machine beside what `src.planning` says of exactly that work.

    python benchmarks/plan.py --output FILE.json --config configs/qwen3_30b_to_8b.yaml --hardware 1x80 \
        --random_weights Qwen/Qwen3-8B Qwen/Qwen3-30B-A3B-Instruct-2507    # on one GPU; only configurations are read
    python benchmarks/plan.py --output FILE.json --hardware none    # the embedded profile on the processor

Caching, training of some steps and export, each in a fresh process, with the settings of profile and overlay. The plan
is made for the GPU that is found, not for the overlay's `gpus`: how fast a card is belongs to the card.

Memory: the allocator's peak, or on a processor the peak of resident memory above the process as it began; the plan's
peak without the process. Time: from the start of the process. Of the export the merge alone is judged, which is what
the plan knows of: the check after it loads two models more. Random weights are made on the device, which no plan
knows of: the making is taken off what was measured, and the reading of weights off what was planned.
"""

import argparse
import dataclasses
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.train_job import choose_rows, made_up_rows, random_model
from src.distillation import export, kd, teacher_cache
from src.distillation.base import place
from src.distillation.kd import SECTION, KDConfig
from src.distillation.teacher_cache import CacheTeacherConfig
from src.planning.answering import Merging, plan_merging
from src.planning.caching import plan_caching
from src.planning.hardware import Hardware, detect, this_machine
from src.planning.result import StagePlan
from src.planning.rows import Rows
from src.planning.setup import caching, open_setup, trainings
from src.planning.timing import starting
from src.planning.training import adapters_of, plan_training
from src.utils.common import UserError, read_jsonl
from src.utils.config import build_config, read_merged, read_profile

STAGES = ("cache", "train", "export")  # each needs what the one before has written
CLOSE = 0.15  # of what was measured: how near the plan's memory is to be
MODELS = ("model_name_or_path", "teacher_model_name_or_path")
HERE = {"teacher_devices": [], "student_devices": []}  # the first GPU


@dataclasses.dataclass
class Opening:
    """What it took to open models: seconds of making random ones."""

    made_seconds: float = 0.0


@contextmanager
def models_opened(random_names: list[str]) -> Iterator[Opening]:
    """Within it these models are made at random and not loaded; all others, such as a written folder, are loaded."""
    # any of the three modules' own is the same function
    spent, load = Opening(), kd.load_model

    def open_model(name: str, *arguments: Any, **settings: Any) -> Any:
        if name not in random_names:
            return load(name, *arguments, **settings)
        started = time.perf_counter()
        model = random_model(name, *arguments, **settings)
        # what was queued for the making is part of it
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent.made_seconds += time.perf_counter() - started
        return model

    with ExitStack() as stack:
        for module in (kd, teacher_cache, export):
            stack.enter_context(mock.patch.object(module, "load_model", open_model))
        yield spent


def run_cache(job: dict[str, Any], spent: Opening) -> harness.Result:
    index = teacher_cache.make_cache(CacheTeacherConfig(**job["settings"]["cache"]))
    # of each row, on average; the held-out row is taken for one of that length
    rows = job["rows"]
    tokens = (rows["train"] + rows["evaluation"]) * (rows["prompt_tokens"] + rows["answer_tokens"])
    return {"work_seconds": tokens / index["tokens_per_second"]}


def run_train(job: dict[str, Any], spent: Opening) -> harness.Result:
    """The first step compiles and warms up, so that the others are what a step takes."""
    ends: list[float] = []

    def end_of_step(*_: Any) -> None:
        ends.append(harness.now())

    # called once a step, whatever the optimiser is
    hook = register_optimizer_step_post_hook(end_of_step)
    kd.run_kd_pipeline(job["settings"]["train"])
    hook.remove()
    if len(ends) != job["steps"]:
        raise UserError(f"training took {len(ends)} steps, not {job['steps']}")
    # from the end of each step to the end of the next: one less than there are steps
    return {"step_seconds": [b - a for a, b in itertools.pairwise(ends)]}


def run_export(job: dict[str, Any], spent: Opening) -> harness.Result:
    """Merged, written, loaded again and checked, into a folder that is left to be deleted."""
    wanted = job["settings"]["export"]
    base, dtype = wanted["model_name_or_path"], getattr(torch, wanted["dtype"])
    folder = Path(wanted["folder"])
    # one file of weights: the merged model
    export.require_room(base, dtype, folder, files=1)
    student = export.Student(base, wanted["adapter"], dtype, place(base, [], dtype, wanted["gpu_memory_gb"]))
    started = time.perf_counter()
    export.write_merged(student, folder, None)
    # making the random base is no part of merging
    merged = time.perf_counter() - started - spent.made_seconds
    # before the check, which loads two models more
    peak = harness.peak_mb()
    heldout = Path(job["settings"]["train"]["experiment_dir"]) / "sft" / "sft_eval_data_clean.jsonl"
    check = export.check_export(student, folder, read_jsonl(heldout))
    return {"merge_and_write_seconds": merged, "merge_peak_mb": peak, "check": dataclasses.asdict(check)}


RUN: dict[str, Callable[[dict[str, Any], Opening], harness.Result]] = {
    "cache": run_cache, "train": run_train, "export": run_export,
}  # fmt: skip


def measure(stage: str, job: dict[str, Any]) -> harness.Result:
    """One stage in this process, and what it took."""
    before = harness.resident_mb()
    harness.forget_peak()
    with models_opened(job["random_names"]) as spent:
        found = RUN[stage](job, spent)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    gb = 2**20 / 1e9  # of a MiB
    if "merge_peak_mb" in found:
        # MiB -> GB, as the plan counts
        found["merge_gb"] = (found.pop("merge_peak_mb") - before) * gb
    reserved = torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else None
    return found | {
        "measured_gb": (harness.peak_mb() - before) * gb,
        "reserved_gb": reserved,
        # psutil knows when the process began: imports are in it
        "seconds": time.time() - psutil.Process().create_time() - spent.made_seconds,
        "made_seconds": spent.made_seconds,
    }


def hardware_here() -> Hardware:
    """One GPU of this machine, or its processor."""
    return dataclasses.replace(detect(), count=1) if torch.cuda.is_available() else this_machine()


def plans(profile: dict[str, Any], rows: Rows, random: bool) -> dict[str, harness.Result]:
    """What is planned for each stage of a merged profile with these rows.

    Raises:
        UserError: the profile's teacher is asked online, or its models are not whole on one device.
    """
    # the machine as it is, and the profile's stages for these rows
    hardware = hardware_here()
    setup = open_setup(profile, hardware, rows)
    # the control comes first, then the run towards the teacher
    cached, (_, trained) = caching(setup), trainings(setup)
    if cached is None:
        raise UserError("the profile asks its teacher online; what is measured here is training from a cache")
    if random and (trained.four_bit or cached.offloaded):
        raise UserError("random weights are not packed or offloaded: name an overlay without load_in_4bit, cpu_offload")
    config = trained.config
    # numbers of weights; what a stage reads from disk follows from its type
    adapters, _ = adapters_of(setup.student.name, config.lora_r, tuple(config.lora_target_modules))
    size = hardware.device.dtype.itemsize
    weights = setup.student.weights
    found = {  # the plan, and bytes of weights that it reads from disk
        "cache": (plan_caching(cached, rows, hardware), setup.teacher.weights * size),
        "train": (plan_training(trained, rows, hardware), weights * config.dtype.itemsize),
        "export": (plan_merging(Merging(setup.student, adapters, config.lora_r), hardware), 2 * weights),
    }
    return {stage: planned(plan, read, random) for stage, (plan, read) in found.items()}


def planned(plan: StagePlan, read_bytes: float, random: bool) -> harness.Result:
    """A stage's plan as it stands in the record; `random` weights are not read from disk."""
    memory = plan.uses[0].memory
    # hours as (at best, at worst) -> seconds
    low, high = (3600 * hours for hours in plan.hours)
    start = starting(read_bytes)
    # what is planned without the start, which is then added as it is here
    work = [low - start[0], high - start[1]]
    begun = starting(0) if random else start
    return {
        "how": plan.how, "parts_gb": dataclasses.asdict(memory), "planned_gb": memory.peak - memory.overhead,
        "seconds": [work[0] + begun[0], work[1] + begun[1]], "work_seconds": work, "tokens": plan.tokens,
        "flops": plan.flops,
    }  # fmt: skip


def compared(stage: str, plan: harness.Result, found: harness.Result, steps: int) -> harness.Result:
    """A stage's plan beside what was measured; `judged` is what is compared, `ratio` planned over measured."""
    result = {"name": stage, "planned": plan} | found
    if "absent" in found:
        return result
    gb, seconds, (low, high) = found["measured_gb"], found["seconds"], plan["seconds"]
    # the plan knows of the merge alone: neither of the check after it, nor is the process's start in what it took
    if stage == "export":
        gb, seconds, begun = found["merge_gb"], found["merge_and_write_seconds"], starting(0)
        low, high = low - begun[0], high - begun[1]
    # above 1: more was planned than was taken
    ratio = plan["planned_gb"] / gb
    if found.get("step_seconds"):  # all steps at what the later ones take; measuring is in the plan's work, not here
        result["work_seconds"] = steps * sum(found["step_seconds"]) / len(found["step_seconds"])
    judged = {"gb": gb, "seconds": seconds, "planned_seconds": [low, high]}
    return result | {
        "judged": judged, "ratio": ratio, "close": abs(ratio - 1) <= CLOSE, "in_range": low <= seconds <= high
    }  # fmt: skip


def make_job(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rows, and every stage's settings as profile and overlay say, on one device, in a folder of their own."""
    # 1. every stage's settings, by profile and overlay
    profile = read_merged(arguments.config, arguments.hardware)
    settings = {
        "cache": read_profile(arguments.config, "cache_teacher", CacheTeacherConfig, arguments.hardware),
        "train": read_profile(arguments.config, SECTION, KDConfig, arguments.hardware),
    }
    names = arguments.random_weights or [profile.get(key) for key in MODELS]
    if not all(names):
        raise UserError(f"{' and '.join(MODELS)} are not set; name a profile that does, or pass --random_weights")
    # a folder by its full path: the worker runs elsewhere; a hub id as it is
    models = {key: str(Path(n).resolve()) if Path(n).exists() else n for key, n in zip(MODELS, names, strict=True)}
    steps = 2 if arguments.quick else arguments.steps
    own = {"experiment_dir": str(folder / "data"), "overwrite": True}
    # 2. on one device, in a folder of their own; a later section wins over an earlier
    settings["cache"] |= own | {MODELS[1]: models[MODELS[1]], "teacher_devices": []}
    settings["train"] |= own | models | HERE | {"output_dir": str(folder / "run"), "max_steps": steps}
    config = build_config(KDConfig, settings["train"])
    count = arguments.rows or 4 * steps * config.rows_per_step  # several passes for the teacher, rows to set aside
    # 3. rows: made up, or those of the profile's experiment
    source = settings["train"] | {"experiment_dir": profile.get("experiment_dir")}
    if arguments.random_weights:
        # twice as many: those that are longer than max_length are passed over
        made_up_rows(2 * count, folder / "made_up")
        source["experiment_dir"] = str(folder / "made_up")
    encoded = choose_rows(source, count, folder / "data")
    # train, evaluation, and the mean tokens of a prompt and of an answer
    rows = Rows(
        count, 1, sum(len(row.prompt_ids) for row in encoded) / count,
        sum(len(row.response_ids) for row in encoded) / count, "counted by the student's tokenizer",
    )  # fmt: skip
    dtype = str(hardware_here().device.dtype).removeprefix("torch.")
    settings["export"] = {"model_name_or_path": models[MODELS[0]], "adapter": str(folder / "run" / "final_model"),
                          "folder": str(folder / "merged"), "dtype": dtype,
                          "gpu_memory_gb": config.gpu_memory_gb}  # fmt: skip
    (folder / "merged").mkdir()
    for section, stage in ((SECTION, "train"), ("cache_teacher", "cache")):  # what is planned is what is run
        profile[section] = {key: value for key, value in settings[stage].items() if key not in MODELS}
    # 4. the job, as JSON
    return {
        "settings": settings, "steps": steps, "rows": dataclasses.asdict(rows),
        "random_names": list(models.values()) if arguments.random_weights else [],
        "plans": plans(profile | models, rows, bool(arguments.random_weights)),
    }  # fmt: skip


def table(results: list[harness.Result]) -> None:
    rows = []
    for result in results:
        row = {"name": result["name"]}
        if "absent" in result:
            row["absent"] = result["absent"]
        else:
            judged = result["judged"]
            low, high = judged["planned_seconds"]
            row |= {"planned GB": result["planned"]["planned_gb"], "measured GB": judged["gb"],
                    "reserved GB": result["reserved_gb"], "ratio": result["ratio"],
                    f"within {CLOSE:.0%}": "yes" if result["close"] else "NO", "planned s": f"{low:.0f} to {high:.0f}",
                    "measured s": judged["seconds"], "in range": "yes" if result["in_range"] else "NO"}  # fmt: skip
        rows.append(row)
    harness.print_table(
        rows,
        {"planned GB": ".2f", "measured GB": ".2f", "reserved GB": ".2f", "ratio": ".2f", f"within {CLOSE:.0%}": "",
         "planned s": "", "measured s": ".1f", "in range": ""},
    )  # fmt: skip


def parent(arguments: argparse.Namespace) -> None:
    before = harness.machine()
    # a stage in the middle needs those before it, which are then measured too
    last = max(STAGES.index(stage) for stage in arguments.stages)
    results: list[harness.Result] = []
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(arguments, Path(folder))
        report = {
            "results": results, "planned_for": str(hardware_here()), "overlay": arguments.hardware,
            "rows": job["rows"], "steps": job["steps"], "random_weights": bool(arguments.random_weights),
            "settings": job["settings"],
        }  # fmt: skip
        for stage in STAGES[: last + 1]:
            found = harness.run_worker(sys.executable, stage, job, minutes=60)
            results.append(compared(stage, job["plans"][stage], found, job["steps"]))
            harness.write_report(arguments.output, report, before)  # each at once: the next may not come to its end
            print(f"{stage}: {found.get('absent') or format(found['seconds'], '.1f') + ' s'}", file=sys.stderr)
            if "absent" in found:
                break
    table(results)
    if "absent" in results[-1]:
        raise UserError(f"{results[-1]['name']} failed: {results[-1]['absent']}; what was measured is in the record")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/embedded.yaml", help="the profile")
    parser.add_argument("--hardware", help="an overlay in configs/hardware, or its path; none: none (the profile's)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES),
                        help="the last of them, and those that it needs (all)")  # fmt: skip
    parser.add_argument("--random_weights", nargs=2, metavar=("STUDENT", "TEACHER"),
                        help="folders or hub ids of which configuration and tokenizer alone are read; random weights "
                        "of their true shapes, made-up rows")  # fmt: skip
    parser.add_argument("--steps", type=int, default=3, help="optimisation steps (3)")
    parser.add_argument("--rows", type=int, metavar="N", help="training rows (four times those of the steps)")
    harness.main(parser, parent, measure, in_rounds=False)
