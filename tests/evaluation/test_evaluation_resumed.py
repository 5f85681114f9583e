"""An interruption changes nothing; a folder takes one evaluation."""

import json
import os
import re
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from src.evaluation import answers, evaluator
from src.evaluation.arms import Arms
from src.evaluation.evaluator import MADE, STEPS, EvaluateConfig, answer_step, marker_of, run_evaluation
from src.utils.common import UserError, read_json, read_jsonl, write_jsonl
from src.utils.stages import hold
from tests.evaluation.tiny import config_for, eval_rows, refused


def interrupted(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str,
                calls: int = 0) -> None:  # fmt: skip
    """Evaluate until `module.name` has been called so many times: then the process is as good as killed."""
    seen, real = [], getattr(module, name)

    def stop(*arguments, **named):
        seen.append(arguments)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            run_evaluation(config)


def same_but_for_provenance(folder: Path, other: Path) -> None:
    """Every file of two evaluations has the same bytes; results.json also says when and by what command."""
    for name in ("answers.jsonl", "samples.jsonl", "heldout.jsonl", "report.md"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    ours, theirs = (read_json(one / "results.json") | {"provenance": {}} for one in (folder, other))
    assert ours == theirs
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize(
    ("module", "name", "calls", "complete"),
    [
        (answers, "append_jsonl", 7, []),
        (evaluator, "grade_all", 0, ["answers"]),
        (evaluator, "write_jsonl", 0, ["answers"]),
        (evaluator, "write_results", 0, ["answers", "grade"]),
        (evaluator, "write_reports", 0, ["answers", "grade", "results"]),
        (evaluator, "finish_stage", 2, ["answers", "grade", "results"]),
    ],
    ids=["answers", "grade", "grades unwritten", "results", "report", "report unmarked"],
)
def test_an_evaluation_that_was_killed_ends_as_one_that_was_not(
    evaluated, tmp_path, monkeypatch, module, name, calls, complete
):
    whole, results = evaluated
    config = replace(whole, output_dir=str(tmp_path / "out"))
    if complete:  # the answers are there already
        (tmp_path / "out").mkdir()
        for file in ("answers.jsonl", "step_answers.json"):
            shutil.copy(Path(whole.output_dir) / file, tmp_path / "out" / file)
    interrupted(config, monkeypatch, module, name, calls)
    for step in STEPS:
        marker = marker_of(tmp_path / "out", step)
        assert (marker.is_file() and read_json(marker)["finished"]) == (step in complete), step
    again = run_evaluation(config)
    assert again["graded"] == results["graded"]
    same_but_for_provenance(tmp_path / "out", Path(whole.output_dir))


def test_a_torn_line_is_cut_and_its_answer_given_again(evaluated, tmp_path):
    whole, _ = evaluated
    shutil.copytree(whole.output_dir, tmp_path / "out")
    path = tmp_path / "out" / "answers.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(kept[:46]) + kept[46][:60])
    marker = marker_of(tmp_path / "out", "answers")
    marker.write_text(json.dumps(read_json(marker) | {"finished": False}))
    run_evaluation(replace(whole, output_dir=str(tmp_path / "out")))
    same_but_for_provenance(tmp_path / "out", Path(whole.output_dir))


@pytest.mark.parametrize("lost", ["report.html", "results.json", "samples.jsonl"])
def test_what_is_missing_is_made_again_without_a_model(evaluated, tmp_path, monkeypatch, lost):
    whole, _ = evaluated
    shutil.copytree(whole.output_dir, tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    monkeypatch.setattr(answers, "opened", lambda *_: pytest.fail("a model was loaded"))
    run_evaluation(replace(whole, output_dir=str(tmp_path / "out")))
    for name in ("samples.jsonl", "results.json", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (Path(whole.output_dir) / name).read_bytes()


def test_a_changed_grader_grades_again_on_demand(evaluated, tmp_path, monkeypatch):
    """The same command says so; `--from grade` needs neither the models nor the runs' adapters."""
    whole, results = evaluated
    shutil.copytree(whole.output_dir, tmp_path / "out")
    config = replace(whole, output_dir=str(tmp_path / "out"))
    monkeypatch.setattr(evaluator, "graders_sha256", lambda: "another")
    monkeypatch.setattr(answers, "opened", lambda *_: pytest.fail("a model was loaded"))
    refused(config, "was made with graders = .* this run has 'another'; pass --from grade to grade again")
    monkeypatch.setattr(evaluator, "resolve_arms", lambda *_: pytest.fail("the arms were looked for"))
    assert run_evaluation(replace(config, from_step="grade"))["graded"] == results["graded"]
    for step in ("results", "report"):
        assert run_evaluation(replace(config, from_step=step))["graded"] == results["graded"]
    same_but_for_provenance(tmp_path / "out", Path(whole.output_dir))


def test_from_a_step_wants_those_before_it(trained, tmp_path, evaluated):
    config = config_for(trained, tmp_path / "out", from_step="grade")
    refused(config, "the step answers is not complete, or its source has changed; run this without --from")
    refused(replace(config, overwrite=True), "--overwrite makes all four steps again, --from grade the later ones")
    whole, _ = evaluated
    shutil.copytree(whole.output_dir, tmp_path / "cut")
    (tmp_path / "cut" / "results.json").unlink()
    refused(replace(whole, output_dir=str(tmp_path / "cut"), from_step="report"), "the step results is not complete")


def test_results_are_not_made_of_grades_of_other_answers(evaluated, tmp_path):
    whole, _ = evaluated
    shutil.copytree(whole.output_dir, tmp_path / "out")
    path = tmp_path / "out" / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[::-1]))
    config = replace(whole, output_dir=str(tmp_path / "out"), from_step="results")
    refused(config, "the step grade is not complete, or its source has changed; run this with --from grade")


def test_a_regrading_that_was_killed_goes_on(evaluated, tmp_path, monkeypatch):
    whole, _ = evaluated
    shutil.copytree(whole.output_dir, tmp_path / "out")
    config = replace(whole, output_dir=str(tmp_path / "out"))
    interrupted(replace(config, from_step="grade"), monkeypatch, evaluator, "write_jsonl")
    refused(replace(config, from_step="results"), "the step grade is not complete")
    run_evaluation(config)
    same_but_for_provenance(tmp_path / "out", Path(whole.output_dir))


def test_held_out_numbers_come_and_go_with_the_setting(evaluated, tmp_path):
    whole, results = evaluated
    shutil.copytree(whole.output_dir, tmp_path / "out")
    config = replace(whole, output_dir=str(tmp_path / "out"), from_step="results")
    assert "heldout" not in run_evaluation(replace(config, heldout=False))
    assert not (tmp_path / "out" / "heldout.jsonl").exists()
    assert run_evaluation(config)["heldout"] == results["heldout"]


def test_held_out_numbers_of_other_models_are_not_taken(copied, tmp_path, scripted, tiny_student, save_model,
                                                       make_model, make_tokenizer):  # fmt: skip
    other = save_model(tmp_path / "other", make_model(seed=9), make_tokenizer())
    results = run_evaluation(config_for(copied, tmp_path / "out", base=other, arms=["base", "kd"]))
    assert "heldout" not in results
    assert "was not measured" in results["verdict"]


def test_answers_to_other_prompts_are_not_graded(copied, tmp_path, scripted):
    config = config_for(copied, tmp_path / "out", heldout=False)
    run_evaluation(config)
    data = copied / "data" / "eval_dataset.jsonl"
    rows = read_jsonl(data)
    write_jsonl(data, [row | {"prompt": f"{row['prompt']} Please."} for row in rows])
    kept = (tmp_path / "out" / "samples.jsonl").read_bytes()
    refused(replace(config, from_step="grade"), "is not in .*, or has another prompt there; bring the file back")
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == kept
    write_jsonl(data, [row | {"reference": "7"} if row["grader"] == "numeric" else row for row in rows])
    graded = run_evaluation(replace(config, from_step="grade"))["graded"]
    maths = [score for score in graded["scores"] if score["domain"] == "maths"]
    assert all(score["outcomes"]["wrong"] == score["answers"] > 0 for score in maths)


@pytest.mark.parametrize(("held", "from_step"), [("answers", "answers"), ("report", "answers"), ("grade", "grade")])
def test_a_second_evaluation_of_a_folder_is_refused_by_name(evaluated, tmp_path, held, from_step):
    whole, _ = evaluated
    shutil.copytree(whole.output_dir, tmp_path / "out")
    config = replace(whole, output_dir=str(tmp_path / "out"), from_step=from_step)
    with hold(tmp_path / "out", "the first", held):
        refused(config, rf"out: the first \(process {os.getpid()} on ")


def test_an_evaluation_of_an_earlier_version_is_not_touched(trained, tmp_path, scripted):
    """Its samples.jsonl stood for the answers and their grades."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples.jsonl").write_text("{}\n")
    config = config_for(trained, tmp_path / "out", heldout=False)
    refused(config, "samples.jsonl is there but was not made by this stage; move it away or pass --overwrite")
    assert (tmp_path / "out" / "samples.jsonl").read_text() == "{}\n"
    run_evaluation(replace(config, overwrite=True))


def test_a_finished_evaluation_is_returned(evaluated, monkeypatch):
    config, results = evaluated
    monkeypatch.setattr(answers, "opened", lambda *_: pytest.fail("evaluated again"))
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
    refused(replace(config, data_dir=str(tmp_path / "data")), "was made with prompts = ")


def answered_without_a_model(root: Path, monkeypatch: pytest.MonkeyPatch, arm: str = "kd") -> EvaluateConfig:
    """Let `answer_step` take a model's name for its fingerprint, and have no answers given."""
    monkeypatch.setattr(evaluator, "model_fingerprint", str)
    monkeypatch.setattr(evaluator, "generate_answers", lambda *_: None)
    write_jsonl(root / "data" / "eval_dataset.jsonl", eval_rows())
    (root / "out").mkdir()
    return config_for(root, root / "out", arms=[arm])


@pytest.mark.parametrize("arm", ["sft", "kd", "teacher"])
def test_another_base_below_an_adapter_is_another_evaluation(tmp_path, monkeypatch, arm):
    """Whether or not it is an arm: the answers of one adapter on two bases must not mix."""
    config = answered_without_a_model(tmp_path, monkeypatch, arm)
    one, other = (Arms(base, {arm: "org/it"}, {}) for base in ("org/base", "org/other"))
    answer_step(config, tmp_path / "out", one)
    with pytest.raises(UserError, match="was made with models = ") if arm != "teacher" else nullcontext():
        answer_step(config, tmp_path / "out", other)
    answer_step(config, tmp_path / "out", one)


def test_answers_that_are_gone_are_those_of_the_run_that_gives_them_anew(tmp_path, monkeypatch):
    config, folder = answered_without_a_model(tmp_path, monkeypatch), tmp_path / "out"
    arms, marker = Arms("org/base", {"kd": "org/it"}, {}), marker_of(tmp_path / "out", "answers")
    monkeypatch.setattr(evaluator, "provenance", lambda: "the first")
    answer_step(config, folder, arms)
    monkeypatch.setattr(evaluator, "provenance", lambda: "the second")
    marker.write_text(json.dumps(read_json(marker) | {"finished": False}))
    answer_step(config, folder, arms)
    assert read_json(marker)["provenance"] == "the first", "it goes on"
    (folder / "answers.jsonl").unlink()
    answer_step(config, folder, arms)
    assert read_json(marker)["provenance"] == "the second"
    assert (folder / "answers.jsonl").is_file()


@contextmanager
def killed_at_unlink(monkeypatch: pytest.MonkeyPatch, number: int):
    """Let so many files be deleted: then the process is as good as killed."""
    deleted, real = [], Path.unlink

    def unlink(path, missing_ok=False):
        if len(deleted) == number:
            raise KeyboardInterrupt
        deleted.append(path)
        real(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("first", range(len(STEPS)))
def test_files_that_are_discarded_go_before_what_marks_them(tmp_path, monkeypatch, first):
    """Killed at any file: none is left that the next run takes for somebody else's, or for complete."""
    for number in range(sum(len(MADE[step]) + 1 for step in STEPS[first:])):
        folder = tmp_path / str(number)
        folder.mkdir()
        for step in STEPS:
            for path in (marker_of(folder, step), *(folder / name for name in MADE[step])):
                path.write_text("{}")
        with killed_at_unlink(monkeypatch, number):
            evaluator._discard(folder, first)
        for index, step in enumerate(STEPS):
            there = [(folder / name).is_file() for name in MADE[step]]
            marked = [marker_of(folder, before).is_file() for before in STEPS[: index + 1]]
            assert all(marked) or not any(there), (number, step)
            assert all(there) or not there[0], (number, step)
        evaluator._discard(folder, first)
        assert len(list(folder.iterdir())) == sum(len(MADE[step]) + 1 for step in STEPS[:first])


@pytest.mark.parametrize(("step", "number"), [("grade", 4), ("grade", 7), ("results", 4), ("report", 1)])
def test_a_step_that_was_killed_while_it_discards_goes_on(evaluated, tmp_path, monkeypatch, step, number):
    whole, _ = evaluated
    shutil.copytree(whole.output_dir, tmp_path / "out")
    config = replace(whole, output_dir=str(tmp_path / "out"))
    monkeypatch.setattr(answers, "opened", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(evaluator, "hold", lambda *_: nullcontext())  # its files are no outputs
    with killed_at_unlink(monkeypatch, number):
        run_evaluation(replace(config, from_step=step))
    assert len(list((tmp_path / "out").iterdir())) < len(list(Path(whole.output_dir).iterdir()))
    run_evaluation(config)
    same_but_for_provenance(tmp_path / "out", Path(whole.output_dir))


def test_overwrite_evaluates_again(trained, tmp_path, scripted):
    config = config_for(trained, tmp_path / "out", heldout=False)
    run_evaluation(config)
    run_evaluation(replace(config, temperatures=[1.2], overwrite=True))
    assert {row["temperature"] for row in read_jsonl(tmp_path / "out" / "samples.jsonl")} == {1.2}
