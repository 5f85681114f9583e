"""The stages of a pipeline, and the command of each: its program, its environment and its GPUs."""

import contextlib
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.launch.profile import Profile, shown
from src.utils.common import ROOT, UserError
from src.utils.config import nearest, rows_of_a_step, step_sizes

# Stage -> its script. Training is two stages: the control, which learns from the same answers alone, and the student.
STAGES = {
    "prepare_models": "prepare_models",
    "download_datasets": "download_datasets",
    "generate_sft_data": "generate_sft_data",
    "fix_sft_data": "fix_sft_data",
    "cache_teacher": "cache_teacher",
    "sft_control": "run_improved_kd",
    "distil": "run_improved_kd",
    "evaluate_distillation": "evaluate_distillation",
}
# What a section may call the models; no other setting that is read here has a further name.
ALIASES = {"teacher_model_name_or_path": "teacher_model", "model_name_or_path": "student_name_or_path"}
PASSES = "gradient_accumulation_steps"
GPUS = re.compile(r"([1-9][0-9]*)x([0-9]+(?:\.[0-9]+)?)")  # 8x40, 1x141.5


@dataclass(frozen=True)
class Launch:
    """How training is started: the number of its processes, and the file in configs/accelerate."""

    processes: int = 1
    accelerate: str = "ddp"


@dataclass(frozen=True)
class Command:
    """One stage: its command, the environment it adds, and the GPUs that it works on, by their place in the overlay."""

    stage: str
    argv: tuple[str, ...]
    env: dict[str, str]
    gpus: tuple[int, ...]


def stage_named(name: str, flag: str) -> str:
    """A stage, by its name or its script's; run_improved_kd is both of its stages."""
    word = name.removesuffix(".py")
    # "from training on" begins with the first of the two, "up to training" ends with the last
    if word == "run_improved_kd":
        return "sft_control" if flag == "--from" else "distil"
    if word not in STAGES:
        raise UserError(f"{flag} {name}: no such stage{nearest(name, list(STAGES))}; there are {', '.join(STAGES)}")
    return word


def chosen_stages(first: str, last: str) -> list[str]:
    names = list(STAGES)
    begin = names.index(stage_named(first, "--from")) if first else 0
    end = names.index(stage_named(last, "--to")) if last else len(names) - 1
    if end < begin:
        raise UserError(f"--from {first} comes after --to {last}; the order is {', '.join(names)}")
    return names[begin : end + 1]


def said(values: dict[str, Any], stage: str, name: str, default: Any = None) -> Any:
    """What a profile says to a stage: in its section, or above the sections."""
    section = values.get(STAGES[stage]) or {}
    own = name if name in section else ALIASES.get(name)
    # as `config.stage_values`: null in a section stands over what is said above it, and leaves the stage its default
    value = section[own] if own in section else values.get(name)
    return default if value is None else value


def device_list(value: Any) -> list[int]:
    """GPUs as YAML may name them: a list, one number or nothing."""
    if value is None:
        return []
    # teacher_devices: 0 is [0]
    devices = list(value) if isinstance(value, list) else [value]
    for device in devices:
        if not isinstance(device, int):
            raise UserError(f"devices are numbers of GPUs, found {device!r}")
    return devices


def serve_of(stage: str, values: dict[str, Any], name: str = "serve") -> dict[str, Any]:
    """How a stage starts its server; empty where it starts none.

    Raises:
        UserError: it is no mapping.
    """
    serve = said(values, stage, name) or {}
    if isinstance(serve, str):  # as --print_config of a stage shows it
        with contextlib.suppress(json.JSONDecodeError):
            serve = json.loads(serve)
    if not isinstance(serve, dict):
        raise UserError(f"{name}: a mapping such as {{command: vllm}} is wanted, found {serve!r}")
    return serve


def read_launch(values: dict[str, Any]) -> Launch:
    """How training is started, and whether a step's rows divide among its processes.

    Raises:
        UserError: they do not, or `launch` says something else than processes and accelerate.
    """
    asked = values.get("launch") or {}
    if not isinstance(asked, dict):
        raise UserError(f"launch: a mapping such as {{processes: 8, accelerate: ddp}} is wanted, found {asked!r}")
    known = list(Launch.__dataclass_fields__)
    for name in asked:
        if name not in known:
            raise UserError(f"launch: unknown key {name!r}{nearest(str(name), known)}; there are {', '.join(known)}")
    launch = Launch(**asked)
    if not isinstance(launch.processes, int) or launch.processes < 1:
        raise UserError(f"launch: processes must be a whole number above 0, found {launch.processes!r}")
    if not (ROOT / "configs" / "accelerate" / f"{launch.accelerate}.yaml").is_file():
        raise UserError(f"launch: configs/accelerate/{launch.accelerate}.yaml: no such file")
    training = values.get("run_improved_kd") or {}
    # as `batching.Cutting` decides it
    by_tokens = training.get("packing", True) and training.get("tokens_per_batch") != 0
    # what the processes share: rows of a step where passes are cut by tokens, else its passes
    shared = rows_of_a_step(training) if by_tokens else step_sizes(training)[PASSES]
    if isinstance(shared, int) and shared % launch.processes:
        what = "rows of a step" if by_tokens else f"passes ({PASSES})"
        raise UserError(
            f"{shared} {what} do not divide among {launch.processes} processes; name another --hardware, or a number "
            f"of processes that divides {shared}"
        )
    if launch.processes > 1 and training.get("student_devices"):
        raise UserError("launch: several processes have a GPU each; leave student_devices out, or processes at 1")
    return launch


