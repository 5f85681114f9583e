"""Many training runs on one teacher cache: a grid of settings, each point an ordinary run in a process of its own.

    plan = make_plan(read_grid(["--alpha", "0", "0.5", "--seed", "1", "2"], profile_values), folder)
    run_plan(plan, folder)  # leaves sweep.json

What a cell of the grid is judged by are the validation rows. A setting that has no effect in a cell (the temperature
where alpha is 0) makes no second run: one run serves all cells that differ in nothing else.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml

from src.distillation.batching import StepOrder, clean_files, is_validation, read_clean
from src.distillation.heldout import EXACT
from src.distillation.kd import identify, read_config
from src.distillation.kd_config import CUT, ON_POLICY, SECTION, KDConfig
from src.distillation.run_folder import complete_checkpoints
from src.distillation.server import guarded
from src.distillation.starting import find_start
from src.utils.common import (
    ROOT,
    Progress,
    UserError,
    logger,
    provenance,
    read_json,
    read_jsonl,
    refuse_mismatch,
    write_json,
    write_text,
)
from src.utils.config import build_config, field_of

REPEATED = ("seed", "data_seed")  # axes whose values repeat a cell instead of making another
# Settings of which a sweep has one value, and why.
ONE_VALUE = {
    "experiment_dir": "it has one cache",
    "teacher_model_name_or_path": "it has one cache, of one teacher",
    "teacher_signal": "it has one cache",
    "init_from": "it has one beginning",
    "validation_fraction": "all cells are measured on the same rows",
    "max_length": "all cells are measured on the same rows",
}
SETTLED = ("output_dir", "resume", "overwrite")  # a run's own are the sweep's to say
MEASURES = ("kl_to_teacher", "nll", "top1_agreement", "expected_acceptance")
# Settings that say how a run is computed, not what it learns, and may be axes all the same: the product of the two is
# the rows of a step, and another student is another run.
AXES_OF_CONDUCT = ("model_name_or_path", "per_device_train_batch_size", "gradient_accumulation_steps")
POLL = 1.0  # seconds between two looks at how far a run is
FAREWELL = 30.0  # seconds a run has to end by itself when the sweep is interrupted


@dataclass(frozen=True)
class Grid:
    """What a sweep was asked for.

    values: the profile's training settings, names (or aliases) to values.
    fixed: further arguments, the same for all runs, such as `["--max_steps", "50"]`.
    axes: setting -> its values as words, in the order in which they were named.
    """

    values: dict[str, Any]
    fixed: tuple[str, ...]
    axes: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class PlannedRun:
    """One training run: the name of its folder, its settings, what identifies it, the steps it will about take."""

    name: str
    config: KDConfig
    fingerprint: dict[str, Any]
    steps: int


@dataclass(frozen=True)
class Cell:
    """A point of the grid without its seeds: the runs that serve it, one a seed.

    settings: axis -> value; None where the cell does not depend on it.
    """

    settings: dict[str, Any]
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    grid: Grid
    cells: tuple[Cell, ...]
    runs: dict[str, PlannedRun]


@dataclass(frozen=True)
class Outcome:
    """How a run stands: `finished`, `failed` (with its last line) or `open`."""

    status: str
    line: str = ""


def read_grid(words: Sequence[str], values: dict[str, Any]) -> Grid:
    """A grid from a command line in which a setting may have several values: `--alpha 0 0.5 --max_steps 50`.

    A setting with one value, a switch, or a setting that is a list itself, is the same for all runs.

    Raises:
        UserError: an unknown setting, one that a sweep cannot vary, or no setting with several values.
    """
    # flag by flag: the same for all runs, or an axis
    types = get_type_hints(KDConfig)
    fixed: list[str] = []
    axes: dict[str, tuple[str, ...]] = {}
    said: set[str] = set()
    for flag, given in _flags(words):
        name = flag.removeprefix("--")
        if not given and name.startswith("no_"):  # a switch: --no_packing
            fixed.append(flag)
            continue
        field = field_of(KDConfig, name)  # "kd_alpha" -> "alpha", so that none is said twice
        if field in said:
            raise UserError(f"{flag}: {field} is set twice; name all its values once")
        said.add(field)
        if field in SETTLED:
            raise UserError(f"{flag}: a sweep names its runs' folders and goes on with unfinished ones; leave it out")
        # --lora_target_modules q_proj v_proj is one value, a list
        if len(given) < 2 or get_origin(types[field]) is list:
            fixed += [flag, *given]
            continue
        if field in ONE_VALUE:
            raise UserError(f"{flag}: a sweep has one value of {field}, for {ONE_VALUE[field]}; make a sweep of each")
        axes[field] = tuple(given)
    if not axes:
        raise UserError("no setting has several values; name some, for example --alpha 0 0.5 0.8 --seed 1 2")
    return Grid(values, tuple(fixed), axes)


def _flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """`--alpha 0 0.5 --packing --seed=1` -> [("--alpha", ["0", "0.5"]), ("--packing", []), ("--seed", ["1"])]"""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            found.append((flag, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise UserError(f"unexpected argument {word!r}; a value stands behind its flag")
    return found


def make_plan(grid: Grid, folder: Path) -> Plan:
    """The runs that a grid needs, in the order in which they are to be made: all cells with the first seed first.

    Raises:
        UserError: a value is of the wrong type or out of range, or stands twice; an axis cannot change what is learned;
            or a run has nothing to be judged by.
    """
    base = _build(grid, {})  # the profile and what is fixed, without the axes
    rows = _training_rows(base)
    # False sorts before True: seeds are the outermost loop of the product, so every cell has a run before one has two
    order = sorted(grid.axes, key=lambda name: name not in REPEATED)  # seeds vary last
    runs: dict[str, PlannedRun] = {}
    named: dict[str, str] = {}  # a run's digest -> its name
    telling: set[str] = set(AXES_OF_CONDUCT)  # settings that tell one run from another
    members: dict[str, list[str]] = {}  # a cell's settings as JSON -> its runs
    typed: dict[str, set[Any]] = {name: set() for name in order}
    for words in itertools.product(*(grid.axes[name] for name in order)):
        # 1. a point of the grid, and which of its settings say nothing
        # as a training run would read the same words from its command line
        config = _build(grid, dict(zip(order, words, strict=True)))
        idle = idle_settings(config)
        settings = {name: None if name in idle else getattr(config, name) for name in grid.axes}
        for name in order:
            # "0.5" and "0.50" are one value, which the words do not tell
            typed[name].add(getattr(config, name))
        telling |= config.identity().keys()

        # 2. the run that it takes: with the profile's values where it does not matter, so that equal runs look equal
        # alpha 0 at T = 1 and at T = 2: both get the profile's T, and are one run
        config = dataclasses.replace(config, **{name: getattr(base, name) for name in idle})
        digest = _digest(config)
        # the first cell that needs a run names it
        name = named.setdefault(digest, _run_name(digest, settings, folder))
        if name not in runs:
            config = dataclasses.replace(config, output_dir=str(folder / "runs" / name))
            runs[name] = PlannedRun(name, config, identify(config)[1], _steps(config, rows))

        # 3. the cell that the run counts for
        # as JSON, for a dict cannot be a key
        cell = json.dumps({name: value for name, value in settings.items() if name not in REPEATED})
        if name not in members.setdefault(cell, []):
            members[cell].append(name)
    # 4. every axis must make a difference
    for name, found in typed.items():
        if name not in telling:
            raise UserError(f"--{name}: it does not change what is learned and makes no other run; give it one value")
        if len(found) < len(grid.axes[name]):
            raise UserError(f"--{name} {' '.join(grid.axes[name])}: a value stands twice; name each once")
    cells = [Cell(json.loads(cell), tuple(names)) for cell, names in members.items()]
    return Plan(grid, tuple(cells), runs)


def _build(grid: Grid, chosen: dict[str, str]) -> KDConfig:
    """The settings of one point of the grid."""
    arguments = [*grid.fixed]
    for name, word in chosen.items():
        arguments.append(f"--{name}={word}")
    config = read_config(build_config(KDConfig, grid.values, arguments, where="the profile", prog="scripts/sweep.py"))
    if config.eval_steps == 0 or config.validation_fraction == 0:
        raise UserError("a sweep chooses by the validation rows; set --eval_steps and --validation_fraction above 0")
    return config


def idle_settings(config: KDConfig) -> set[str]:
    """Settings that have no effect on what this run learns, because of others."""
    idle = set()
    if config.alpha == 0:  # the teacher is not asked
        idle |= {"temperature", "teacher_temperature", "teacher_top_k", "teacher_top_p", "divergence", "beta"}
        idle |= set(ON_POLICY)
    elif not config.on_policy:  # all but the one that is 0, which must stay so
        idle |= set(ON_POLICY) - {"on_policy_fraction" if config.on_policy_rounds else "on_policy_rounds"}
    if config.divergence != "jsd":
        idle.add("beta")
    if config.lr_scheduler_type == "constant":
        idle.add("warmup_steps")
    if config.max_steps > 0:
        idle.add("num_train_epochs")
    if config.optim == "sgd":
        idle |= {"adam_beta1", "adam_beta2", "adam_epsilon"}
    if not config.lora_dropout:  # with it, how the rows are cut into passes decides what is dropped
        idle |= set(CUT) - set(AXES_OF_CONDUCT)
    return idle


def _digest(config: KDConfig) -> str:
    """A hash of all that identifies a run."""
    # the student is no part of a run's settings: its fingerprint has it. Here it may be an axis
    identity = config.identity() | {"student": config.model_name_or_path}
    if start := find_start(config):
        identity["init_from"] = start.sha256
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def _run_name(digest: str, settings: dict[str, Any], folder: Path) -> str:
    """Readable, and with the digest, so that a run is found again under another grid."""
    # the readable part depends on the grid's axes, the digest on the run alone
    for there in sorted((folder / "runs").glob(f"*-{digest}")):
        if there.is_dir():
            return there.name
    words = []
    for name, value in settings.items():
        if value is not None:
            # alpha_0.5-seed_1-1f3a9c07
            shown = Path(value).name if isinstance(value, str) else f"{value:g}"
            words.append(f"{name}_{shown}")
    return "-".join([*words, digest])


def _training_rows(config: KDConfig) -> int:
    """Rows to train on, but for those that will prove too long.

    Raises:
        UserError: none is set aside for validation.
    """
    # how many are too long only their encoding tells, which would take as long as a run's start
    rows = read_clean(clean_files(Path(config.experiment_dir) / "sft")["train"])
    training = sum(not is_validation(row["id"], config.validation_fraction) for row in rows)
    if training == len(rows):
        raise UserError(f"none of {len(rows)} rows is set aside for validation; raise --validation_fraction")
    return training


def _steps(config: KDConfig, rows: int) -> int:
    if config.max_steps > 0:
        return config.max_steps
    per_epoch = StepOrder(rows, config.rows_per_step, config.data_seed).steps_per_epoch
    return math.ceil(per_epoch * config.num_train_epochs)


def status_of(run: PlannedRun) -> str:
    """`finished`, `begun` or `new`.

    Raises:
        UserError: the folder holds a run of other rows, models or cache.
    """
    folder = Path(run.config.output_dir)
    if not (folder / "kd_config.json").is_file():
        return "new"
    refuse_mismatch(folder, read_json(folder / "kd_config.json").get("fingerprint", {}), run.fingerprint)
    return "finished" if (folder / "kd_results.json").is_file() else "begun"


def command_of(run: PlannedRun) -> list[str]:
    """What trains it; its profile is written by `run_plan`."""
    return [sys.executable, str(ROOT / "scripts" / f"{SECTION}.py"), "--config", str(_beside(run, "yaml"))]


def _beside(run: PlannedRun, kind: str) -> Path:
    """The run's profile (yaml) or log, beside its folder, whose name has dots of its own: alpha_0.5-seed_1-1f3a9c07."""
    folder = Path(run.config.output_dir)
    return folder.with_name(f"{folder.name}.{kind}")


