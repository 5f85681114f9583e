"""Base, SFT control, distilled student and teacher on the same prompts: four steps, each made from the one before.

answers (answers.jsonl, the only step with models) -> grade (samples.jsonl) -> results (results.json, heldout.jsonl)
-> report (report.md, report.html). A finished step is skipped; `--from STEP` does that step and the later ones again.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from src.distillation.base import SERVED, model_fingerprint
from src.distillation.engines import EngineSettings, engine_name, make_engine, server_kind
from src.distillation.serving import answering
from src.distillation.sft import Sampling
from src.evaluation.answers import (
    MODES,
    PRESETS,
    cells,
    check_serve,
    generate_answers,
    select_rows,
    stored_rows,
)
from src.evaluation.arms import Arms, resolve_arms, run_of_model
from src.evaluation.results import join_heldout, make_results, run_files
from src.evaluation.results_schema import ARMS, SCHEMA_VERSION, read_results, write_results
from src.grading.graders import grade_all, read_dataset
from src.grading.rows import UNGRADED, Row, family_of
from src.grading.sandbox import Sandbox, open_sandbox
from src.report.page import write_reports
from src.utils.common import (
    ROOT,
    Progress,
    UserError,
    finish_stage,
    logger,
    provenance,
    read_json,
    require_disk,
    sha256_file,
    sha256_text,
    stage_state,
    start_stage,
    write_jsonl,
)
from src.utils.config import read_profile, setting
from src.utils.stages import graders_sha256, hold

SECTION = "evaluate_distillation"
MADE = {  # by each step
    "answers": ("answers.jsonl",),  # the first file of each step is the one it must have
    "grade": ("samples.jsonl",),
    "results": ("results.json", "heldout.jsonl"),
    "report": ("report.md", "report.html"),
}
STEPS = tuple(MADE)
GRADED_AT_ONCE = 512  # answers between two signs of life


@dataclass
class EvaluateConfig(EngineSettings):
    data_dir: str = setting("data/processed", "where eval_dataset.jsonl is")
    experiment_dir: str = setting("outputs/experiment/default", "runs are beside it")
    output_dir: str = setting("outputs/evaluation", "where answers, grades, results and reports go")
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
    heldout: bool = setting(True, "take over the runs' measures of the held-out teacher text (KL, NLL, agreement)")
    student_devices: list[int] = setting([], "GPUs the student is spread over (serve: and replicated on)")
    teacher_base_url: str = setting("", "openai: a running server of the teacher, where it is not the students'")
    seed: int = setting(42, "every answer's seed is made from this, its row, temperature and preset")
    allow_unsafe_execution: bool = setting(False, "run code answers even where the host allows limits only")
    from_step: Literal["answers", "grade", "results", "report"] = setting(
        "answers", "do this step and the later ones again, from the files of those before it", "from"
    )
    overwrite: bool = setting(False, "evaluate again, all four steps")


# Where things are and how fast they go, which cannot change an answer: other values may finish what these began
CONDUCT = {
    "overwrite", "from_step", "output_dir", "data_dir", "experiment_dir", "model_path", "sft_model_path", "base",
    "teacher", "heldout", "allow_unsafe_execution", "teacher_devices", "student_devices", "gpu_memory_gb", "serve",
    "base_url", "teacher_base_url", "api_key_variable", "concurrency", "request_timeout", "tries", "max_refused",
}  # fmt: skip


def shipped_profile(model_path: str | None = None) -> Path:
    """The shipped profile of a run's experiment; without a run, the one whose experiment has the newest finished run.

    Raises:
        UserError: there is none.
    """
    experiment = run_of_model(model_path).get("experiment") if model_path else None
    found = []
    for profile in sorted((ROOT / "configs").glob("*.yaml")):
        # runs lie beside the experiment's folder, which names the experiment
        folder = Path(read_profile(profile, SECTION, EvaluateConfig).get("experiment_dir", ""))
        if model_path:
            found += [(folder.name, profile)] if folder.name == experiment else []
        for results in () if model_path else folder.parent.glob("gpu_optimized_kd_*/kd_results.json"):
            if read_json(results).get("experiment") == folder.name:
                found.append((results.parent.name, profile))
    if found:
        return max(found)[1]  # runs' folders end in the time they began: the greatest name is the newest
    if model_path:
        raise UserError(
            f"--model_path {model_path} is of no shipped profile's experiment; name its profile with --config"
        )
    raise UserError("no finished run of a shipped profile; run bash run_pipeline.sh, or name a profile with --config")


def _check(config: EvaluateConfig) -> None:
    # 1. lists: at least one, known, once
    for name, known in (("arms", ARMS), ("presets", PRESETS), ("temperatures", None)):
        values = getattr(config, name)
        if not values:
            raise UserError(f"{name}: name at least one")
        for value in values:
            if known is not None and value not in known:
                raise UserError(f"{name}: unknown {value!r}; there are {', '.join(known)}")
            # named twice, a cell would be there twice
            if values.count(value) > 1:
                raise UserError(f"{name}: {value} is named twice")
    # 2. numbers and flags
    for name in ("num_samples", "max_new_tokens", "batch_size"):  # what a batch holds can change an answer's rounding
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1")
    if config.overwrite and config.from_step != "answers":
        raise UserError(f"--overwrite makes all four steps again, --from {config.from_step} the later ones; say one")
    # 3. what others check: a server's settings, the engine's, a temperature
    serve = check_serve(config)
    make_engine(config, config.base or "", [], serve)  # complains about its settings
    for temperature in config.temperatures:
        Sampling(temperature)  # complains before anything is loaded or written


def run_evaluation(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate every arm; returns the content of results.json.

    Killed and called again, it goes on where it was; called again when finished, it returns what is there.

    Raises:
        UserError: something the user must put right, or another process works on `output_dir`; the text says what.
    """
    _check(config)
    folder, first = Path(config.output_dir), STEPS.index(config.from_step)
    arms = resolve_arms(config) if first == 0 else None  # nothing is looked for that is not needed
    with contextlib.ExitStack() as held:
        # the last step first: every evaluation wants that lock, so that the second is refused before it touches a file
        for step in reversed(STEPS[first:]):
            held.enter_context(hold(folder, SECTION, step))
        # each step checks by itself whether there is anything to do
        if arms is not None:
            answer_step(config, folder, arms)
        # steps that are passed over must be there, and fit one another
        for step in STEPS[:first]:
            _require(folder, step)
        if first <= 1:
            grade_step(config, folder, again=first == 1)
        if first <= 2:
            results_step(config, folder, again=first == 2)
        report_step(folder, again=first == 3)
        return read_results(folder / "results.json")


