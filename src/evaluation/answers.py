"""The first step of an evaluation, and the only one with models: every arm answers the same prompts, by any engine."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.distillation.base import load_tokenizer, prompt_text
from src.distillation.engines import Engine, make_engine, opened, server_kind, stage_serve, started
from src.distillation.serving import (
    ADAPTED,
    PlannedServer,
    Serve,
    adapter_name,
    arms_server,
    named_arms,
    students_server,
    teacher_server,
    with_open_port,
)
from src.distillation.sft import Request, Sampling, make_requests
from src.evaluation.arms import Arms
from src.grading.rows import Row
from src.utils.common import Progress, UserError, append_jsonl, read_jsonl, repair_jsonl_tail, sha256_text

if TYPE_CHECKING:
    from src.evaluation.evaluator import EvaluateConfig

MODES = {"quick": 10, "medium": 50, "full": 350}  # prompts
PRESETS = {"raw": {"top_p": 1.0, "top_k": 0}, "recommended": {"top_p": 0.8, "top_k": 20}}


@dataclass(frozen=True)
class Cell:
    """One way of sampling that is compared: a preset of `PRESETS` at a temperature."""

    preset: str
    temperature: float


@dataclass(frozen=True)
class Asking:
    """What is asked of an arm: all its requests, those answered before, and of how many of these the answer is that
    the server refused."""

    arm: str
    requests: list[Request]
    done: frozenset[Request]
    refused: int


def cells(config: "EvaluateConfig") -> list[Cell]:
    """All cells; greedy decoding is one, for no preset changes it."""
    found = []
    for preset in config.presets:
        for temperature in config.temperatures:
            if temperature or preset == config.presets[0]:  # at 0 the first preset stands for all
                found.append(Cell(preset, temperature))
    return found


def select_rows(rows: list[Row], count: int) -> list[Row]:
    """`count` rows, the sources taking turns, each in the order of its ids: quick is part of medium, medium of full."""
    left: dict[str, list[Row]] = {}
    # reversed, because `pop` takes the last
    for row in sorted(rows, key=lambda row: row["id"], reverse=True):
        left.setdefault(row["source"], []).append(row)
    chosen: list[Row] = []
    while len(chosen) < min(count, len(rows)):
        # one of each source, again and again: gsm8k, mbpp, gsm8k, mbpp, gsm8k, ...
        for source in sorted(left):
            if left[source] and len(chosen) < count:
                chosen.append(left[source].pop())
    return chosen


def sweep_requests(config: "EvaluateConfig", rows: list[Row]) -> list[Request]:
    """Every answer that is wanted of an arm.

    The seeds are the same for every arm: arms are compared on common random numbers.
    """
    requests: list[Request] = []
    for cell in cells(config):
        sampling = Sampling(cell.temperature, **PRESETS[cell.preset], max_new_tokens=config.max_new_tokens)
        salt = f"{cell.preset}/{cell.temperature:g}"  # "recommended/0.7": each cell has seeds of its own
        requests += make_requests(rows, config.num_samples, config.seed, sampling, salt)
    return requests


def preset_of(sampling: dict[str, Any]) -> str:
    """The preset that an answer was drawn with."""
    for preset, fields in PRESETS.items():
        if all(sampling[name] == value for name, value in fields.items()):
            return preset
    raise AssertionError(f"no preset has {sampling}")


def check_serve(config: "EvaluateConfig") -> Serve | None:
    """The server settings of an evaluation, without a port yet.

    Raises:
        UserError: they are wrong, or a whole command line leaves out an arm that it is to answer as.
    """
    serve = stage_serve(config)
    if serve is None or serve.program != "other":
        return serve
    asked = [arm for arm in config.arms if not (arm == "teacher" and config.teacher_base_url)]
    named = named_arms(serve)
    for arm in asked if named else ():
        if arm not in named:
            raise UserError(
                f"serve: the command line starts one server for every arm and does not name {{{arm}}}; name it, say "
                "another serve under evaluate_distillation (command: vllm derives its flags), or leave it out of arms"
            )
    return serve


def arm_engine(config: "EvaluateConfig", arms: Arms, arm: str, serve: Serve | None = None) -> Engine:
    """What answers as an arm. A server knows base and teacher by their models' names; see `adapter_name`."""
    what = arms.found[arm]
    if arm == "teacher":
        own = None if config.teacher_base_url else serve  # the stage does not start one that runs elsewhere
        return make_engine(config, what, config.teacher_devices, own, own.model if own else "",
                           config.teacher_base_url, experiment_dir=config.experiment_dir)  # fmt: skip
    name = adapter_name(server_kind(config, serve), arms.base, arm) if arm in ADAPTED else ""
    return make_engine(config, arms.base, config.student_devices, serve, name,
                       adapter=what if arm in ADAPTED else "", experiment_dir=config.experiment_dir)  # fmt: skip


