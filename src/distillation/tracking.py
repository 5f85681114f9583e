"""What a run tells an experiment tracker: its settings, every row of metrics.jsonl, at the end the held-out numbers.

The trackers are accelerate's. metrics.jsonl and kd_results.json stay the record: a tracker only shows them.

| `report_to` | writes to | a killed run that goes on is |
|---|---|---|
| tensorboard | `tensorboard/` in the run's folder | in the same folder; steps after the checkpoint are hidden |
| wandb | `wandb/` in the run's folder, its server | the same run, by its id; steps that it has it keeps |
| trackio | the folder TRACKIO_DIR | the same run, by its name; repeated steps stand twice |
| mlflow | the store MLFLOW_TRACKING_URI | the same run, by its id; repeated steps stand twice |

The last three keep the runs of an experiment in one project. Steps that are taken again give what they gave before, so
a point that stands twice stands twice at one place.
"""

import contextlib
import importlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from src.distillation.training import Run
from src.utils.common import UserError, read_json, write_json
from src.utils.config import nearest

NAMES = "tracker.json"  # in a run's folder: what each tracker calls this run
# Whose settings a new session replaces: mlflow refuses a changed one, tensorboard would list the run a second time.
RESTATED = ("trackio", "wandb")


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not here, before any work.

    Raises:
        UserError: accelerate does not know it, or it is not installed.
    """
    # "all" would be every tracker that is installed
    known = [str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL]
    if name == "none" or name in map(str, get_available_trackers()):
        return
    if name in known:
        raise UserError(f"--report_to {name}: it is not installed here; pip install {name}, or leave --report_to out")
    raise UserError(
        f"--report_to {name}: accelerate finds no such tracker here{nearest(name, known)}; it knows {', '.join(known)}"
    )


@contextlib.contextmanager
def tracked(run: Run, folder: Path) -> Iterator[None]:
    """Report to the config's tracker until the block ends, well or badly. accelerate does so on one rank only."""
    if run.config.report_to == "none":
        yield
        return
    # the files are the first rank's
    if run.accelerator.is_main_process:
        _start(run, folder)
    # until the block has ended well: an exception or an end by a signal leaves it so
    failed = True
    try:
        yield
        failed = False
    finally:
        _finish(run.accelerator, failed)


def _start(run: Run, folder: Path) -> None:
    """Begin the tracker's run, or go on with the one that an earlier session of this run began."""
    name, accelerator = run.config.report_to, run.accelerator
    # 1. what this run is called, said before there is a run of the name
    names = read_json(folder / NAMES) if (folder / NAMES).is_file() else {}
    goes_on = name in names
    if not goes_on and name != "mlflow":  # which names its runs itself
        names[name] = secrets.token_hex(8)  # a folder's name may stand in several places
        write_json(folder / NAMES, names)  # first: a kill after the next line must not leave a run nobody knows
    # 2. the tracker's run
    own = _own_settings(name, names.get(name), run, folder, goes_on)
    # the folder was not known when the Accelerator was made; of the four only tensorboard asks for it
    accelerator.project_configuration.logging_dir = str(folder)
    project = "tensorboard" if name == "tensorboard" else Path(run.config.experiment_dir).name
    config = _settings(run) if not goes_on or name in RESTATED else None
    accelerator.init_trackers(project, config=config, init_kwargs={name: own})
    if name == "mlflow" and not goes_on:
        # mlflow's name of the run is known only once it is there
        write_json(folder / NAMES, names | {name: accelerator.get_tracker(name).tracker.info.run_id})


def _own_settings(name: str, known_as: str | None, run: Run, folder: Path, goes_on: bool) -> dict[str, Any]:
    """What a tracker wants to be told in words of its own, so that it finds its run again."""
    if name == "wandb":  # https://docs.wandb.ai/models/runs/resuming: "allow" makes the run or goes on with it
        return {"name": folder.name, "id": known_as, "resume": "allow", "dir": str(folder)}
    if name == "trackio":  # which resumes the newest run of a name
        return {"name": f"{folder.name}-{known_as}", "resume": "allow"}
    if name == "mlflow":
        return {"run_name": folder.name, "run_id": known_as}
    if name == "tensorboard" and goes_on:
        # SummaryWriter hides events from this step on: those of steps that will be taken again
        # with a final model every step is taken, and only held-out numbers may come again
        kept = run.steps if (folder / "final_model").is_dir() else run.step
        return {"purge_step": kept + 1}
    return {}


def _settings(run: Run) -> dict[str, bool | int | float | str | None]:
    """The run's settings in the types that every tracker takes: a list becomes text."""
    config = run.config
    settings = {
        "experiment": Path(config.experiment_dir).name,
        "arm": config.arm,
        "model_name_or_path": config.model_name_or_path,
        "teacher_model_name_or_path": config.teacher_model_name_or_path,
    }
    plain = {}
    # settings, all that makes the run, and what it decided for itself
    for name, value in (settings | config.identity() | run.took_effect).items():
        plain[name] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return plain


def log_heldout(run: Run, results: dict[str, Any]) -> None:
    """The held-out numbers of kd_results.json, as one row at the last step, such as heldout/after/kl_to_teacher."""
    row = {}
    for part in ("before", "after", "teacher", "gap_recovered"):
        for name, value in results[part].items():
            if value is not None:  # no way to go, nothing recovered
                row[f"heldout/{part}/{name}"] = value
    run.accelerator.log(row, step=run.steps)


def _finish(accelerator: Accelerator, failed: bool) -> None:
    """Close the trackers; accelerate's own `finish` would call a run that failed finished."""
    for tracker in accelerator.trackers:
        if failed:
            _finish_failed(tracker)
        else:
            tracker.finish()


def _finish_failed(tracker: GeneralTracker) -> None:
    if tracker.name == "wandb":
        tracker.tracker.finish(exit_code=1)
    elif tracker.name == "mlflow":
        importlib.import_module("mlflow").end_run("FAILED")  # imported here, where it is installed
    else:
        tracker.finish()
