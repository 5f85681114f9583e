"""The runs that benchmarks/recipes.py compares: which there are, how one is made, what is read off it.

A run's record is OUTPUT/records/PHASE/NAME_seed_N.json. Shape letters: N response tokens, H and G widths of student and
teacher, V their vocabulary.
"""

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.recipe_arms import ARMS, CANDIDATES, SEEDS, Arm
from benchmarks.recipe_report import Phase
from src.distillation.base import EncodedRow, encode_row, end_of_turn_id, load_model, load_tokenizer, model_fingerprint
from src.distillation.batching import clean_hashes, consecutive, is_validation
from src.distillation.engines import EngineSettings, make_engine, opened
from src.distillation.filters import cut_to_candidates
from src.distillation.kd import SECTION, KDConfig, run_kd_pipeline
from src.distillation.lora import merge_adapter
from src.distillation.losses import chunk_tokens, divergence, product
from src.distillation.sft import Request, Sampling, make_requests
from src.distillation.teacher import Reader, model_reader
from src.distillation.teacher_cache import read_index
from src.evaluation.results import repetition
from src.grading.graders import grade_all, read_dataset
from src.grading.rows import Row, family_of
from src.grading.sandbox import Sandbox
from src.utils.common import (
    UserError,
    append_jsonl,
    finish_stage,
    provenance,
    read_json,
    read_jsonl,
    refuse_mismatch,
    repair_jsonl_tail,
    sha256_file,
    sha256_text,
    stage_state,
    start_stage,
)
from src.utils.config import build_config, read_merged, read_profile

PROFILE = Path(__file__).with_name("recipes.yaml")
LONGEST = 128  # tokens of an answer, as the teacher had
BATCH = 128  # answers in one forward pass
# how answers are graded: greedily, and drawn from the model's own distribution, which no filter mends
GRADED = {"greedy": Sampling(0.0, 1.0, 0, LONGEST), "T=0.7": Sampling(0.7, 1.0, 0, LONGEST)}
OWN = Sampling(1.0, 1.0, 0, LONGEST)  # samples of the student itself, on which the reverse KL is measured
MEASURED_PROMPTS = 48  # of each domain: own samples, and the teacher's answers on which KL and NLL are measured
READ_TOKENS = 2048  # in one pass
PHASES = {"choose": CANDIDATES, "table": ARMS}
MODELS = {"base": "model_name_or_path", "teacher": "teacher_model_name_or_path"}  # measured beside the arms


@dataclass(frozen=True)
class Job:
    """One record: an arm with a seed, or a model that is not trained (`arm` None, seed 0).

    folder: of the whole comparison; phase: of `PHASES`.
    """

    name: str
    arm: Arm | None
    seed: int
    phase: str
    folder: Path
    profile: dict[str, Any]

    @property
    def record(self) -> Path:
        return self.folder / "records" / self.phase / f"{self.name}.json"

    @property
    def answers(self) -> Path:
        return self.folder / "answers" / self.phase / f"{self.name}.jsonl"

    def run_of(self, arm_name: str) -> Path:
        return self.folder / "train" / f"{arm_name}_seed_{self.seed}"


# --- what there is to make


