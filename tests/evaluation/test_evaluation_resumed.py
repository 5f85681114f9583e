"""An interruption changes nothing; a folder takes one evaluation."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from src.evaluation import evaluator
from src.evaluation.evaluator import EvaluateConfig, run_evaluation
from src.utils.common import read_json, read_jsonl, write_jsonl
from tests.evaluation.tiny import config_for, eval_rows, refused
from tests.reading import as_set


def interrupted(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Evaluate until `after` answers are graded."""
    calls, real = [], evaluator.grade_all

    def stop(answers, *rest):
        calls.extend(answers)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(answers, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "grade_all", stop)
        with pytest.raises(KeyboardInterrupt):
            run_evaluation(config)


def test_an_interrupted_evaluation_ends_as_an_uninterrupted_one(evaluated, tmp_path, monkeypatch):
    whole, results = evaluated
    config = replace(whole, output_dir=str(tmp_path / "out"))
    interrupted(config, monkeypatch, after=30)
    assert not (tmp_path / "out" / "results.json").exists()
    again = run_evaluation(config)
    for name in ("samples", "heldout"):
        assert as_set(tmp_path / "out" / f"{name}.jsonl") == as_set(Path(whole.output_dir) / f"{name}.jsonl")
    assert again["graded"] == results["graded"]
    assert again["verdict"] == results["verdict"]


def test_a_torn_line_is_cut_and_its_answer_given_again(evaluated, tmp_path):
    whole, results = evaluated
    shutil.copytree(whole.output_dir, tmp_path / "out")
    config = replace(whole, output_dir=str(tmp_path / "out"))
    for name, lines in (("samples", 47), ("heldout", 18)):
        path = tmp_path / "out" / f"{name}.jsonl"
        kept = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(kept[: lines - 1]) + kept[lines - 1][:60])
    (tmp_path / "out" / "results.json").unlink()
    marker = tmp_path / "out" / "evaluation.json"
    marker.write_text(json.dumps(read_json(marker) | {"finished": False}))
    assert run_evaluation(config)["graded"] == results["graded"]
    assert as_set(tmp_path / "out" / "samples.jsonl") == as_set(Path(whole.output_dir) / "samples.jsonl")
    assert len(read_jsonl(tmp_path / "out" / "heldout.jsonl")) == 18


def test_a_held_out_row_that_is_too_long_does_not_stop_a_resumed_evaluation(
    copied, tmp_path, scripted, monkeypatch, clean_rows, write_sft
):
    rows = clean_rows(30, start=100)
    rows[0]["messages"][1]["content"] = "long " * 100
    write_sft(copied / "tiny", clean_rows(24), rows)
    config = config_for(copied, tmp_path / "out")
    interrupted(config, monkeypatch, after=0)
    assert run_evaluation(config)["heldout"]["rows"] == 29


def test_a_finished_evaluation_is_returned(evaluated, monkeypatch):
    config, results = evaluated
    monkeypatch.setattr(evaluator, "load_model", lambda *_: pytest.fail("evaluated again"))
    assert run_evaluation(config) == json.loads(json.dumps(results))


@pytest.mark.parametrize(("change", "words"), [
    ({"temperatures": [0.7]}, r"temperatures = \[0\.1, 0\.7\], this run has \[0\.7\]"),
    ({"mode": "medium"}, "mode = 'quick', this run has 'medium'"),
    ({"max_new_tokens": 9}, "max_new_tokens = 8, this run has 9"),
    ({"seed": 1}, "seed = 42, this run has 1"),
    ({"arms": ["base", "kd"]}, "arms = "),
])  # fmt: skip
def test_other_settings_in_the_same_folder_are_refused_by_the_field(evaluated, change, words):
    config, _ = evaluated
    before = (Path(config.output_dir) / "samples.jsonl").read_bytes()
    refused(replace(config, **change), f"{re.escape(config.output_dir)} was made with {words}.*--overwrite")
    assert (Path(config.output_dir) / "samples.jsonl").read_bytes() == before


def test_other_gpus_may_finish_what_these_began(evaluated):
    """Where the models lie is no part of what was asked for."""
    config, results = evaluated
    moved = replace(config, teacher_devices=[4], student_devices=[5], gpu_memory_gb=70.0)
    assert run_evaluation(moved) == json.loads(json.dumps(results))


def test_other_prompts_in_the_same_folder_are_refused(trained, tmp_path, scripted):
    config = config_for(trained, tmp_path / "out", heldout=False)
    run_evaluation(config)
    write_jsonl(tmp_path / "data" / "eval_dataset.jsonl", eval_rows()[:-1])
    refused(replace(config, data_dir=str(tmp_path / "data")), "was made with data = ")


def test_overwrite_evaluates_again(trained, tmp_path, scripted):
    config = config_for(trained, tmp_path / "out", heldout=False)
    run_evaluation(config)
    run_evaluation(replace(config, temperatures=[1.2], overwrite=True))
    assert {row["temperature"] for row in read_jsonl(tmp_path / "out" / "samples.jsonl")} == {1.2}