def marker_of(folder: Path, step: str) -> Path:
    """The file that says what a step was made from, and whether it is complete."""
    return folder / f"step_{step}.json"


def _require(folder: Path, step: str) -> None:
    """Refuse to go on from a step that is not complete, or was made from another file than is there now.

    Raises:
        UserError: names the step and the way out.
    """
    marker = marker_of(folder, step)
    # step -> the name in its fingerprint, and the file, that it was made from
    made_from = {"grade": ("answers", "answers.jsonl"), "results": ("samples", "samples.jsonl")}
    stored = read_json(marker) if marker.is_file() else {}
    complete = stored.get("finished") and (folder / MADE[step][0]).is_file()
    if complete and step in made_from:
        name, file = made_from[step]
        complete = stored["fingerprint"][name] == sha256_file(folder / file)
    if not complete:
        way_out = "run this without --from" if step == "answers" else f"run this with --from {step}"
        raise UserError(f"{folder}: the step {step} is not complete, or its source has changed; {way_out}")


def answered(folder: Path) -> dict[str, Any]:
    """What the step `answers` left: its fingerprint, the arms, settings and provenance; empty before it began."""
    path = marker_of(folder, "answers")
    return read_json(path) if path.is_file() else {}


def _discard(folder: Path, first: int) -> None:
    """Delete what the steps from this one on have made: they are made from what is about to change."""
    # The last step first, and of each its marker last: a kill leaves no file without the marker of its step and those
    # before it, which would be refused as somebody else's. A marker whose first file is gone has that made again.
    for step in reversed(STEPS[first:]):
        for path in (*(folder / name for name in MADE[step]), marker_of(folder, step)):
            path.unlink(missing_ok=True)