def run_plan(
    plan: Plan,
    folder: Path,
    *,
    profile: str = "",
    heldout: str = "",
    overwrite: bool = False,
    stop_on_failure: bool = False,
) -> None:
    """Make the runs that are not finished, one after the other, and keep sweep.json up to date.

    Args:
        profile, heldout: see `results`.
        overwrite: train finished runs again too.
        stop_on_failure: end with the first run that fails; otherwise it is recorded and the others are made.

    Raises:
        UserError: runs failed; the first is named with its last line.
    """
    # all of them first: a folder of other rows is refused before hours are spent
    statuses = {name: "new" if overwrite else status_of(run) for name, run in plan.runs.items()}
    outcomes: dict[str, Outcome] = {}
    with Progress(sum(run.steps for run in plan.runs.values()), f"sweep {folder.name}", "step") as progress:
        for number, (name, run) in enumerate(plan.runs.items(), start=1):
            if statuses[name] == "finished":
                progress.skip(run.steps)
                continue
            outcomes[name] = _make(run, overwrite, progress)
            said = _said(run) if outcomes[name].status == "finished" else f"failed: {outcomes[name].line}"
            # after every run: a sweep that is killed leaves the table of what it has
            logger.info("run %d of %d, %s: %s", number, len(plan.runs), name, said)
            write_json(folder / "sweep.json", results(plan, statuses, outcomes, profile, heldout))
            if outcomes[name].status == "failed" and stop_on_failure:
                break
    write_json(folder / "sweep.json", results(plan, statuses, outcomes, profile, heldout))
    failed = [name for name, outcome in outcomes.items() if outcome.status == "failed"]
    if failed:
        raise UserError(
            f"{folder}: {len(failed)} of {len(plan.runs)} runs failed, first {failed[0]}: {outcomes[failed[0]].line} "
            f"(its log: {folder / 'runs' / failed[0]}.log); mend that and run the same command again"
        )


