"""One profile on two machines: whatever an overlay says of how a step is cut, the run is the same, to rounding.

Several processes learn what one learns: tests/test_distributed.py.
"""

from pathlib import Path

import pytest
import yaml
from peft import load_peft_weights

from src.distillation.kd import SECTION, KDConfig, run_kd_pipeline
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache
from src.evaluation.arms import resolve_arms
from src.evaluation.evaluator import EvaluateConfig
from src.utils.common import read_json, read_jsonl
from src.utils.config import load_config

pytestmark = pytest.mark.slow

# 8 rows of a step: a row at a time, with activations computed again, or packed passes
MACHINES = {
    "small": {"batch_size": 1, "gradient_accumulation_steps": 8, "tokens_per_batch": 0, "gradient_checkpointing": True},
    "large": {"tokens_per_batch": 300, "gradient_checkpointing": False},
}


@pytest.fixture
def arguments(tmp_path, tiny_teacher, tiny_student, clean_rows, write_sft):
    """`arguments(machine)`: the command line of training there."""
    experiment = write_sft(tmp_path / "tiny", clean_rows(40), clean_rows(8, start=100))
    make_cache(CacheTeacherConfig(tiny_teacher, str(experiment), bf16=False))
    profile = {
        "model_name_or_path": tiny_student, "teacher_model_name_or_path": tiny_teacher,
        "experiment_dir": str(experiment), "hardware": str(tmp_path / "small.yaml"),
        SECTION: {"batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6, "learning_rate": 1e-2,
                  "warmup_steps": 0, "lora_r": 4, "bf16": False, "compile_loss": False},
    }  # fmt: skip
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    for name, training in MACHINES.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({SECTION: training}))
    return lambda name: ["--config", str(tmp_path / "profile.yaml"), "--hardware", str(tmp_path / f"{name}.yaml")]


def trained(words: list[str]) -> Path:
    return Path(run_kd_pipeline(load_config(KDConfig, SECTION, words))["run_dir"])


def assert_same_run(one: Path, other: Path) -> None:
    """The same fingerprint, losses, adapters and held-out numbers, but for sums in another order."""
    assert read_json(one / "kd_config.json")["fingerprint"] == read_json(other / "kd_config.json")["fingerprint"]
    metrics = [[row for row in read_jsonl(run / "metrics.jsonl") if "loss" in row] for run in (one, other)]
    assert [len(rows) for rows in metrics] == [6, 6]
    for ours, theirs in zip(*metrics, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    first, second = (load_peft_weights(str(run / "final_model")) for run in (one, other))
    assert first.keys() == second.keys()
    moved = 0.0
    for name in first:
        assert (first[name] - second[name]).abs().max() < 1e-5, name
        moved = max(moved, first[name].abs().max().item() if "lora_B" in name else 0.0)
    assert moved > 1e-2  # lora_B begins at 0: it has learnt a thousand times more than that
    results = [read_json(run / "kd_results.json")["after"] for run in (one, other)]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_two_overlays_learn_the_same(arguments, tmp_path):
    """And the evaluation takes the SFT control of one machine for the student of the other."""
    small = trained([*arguments("small"), "--output_dir", str(tmp_path / "elsewhere")])
    control = trained([*arguments("small"), "--alpha", "0"])
    large = trained(arguments("large"))
    assert_same_run(small, large)
    took = [read_json(run / "kd_config.json") for run in (small, large)]
    assert [made["gradient_checkpointing"] for made in took] == [True, False]
    assert [made["tokens_per_batch"] for made in took] == [0, 300]
    assert trained(arguments("small")) == large  # finished already, so it is not trained again
    found = resolve_arms(EvaluateConfig(experiment_dir=str(tmp_path / "tiny"))).found
    assert (found["kd"], found["sft"]) == (str(large / "final_model"), str(control / "final_model"))