def answer_settings(config: EvaluateConfig, arms: Arms) -> dict[str, Any]:
    """The settings that can change an answer."""
    settings = {name: value for name, value in asdict(config).items() if name not in CONDUCT}
    settings["engine"], serve = engine_name(config), check_serve(config)
    settings["server"] = server_kind(config, serve)
    # what a server answers depends on which one it is and on its flags, not on batches of ours
    if settings["engine"] != "transformers":  # only there batches have a fixed make-up
        del settings["batch_size"]
    # what a server runs in the teacher's place (a quantised one, say) answers in its name
    if serve is not None and serve.model and "teacher" in arms.found and not config.teacher_base_url:
        settings["answers_as_teacher"] = model_fingerprint(serve.model)
    if serve is not None and answering(serve):
        settings["server_arguments"] = answering(serve)
    return settings


def answer_step(config: EvaluateConfig, folder: Path, arms: Arms) -> None:
    """answers.jsonl: every arm's answers, as the engine gave them."""
    rows = _chosen_rows(config)
    # 1. what the answers depend on
    asked = [[row["id"], row["system"], row["prompt"]] for row in rows]
    settings, models = answer_settings(config, arms), dict(arms.found)
    if models.keys() - {"teacher"}:
        models["base"] = arms.base  # it answers below every adapter, whether or not it is an arm
    fingerprint = settings | {
        "prompts": sha256_text(repr(asked)),
        "models": {arm: model_fingerprint(name) for arm, name in models.items()},
    }
    # 2. what is there of them
    path, marker = folder / "answers.jsonl", marker_of(folder, "answers")
    if config.overwrite:
        _discard(folder, 0)
    # without a marker, any file of any step is of another version, or of something else
    made = [path] if marker.is_file() else [folder / name for names in MADE.values() for name in names]
    state = stage_state(marker, fingerprint, False, made)
    if state == "done":
        logger.info("%s is complete; no answers are generated", path)
        return
    # 3. where they came from: a run that goes on keeps what was written when it began
    facts = {name: value for name, value in answered(folder).items() if name not in ("finished", "fingerprint")}
    if state == "fresh":
        _discard(folder, 1)
    if state == "fresh" or not path.is_file():  # answers that are gone are all given anew, here and by this code
        shown = {"experiment": Path(config.experiment_dir).name, "data_dir": config.data_dir, "prompts": len(rows)}
        facts = {"arms": arms.found, "missing_arms": arms.missing, "settings": shown | settings,
                 "provenance": provenance()}  # fmt: skip
    # 4. room for them, and once more with their grades: 4 bytes a token, 2 kB for the other fields
    answers = len(rows) * len(arms.found) * len(cells(config)) * config.num_samples
    require_disk(folder, 2 * answers * (4 * config.max_new_tokens + 2000), "the answers")
    # 5. the answers that are missing
    start_stage(marker, fingerprint, **facts)
    path.touch()  # there may be nothing to answer, and the next step reads the file
    for arm, why in arms.missing.items():
        logger.info("arm %s: %s", arm, why)
    generate_answers(config, arms, rows, path)
    finish_stage(marker, fingerprint, **facts)


def _chosen_rows(config: EvaluateConfig) -> list[Row]:
    """The prompts of this mode, of those that a grader can judge."""
    data = Path(config.data_dir) / "eval_dataset.jsonl"
    rows = read_dataset(data)
    gradeable = [row for row in rows if row["grader"] != UNGRADED]
    if len(gradeable) < len(rows):
        logger.info("%s: %d rows have no grader; they count as held-out text only", data, len(rows) - len(gradeable))
    wanted = MODES[config.mode]
    if len(gradeable) < wanted:
        logger.info("%s asks for %d prompts, %s has %d: all are used", config.mode, wanted, data, len(gradeable))
    # by source in turn, the smaller modes inside the larger
    return select_rows(gradeable, wanted)


