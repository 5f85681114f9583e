"""Tiny models, prompts and runs for the tests of the evaluation."""

import json
from pathlib import Path

import pytest

from src.distillation.kd import run_kd_pipeline
from src.evaluation.evaluator import EvaluateConfig, run_evaluation
from src.utils.common import UserError, read_json, read_jsonl


def eval_rows() -> list[dict[str, str]]:
    """12 prompts: 6 sums, 3 functions, 3 incidents."""
    rows = []
    for i in range(12):
        kind = ("sums", "functions", "sums", "incidents")[i % 4]
        rows.append({"id": f"{kind}-{i:02d}", "source": kind, "split": "eval", "system": "", "reference": str(i)})
        if kind == "sums":
            rows[-1] |= {"domain": "maths", "prompt": f"What is {i} + 0?", "grader": "numeric", "grader_args": "{}"}
        elif kind == "functions":
            arguments = {"setup": "", "tests": f"assert f() == {i}", "entry_point": "f"}
            rows[-1] |= {"domain": "code", "prompt": f"Write f, which returns {i}.", "grader": "python_tests"}
            rows[-1]["grader_args"] = json.dumps(arguments)
        else:
            arguments = {"groups": [{"name": "root_cause", "any": ["disk full"]}], "pass_mark": 1.0}
            rows[-1] |= {"domain": "ops", "prompt": f"Alert {i}: writes fail.", "grader": "rubric"}
            rows[-1]["grader_args"] = json.dumps(arguments)
    return rows


def train(root: Path, **settings) -> dict:
    return run_kd_pipeline(read_json(root / "settings.json") | {"experiment_dir": str(root / "tiny")} | settings)


def config_for(root: Path, output: Path, **settings) -> EvaluateConfig:
    small = {"mode": "quick", "temperatures": [0.7], "max_new_tokens": 8, "batch_size": 4}
    return EvaluateConfig(
        data_dir=str(root / "data"), experiment_dir=str(root / "tiny"), output_dir=str(output), **(small | settings)
    )


def run_of(root: Path) -> Path:
    [folder] = root.glob("gpu_optimized_kd_*")
    return folder


def stored(config: EvaluateConfig, name: str) -> list[dict]:
    return read_jsonl(Path(config.output_dir) / f"{name}.jsonl")


def refused(config: EvaluateConfig, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        run_evaluation(config)
    assert "\n" not in str(caught.value)
