#!/usr/bin/env python3
"""Base against distilled, side by side: a script to run and a function to call, not a pytest file.

python test_kd_inference_v2.py --mode quick --temperature 0.7
python test_kd_inference_v2.py --mode medium --temperature 0.1 0.7 1.2 --model_path RUN/final_model

from test_kd_inference_v2 import test_model
results = test_model(temperature=0.7, mode="quick")
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from src.evaluation.evaluator import SECTION, EvaluateConfig, run_evaluation, shipped_profile
from src.grading.graders import read_dataset
from src.grading.rows import question_of
from src.report.tables import make_console, print_summary
from src.utils.common import logger, read_jsonl, run_cli
from src.utils.config import (
    build_config,
    hardware_argument,
    profile_argument,
    read_profile,
    setting,
    settings_text,
    wants_config,
)

SHOWN = 3  # answers shown side by side
LIMIT = 400  # characters of a text shown


@dataclass
class InferenceTestConfig:
    mode: Literal["quick", "medium", "full"] = setting("quick", "10, 50 or 350 prompts")
    temperature: list[float] = setting([0.7], "sampling temperatures; 0 is greedy", "temperatures")
    model_path: str | None = setting(None, "a run's folder or its final_model (default: the newest finished run)")
    overwrite: bool = setting(False, "generate again")


def comparison(own: InferenceTestConfig, profile: Path, hardware: str | None) -> dict[str, Any]:
    """The evaluation's settings for the arms base and kd."""
    values = read_profile(profile, SECTION, EvaluateConfig, hardware)
    # a folder for each comparison: outputs/inference_test/EXPERIMENT/RUN/quick_T0.1_0.7
    parts = [Path(values.get("experiment_dir", "default")).name]
    if own.model_path:
        parts.append(Path(own.model_path.removesuffix("/").removesuffix("/final_model")).name)
    parts.append(f"{own.mode}_T{'_'.join(f'{t:g}' for t in own.temperature)}")
    # under either of its names, for a setting that is said twice is refused
    return {name: value for name, value in values.items() if name not in ("temperature", "temperatures")} | {
        "arms": ["base", "kd"],
        "heldout": False,
        "mode": own.mode,
        "temperatures": own.temperature,
        "model_path": own.model_path,
        "overwrite": own.overwrite,
        "output_dir": str(Path("outputs", "inference_test", *parts)),
    }


def settings_of(own: InferenceTestConfig, profile: Path, hardware: str | None = None) -> EvaluateConfig:
    """`comparison`, checked."""
    logger.info("profile %s", profile)
    return build_config(EvaluateConfig, comparison(own, profile, hardware), where=str(profile))


def run_comparison(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate both arms; results.json's content and the folder it is in."""
    return {**run_evaluation(config), "output_dir": config.output_dir}


def test_model(
    temperature: float = 0.7,
    mode: str = "quick",
    model_path: str | None = None,
    config: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compare the student before and after distillation at one sampling temperature.

    Args:
        temperature: of the sampling; 0 is greedy.
        mode: `quick`, `medium` or `full`: 10, 50 or 350 prompts (fewer where the data set is smaller).
        model_path: a run's folder or its final_model (default: the newest finished run).
        config: a profile (default: the shipped one of the run's experiment).
        overwrite: compare again although the folder holds a comparison, which is wanted after another training run.

    Returns:
        The content of results.json, and `output_dir`, where samples.jsonl, report.md and report.html are too.

    Raises:
        UserError: something the user must put right.
    """
    profile = Path(config) if config else shipped_profile(model_path)
    asked = {"mode": mode, "temperature": [temperature], "model_path": model_path, "overwrite": overwrite}
    own = build_config(InferenceTestConfig, asked, where="test_model")
    return run_comparison(settings_of(own, profile))


test_model.__test__ = False  # the name is the users'; pytest must not collect it


def _printable(text: str) -> str:
    """Cut to what fits a cell; control characters, which could steer the terminal, are shown as a replacement mark."""
    cut = text if len(text) <= LIMIT else f"{text[:LIMIT]} ..."
    return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in cut)


def show(results: dict[str, Any], data_dir: str) -> None:
    """A few answers side by side, then the summary. Model-written text is shown as text, never as markup."""
    # where the rows are today: the results say where they were when the answers were made
    questions = {row["id"]: question_of(row) for row in read_dataset(Path(data_dir) / "eval_dataset.jsonl")}
    # (temperature, preset, row) -> arm -> its first answer
    answers: dict[tuple[float, str, str], dict[str, dict[str, Any]]] = {}
    for row in read_jsonl(Path(results["output_dir"]) / "samples.jsonl"):
        if row["sample_index"] == 0:
            answers.setdefault((row["temperature"], row["preset"], row["id"]), {})[row["arm"]] = row
    table = Table(
        "T", "sampling", "prompt", "base", "distilled", title="Answers side by side", show_lines=True, expand=True
    )
    # in the order of samples.jsonl: one prompt at every temperature, then the next
    for (temperature, preset, row_id), arms in list(answers.items())[:SHOWN]:
        cells = [f"{temperature:g}", preset, questions[row_id]]
        cells += [f"[{arms[arm]['outcome']}] {arms[arm]['response']}" if arm in arms else "-" for arm in ("base", "kd")]
        table.add_row(*(Text(_printable(cell)) for cell in cells))  # Text: rich would read "[b]" as markup
    make_console().print(table)
    print_summary(results, results["output_dir"])


def main() -> None:
    argv = sys.argv[1:]
    own, config = build_config(InferenceTestConfig, argv=argv, prog=Path(__file__).name), profile_argument(argv)
    profile, hardware = Path(config) if config else shipped_profile(own.model_path), hardware_argument(argv)
    if wants_config(argv):
        print(settings_text(EvaluateConfig, SECTION, comparison(own, profile, hardware)), end="")
    else:
        config = settings_of(own, profile, hardware)
        show(run_comparison(config), config.data_dir)


if __name__ == "__main__":
    run_cli(main)
