"""The outside judge: lm-evaluation-harness on the student arms (optional: `pip install lm_eval==0.4.13`)."""

import contextlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from src.distillation.base import compute_dtype, model_fingerprint
from src.evaluation.arms import resolve_arms
from src.utils.common import UserError, logger, read_json, refuse_mismatch, sha256_file, write_json
from src.utils.config import nearest

if TYPE_CHECKING:
    from src.evaluation.evaluator import EvaluateConfig

KEPT = ("results", "groups", "configs", "versions", "n-shot", "n-samples", "config", "lm_eval_version")


def check_tasks(tasks: Sequence[str]) -> None:
    """Find out before any long work whether the harness is there and knows every task (a name, or a YAML file).

    Raises:
        UserError: it is not, or does not.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm_eval_tasks needs lm-evaluation-harness; pip install lm_eval==0.4.13, or leave it out")
    names = [task for task in tasks if not Path(task).is_file()]
    if names:
        from lm_eval.tasks import TaskManager

        known = TaskManager().all_tasks
        for name in names:
            if name not in known:
                raise UserError(f"--lm_eval_tasks: no task and no YAML file {name!r}{nearest(name, known)}")


def judge_outside(config: "EvaluateConfig") -> list[Path]:
    """Hand base, SFT control and distilled student, as far as they are arms, to the harness one after another.

    Writes `output_dir`/lm_eval_ARM.json: the harness's numbers with its settings. A file of the same settings is kept.
    The chat template is applied, without thinking; all else is as the tasks say.

    Returns:
        The files.

    Raises:
        UserError: the harness cannot run a task, or a file there was made with other settings.
    """
    arms, files = resolve_arms(config), []
    device = f"cuda:{(config.student_devices or [0])[0]}" if torch.cuda.is_available() else "cpu"
    for arm in (arm for arm in ("base", "sft", "kd") if arm in arms.found):
        model_args = {"pretrained": arms.base, "dtype": str(compute_dtype()).removeprefix("torch.")}
        model_args |= {"enable_thinking": False} | ({} if arm == "base" else {"peft": arms.found[arm]})
        settings: dict[str, Any] = {
            "tasks": {task: sha256_file(task) if Path(task).is_file() else None for task in config.lm_eval_tasks},
            "model": {"base": model_fingerprint(arms.base), arm: model_fingerprint(arms.found[arm])},
            "model_args": model_args,
            "apply_chat_template": True,
        }
        path = Path(config.output_dir) / f"lm_eval_{arm}.json"
        files.append(path)
        if path.is_file() and not config.overwrite:
            refuse_mismatch(path, read_json(path)["settings"], settings)
            logger.info("%s is there; nothing to do", path)
            continue
        found = _evaluate(config, model_args, device)
        write_json(path, {"arm": arm, "settings": settings} | {name: found[name] for name in KEPT if name in found})
    return files


def _evaluate(config: "EvaluateConfig", model_args: dict[str, Any], device: str) -> dict[str, Any]:
    import lm_eval
    from lm_eval.utils import handle_non_serializable

    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = lm_eval.simple_evaluate(
                "hf", dict(model_args), list(config.lm_eval_tasks), device=device, batch_size=config.batch_size,
                apply_chat_template=True, log_samples=False, bootstrap_iters=1000,
            )  # fmt: skip
    except (OSError, KeyError, ValueError, ConnectionError) as error:  # a hub out of reach, a data file, a YAML field
        reason = " ".join(str(error).split())[:200]
        tasks = ", ".join(config.lm_eval_tasks)
        raise UserError(f"lm-evaluation-harness cannot run {tasks}: {type(error).__name__}: {reason}") from error
    return json.loads(json.dumps(found | {"lm_eval_version": lm_eval.__version__}, default=handle_non_serializable))
