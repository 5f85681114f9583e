"""Base, SFT control, distilled student and teacher on the same prompts and the same held-out text.

Answers go to samples.jsonl and per-row sums to heldout.jsonl as they are made; results.json derives from those two.
"""

import contextlib
import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from src.distillation.base import (
    causal_lm,
    compute_dtype,
    load_model,
    load_tokenizer,
    model_fingerprint,
    place,
    prompt_text,
    shared_vocabulary,
)
from src.distillation.batching import encode_pairs, read_clean
from src.distillation.heldout import score_heldout
from src.distillation.lora import load_adapters
from src.distillation.packing import check_packing
from src.distillation.sft import Sampling, generate, make_requests
from src.distillation.teacher import model_reader
from src.evaluation.arms import Arms, resolve_arms, run_of_model, use_arm
from src.evaluation.report import write_reports
from src.evaluation.results import make_results, run_files
from src.evaluation.results_schema import ARMS, SCHEMA_VERSION, read_results, write_results
from src.grading.graders import grade_all, read_dataset
from src.grading.rows import UNGRADED, Grade
from src.grading.sandbox import Sandbox, open_sandbox
from src.utils.common import (
    ROOT,
    Progress,
    UserError,
    append_jsonl,
    finish_stage,
    logger,
    provenance,
    read_json,
    read_jsonl,
    repair_jsonl_tail,
    require_disk,
    sha256_file,
    sha256_text,
    stage_state,
    start_stage,
)
from src.utils.config import read_profile, setting
from src.utils.stages import hold

SECTION = "evaluate_distillation"
MODES = {"quick": 10, "medium": 50, "full": 350}
PRESETS = {"raw": {"top_p": 1.0, "top_k": 0}, "recommended": {"top_p": 0.8, "top_k": 20}}


@dataclass
class EvaluateConfig:
    data_dir: str = setting("data/processed", "where eval_dataset.jsonl is")
    experiment_dir: str = setting("outputs/experiment/default", "held-out rows are in its folder sft/, runs beside it")
    output_dir: str = setting("outputs/evaluation", "where samples, results and reports go")
    model_path: str | None = setting(
        None, "RUN/final_model of the distilled student (default: the newest finished run)"
    )
    sft_model_path: str | None = setting(None, "RUN/final_model of its control (default: the newest that matches)")
    base: str | None = setting(None, "the student before training (default: from the run's kd_config.json)")
    teacher: str | None = setting(None, "the teacher (default: from the run's kd_config.json)")
    arms: list[str] = setting(list(ARMS), "which of base, sft, kd, teacher to evaluate")
    mode: Literal["quick", "medium", "full"] = setting("full", "10, 50 or 350 prompts")
    temperatures: list[float] = setting([0.1, 0.7, 1.2], "sampling temperatures; 0 is greedy", "temperature")
    presets: list[str] = setting(["recommended"], "raw (top_p 1, top_k 0) and / or recommended (0.8, 20)")
    num_samples: int = setting(1, "answers a prompt, temperature and preset")
    max_new_tokens: int = setting(768, "longest answer")
    batch_size: int = setting(32, "rows in one forward pass")
    packing: bool = setting(True, "score held-out rows packed end to end; --no_packing pads them")
    heldout: bool = setting(True, "score the held-out teacher text (KL, NLL, top-1 agreement)")
    max_length: int = setting(1024, "longest held-out row in tokens")
    teacher_devices: list[int] = setting([], "GPUs the teacher is spread over")
    student_devices: list[int] = setting([], "GPUs the student is spread over")
    gpu_memory_gb: float = setting(36.0, "weights one GPU may hold, 1e9 bytes")
    lm_eval_tasks: list[str] = setting([], "tasks of lm-evaluation-harness (names or YAML files) for the student arms")
    seed: int = setting(42, "every answer's seed is made from this, its row, temperature and preset")
    allow_unsafe_execution: bool = setting(False, "run code answers even where the host allows limits only")
    overwrite: bool = setting(False, "evaluate again")


