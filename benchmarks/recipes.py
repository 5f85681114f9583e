"""Which recipe wins, and when is distillation worth it: the same student, rows and steps, one recipe after the other.

    python benchmarks/recipes.py prepare            # rows, the teacher's answers and its cache: minutes
    python benchmarks/recipes.py choose             # one seed, half the steps, graded on the validation rows
    python benchmarks/recipes.py table              # every arm with every seed, graded on the evaluation rows: hours
    python benchmarks/recipes.py report             # recipes.json and recipes.md from what there is

Each run leaves OUTPUT/records/PHASE/NAME_seed_N.json and is not made again; a killed one goes on. Started several times
at once (OMP_NUM_THREADS=1 each), the processes share the runs out between them. What is compared stands in
recipe_arms.py, the profile in recipes.yaml.
"""

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from filelock import Timeout
from torch import Tensor

from benchmarks.recipe_arms import ARMS, CANDIDATES, SEEDS, Arm
from benchmarks.recipe_report import Phase, make_results, markdown
from src.distillation.base import EncodedRow, encode_row, end_of_turn_id, load_model, load_tokenizer
from src.distillation.batching import consecutive, is_validation
from src.distillation.engines import EngineSettings, make_engine, opened
from src.distillation.kd import SECTION, KDConfig, run_kd_pipeline
from src.distillation.lora import merge_adapter
from src.distillation.losses import chunk_tokens, divergence, product
from src.distillation.sft import Request, Sampling, make_requests
from src.distillation.teacher import Reader, model_reader
from src.evaluation.results import repetition
from src.grading.graders import grade_all, read_dataset
from src.grading.rows import Row, family_of
from src.grading.sandbox import Sandbox
from src.utils.common import (
    ROOT,
    UserError,
    append_jsonl,
    logger,
    provenance,
    read_json,
    read_jsonl,
    repair_jsonl_tail,
    run_cli,
    sha256_file,
    write_json,
    write_jsonl,
    write_text,
)
from src.utils.config import read_merged, read_profile
from src.utils.stages import locked

PROFILE = Path(__file__).with_name("recipes.yaml")
STAGES = ("prepare_models", "download_datasets", "generate_sft_data", "fix_sft_data", "cache_teacher")
LONGEST = 128  # tokens of an answer, as the teacher had
BATCH = 128  # answers in one forward pass
# how answers are graded: greedily, and drawn from the model's own distribution, which no filter mends
GRADED = {"greedy": Sampling(0.0, 1.0, 0, LONGEST), "T=0.7": Sampling(0.7, 1.0, 0, LONGEST)}
OWN = Sampling(1.0, 1.0, 0, LONGEST)  # samples of the student itself, on which the reverse KL is measured
OWN_PROMPTS = 48  # of each domain
READ_TOKENS = 2048  # in one pass
PHASES = {"choose": CANDIDATES, "table": ARMS}


def prepare(arguments: argparse.Namespace) -> None:
    """The stages before training, with the profile."""
    for stage in STAGES:
        if stage == "cache_teacher":
            keep_heldout(Path(read_merged(PROFILE)["experiment_dir"]) / "sft")
        command = [sys.executable, str(ROOT / "scripts" / f"{stage}.py"), "--config", str(PROFILE)]
        subprocess.run(command, cwd=ROOT, check=True)


def keep_heldout(folder: Path) -> None:
    """Measure KL and NLL on a part of the evaluation rows: every run does, and all of them would take it minutes."""
    path = folder / "sft_eval_data_clean.jsonl"
    rows = read_jsonl(path)
    chosen = []
    for domain in sorted({row["domain"] for row in rows}):
        chosen += sorted((row for row in rows if row["domain"] == domain), key=lambda row: row["id"])[:OWN_PROMPTS]
    write_jsonl(path, chosen)