def grade_step(config: EvaluateConfig, folder: Path, again: bool = False) -> None:
    """samples.jsonl: the answers with their grades, in an order of its own. No model, and no state but the sandbox."""
    # 1. whether there is anything to do
    data = Path(config.data_dir) / "eval_dataset.jsonl"
    answers, samples, marker = folder / "answers.jsonl", folder / "samples.jsonl", marker_of(folder, "grade")
    fingerprint = {
        "answers": sha256_file(answers),
        "data": sha256_file(data),
        "graders": graders_sha256(),
        "allow_unsafe_execution": config.allow_unsafe_execution,
    }
    way_out = "pass --from grade to grade again"
    if not again and stage_state(marker, fingerprint, False, [samples], way_out) == "done":
        return
    # 2. the prompts must be those that were answered; the references may have changed
    rows = {row["id"]: row for row in read_dataset(data)}
    given = sorted(stored_rows(answers), key=_place)
    for answer in given:
        if answer["id"] not in rows or answer["prompt"] != rows[answer["id"]]["prompt"]:
            raise UserError(
                f"{answers}: row {answer['id']} is not in {data}, or has another prompt there; bring the file back "
                "that was answered, or pass --overwrite to answer this one"
            )
    _discard(folder, 1)  # only now, when nothing is left to refuse
    start_stage(marker, fingerprint)
    # 3. the grades; a sandbox is opened only where there is code, since that probes the host
    asked = {answer["id"] for answer in given}
    has_code = any(rows[key]["grader"] == "python_tests" for key in asked)
    sandbox = open_sandbox(config.allow_unsafe_execution) if has_code else Sandbox("none", "there is no code to run")
    graded: list[dict[str, Any]] = []
    with Progress(len(given), "grades", "answer") as progress:
        for start in range(0, len(given), GRADED_AT_ONCE):
            # `grade_all` runs the code of one part in parallel
            part = given[start : start + GRADED_AT_ONCE]
            grades = grade_all([(rows[a["id"]], a["response"], a["finish_reason"]) for a in part], sandbox)
            for answer, grade in zip(part, grades, strict=True):
                level = {"sandbox_level": sandbox.used_level}
                graded.append(_sample(answer, rows[answer["id"]]) | asdict(grade) | level)
            progress.advance(len(part))
    # 4. all in one write: a killed regrading leaves no half file
    write_jsonl(samples, graded)
    finish_stage(marker, fingerprint)


def _place(answer: dict[str, Any]) -> tuple:
    """Where an answer stands in samples.jsonl, whatever the order in which a server gave them."""
    return (
        ARMS.index(answer["arm"]), answer["id"], answer["preset"], answer["sampling"]["temperature"],
        answer["sample_index"],
    )  # fmt: skip


def _sample(answer: dict[str, Any], row: Row) -> dict[str, Any]:
    """An answer beside what was asked, without its grade."""
    return {
        "arm": answer["arm"],
        "id": row["id"],
        "source": row["source"],
        "domain": row["domain"],
        "family": family_of(row),
        "grader": row["grader"],
        "prompt": row["prompt"],
        "reference": row["reference"],
        "temperature": answer["sampling"]["temperature"],
        "preset": answer["preset"],
        "sample_index": answer["sample_index"],
        "seed": answer["seed"],
        "sampling": answer["sampling"],
        "prompt_sha256": answer["prompt_sha256"],
        "response": answer["response"],
        "finish_reason": answer["finish_reason"],
        "num_tokens": answer["num_tokens"],
    }