def _make(run: PlannedRun, overwrite: bool, progress: Progress) -> Outcome:
    """Train one run in a process of its own, so that its memory is given back; its words go to a log beside it."""
    folder = Path(run.config.output_dir)
    # 1. its profile: every setting but those that the command line says
    settings = {}
    for name, value in dataclasses.asdict(run.config).items():
        if value is not None and name not in ("resume", "overwrite"):
            settings[name] = value
    write_text(_beside(run, "yaml"), yaml.safe_dump({SECTION: settings}, sort_keys=False))
    command = [*command_of(run), "--overwrite"] if overwrite else command_of(run)
    done = 0 if overwrite else _last_row(folder).get("step", 0)  # of an earlier session; not of this one's speed
    progress.skip(done)
    # 2. the run; the log of earlier sessions stays, `begin` is where this one starts
    log = _beside(run, "log")
    with log.open("ab") as output:
        begin = output.tell()
        # a session of its own, so that whatever it starts can be ended with it
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    with guarded(child, _end):
        # 3. how far it is, read off its metrics.jsonl
        while child.poll() is None:
            time.sleep(POLL)
            row = _last_row(folder)
            step = min(row.get("step", 0), run.steps)
            if row:
                progress.say(run=run.name, step=step, loss=f"{row['loss']:.4f}")
            # a run that goes on from a checkpoint takes steps again that its metrics had: they count once
            progress.advance(max(0, step - done))
            done = max(done, step)
    # to its end, so that the bar is right for the next run whatever became of this one
    progress.advance(run.steps - done)
    return _outcome(run, child.returncode, log, begin)