def asked_rows(phase: str, profile: dict[str, Any]) -> list[Row]:
    """The prompts that a phase grades on: validation rows to choose, evaluation rows for the table."""
    folder = Path(read_merged(PROFILE)["data_dir"])
    if phase == "table":
        return read_dataset(folder / "eval_dataset.jsonl")
    rows = read_dataset(folder / "train_dataset.jsonl")
    return [row for row in rows if is_validation(row["id"], profile["validation_fraction"])]


def train(arm: Arm, seed: int, profile: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One training run in `folder`/train/NAME, which is gone on with if it was killed."""
    settings = profile | arm.settings
    settings |= {"seed": seed, "max_steps": arm.steps, "warmup_steps": arm.steps // 10}
    settings |= {"eval_steps": 0, "save_steps": max(10, arm.steps // 2)}
    if arm.after:
        settings["init_from"] = str(folder / "train" / f"{arm.after}_seed_{seed}" / "final_model")
    return run_kd_pipeline(settings | {"output_dir": str(folder / "train" / f"{arm.name}_seed_{seed}")})


def requests_of(rows: Sequence[Row], phase: str) -> list[Request]:
    """All answers that are wanted of an arm; the seeds are the same for all: common random numbers."""
    requests: list[Request] = []
    for name, sampling in GRADED.items():
        requests += make_requests(rows, 1, 0, sampling, name)
    if phase == "table":
        requests += make_requests(own_prompts(rows), 1, 0, OWN, "own")
    return requests


def own_prompts(rows: Sequence[Row]) -> list[Row]:
    """Of each domain the first by their ids, which are hashes."""
    chosen = []
    for domain in sorted({row["domain"] for row in rows}):
        own = sorted((row for row in rows if row["domain"] == domain), key=lambda row: row["id"])
        chosen += own[:OWN_PROMPTS]
    return chosen


def answers_of(model: str, adapter: str, rows: Sequence[Row], phase: str, path: Path) -> list[dict[str, Any]]:
    """Every answer of a model (with an adapter merged), appended to `path` as they come."""
    requests = requests_of(rows, phase)
    repair_jsonl_tail(path)
    stored = read_jsonl(path) if path.is_file() and path.stat().st_size else []
    known = {(row["id"], row["seed"]) for row in stored}
    done = frozenset(request for request in requests if (request.id, request.seed) in known)
    engine = make_engine(EngineSettings(batch_size=BATCH), model, (), adapter=adapter)
    with opened(engine) as generate:
        for part in generate(requests, done):
            append_jsonl(path, part)
    gc.collect()
    return sorted(read_jsonl(path), key=lambda row: (row["id"], row["seed"]))


def graded(answers: Sequence[dict[str, Any]], rows: Sequence[Row], sampling: Sampling) -> dict[str, Any]:
    """Which are right, in the order of `rows`, and what the answers look like."""
    by_id = {answer["id"]: answer for answer in answers if answer["sampling"] == asdict(sampling)}
    given = [by_id[row["id"]] for row in rows]
    grades = grade_all(
        [(row, answer["response"], answer["finish_reason"]) for row, answer in zip(rows, given, strict=True)],
        Sandbox("none", "there is no code to run"),
    )
    return {
        "right": [grade.outcome == "correct" for grade in grades],
        "tokens": [answer["num_tokens"] for answer in given],
        "repetition": [repetition(answer["response"]) for answer in given],
        "truncated": sum(answer["finish_reason"] == "length" for answer in given),
    }


def encoded(answers: Sequence[dict[str, Any]], tokenizer: Any) -> list[EncodedRow]:
    """Sampled answers as the models read them; one that was cut ends where it was cut."""
    rows, end = [], end_of_turn_id(tokenizer)
    for answer in answers:
        messages = [{"role": "user", "content": answer["prompt"]}, {"role": "assistant", "content": answer["response"]}]
        row = {"id": answer["id"], "messages": messages, "finish_reason": answer["finish_reason"]}
        ids = encode_row(tokenizer, row, end)
        if answer["finish_reason"] == "length" and ids.response_ids[-1] == end:
            ids = replace(ids, response_ids=ids.response_ids[:-1])
        rows.append(ids)
    return [row for row in rows if row.response_ids]


def logits_of(reader: Reader, hidden_NH: Tensor) -> Tensor:
    return reader.logit_map(product(hidden_NH, reader.head_on(hidden_NH.device).T)[:, : reader.vocab_size])


@torch.no_grad()
def reverse_kl(student: Reader, teacher: Reader, rows: Sequence[EncodedRow]) -> list[float]:
    """KL(student || teacher) at T = 1, summed over the tokens of each row: on the student's own samples its mean over
    rows is the KL of the two distributions over whole answers, up to the cut (MiniLLM, Gu et al. 2024, equation 1)."""
    sums: list[float] = []
    for batch in consecutive(rows, READ_TOKENS, len):
        states = [reader.hidden(batch) for reader in (student, teacher)]
        parts = []
        for student_NH, teacher_NH in zip(*(s.split(chunk_tokens(student.vocab_size)) for s in states), strict=True):
            log_q = torch.log_softmax(logits_of(student, student_NH), -1)
            log_p = torch.log_softmax(logits_of(teacher, teacher_NH), -1)
            parts.append(divergence(log_p, log_q, "reverse_kl"))
        counts = [len(row.response_ids) for row in batch]
        sums += [part.sum().item() for part in torch.cat(parts).double().split(counts)]
    return sums


def own_samples(answers: Sequence[dict[str, Any]], model: str, adapter: str, teacher: str) -> dict[str, Any]:
    """Tokens and reverse KL of a student's own answers at T = 1."""
    tokenizer = load_tokenizer(model)
    chosen = [answer for answer in answers if answer["sampling"] == asdict(OWN)]
    rows = encoded(chosen, tokenizer)
    student = load_model(model, torch.float32)
    if adapter:
        student = merge_adapter(student, adapter)
    size = max(tokenizer.get_vocab().values()) + 1
    readers = [
        model_reader(m, tokenizer.pad_token_id, False).cut(size) for m in (student, load_model(teacher, torch.float32))
    ]
    sums = reverse_kl(*readers, rows)
    return {
        "ids": [row.id for row in rows],
        "tokens": [len(row.response_ids) for row in rows],
        "reverse_kl": [round(value, 5) for value in sums],
    }


def cost_of(arm: Arm, results: dict[str, Any], run: Path) -> dict[str, Any]:
    """What a run took: tokens that the student trained on and wrote, and that the teacher wrote and read."""
    rounds = [read_json(path) for path in sorted(run.glob("rounds/*/round.json"))]
    return {
        "train_steps": results["steps"],
        "train_seconds": results["train_seconds"],
        "student_tokens_trained": results["train_tokens"],
        "student_tokens_written": sum(facts["sampled_tokens"] for facts in rounds),
        "teacher_tokens_read_of_own": sum(facts["tokens_read"] for facts in rounds),
        "round_seconds": sum(facts["answering_seconds"] + facts["caching_seconds"] for facts in rounds),
    }


def answers_path(folder: Path, phase: str, name: str) -> Path:
    return folder / "answers" / phase / f"{name}.jsonl"


def measure(name: str, adapter: str, phase: str, folder: Path, profile: dict[str, Any], model: str) -> dict[str, Any]:
    """The answers of one model, and what only models can tell of them; `report` grades them."""
    rows, path = asked_rows(phase, profile), answers_path(folder, phase, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = answers_of(model, adapter, rows, phase, path)
    found: dict[str, Any] = {"answers_sha256": sha256_file(path)}
    if phase == "table":
        teacher = profile["teacher_model_name_or_path"]
        found["own"] = own_samples(answers, model, adapter, teacher)
    return found


def run_arm(arm: Arm, seed: int, phase: str, folder: Path, profile: dict[str, Any]) -> dict[str, Any]:
    """Train and measure; what its record holds."""
    started = time.monotonic()
    run = folder / "train" / f"{arm.name}_seed_{seed}"
    results = train(arm, seed, profile, folder)
    found = measure(run.name, str(run / "final_model"), phase, folder, profile, profile["model_name_or_path"])
    return {
        "arm": asdict(arm),
        "seed": seed,
        "heldout": {name: results[name] for name in ("before", "after", "teacher")},
        "cost": cost_of(arm, results, run),
        **found,
        "adapter_sha256": results["adapter_sha256"],
        "wall_seconds": time.monotonic() - started,
        "provenance": provenance(),
    }


def run_model(name: str, phase: str, folder: Path, profile: dict[str, Any]) -> dict[str, Any]:
    """Measure the bare student or the teacher."""
    key = "model_name_or_path" if name == "base" else "teacher_model_name_or_path"
    found = measure(name, "", phase, folder, profile, profile[key])
    return {"arm": {"name": name}, "seed": None, **found, "provenance": provenance()}


def work(arguments: argparse.Namespace) -> None:
    """Make every record of a phase that is missing; runs that another process makes are left to it."""
    folder, phase = Path(arguments.output), arguments.phase
    profile = read_profile(PROFILE, SECTION, KDConfig)
    records = folder / "records" / phase
    records.mkdir(parents=True, exist_ok=True)
    (folder / "train").mkdir(exist_ok=True)
    seeds = SEEDS if phase == "table" else SEEDS[:1]
    arms = [arm for arm in PHASES[phase] if not arguments.only or arm.name in arguments.only]
    todo: list[tuple[str, Arm | None, int]] = []
    for seed in seeds:  # all arms with one seed, before any has a second
        todo += [(f"{arm.name}_seed_{seed}", arm, seed) for arm in arms]
    if not arguments.only:
        todo += [("base", None, 0), ("teacher", None, 0)]
    for name, arm, seed in todo:
        path = records / f"{name}.json"
        try:
            with locked(records / f".{name}.lock", timeout=0):
                if path.is_file():
                    continue
                logger.info("%s: %s", phase, name)
                made = run_arm(arm, seed, phase, folder, profile) if arm else run_model(name, phase, folder, profile)
                write_json(path, made)
        except Timeout:
            continue


def read_records(folder: Path, phase: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What there is of a phase, every answer graded.

    Raises:
        UserError: the answers of a record are not those that it was made with.
    """
    records = []
    for path in sorted((folder / "records" / phase).glob("*.json")):
        answers = answers_path(folder, phase, path.stem)
        record = read_json(path)
        if not answers.is_file() or sha256_file(answers) != record["answers_sha256"]:
            raise UserError(f"{answers}: missing or not as it was written; delete {path} and run `{phase}` again")
        given = read_jsonl(answers)
        records.append(record | {"graded": {cell: graded(given, rows, s) for cell, s in GRADED.items()}})
    return records


def report(arguments: argparse.Namespace) -> None:
    """recipes.json and recipes.md."""
    profile = read_profile(PROFILE, SECTION, KDConfig)
    folder = Path(arguments.output)
    phases = {}
    for phase in PHASES:
        rows = asked_rows(phase, profile)
        prompts = [{"id": row["id"], "domain": row["domain"], "family": family_of(row)} for row in rows]
        phases[phase] = Phase(prompts, read_records(folder, phase, rows))
    results = make_results(phases["choose"], phases["table"])
    write_json(Path(arguments.json or folder / "recipes.json"), results)
    write_text(folder / "recipes.md", markdown(results))
    print(markdown(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("prepare", *PHASES, "report"))
    parser.add_argument("--output", default="outputs/recipes", help="runs, answers and records (outputs/recipes)")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms alone")
    parser.add_argument("--json", help="report: the results' file (OUTPUT/recipes.json)")
    arguments = parser.parse_args()
    os.chdir(ROOT)  # the profile's folders are below it
    {"prepare": prepare, "report": report}.get(arguments.phase, work)(arguments)


if __name__ == "__main__":
    run_cli(main)