def select_rows(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` rows, the sources taking turns, each in the order of its ids: quick is part of medium, medium of full."""
    by_source: dict[str, list] = {}
    for row in sorted(rows, key=lambda row: row["id"]):
        by_source.setdefault(row["source"], []).append(row)
    turns = [(turn, source, row) for source, own in by_source.items() for turn, row in enumerate(own)]
    return [row for _, _, row in sorted(turns, key=lambda item: item[:2])[:count]]


def _stored(path: Path) -> list[dict[str, Any]]:
    repair_jsonl_tail(path)
    return read_jsonl(path) if path.is_file() and path.stat().st_size else []


def _sample_row(arm: str, row: dict[str, Any], answer: dict[str, Any], preset: str, prompt: str, result: Grade,
                sandbox_level: str) -> dict[str, Any]:  # fmt: skip
    return {
        "arm": arm,
        "id": row["id"],
        "source": row["source"],
        "domain": row["domain"],
        "grader": row["grader"],
        "prompt": row["prompt"],
        "reference": row["reference"],
        "temperature": answer["sampling"]["temperature"],
        "preset": preset,
        "sample_index": answer["sample_index"],
        "seed": answer["seed"],
        "sampling": answer["sampling"],
        "prompt_sha256": sha256_text(prompt),
        "response": answer["response"],
        "finish_reason": answer["finish_reason"],
        "num_tokens": answer["num_tokens"],
        **asdict(result),
        "sandbox_level": sandbox_level,
    }


@dataclass
class Models:
    """What the arms run on; the adapters of sft and kd sit on `student`."""

    student: Any = None
    student_tokenizer: Any = None
    teacher: Any = None
    teacher_tokenizer: Any = None


def load_models(config: EvaluateConfig, arms: Arms) -> Models:
    """The models of `arms.found`.

    Raises:
        UserError: one cannot be loaded or placed, or an adapter is for another student.
    """
    dtype, models, base = compute_dtype(), Models(), arms.base
    if arms.found.keys() != {"teacher"}:
        models.student_tokenizer = load_tokenizer(base, config.experiment_dir)
        student = load_model(base, dtype, place(base, config.student_devices, dtype, config.gpu_memory_gb))
        models.student = load_adapters(student, {arm: arms.found[arm] for arm in ("kd", "sft") if arm in arms.found})
    if name := arms.found.get("teacher"):
        models.teacher_tokenizer = load_tokenizer(name, config.experiment_dir)
        models.teacher = load_model(name, dtype, place(name, config.teacher_devices, dtype, config.gpu_memory_gb))
    return models


def _score_heldout(config: EvaluateConfig, arms: Arms, models: Models, rows: list[dict[str, Any]], path: Path) -> None:
    """Append the sums of the rows that heldout.jsonl lacks."""
    names = [arm for arm in ("base", "sft", "kd") if arm in arms.found]
    done = {(row["arm"], row["id"], row["sample_index"]) for row in _stored(path)}
    tokenizers = (models.student_tokenizer, models.teacher_tokenizer)
    pairs, _ = encode_pairs(rows, *tokenizers, config.max_length, "held-out rows")
    todo = [p for p in pairs if not all((arm, p.student.id, p.student.sample_index) in done for arm in names)]
    ours, theirs = [pair.student for pair in todo], [pair.teacher for pair in todo]
    pad_id = models.student_tokenizer.pad_token_id
    student, teacher = (model_reader(m, pad_id, config.packing) for m in (models.student, models.teacher))
    vocab_size = shared_vocabulary(*tokenizers, student.vocab_size, teacher.vocab_size, ours, theirs)
    if config.packing and todo:
        check_packing(models.teacher, theirs, pad_id)
        check_packing(models.student, ours, pad_id)
    contexts = {arm: lambda arm=arm: use_arm(models.student, arm) for arm in names}
    with Progress(len(todo), "held-out rows") as progress:
        for part in score_heldout(student.cut(vocab_size), teacher.cut(vocab_size), todo, contexts):
            append_jsonl(path, [row for row in part if (row["arm"], row["id"], row["sample_index"]) not in done])
            progress.advance(len(part) // len(names))


def cells(config: EvaluateConfig) -> list[tuple[str, float]]:
    """Preset and temperature of every cell; greedy decoding is one cell, for no preset changes it."""
    return [(p, t) for p in config.presets for t in config.temperatures if t or p == config.presets[0]]


def generate_answers(config: EvaluateConfig, arms: Arms, models: Models, rows: list[dict[str, Any]], path: Path,
                     sandbox: Sandbox) -> None:  # fmt: skip
    """Append the graded answers that samples.jsonl lacks. All cells of an arm share its batches."""
    done: dict[str, set] = {}
    for row in _stored(path):
        done.setdefault(row["arm"], set()).add((row["id"], row["sample_index"], row["seed"]))
    by_id = {row["id"]: row for row in rows}
    requests, samplings = [], []
    for preset, temperature in cells(config):
        # the seeds are the same for every arm: arms are compared on common random numbers
        requests += make_requests(rows, config.num_samples, config.seed, f"{preset}/{temperature:g}")
        sampling = Sampling(temperature, **PRESETS[preset], max_new_tokens=config.max_new_tokens)
        samplings += [sampling] * (len(requests) - len(samplings))
    preset_of = {tuple(fields.values()): preset for preset, fields in PRESETS.items()}
    with Progress(len(arms.found) * len(requests), "graded answers", "answer") as progress:
        for arm in arms.found:
            stored = {r for r in requests if (r.id, r.sample_index, r.seed) in done.get(arm, ())}
            progress.skip(len(stored))
            tokenizer = models.teacher_tokenizer if arm == "teacher" else models.student_tokenizer
            prompts = {r.id: prompt_text(tokenizer, r.messages) for r in requests}
            model = models.teacher if arm == "teacher" else causal_lm(models.student)
            with contextlib.nullcontext() if arm == "teacher" else use_arm(models.student, arm):
                for part in generate(model, tokenizer, requests, samplings, config.batch_size, stored):
                    grades = grade_all([(by_id[a["id"]], a["response"], a["finish_reason"]) for a in part], sandbox)
                    presets = [preset_of[a["sampling"]["top_p"], a["sampling"]["top_k"]] for a in part]
                    append_jsonl(path, [
                        _sample_row(arm, by_id[a["id"]], a, preset, prompts[a["id"]], result, sandbox.used_level)
                        for a, preset, result in zip(part, presets, grades, strict=True)
                    ])  # fmt: skip
                    progress.advance(len(part), arm=arm)


def shipped_profile(model_path: str | None = None) -> Path:
    """The shipped profile of a run's experiment; without a run, the one whose experiment has the newest finished run.

    Raises:
        UserError: there is none.
    """
    experiment = run_of_model(model_path).get("experiment") if model_path else None
    found = []
    for profile in sorted((ROOT / "configs").glob("*.yaml")):
        folder = Path(read_profile(profile, SECTION, EvaluateConfig).get("experiment_dir", ""))
        if model_path:
            found += [(folder.name, profile)] if folder.name == experiment else []
        for results in () if model_path else folder.parent.glob("gpu_optimized_kd_*/kd_results.json"):
            if read_json(results).get("experiment") == folder.name:
                found.append((results.parent.name, profile))
    if found:
        return max(found)[1]
    if model_path:
        raise UserError(
            f"--model_path {model_path} is of no shipped profile's experiment; name its profile with --config"
        )
    raise UserError("no finished run of a shipped profile; run bash run_pipeline.sh, or name a profile with --config")


def _check(config: EvaluateConfig) -> None:
    for name, known in (("arms", ARMS), ("presets", PRESETS), ("temperatures", None)):
        values = getattr(config, name)
        if not values:
            raise UserError(f"{name}: name at least one")
        for value in values:
            if known is not None and value not in known:
                raise UserError(f"{name}: unknown {value!r}; there are {', '.join(known)}")
            if values.count(value) > 1:
                raise UserError(f"{name}: {value} is named twice")
    for name in ("num_samples", "batch_size", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1")
    for temperature in config.temperatures:
        Sampling(temperature)  # complains before anything is loaded or written


def run_evaluation(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate every arm; returns the content of results.json.

    Writes `output_dir`/{samples,heldout}.jsonl, results.json and report.{md,html}. Killed and called again, it goes on
    where it was; called again when finished, it returns what is there.

    Raises:
        UserError: something the user must put right, or another process works on `output_dir`; the text says what.
    """
    _check(config)
    arms = resolve_arms(config)
    with hold(Path(config.output_dir), SECTION):
        return _evaluate(config, arms)


def _evaluate(config: EvaluateConfig, arms: Arms) -> dict[str, Any]:
    """`run_evaluation` of these arms, in a folder that is held."""
    data = Path(config.data_dir) / "eval_dataset.jsonl"
    rows = read_dataset(data)
    gradeable = [row for row in rows if row["grader"] != UNGRADED]
    if len(gradeable) < len(rows):
        logger.info("%s: %d rows have no grader; they count as held-out text only", data, len(rows) - len(gradeable))
    chosen = select_rows(gradeable, MODES[config.mode])
    heldout_file = Path(config.experiment_dir) / "sft" / "sft_eval_data_clean.jsonl"
    with_heldout = config.heldout and "teacher" in arms.found and len(arms.found) > 1
    heldout_rows = read_clean(heldout_file) if with_heldout else []

    ignored = {
        "overwrite", "output_dir", "data_dir", "experiment_dir", "model_path", "sft_model_path", "base", "teacher",
        "lm_eval_tasks",
    }  # fmt: skip
    settings = {name: value for name, value in asdict(config).items() if name not in ignored}
    placement = {"teacher_devices", "student_devices", "gpu_memory_gb"}  # others may finish what these began
    fingerprint = {
        **{name: value for name, value in settings.items() if name not in placement},
        "schema_version": SCHEMA_VERSION,
        "data": sha256_file(data),
        "heldout_rows": sha256_file(heldout_file) if with_heldout else None,
        "models": {arm: model_fingerprint(name) for arm, name in arms.found.items()},
    }
    folder = Path(config.output_dir)
    samples_path, heldout_path, results_path = (folder / n for n in ("samples.jsonl", "heldout.jsonl", "results.json"))
    reports = [folder / "report.md", folder / "report.html"]
    outputs = [samples_path, results_path, *reports, *([heldout_path] if with_heldout else [])]
    marker = folder / "evaluation.json"
    if stage_state(marker, fingerprint, config.overwrite, outputs) == "done":
        logger.info("%s is complete; nothing to do", folder)
        return read_results(results_path)
    answers = len(chosen) * len(arms.found) * len(cells(config)) * config.num_samples
    require_disk(folder, answers * (4 * config.max_new_tokens + 2000), "the answers")
    start_stage(marker, fingerprint)
    samples_path.touch()
    if len(chosen) < MODES[config.mode]:
        logger.info(
            "%s asks for %d prompts, %s has %d: all are used", config.mode, MODES[config.mode], data, len(chosen)
        )
    for arm, why in arms.missing.items():
        logger.info("arm %s: %s", arm, why)

    sandbox = open_sandbox(config.allow_unsafe_execution)
    models = load_models(config, arms)
    if heldout_rows:
        _score_heldout(config, arms, models, heldout_rows, heldout_path)
    generate_answers(config, arms, models, chosen, samples_path, sandbox)
    del models
    gc.collect()
    context = {
        "arms": arms.found,
        "missing_arms": arms.missing,
        **run_files(arms.found),
        "settings": {
            "experiment": Path(config.experiment_dir).name,
            "data_dir": config.data_dir,
            "prompts": len(chosen),
            **settings,
        },
        "provenance": provenance(),
    }
    samples = _stored(samples_path)
    results = make_results(samples, _stored(heldout_path) if with_heldout else [], context, config.seed)
    write_results(results_path, results)
    write_reports(folder, results, samples)
    finish_stage(marker, fingerprint)
    return results
