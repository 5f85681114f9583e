"""The whole embedded pipeline at reduced size, through the shell scripts a user runs: real teacher, real student."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from src.utils.common import read_json, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
PROFILE = ROOT / "configs" / f"{os.environ.get('KD_TEST_PROFILE', 'embedded')}.yaml"
REDUCED = {
    "download_datasets": {"domain_train_rows": [32, 8], "domain_eval_rows": [12, 4], "humaneval_train_rows": 2,
                          "humaneval_eval_rows": 2},
    "generate_sft_data": {"max_new_tokens": 64},
    "run_improved_kd": {"max_steps": 12, "save_steps": 4, "eval_steps": 12, "warmup_steps": 2},
    "evaluate_distillation": {"mode": "quick", "temperatures": [0.7], "max_new_tokens": 48},
}  # fmt: skip

pytestmark = pytest.mark.slow


def run(*command: str) -> str:
    done = subprocess.run(
        ["bash", *command], cwd=ROOT, env=os.environ | {"VENV": sys.prefix}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The profile in a folder of its own, and what the first run printed."""
    root = tmp_path_factory.mktemp("pipeline")
    values = yaml.safe_load(PROFILE.read_text())
    values |= {
        "data_dir": str(root / "data"),
        "experiment_dir": str(root / "experiment" / "reduced"),
        "teacher_model_name_or_path": str(root / "models" / "teacher"),
        "model_name_or_path": str(root / "models" / "student"),
    }
    for section, changes in REDUCED.items():
        values[section] |= changes
    values["evaluate_distillation"]["output_dir"] = str(root / "evaluation")
    profile = root / "reduced.yaml"
    profile.write_text(yaml.safe_dump(values))
    return root, str(profile), run("run_pipeline.sh", "--profile", str(profile))


def stamps(root: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime_ns for path in sorted(root.rglob("*")) if path.is_file()}


def test_every_stage_does_its_work(made):
    root, _, printed = made
    config = read_json(root / "models" / "student" / "config.json")
    assert config["num_hidden_layers"] == 20
    train = read_jsonl(root / "data" / "train_dataset.jsonl")
    assert len(train) == 42
    stats = read_json(root / "experiment" / "reduced" / "sft" / "stats.json")
    for split, rows in (("train", 42), ("eval", 18)):
        assert stats[split]["answers"] == stats[split]["kept"] + stats[split]["rejected"] == rows
    [kd] = (root / "experiment").glob("gpu_optimized_kd_*")
    [control] = (root / "experiment").glob("sft_control_*")
    for folder in (kd, control):
        results = read_json(folder / "kd_results.json")
        assert results["after"]["kl_to_teacher"] < results["before"]["kl_to_teacher"]
        assert results["after"]["nll"] < results["before"]["nll"]
        assert results["trainable_parameters"] == 13_025_280
        assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row] == list(range(1, 13))
    evaluation = read_json(root / "evaluation" / "results.json")
    assert evaluation["missing_arms"] == {}
    assert evaluation["heldout"]["arms"].keys() == {"base", "sft", "kd", "teacher"}
    gain = next(
        d
        for d in evaluation["heldout"]["differences"]
        if (d["a"], d["b"], d["metric"]) == ("kd", "base", "kl_to_teacher")
    )
    assert gain["interval"][1] < 0
    for arm in ("base", "kd"):
        stored = read_json(kd / "kd_results.json")["before" if arm == "base" else "after"]
        assert evaluation["heldout"]["arms"][arm]["kl_to_teacher"] == pytest.approx(stored["kl_to_teacher"], rel=0.02)
    said = " ".join(printed.split())  # the console breaks lines
    for words in (
        "distilled",
        "SFT control",
        "KL to the teacher",
        str(root / "evaluation" / "report.html"),
        "all stages",
    ):
        assert words in said
    assert not re.search(r"\d+%\|", printed), "a progress bar was drawn off a terminal"
    assert "Traceback" not in printed


def test_run_again_does_nothing(made):
    root, profile, _ = made
    before = stamps(root)
    printed = run("run_pipeline.sh", "--profile", profile)
    assert stamps(root) == before
    assert printed.count("nothing to do") + printed.count("is ready") >= 8


def test_the_inference_test_finds_the_run(made):
    _, profile, _ = made
    shutil.rmtree(ROOT / "outputs" / "inference_test" / "reduced", ignore_errors=True)
    printed = run("run_kd_inference_test.sh", "quick", "--profile", profile)
    folder = next(line for line in printed.splitlines() if line.endswith("results.json")).strip()
    results = read_json(ROOT / folder)
    assert {(score["temperature"], score["arm"]) for score in results["graded"]["scores"]} == {
        (temperature, arm) for temperature in (0.1, 0.7, 1.2) for arm in ("base", "kd")
    }
    assert all(sum(score["outcomes"].values()) == score["answers"] for score in results["graded"]["scores"])
    assert "Answers side by side" in printed


def test_the_shell_scripts_explain_themselves():
    for script in ("run_pipeline.sh", "run_tests.sh", "run_kd_inference_test.sh"):
        assert "usage:" in run(script, "--help")
        wrong = subprocess.run(
            ["bash", script, "--nonsense-flag-x", "--profile"], cwd=ROOT, capture_output=True, text=True
        )
        assert wrong.returncode == 2
        assert len(wrong.stderr.strip().splitlines()) >= 1