def _last_row(folder: Path) -> dict[str, Any]:
    """The newest whole row of metrics.jsonl that holds a loss; a row may just be written."""
    path = folder / "metrics.jsonl"
    # what stands behind the last line end is not whole yet: "{...}\n{..." -> "{...}"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    for line in reversed(lines):
        row = json.loads(line)
        if "loss" in row:
            return row
    return {}


def _end(child: subprocess.Popen) -> None:
    """Interrupt a run that still works, as Ctrl-C would, and make it end if it does not."""
    for word in (signal.SIGINT, signal.SIGKILL):
        if child.poll() is None:
            os.killpg(child.pid, word)  # the group: it is a session of its own
            try:
                child.wait(timeout=FAREWELL)
            except subprocess.TimeoutExpired:
                logger.warning("process %d does not end; killing it", child.pid)


def _outcome(run: PlannedRun, code: int, log: Path, begin: int) -> Outcome:
    folder = Path(run.config.output_dir)
    if code != 0:
        with log.open("rb") as file:
            file.seek(begin)
            said = file.read().decode("utf-8", errors="replace").strip().splitlines() or ["no word"]
        # a user's mistake is one such line (run_cli); anything else ends with a traceback, whose last line says most
        errors = [line for line in said if line.startswith("error: ")]
        line = errors[-1].removeprefix("error: ") if errors else f"exit code {code}: {said[-1]}"
        line = "".join(letter if letter.isprintable() else " " for letter in line)  # it goes to a terminal: no escapes
        return Outcome("failed", line)
    for checkpoint in complete_checkpoints(folder):
        shutil.rmtree(checkpoint)  # of use to an unfinished run only; a grid of them would fill the disk
    return Outcome("finished")