def measured_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each domain the first by their ids, which are hashes."""
    # a hash says nothing of its row: the first ones are a draw that every call repeats
    chosen: list[dict[str, Any]] = []
    for domain in sorted({row["domain"] for row in rows}):
        own = sorted((row for row in rows if row["domain"] == domain), key=lambda row: row["id"])
        chosen += own[:MEASURED_PROMPTS]
    return chosen


def asked_rows(phase: str, profile: dict[str, Any]) -> list[Row]:
    """The prompts that a phase grades on: validation rows to choose, evaluation rows for the table."""
    folder = Path(read_merged(PROFILE)["data_dir"])
    if phase == "table":
        return read_dataset(folder / "eval_dataset.jsonl")
    rows = read_dataset(folder / "train_dataset.jsonl")
    return [row for row in rows if is_validation(row["id"], profile["validation_fraction"])]


def jobs_of(phase: str, folder: Path, only: Sequence[str] = ()) -> list[Job]:
    """All records of a phase: every arm with one seed, before any has a second; then the models.

    Raises:
        UserError: `only` names an arm that there is not.
    """
    profile = read_profile(PROFILE, SECTION, KDConfig)
    arms = {arm.name: arm for arm in PHASES[phase]}
    if unknown := set(only) - {*arms, *MODELS}:
        raise UserError(f"--only {min(unknown)}: no such arm in {phase}; there are {', '.join([*arms, *MODELS])}")
    jobs = []
    # seeds outside, arms inside: what is there when it is broken off has all arms
    for seed in SEEDS if phase == "table" else SEEDS[:1]:
        for arm in arms.values():
            jobs.append(Job(f"{arm.name}_seed_{seed}", arm, seed, phase, folder, profile))
    # last: they are no arms, and no arm waits for them
    jobs += [Job(name, None, 0, phase, folder, profile) for name in MODELS]
    # --only names arms and models; no names: all
    return [job for job in jobs if not only or (job.arm.name if job.arm else job.name) in only]


def made_of(job: Job) -> dict[str, Any]:
    """What tells a record from one that another version of the comparison made."""
    data = Path(read_merged(PROFILE)["data_dir"])
    # 1. the arm, and what it goes on from
    after = next((arm for arm in ARMS if job.arm and arm.name == job.arm.after), None)
    facts = {
        "arm": asdict(job.arm) if job.arm else job.name,
        "after": asdict(after) if after else None,
        "seed": job.seed,
        "training": job.profile,
        # 2. what it is trained on and asked, by hashes: rows that changed make another record
        "rows": clean_hashes(Path(job.profile["experiment_dir"]) / "sft"),
        "prompts": sha256_file(data / f"{'eval' if job.phase == 'table' else 'train'}_dataset.jsonl"),
        "sampling": {name: asdict(sampling) for name, sampling in {**GRADED, "own": OWN}.items()},
        "measured_prompts": MEASURED_PROMPTS,
    }
    # through JSON and back, as it is stored: a tuple is a list there
    return json.loads(json.dumps(facts))


# --- one record


def train(job: Job) -> dict[str, Any]:
    """The arm's training run, which is gone on with if it was killed."""
    assert job.arm is not None
    settings = job.profile | job.arm.settings
    # a tenth of the steps warms up, as in the profile
    settings |= {"seed": job.seed, "max_steps": job.arm.steps, "warmup_steps": job.arm.steps // 10}
    # an arm's own order of the rows differs from seed to seed too
    if "data_seed" in settings:
        settings["data_seed"] += job.seed
    # nothing is measured on the way; a checkpoint half way, for a killed run
    settings |= {"eval_steps": 0, "save_steps": max(10, job.arm.steps // 2)}
    if job.arm.after:
        settings["init_from"] = str(job.run_of(job.arm.after) / "final_model")
    return run_kd_pipeline(settings | {"output_dir": str(job.run_of(job.arm.name))})


def requests_of(job: Job) -> list[Request]:
    """All answers that are wanted; the seeds are the same for all arms: common random numbers."""
    rows = asked_rows(job.phase, job.profile)
    requests: list[Request] = []
    # the name of the cell salts the seeds: greedy and T = 0.7 are other draws
    for name, sampling in GRADED.items():
        requests += make_requests(rows, 1, 0, sampling, name)
    if job.phase == "table":
        requests += make_requests(measured_of(rows), 1, 0, OWN, "own")
    return requests


def answer(job: Job, model: str, adapter: str) -> list[dict[str, Any]]:
    """Every answer of a model (with an adapter merged), stored as they come; another model's are thrown away."""
    # 1. what the answers are of: weights, requests, and the batch, which decides how sums are rounded
    requests, path, marker = requests_of(job), job.answers, job.answers.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = sha256_file(Path(adapter) / "adapter_model.safetensors") if adapter else ""
    asked = sha256_text(json.dumps([asdict(request) for request in requests]))
    fingerprint = {"model": model_fingerprint(model), "adapter": weights, "requests": asked, "batch_size": BATCH}
    # answers of other weights lie there: they are overwritten, not refused
    others = marker.is_file() and read_json(marker)["fingerprint"] != fingerprint
    if stage_state(marker, fingerprint, overwrite=others, outputs=[path]) == "done":
        return read_jsonl(path)
    # 2. those that are there, as far as a kill has left them whole
    start_stage(marker, fingerprint)
    path.touch()
    repair_jsonl_tail(path)
    stored = read_jsonl(path) if path.stat().st_size else []
    # a prompt is asked once in every cell, each time with another seed
    known = {(row["id"], row["seed"]) for row in stored}
    done = frozenset(request for request in requests if (request.id, request.seed) in known)
    # 3. the others, stored batch by batch
    with opened(make_engine(EngineSettings(batch_size=BATCH), model, (), adapter=adapter)) as generate:
        for part in generate(requests, done):
            append_jsonl(path, part)
    # the model is gone before the next one is loaded
    gc.collect()
    finish_stage(marker, fingerprint)
    return read_jsonl(path)


def encoded(answers: Sequence[dict[str, Any]], tokenizer: Any) -> list[EncodedRow]:
    """Sampled answers as the models read them; one that was cut ends where it was cut, see `rounds.read_own_pairs`.

    By the ids that were sampled where the answers have them (`keep_ids`), else by their text, which may be cut into
    other tokens than were sampled.
    """
    rows, end, size = [], end_of_turn_id(tokenizer), shared_size(tokenizer)
    # in one order, whichever batch an answer came in
    for given in sorted(answers, key=lambda row: row["id"]):
        text = given["response"]
        if given["finish_reason"] == "length":
            text = text.rstrip("\ufffd")  # a part of a character
        messages = [{"role": "user", "content": given["prompt"]}, {"role": "assistant", "content": text}]
        row = {"id": given["id"], "messages": messages, "finish_reason": given["finish_reason"]}
        ids = given.get("token_ids")
        # a token of the padding of a model's logits is none of the tokenizer's
        if ids is not None and max(ids, default=0) < size:
            row["response_ids"] = ids
        rows.append(encode_row(tokenizer, row, end, own_answer=True))
    # one that was cut before it said a word has no token to measure
    return [row for row in rows if row.response_ids]


def shared_size(tokenizer: Any) -> int:
    """How many tokens exist; what a model stores beyond them is padding."""
    return max(tokenizer.get_vocab().values()) + 1


def logits_of(reader: Reader, hidden_NH: Tensor) -> Tensor:
    # [N, V], cut to the tokens that exist
    return reader.logit_map(product(hidden_NH, reader.head_on(hidden_NH.device).T)[:, : reader.vocab_size])


def hidden_of(reader: Reader, rows: Sequence[EncodedRow]) -> Tensor:
    """Final hidden states `[N, H]` at the response positions of all rows, one row after the other."""
    return torch.cat([reader.hidden(batch) for batch in consecutive(rows, READ_TOKENS, len)])


@torch.no_grad()
def divergences(
    student: Reader, teacher: Reader, student_NH: Tensor, teacher_NG: Tensor, counts: Sequence[int], config: KDConfig
) -> list[float]:
    """D(teacher, student) as a run with these settings has it, without its T^2, summed over the tokens of each row.

    Args:
        student_NH, teacher_NG: `hidden_of` of the same rows.
        counts: response tokens of each row.
    """
    own_T = config.teacher_temperature or config.temperature
    sums = []
    # logits of a chunk of tokens at a time, as in the loss
    size = chunk_tokens(student.vocab_size)
    for student_CH, teacher_CG in zip(student_NH.split(size), teacher_NG.split(size), strict=True):
        target = cut_to_candidates(logits_of(teacher, teacher_CG), own_T, config.teacher_top_k, config.teacher_top_p)
        log_p = torch.log_softmax(target / own_T, -1)
        log_q = torch.log_softmax(logits_of(student, student_CH) / config.temperature, -1)
        sums.append(divergence(log_p, log_q, config.divergence, config.beta))
    # [N] -> a piece a row, summed in fp64
    return [part.sum().item() for part in torch.cat(sums).double().split(list(counts))]


def reverse_kl(student: Reader, teacher: Reader, rows: Sequence[EncodedRow]) -> list[float]:
    """KL(student || teacher) at T = 1, summed over the tokens of each row.

    On the student's own samples its mean over rows estimates the KL of the two distributions over whole answers, up to
    the cut, by the chain rule (what MiniLLM minimises: Gu et al. 2024, equation 1).
    """
    counts = [len(row.response_ids) for row in rows]
    states = hidden_of(student, rows), hidden_of(teacher, rows)
    return divergences(student, teacher, *states, counts, KDConfig(temperature=1.0, divergence="reverse_kl"))


def own_samples(answers: Sequence[dict[str, Any]], model: str, adapter: str, teacher: str) -> dict[str, Any]:
    """Tokens and reverse KL of a model's own answers at T = 1, by their text."""
    tokenizer = load_tokenizer(model)
    # of all answers those that were drawn at T = 1 without filters
    rows = encoded([given for given in answers if given["sampling"] == asdict(OWN)], tokenizer)
    student = load_model(model, torch.float32)
    if adapter:
        student = merge_adapter(student, adapter)
    models = (student, load_model(teacher, torch.float32))
    size = shared_size(tokenizer)
    readers = [model_reader(loaded, tokenizer.pad_token_id, packing=False).cut(size) for loaded in models]
    return {
        "ids": [row.id for row in rows],
        "tokens": [len(row.response_ids) for row in rows],
        "reverse_kl": reverse_kl(*readers, rows),
    }


def cost_of(job: Job, arm: Arm) -> dict[str, float]:
    """Tokens that an arm takes, with those of the arm that it goes on from.

    The teacher's answers count as often as they are learned from, at their mean length. Seconds are not told, for runs
    share the machine.
    """
    # 1. what the run and its rounds say of themselves
    results = read_json(job.run_of(arm.name) / "kd_results.json")
    rounds = [read_json(path) for path in sorted(job.run_of(arm.name).glob("rounds/*/round.json"))]
    own_rows = sum(facts["rows"] for facts in rounds)
    config = build_config(KDConfig, job.profile | arm.settings)
    index = read_index(Path(config.experiment_dir) / "teacher_cache")
    # 2. a step's rows are the student's own or the teacher's
    answers = arm.steps * config.rows_per_step - own_rows
    cost = {
        "steps": results["steps"],
        "student_tokens_trained": results["train_tokens"],
        "student_tokens_written": sum(facts["sampled_tokens"] for facts in rounds),
        "teacher_tokens_written": answers * index["tokens"] / len(index["rows"]),
        "teacher_tokens_read_of_own": sum(facts["tokens_read"] for facts in rounds),
    }
    # 3. and what the arm before it took
    if arm.after:
        before = cost_of(job, next(own for own in ARMS if own.name == arm.after))
        cost = {name: value + before[name] for name, value in cost.items()}
    return cost


def make(job: Job) -> dict[str, Any]:
    """Train, answer and measure; what the record holds."""
    facts: dict[str, Any] = {"name": job.arm.name if job.arm else job.name, "seed": job.seed, "made_of": made_of(job)}
    # a model is a job by its name; every arm is of the student
    model, adapter = job.profile[MODELS.get(job.name, "model_name_or_path")], ""
    if job.arm:
        results = train(job)
        adapter = str(job.run_of(job.arm.name) / "final_model")
        facts |= {"heldout": results["after"], "cost": cost_of(job, job.arm)}
    answers = answer(job, model, adapter)
    if job.phase == "table":
        facts["own"] = own_samples(answers, model, adapter, job.profile["teacher_model_name_or_path"])
    return facts | {"answers_sha256": sha256_file(job.answers), "provenance": provenance()}


def is_made(job: Job) -> bool:
    """Whether the record is there.

    Raises:
        UserError: it was made with other settings or rows.
    """
    if not job.record.is_file():
        return False
    # an arm's answers follow from its run, a model's have nothing to follow from
    way_out = f"move it and {job.run_of(job.arm.name) if job.arm else job.answers} away to have it made again"
    refuse_mismatch(job.record, read_json(job.record)["made_of"], made_of(job), way_out)
    return True


def waits(job: Job) -> bool:
    """Whether the run that this one goes on from is not there yet."""
    return bool(job.arm and job.arm.after) and not (job.run_of(job.arm.after) / "kd_results.json").is_file()


# --- what came of it


def graded(answers: Sequence[dict[str, Any]], rows: Sequence[Row], sampling: Sampling) -> dict[str, Any]:
    """Which are right, in the order of `rows`, and what the answers look like."""
    # the cell is told by its settings, which every answer has
    by_id = {given["id"]: given for given in answers if given["sampling"] == asdict(sampling)}
    # in the order of the prompts, whatever order they were answered in
    given = [by_id[row["id"]] for row in rows]
    grades = grade_all(
        [(row, one["response"], one["finish_reason"]) for row, one in zip(rows, given, strict=True)],
        Sandbox("none", "there is no code to run"),
    )
    return {
        "right": [grade.outcome == "correct" for grade in grades],
        "tokens": [one["num_tokens"] for one in given],
        "repetition": [repetition(one["response"]) for one in given],
        "truncated": sum(one["finish_reason"] == "length" for one in given),
    }


def read_phase(phase: str, folder: Path) -> Phase:
    """What there is of a phase, every answer graded.

    Raises:
        UserError: a record was made with other settings, or its answers are not those that it was made with.
    """
    rows = asked_rows(phase, read_profile(PROFILE, SECTION, KDConfig))
    # records that are not there are no mistake here: the report says what is unfinished
    records = []
    for job in jobs_of(phase, folder):
        if not is_made(job):
            continue
        record = read_json(job.record)
        # answers are graded anew each time, so they must be the ones that the record speaks of
        if not job.answers.is_file() or sha256_file(job.answers) != record["answers_sha256"]:
            raise UserError(
                f"{job.answers}: missing or not as it was written; delete it, if it is there, and {job.record}, and "
                f"run `{phase}` again"
            )
        answers = read_jsonl(job.answers)
        records.append(record | {"graded": {cell: graded(answers, rows, s) for cell, s in GRADED.items()}})
    prompts = [{"id": row["id"], "domain": row["domain"], "family": family_of(row)} for row in rows]
    return Phase(prompts, records)
