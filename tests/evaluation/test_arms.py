"""Which models an evaluation compares: found, taken by name, missing, refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from src.evaluation.evaluator import resolve_arms, run_evaluation
from src.evaluation.results_schema import ARMS
from src.utils.common import UserError, read_json, read_jsonl
from tests.evaluation.tiny import config_for, refused, run_of, train


def test_without_a_control_nothing_is_shown_about_distillation(copied, tmp_path, scripted):
    results = run_evaluation(config_for(copied, tmp_path / "out"))
    assert "nothing is shown about distillation itself" in results["verdict"]
    assert "The arm sft is missing: no finished control of this experiment" in results["verdict"]
    assert "SFT control" not in results["verdict"]
    assert results["arms"].keys() == {"base", "kd", "teacher"}
    assert "SFT control: missing, no finished control" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("change", [{"max_steps": 1}, {"learning_rate": 2e-2}, {"seed": 7}], ids=str)
def test_a_control_with_other_settings_is_not_taken(copied, change):
    train(copied, alpha=0.0, **change)
    arms = resolve_arms(config_for(copied, copied / "out"))
    assert "sft" not in arms.found
    assert "1 finished controls differ in rows or settings" in arms.missing["sft"]
    control = train(copied, alpha=0.0)
    assert resolve_arms(config_for(copied, copied / "out")).found["sft"] == control["final_model"]


@pytest.mark.parametrize("change", [{"temperature": 4.0}, {"divergence": "reverse_kl"}, {"teacher_top_k": 9}], ids=str)
def test_a_control_that_differs_in_the_objective_alone_is_taken(copied, change):
    control = train(copied, alpha=0.0, **change)
    assert resolve_arms(config_for(copied, copied / "out")).found["sft"] == control["final_model"]


def test_runs_of_another_experiment_or_unfinished_ones_are_passed_over(copied):
    for name, keep, experiment in (("99990101_000000", True, "other"), ("99990102_000000", False, "tiny")):
        newer = copied / f"gpu_optimized_kd_{name}"
        shutil.copytree(run_of(copied) if keep else next(copied.glob("gpu_optimized_kd_2*")), newer)
        config = read_json(newer / "kd_config.json") | {"experiment": experiment}
        (newer / "kd_config.json").write_text(json.dumps(config))
        if not keep:
            (newer / "kd_results.json").unlink()
    found = resolve_arms(config_for(copied, copied / "out")).found["kd"]
    assert Path(found).parent.name.startswith("gpu_optimized_kd_2")


def test_a_model_path_is_a_run_or_its_final_model(trained, tmp_path):
    run = run_of(trained)
    found = [
        resolve_arms(config_for(trained, tmp_path, model_path=str(path))).found for path in (run, run / "final_model")
    ]
    assert found[0] == found[1]
    assert found[0]["kd"] == str(run / "final_model")
    assert found[0].keys() == set(ARMS)


@pytest.mark.parametrize("flag", ["model_path", "sft_model_path"])
def test_a_wrong_model_path_is_one_line(trained, tmp_path, flag):
    refused(
        config_for(trained, tmp_path / "out", **{flag: str(tmp_path / "no" / "run")}),
        rf"--{flag} .*/no/run: no adapter_config\.json there; name a run folder or its final_model",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["base", "teacher"])
def test_an_adapter_is_no_arm_of_its_own(trained, tmp_path, flag):
    """Its base would answer, and be measured, in its name."""
    refused(config_for(trained, tmp_path / "out", **{flag: str(run_of(trained) / "final_model")}), "is an adapter of")
    assert not (tmp_path / "out" / "answers.jsonl").exists()


@pytest.mark.parametrize(("settings", "words"), [
    ({"arms": ["kd", "student"]}, "arms: unknown 'student'; there are base, sft, kd, teacher"),
    ({"presets": ["greedy"]}, "presets: unknown 'greedy'; there are raw, recommended"),
    ({"data_dir": "no/such"}, r"eval_dataset\.jsonl: no such file; run scripts/download_datasets\.py"),
    ({"experiment_dir": "no/such"}, "no finished run of such; run scripts/run_improved_kd.py, or pass --model_path"),
    ({"temperatures": [0.7, -1.0]}, "temperature must be 0"),
    ({"temperatures": [float("nan")]}, "temperature must be 0"),
])  # fmt: skip
def test_wrong_settings_are_one_line(trained, tmp_path, settings, words):
    refused(replace(config_for(trained, tmp_path / "out", heldout=False), **settings), words)
    assert not (tmp_path / "out").exists()


def test_arms_that_are_not_asked_for_are_named(trained, tmp_path, scripted):
    results = run_evaluation(config_for(trained, tmp_path / "out", arms=["base", "kd"]))
    assert results["missing_arms"] == {"sft": "not asked for", "teacher": "not asked for"}
    assert results["heldout"]["arms"].keys() == {"base", "kd", "teacher"}, "the run has measured them"
    assert {row["arm"] for row in read_jsonl(tmp_path / "out" / "samples.jsonl")} == {"base", "kd"}


def test_an_adapter_of_another_student_is_refused(copied, tmp_path, make_model, make_tokenizer, save_model):
    other = save_model(tmp_path / "wide", make_model(hidden_size=48), make_tokenizer())
    refused(
        config_for(copied, tmp_path / "out", base=other),
        r"final_model does not fit on .*wide: .*; name its student with --base",
    )


@pytest.mark.parametrize("arms", [["base"], ["teacher"], ["base", "teacher"]], ids=str)
def test_arms_without_an_adapter(trained, tmp_path, scripted, arms):
    results = run_evaluation(config_for(trained, tmp_path / "out", arms=arms, heldout=False))
    assert set(results["arms"]) == set(arms)


@pytest.mark.parametrize(
    ("change", "field"), [({"alpha": 0.0, "max_steps": 1}, "max_steps"), ({"alpha": 0.5}, "alpha")]
)
def test_a_named_control_that_differs_is_not_called_the_same(copied, tmp_path, scripted, change, field):
    """Either refused by the field, or said in the verdict; not "its SFT control (same rows, same steps)"."""
    named = train(copied, output_dir=str(tmp_path / "named"), **change)
    config = config_for(copied, tmp_path / "out", sft_model_path=named["run_dir"])
    try:
        verdict = run_evaluation(config)["verdict"]
    except UserError as error:
        verdict = str(error)
    assert field in verdict
    assert "same rows, same steps" not in verdict