def _validation(folder: Path) -> dict[str, float]:
    """What a finished run measured on the validation rows after its last step."""
    last = read_jsonl(folder / "metrics.jsonl")[-1]
    if "validation_nll" not in last:
        raise UserError(f"{folder}: no validation row is short enough; raise --max_length or --validation_fraction")
    return {name: last[f"validation_{name}"] for name in MEASURES}


def _said(run: PlannedRun) -> str:
    found = _validation(Path(run.config.output_dir))
    return f"validation KL to the teacher {found['kl_to_teacher']:.4f}, NLL {found['nll']:.4f}"


def results(
    plan: Plan, statuses: dict[str, str], outcomes: dict[str, Outcome], profile: str = "", heldout: str = ""
) -> dict[str, Any]:
    """What sweep.json holds: the grid, every run, and every cell with its mean and range over seeds.

    Args:
        statuses: what runs were when the session began, see `status_of`; all are new if they are trained again.
        outcomes: of runs made in this session.
        profile: the path of the profile, to be named.
        heldout: kl_to_teacher or nll: the cell whose validation rows have the lowest also shows its held-out rows, once
            no run is open. No other cell does: they are not for choosing.

    Raises:
        UserError: a finished run is of other rows or another cache than the others.
    """
    # 1. every run: how it stands and what it measured
    first = next(iter(plan.runs.values()))
    runs = {}
    for name, run in plan.runs.items():
        outcome = outcomes.get(name) or Outcome("finished" if statuses[name] == "finished" else "open")
        runs[name] = _run_facts(run, outcome, _shared(first.fingerprint))
    # 2. every cell over its seeds
    cells = []
    for cell in plan.cells:
        finished = [runs[name]["validation"] for name in cell.runs if runs[name]["status"] == "finished"]
        facts = {"settings": cell.settings, "runs": list(cell.runs), "n": len(finished)}
        cells.append(facts | {"validation": _over_seeds(finished)})
    # 3. which cell is lowest, and its held-out rows, which nothing was chosen by
    bounds = {run["kl_is"] for run in runs.values() if run["status"] == "finished"}
    lowest = {name: _lowest(cells, name) for name in ("kl_to_teacher", "nll")}
    # not while a run is open: with its numbers another cell might be the lowest
    settled = heldout and lowest[heldout] and all(run["status"] != "open" for run in runs.values())
    return {
        "profile": profile,
        "experiment_dir": first.config.experiment_dir,
        "models": _models(plan),
        "axes": {name: list(words) for name, words in plan.grid.axes.items()},
        "fixed": shlex.join(plan.grid.fixed),
        "kl_is": next(iter(bounds), EXACT),  # one: all read one teacher's signal
        "cells": cells,
        "lowest": lowest,
        "heldout": _heldout(plan, heldout, lowest[heldout]["cell"]) if settled else None,
        "runs": runs,
        "provenance": provenance(),
    }


