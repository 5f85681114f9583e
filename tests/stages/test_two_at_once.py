"""Every stage keeps a second process off what it writes; the second says who is there and changes nothing."""

import os
from pathlib import Path

import pytest
import yaml

from src.utils.stages import hold
from tests.reading import content


@pytest.fixture
def folders(answered, tiny_student, tmp_path) -> dict[str, Path]:
    """Where each stage works, stages 1 and 2 done."""
    sft = answered[1]
    return {
        "download_datasets": tmp_path / "data",
        "generate_sft_data": sft,
        "fix_sft_data": sft,
        "cache_teacher": sft.parent / "teacher_cache",
        "run_improved_kd": tmp_path / "named_run",
    }


@pytest.mark.parametrize(
    ("stage", "part", "flags"),
    [
        ("download_datasets", "stage", ["--overwrite"]),
        ("generate_sft_data", "train", []),
        ("generate_sft_data", "eval", ["--overwrite"]),
        ("fix_sft_data", "train", []),
        ("fix_sft_data", "eval", []),
        ("cache_teacher", "stage", []),
        ("run_improved_kd", "stage", ["--output_dir", "{tmp_path}/named_run"]),
    ],
)
def test_the_second_of_two_is_refused_by_name(stage, part, flags, folders, answered, succeeds, fails, tmp_path):
    if stage in ("cache_teacher", "run_improved_kd"):
        succeeds("fix_sft_data", "--config", answered[0])
    folder = folders[stage]
    with hold(folder, "the first", part):
        before = content(folder)
        line = fails(stage, "--config", answered[0], *(flag.format(tmp_path=tmp_path) for flag in flags))
        assert f"{folder}: the first (process {os.getpid()} on " in line
        assert "is working on it; run this again when that has ended" in line
        assert content(folder) == before


def test_splits_may_be_answered_side_by_side(answered, succeeds, tmp_path):
    with hold(answered[1], "the other", "eval"):
        succeeds("generate_sft_data", "--config", answered[0], "--splits", "train", "--overwrite")


def test_models_are_made_by_one(tiny_teacher, fails, tmp_path):
    target = tmp_path / "models" / "student"
    arguments = ["--teacher_model", tiny_teacher, "--model_name_or_path", target, "--student_layers", "2"]
    with hold(target.parent, "the first", "student"):
        line = fails("prepare_models", *arguments, "--calibration_domains", "maths")
        assert "the first (process" in line
    assert not target.exists()


def test_an_evaluation_is_made_by_one(succeeds, fails, answered, tmp_path):
    succeeds("fix_sft_data", "--config", answered[0])
    succeeds("run_improved_kd", "--config", answered[0], "--output_dir", tmp_path / "experiment" / "gpu_optimized_kd_1")
    profile = yaml.safe_load(answered[0].read_text())
    profile["evaluate_distillation"] = {"output_dir": str(tmp_path / "evaluation"), "mode": "quick"}
    answered[0].write_text(yaml.safe_dump(profile))
    with hold(tmp_path / "evaluation", "the first", "results"):
        line = fails("evaluate_distillation", "--config", answered[0])
        assert f"{tmp_path / 'evaluation'}: the first (process" in line
    assert not (tmp_path / "evaluation" / "answers.jsonl").exists()