def arms_by_server(config: "EvaluateConfig", arms: Arms, serve: Serve | None) -> dict[str, list[str]]:
    """The name of each server -> the arms that it answers as, in the order in which they are started."""
    if serve is not None and serve.program == "other" and not config.teacher_base_url:
        return {"arms": list(arms.found)}
    students = [arm for arm in arms.found if arm != "teacher"]
    return {"students": students, "teacher": [arm for arm in arms.found if arm == "teacher"]}


def planned_server(config: "EvaluateConfig", arms: Arms, serve: Serve | None, name: str) -> PlannedServer | None:
    """The server of that name, as the stage would start it; None for one that runs elsewhere.

    Raises:
        UserError: see `serving.serve_command` and `serving.typed_command`.
    """
    if serve is None or (name == "teacher" and config.teacher_base_url):
        return None
    if name == "teacher":
        return teacher_server(serve, arms.found["teacher"], config.teacher_devices)
    if serve.program == "other":
        return arms_server(serve, arms.places, sorted({*config.teacher_devices, *config.student_devices}))
    adapters = {arm: arms.found[arm] for arm in ADAPTED if arm in arms.found}
    return students_server(serve, arms.base, adapters, config.student_devices)


def generate_answers(config: "EvaluateConfig", arms: Arms, rows: list[Row], path: Path) -> None:
    """Append the answers that answers.jsonl lacks, arm after arm. All cells of an arm share its batches."""
    serve = check_serve(config)
    serve = with_open_port(serve) if serve else None
    # 1. what is asked of every arm
    requests = sweep_requests(config, rows)
    # 2. what each has answered; the seed tells cells apart, which share id and sample index
    keys: dict[str, set] = {arm: set() for arm in arms.found}
    refused = dict.fromkeys(arms.found, 0)
    for row in stored_rows(path):
        keys[row["arm"]].add((row["id"], row["sample_index"], row["seed"]))
        refused[row["arm"]] += row["finish_reason"] == "refused"
    # as requests: `generate` wants those to pass over
    done = {}
    for arm in arms.found:
        done[arm] = frozenset(r for r in requests if (r.id, r.sample_index, r.seed) in keys[arm])
    # 3. the rest, one server after the other: no two models need share a GPU
    with Progress(len(arms.found) * len(requests), "answers", "answer") as progress:
        progress.skip(sum(map(len, done.values())))
        for server, answered in arms_by_server(config, arms, serve).items():
            # no server is started for arms that have answered all
            todo = [arm for arm in answered if len(done[arm]) < len(requests)]
            if not todo:
                continue
            with started(planned_server(config, arms, serve, server), path.with_name(f"server_{server}.log")):
                for arm in todo:
                    asking = Asking(arm, requests, done[arm], refused[arm])
                    _answer_arm(arm_engine(config, arms, arm, serve), asking, path, progress)
                    gc.collect()  # before the next arm's weights are loaded


def _answer_arm(engine: Engine, asking: Asking, path: Path, progress: Progress) -> None:
    tokenizer, arm = load_tokenizer(engine.model, engine.experiment_dir), asking.arm
    # what was read, to the letter
    prompts = {request.id: sha256_text(prompt_text(tokenizer, request.messages)) for request in asking.requests}
    with opened(engine) as generate:
        for part in generate(asking.requests, asking.done, asking.refused):
            for answer in part:
                answer |= {"arm": arm, "preset": preset_of(answer["sampling"]), "prompt_sha256": prompts[answer["id"]]}
            # stored part by part: what a kill leaves is not asked again
            append_jsonl(path, part)
            progress.advance(len(part), arm=arm)


def stored_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that is appended to; a torn last line is cut off first."""
    repair_jsonl_tail(path)
    return read_jsonl(path) if path.is_file() and path.stat().st_size else []