def _models(plan: Plan) -> dict[str, str]:
    """Names of the teacher and, unless it is an axis, of the student."""
    config = next(iter(plan.runs.values())).config
    names = {"teacher": Path(config.teacher_model_name_or_path).name}
    if "model_name_or_path" not in plan.grid.axes:
        names["student"] = Path(config.model_name_or_path).name
    return names


def _shared(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's fingerprint that all runs of a table have in common: the rows, the teacher and its cache."""
    return {
        name: value
        for name, value in fingerprint.items()
        if name in ("teacher", "teacher_cache") or name.endswith(".jsonl")  # a file of rows, by its hash
    }


def _run_facts(run: PlannedRun, outcome: Outcome, shared: dict[str, Any]) -> dict[str, Any]:
    folder = Path(run.config.output_dir)
    facts: dict[str, Any] = {"status": outcome.status, "line": outcome.line, "seed": run.config.seed}
    if outcome.status == "finished":
        stored, config = read_json(folder / "kd_results.json"), read_json(folder / "kd_config.json")
        # a run that is there may be of other rows or another cache: its numbers would stand beside these
        refuse_mismatch(folder, _shared(config["fingerprint"]), shared)
        facts |= {name: stored[name] for name in ("steps", "train_seconds", "peak_memory_mb")}
        # of the held-out rows, and so of the validation rows; runs that do not say it read whole distributions
        facts["kl_is"] = stored.get("kl_is", EXACT)
        facts["validation_rows"] = config["rows"]["validation"]
        facts["validation"] = _validation(folder)
    return facts


def _heldout(plan: Plan, chosen_by: str, index: int) -> dict[str, Any]:
    """Of the chosen cell: mean and range over seeds on the held-out rows."""
    measured = []
    for name in plan.cells[index].runs:
        after = read_json(Path(plan.runs[name].config.output_dir) / "kd_results.json")["after"]
        measured.append({measure: after[measure] for measure in MEASURES})
    return {"chosen_by": chosen_by, "cell": index, **_over_seeds(measured)}


def _over_seeds(measured: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    found = {}
    for name in MEASURES:
        values = [one[name] for one in measured]
        if values:
            found[name] = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
    return found


def _lowest(cells: Sequence[dict[str, Any]], measure: str) -> dict[str, Any] | None:
    """The cell with the lowest mean on the validation rows, and those whose ranges over seeds reach into its own.

    Of cells whose seeds have all finished: the mean of fewer seeds is of other seeds.
    """
    measured = [index for index, cell in enumerate(cells) if cell["n"] == len(cell["runs"])]
    if not measured:
        return None
    # of equal means the first
    best = min(measured, key=lambda index: cells[index]["validation"][measure]["mean"])
    # its worst seed is no better than another cell's best: between these two the seeds decide nothing
    highest = cells[best]["validation"][measure]["max"]
    overlapping = []
    for index in measured:
        if index != best and cells[index]["validation"][measure]["min"] <= highest:
            overlapping.append(index)
    return {"cell": best, "overlapping": overlapping}