def results_step(config: EvaluateConfig, folder: Path, again: bool = False) -> None:
    """results.json from the grades, and heldout.jsonl, which joins what the training runs measured."""
    # 1. whether there is anything to do
    facts, samples = answered(folder), folder / "samples.jsonl"
    runs = _measured_runs(facts, config.teacher) if config.heldout else {}
    fingerprint = {
        "samples": sha256_file(samples),
        "heldout": {arm: sha256_file(run / "heldout.jsonl") for arm, run in runs.items()},
        "training": sha256_text(json.dumps(run_files(facts["arms"]))),  # kd_results.json and curves
        "schema_version": SCHEMA_VERSION,
    }
    marker, results, joined = marker_of(folder, "results"), folder / "results.json", folder / "heldout.jsonl"
    outputs = [results, *([joined] if runs else [])]
    way_out = "pass --from results to make them again"
    if not again and stage_state(marker, fingerprint, False, outputs, way_out) == "done":
        return
    # 2. the held-out rows; a run brings base along, whether or not it was asked for
    heldout: list[dict[str, Any]] = []
    if runs:
        families = {row["id"]: family_of(row) for row in read_dataset(Path(config.data_dir) / "eval_dataset.jsonl")}
        heldout = [row for row in join_heldout(runs, families) if row["arm"] in facts["arms"]]
    _discard(folder, 2)  # only now, when nothing is left to refuse
    start_stage(marker, fingerprint)
    if runs:
        write_jsonl(joined, heldout)
    # 3. the numbers, with the seed of the answers: from stored files alone, the same every time
    context = {name: facts[name] for name in ("arms", "missing_arms", "settings", "provenance")}
    context |= run_files(facts["arms"])
    write_results(results, make_results(stored_rows(samples), heldout, context, facts["settings"]["seed"]))
    finish_stage(marker, fingerprint)


def _measured_runs(facts: dict[str, Any], teacher: str | None = None) -> dict[str, Path]:
    """The runs of the trained arms that have measured the held-out text, with the student and teacher of this
    evaluation (`--base` and `--teacher` may have named others).

    Args:
        teacher: as `--teacher` names it, arm or not.
    """
    runs = {}
    for arm in ("kd", "sft"):
        if arm not in facts["arms"]:
            continue
        run, why = Path(facts["arms"][arm]).parent, ""
        if not (run / "heldout.jsonl").is_file():
            why = "there is no heldout.jsonl"
        else:
            run_config = read_json(run / "kd_config.json")
            if run_config.get("load_in_4bit"):  # the answers here are those of the student in bf16
                why = (
                    "it was measured on the student in 4 bits, which is another model (kd_results.json has the numbers)"
                )
            if other := _other_model(facts, teacher, run_config):
                why = f"it was measured with another {other}"
        if why:
            logger.info("%s: %s; closeness to the teacher is not shown for %s", run, why, arm)
        else:
            runs[arm] = run
    return runs


def _other_model(facts: dict[str, Any], teacher: str | None, run_config: dict[str, Any]) -> str | None:
    """Which of a run's models this evaluation has another in place of, "student" or "teacher"; None for neither."""
    models, measured = facts["fingerprint"]["models"], run_config["fingerprint"]
    # 1. the student; an evaluation of an earlier version has its fingerprint only where it was an arm
    if "base" in models and models["base"] != measured.get("student"):
        return "student"
    # 2. the teacher: an arm, or named though it is none
    named, own = facts["arms"].get("teacher", teacher), run_config["teacher_model_name_or_path"]
    if measured.get("teacher", "").startswith(SERVED):  # the run has seen no weights of it; both name one tokenizer
        same = named in (None, own)
    elif "teacher" in models:
        same = models["teacher"] == measured.get("teacher")
    else:
        same = named in (None, own) or model_fingerprint(named) == measured.get("teacher")
    return None if same else "teacher"


def report_step(folder: Path, again: bool = False) -> None:
    """report.md and report.html, drawn from results.json and samples.jsonl."""
    results, samples = folder / "results.json", folder / "samples.jsonl"
    for needed in (results, samples):
        if not needed.is_file():
            raise UserError(f"{needed}: no such file; run this without --from report")
    fingerprint = {"results": sha256_file(results), "samples": sha256_file(samples)}
    marker, outputs = marker_of(folder, "report"), [folder / name for name in MADE["report"]]
    if again:
        _discard(folder, STEPS.index("report"))
    if stage_state(marker, fingerprint, False, outputs, "pass --from report to draw it again") == "done":
        return
    start_stage(marker, fingerprint)
    write_reports(folder, read_results(results), stored_rows(samples))
    finish_stage(marker, fingerprint)