def makes_rounds(stage: str, values: dict[str, Any]) -> bool:
    """Whether the student of a stage learns from answers of its own too; the control never does."""
    return bool(
        stage == "distil" and said(values, stage, "on_policy_rounds") and said(values, stage, "on_policy_fraction", 0.5)
    )


def gpus_of(stage: str, values: dict[str, Any], launch: Launch) -> tuple[int, ...]:
    """The GPUs that a stage works on."""
    teacher = device_list(said(values, stage, "teacher_devices"))
    student = device_list(said(values, stage, "student_devices"))
    if stage == "cache_teacher":
        # with this engine alone the stage starts the server that `serve` describes for all
        asks_server = said(values, stage, "engine") == "openai"
        devices = (device_list(serve_of(stage, values).get("devices")) if asks_server else []) or teacher
    elif stage in ("sft_control", "distil"):
        online, own_answers = said(values, stage, "teacher_signal") == "online", makes_rounds(stage, values)
        # a process a GPU, from the first on
        devices = student or range(launch.processes if values.get("gpus") else 0)
        # a cached teacher needs a GPU for the student's own answers alone
        devices = [*devices, *(teacher if online or own_answers else [])]
        if own_answers:
            devices += device_list(serve_of(stage, values, "on_policy_serve").get("devices"))
    elif stage in ("generate_sft_data", "evaluate_distillation"):
        # a server's own GPUs stand in for the teacher's and the students'
        devices = device_list(serve_of(stage, values).get("devices")) or [*teacher, *student]
    else:
        devices = []
    # a GPU that two models share is one GPU
    return tuple(sorted(set(devices)))


def gpu_count(values: dict[str, Any]) -> int:
    """The number in `gpus: 8x40`; 0 where the profile names none.

    Raises:
        UserError: it is no number x gigabytes.
    """
    asked = values.get("gpus")
    if asked is None:
        return 0
    match = GPUS.fullmatch(str(asked))
    if match is None:
        raise UserError(f"gpus: {asked}: expected number x gigabytes, such as 8x40")
    return int(match[1])


def visible_gpus(values: dict[str, Any]) -> list[str]:
    """The GPUs of this machine that the profile's are, by number or UUID: the first ones that may be seen.

    Raises:
        UserError: CUDA_VISIBLE_DEVICES names fewer.
    """
    count, allowed = gpu_count(values), os.environ.get("CUDA_VISIBLE_DEVICES")
    if not count or allowed is None:
        return [str(number) for number in range(count)]
    # "4,6", or UUIDs; as a scheduler gives them to a job
    names = [name.strip() for name in allowed.split(",") if name.strip()]
    if len(names) < count:
        raise UserError(f"gpus: {values['gpus']}: CUDA_VISIBLE_DEVICES={allowed} names {len(names)}, name {count}")
    return names[:count]


def command_of(stage: str, profile: Profile) -> Command:
    """The command line of a stage.

    Raises:
        UserError: what the profile says of GPUs or processes does not fit together.
    """
    launch = read_launch(profile.values)
    # 1. the script and what it is told
    script = [f"scripts/{STAGES[stage]}.py", "--config", shown(profile.path)]
    if stage == "sft_control":
        script += ["--alpha", "0"]
    # 2. who runs it: this Python, or accelerate of the same environment with several processes
    program = [shown(Path(sys.executable))]
    if STAGES[stage] == "run_improved_kd" and launch.processes > 1:
        launcher, config = Path(sys.executable).with_name("accelerate"), f"configs/accelerate/{launch.accelerate}.yaml"
        program = [shown(launcher), "launch", "--config_file", config, "--num_processes", str(launch.processes)]
    # 3. the GPUs that it may see: all of the profile's, so that its numbers mean what they say
    gpus = gpus_of(stage, profile.values, launch)
    visible = visible_gpus(profile.values) if gpus else []
    if visible and gpus and gpus[-1] >= len(visible):
        raise UserError(f"{stage} wants GPU {gpus[-1]}, and gpus: {profile.values['gpus']} are numbered from 0")
    env = {"CUDA_VISIBLE_DEVICES": ",".join(visible)} if visible and gpus else {}
    return Command(stage, (*program, *script), env, gpus)


def command_line(command: Command) -> str:
    """As it can be typed."""
    # CUDA_VISIBLE_DEVICES=0,1 python scripts/cache_teacher.py ...
    assignments = [f"{name}={shlex.quote(value)}" for name, value in command.env.items()]
    return " ".join([*assignments, shlex.join(command.argv)])
