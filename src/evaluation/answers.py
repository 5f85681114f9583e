"""The first step of an evaluation, and the only one with models: every arm answers the same prompts, by any engine."""

import gc
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.distillation.base import load_tokenizer, prompt_text
from src.distillation.engines import Engine, make_engine, opened
from src.distillation.server import running
from src.distillation.sft import Request, Sampling, make_requests
from src.evaluation.arms import Arms
from src.evaluation.results_schema import ARMS
from src.grading.rows import Row
from src.utils.common import Progress, UserError, append_jsonl, read_jsonl, repair_jsonl_tail, sha256_text

if TYPE_CHECKING:
    from src.evaluation.evaluator import EvaluateConfig

MODES = {"quick": 10, "medium": 50, "full": 350}
PRESETS = {"raw": {"top_p": 1.0, "top_k": 0}, "recommended": {"top_p": 0.8, "top_k": 20}}


@dataclass(frozen=True)
class Cell:
    """One way of sampling that is compared: a preset of `PRESETS` at a temperature."""

    preset: str
    temperature: float


def cells(config: "EvaluateConfig") -> list[Cell]:
    """All cells; greedy decoding is one, for no preset changes it."""
    found = []
    for preset in config.presets:
        for temperature in config.temperatures:
            if temperature or preset == config.presets[0]:
                found.append(Cell(preset, temperature))
    return found


def select_rows(rows: list[Row], count: int) -> list[Row]:
    """`count` rows, the sources taking turns, each in the order of its ids: quick is part of medium, medium of full."""
    left: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["id"], reverse=True):
        left.setdefault(row["source"], []).append(row)
    chosen: list[Row] = []
    while len(chosen) < min(count, len(rows)):
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
        salt = f"{cell.preset}/{cell.temperature:g}"
        requests += make_requests(rows, config.num_samples, config.seed, sampling, salt)
    return requests


def preset_of(sampling: dict[str, Any]) -> str:
    """The preset that an answer was drawn with."""
    for preset, fields in PRESETS.items():
        if all(sampling[name] == value for name, value in fields.items()):
            return preset
    raise AssertionError(f"no preset has {sampling}")


def arm_engine(config: "EvaluateConfig", arms: Arms, arm: str) -> Engine:
    """What answers as an arm. A server knows sft and kd by these names, base and teacher by their models'."""
    what = arms.found[arm]
    if arm == "teacher":
        return make_engine(config, what, config.teacher_devices, base_url=config.teacher_base_url,
                           experiment_dir=config.experiment_dir)  # fmt: skip
    adapted = arm in ("sft", "kd")
    return make_engine(config, arms.base, config.student_devices, served_name=arm if adapted else "",
                       adapter=what if adapted else "", experiment_dir=config.experiment_dir)  # fmt: skip


def server_command(config: "EvaluateConfig", arms: Arms, teacher: bool) -> str:
    """The command of a server, with the folders of the arms where it says {base}, {sft}, {kd} and {teacher}.

    Raises:
        UserError: it names an arm that is not there.
    """
    command = config.teacher_server_command if teacher else config.server_command
    for arm in ARMS:
        if f"{{{arm}}}" in command and arm not in arms.places:
            raise UserError(
                f"server_command names {{{arm}}}, an arm that is missing ({arms.missing[arm]}); take it out"
            )
        command = command.replace(f"{{{arm}}}", shlex.quote(arms.places.get(arm, "")))
    return command


def generate_answers(config: "EvaluateConfig", arms: Arms, rows: list[Row], path: Path) -> None:
    """Append the answers that answers.jsonl lacks, arm after arm. All cells of an arm share its batches."""
    requests = sweep_requests(config, rows)
    keys: dict[str, set] = {arm: set() for arm in arms.found}
    for row in stored_rows(path):
        keys[row["arm"]].add((row["id"], row["sample_index"], row["seed"]))
    done = {}
    for arm in arms.found:
        done[arm] = frozenset(r for r in requests if (r.id, r.sample_index, r.seed) in keys[arm])
    with Progress(len(arms.found) * len(requests), "answers", "answer") as progress:
        progress.skip(sum(map(len, done.values())))
        for teacher in (False, True):  # the students are modules of one server, the teacher has its own
            todo = [arm for arm in arms.found if (arm == "teacher") is teacher and len(done[arm]) < len(requests)]
            if not todo:
                continue
            url = (config.teacher_base_url if teacher else "") or config.base_url
            log = path.with_name("server_teacher.log" if teacher else "server_students.log")
            with running(server_command(config, arms, teacher), url, log):
                for arm in todo:
                    _answer_arm(arm_engine(config, arms, arm), arm, requests, done[arm], path, progress)
                    gc.collect()  # before the next arm's weights are loaded


def _answer_arm(
    engine: Engine, arm: str, requests: list[Request], done: frozenset[Request], path: Path, progress: Progress
) -> None:
    tokenizer = load_tokenizer(engine.model, engine.experiment_dir)
    prompts = {request.id: sha256_text(prompt_text(tokenizer, request.messages)) for request in requests}
    with opened(engine) as generate:
        for part in generate(requests, done):
            for answer in part:
                answer |= {"arm": arm, "preset": preset_of(answer["sampling"]), "prompt_sha256": prompts[answer["id"]]}
            append_jsonl(path, part)
            progress.advance(len(part), arm=arm)


def stored_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that is appended to; a torn last line is cut off first."""
    repair_jsonl_tail(path)
    return read_jsonl(path) if path.is_file() and path.stat().st_size else []
