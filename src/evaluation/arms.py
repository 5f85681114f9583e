"""Which models an evaluation compares: the student before, the SFT control, the distilled student, the teacher."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.distillation.base import adapter_folder, base_of_adapter, refuse_adapter
from src.evaluation.results_schema import ARMS
from src.utils.common import UserError, read_json

if TYPE_CHECKING:
    from src.evaluation.evaluator import EvaluateConfig


@dataclass(frozen=True)
class Arms:
    """What each arm is, a model name (base, teacher) or an adapter folder (sft, kd); and why others are missing."""

    base: str  # the student that the adapters sit on, whether or not it is an arm
    found: dict[str, str]
    missing: dict[str, str]
    places: dict[str, str] = field(default_factory=dict)  # of all that there are, asked for or not


def _finished_runs(root: Path, prefix: str, experiment: str) -> list[Path]:
    """Finished runs of an experiment, the newest last."""
    # a run's folder ends in the time it began
    runs = [path.parent for path in sorted(root.glob(f"{prefix}_*/kd_results.json"))]
    # several experiments keep their runs in one folder
    return [run for run in runs if read_json(run / "kd_config.json").get("experiment") == experiment]


def _difference(run: dict[str, Any], control: dict[str, Any]) -> str | None:
    """Why a run is no control of another: it must differ in the objective alone (same rows, steps, seed), alpha 0."""
    if not run or not control:
        return "no kd_config.json beside both models says that they had the same rows and steps"
    # 1. a control learns from the text alone
    if control["fingerprint"].get("alpha") != 0:
        return f"it was trained with alpha = {control['fingerprint'].get('alpha')}, a control has 0"
    # 2. and may differ in what only the divergence reads
    objective = {"alpha", "temperature", "divergence", "beta", "teacher_signal", "teacher_cache"}
    objective |= {"teacher_temperature", "teacher_top_k", "teacher_top_p"}
    ours, theirs = run["fingerprint"], control["fingerprint"]
    names = ours.keys() | theirs.keys()
    objective |= {name for name in names if name.startswith("on_policy_")}  # answers of its own teach a control nothing
    # 3. in nothing else; a field that one of them lacks is None there
    for name in sorted(names - objective):
        if ours.get(name) != theirs.get(name):
            return f"its {name} is {theirs.get(name)!r}, the distilled student's {ours.get(name)!r}"
    return None


def _run_config(adapter: Path) -> dict[str, Any]:
    path = adapter.parent / "kd_config.json"
    return read_json(path) if path.is_file() else {}


def run_of_model(path: str) -> dict[str, Any]:
    """kd_config.json of the run that a `--model_path` is of; empty if there is none beside it.

    Raises:
        UserError: the path is no adapter.
    """
    return _run_config(adapter_folder(path, "model_path"))


def distilled_adapter(model_path: str | None, experiment_dir: str) -> Path:
    """The adapter folder that is named, or else that of the newest finished distilled run of the experiment.

    Raises:
        UserError: there is none.
    """
    if model_path:
        return adapter_folder(model_path, "model_path")
    root, experiment = Path(experiment_dir).parent, Path(experiment_dir).name
    runs = _finished_runs(root, "gpu_optimized_kd", experiment)
    if not runs:
        raise UserError(
            f"{root}: no finished run of {experiment}; run scripts/run_improved_kd.py, or pass --model_path"
        )
    return runs[-1] / "final_model"


def resolve_arms(config: "EvaluateConfig") -> Arms:
    """Find every arm that is asked for, by flag or from the newest finished run of the experiment.

    Raises:
        UserError: there is no distilled student, a flag names something that is not there, or base or teacher is an
            adapter.
    """
    # 1. the distilled student, which says what the others are
    root, experiment = Path(config.experiment_dir).parent, Path(config.experiment_dir).name
    kd = distilled_adapter(config.model_path, config.experiment_dir)
    run_config = _run_config(kd)
    experiment = run_config.get("experiment", experiment)  # a named model may be of another experiment
    if run_config.get("alpha") == 0:
        raise UserError(
            f"--model_path {kd} is an SFT control (alpha = 0); name a distilled student, or --sft_model_path"
        )
    # 2. the student before training: by flag, by the run, or by the adapter alone
    adapter = read_json(kd / "adapter_config.json")
    base = config.base or run_config.get("model_name_or_path") or base_of_adapter(adapter)
    refuse_adapter(base)  # its own base would answer in its name
    # 3. the teacher
    found = {"kd": str(kd), "base": base}
    missing = {}
    if teacher := config.teacher or run_config.get("teacher_model_name_or_path"):
        refuse_adapter(teacher)
        found["teacher"] = teacher
    else:
        missing["teacher"] = "no kd_config.json beside the model; name it with --teacher"
    # 4. the control: one that is named must fit, else the newest that does
    if config.sft_model_path:
        control = adapter_folder(config.sft_model_path, "sft_model_path")
        if why := _difference(run_config, _run_config(control)):
            raise UserError(f"--sft_model_path {control} is no control of {kd}: {why}")
        found["sft"] = str(control)
    else:
        controls = _finished_runs(root, "sft_control", experiment)
        matching = [run for run in controls if not _difference(run_config, read_json(run / "kd_config.json"))]
        if matching:
            found["sft"] = str(matching[-1] / "final_model")
        elif controls:
            missing["sft"] = (
                f"{len(controls)} finished controls differ in rows or settings; run_improved_kd.py --alpha 0"
            )
        else:
            missing["sft"] = "no finished control of this experiment; run_improved_kd.py --alpha 0"
    # 5. those that were asked for, in the order of `ARMS`
    asked = {arm: found[arm] for arm in ARMS if arm in found and arm in config.arms}
    missing |= {arm: "not asked for" for arm in ARMS if arm not in config.arms}
    return Arms(base, asked, missing, found)
