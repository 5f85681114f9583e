"""Trackers hear what metrics.jsonl and kd_results.json say, and a run that goes on goes on in its tracker's run.

TensorBoard is the real one, read back from its files. The others are stood in for by modules that take the calls which
accelerate's own trackers make, with the arguments of the real ones (wandb 0.31, trackio 0.43, mlflow 3.17).
"""

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.distillation import training
from src.distillation.kd import run_kd_pipeline
from src.utils.common import UserError, read_json, read_jsonl


@pytest.fixture
def settings(tmp_path, tiny_teacher, tiny_student, clean_rows, write_sft):
    return {
        "model_name_or_path": tiny_student,
        "teacher_model_name_or_path": tiny_teacher,
        "experiment_dir": str(write_sft(tmp_path / "runs" / "tiny", clean_rows(40), clean_rows(4, start=100))),
        "output_dir": str(tmp_path / "runs" / "run"),
        "teacher_signal": "online",
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "max_length": 256,
        "save_steps": 2,
        "eval_steps": 3,
        "lora_r": 4,
        "bf16": False,
        "compile_loss": False,
    }


def train_with_a_break(settings, monkeypatch) -> dict:
    """The run is interrupted after step 5, which it has told its tracker, and goes on from the checkpoint of step 4."""
    take_step = training.take_step

    def stop(run):
        if run.step == 5:
            raise KeyboardInterrupt
        return take_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run_kd_pipeline(settings)
    return run_kd_pipeline(settings)


def expected_points(results: dict) -> dict[tuple[str, int], float]:
    """(name, step) -> value, from the run's own files."""
    points = {}
    for row in read_jsonl(Path(results["run_dir"]) / "metrics.jsonl"):
        for name, value in row.items():
            if name != "step":
                points[name, row["step"]] = value
    for part in ("before", "after", "teacher", "gap_recovered"):
        for name, value in results[part].items():
            if value is not None:  # where this teacher is no better, there is no way to go
                points[f"heldout/{part}/{name}", 6] = value
    return points


def test_tensorboard_holds_what_metrics_jsonl_holds(settings, monkeypatch):
    results = train_with_a_break(settings | {"report_to": "tensorboard"}, monkeypatch)
    folder = Path(results["run_dir"])
    assert sorted(path.name for path in folder.parent.iterdir()) == ["run", "tiny"]  # nothing beside the run
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert (name, event.step) not in found  # the steps taken again hide what they replace
            found[name, event.step] = event.value
    expected = {key: float(numpy.float32(value)) for key, value in expected_points(results).items()}  # as it keeps them
    assert found == expected
    assert ("loss", 6) in found
    assert ("validation_kl_to_teacher", 3) in found


def test_tensorboard_knows_the_settings_once(settings, monkeypatch):
    results = train_with_a_break(settings | {"report_to": "tensorboard", "alpha": 0.25}, monkeypatch)
    [stored] = (Path(results["run_dir"]) / "tensorboard").rglob("hparams.yml")
    text = stored.read_text(encoding="utf-8")
    assert "alpha: 0.25\n" in text
    assert "lora_target_modules: q_proj, k_proj" in text  # it takes no lists
    assert "teacher_temperature: null\n" in text
    assert "compile_loss: false\n" in text  # what was decided


class Calls:
    """A stand-in for a tracker's package: its sessions, each with what it was begun with and what it was told."""

    def __init__(self):
        self.sessions = []
        self.config = SimpleNamespace(update=self.configure)

    def begin(self, **arguments):
        self.sessions.append({"begun": arguments, "config": {}, "rows": [], "end": None})
        return SimpleNamespace(log=self.log, finish=self.finish, info=SimpleNamespace(run_id="of mlflow's own"))

    def configure(self, values, allow_val_change):
        assert all(value is None or isinstance(value, bool | int | float | str) for value in values.values())
        self.sessions[-1]["config"].update(values)

    def log(self, values, step):
        self.sessions[-1]["rows"].append((step, values))

    def finish(self, exit_code=0):
        assert self.sessions[-1]["end"] is None
        self.sessions[-1]["end"] = exit_code


def wandb_or_trackio(calls: Calls) -> SimpleNamespace:
    return SimpleNamespace(init=calls.begin, config=calls.config)


def mlflow(calls: Calls) -> SimpleNamespace:
    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    return SimpleNamespace(
        search_experiments=lambda filter_string: [],
        create_experiment=lambda name, artifact_location, tags: name,
        start_run=calls.begin,
        log_params=lambda values: calls.configure(values, True),
        log_metrics=calls.log,
        end_run=lambda status="FINISHED": calls.finish(["FINISHED", "FAILED"].index(status)),
        utils=SimpleNamespace(validation=limits),
    )


@pytest.fixture
def calls(request, monkeypatch) -> Calls:
    """The stand-in of the tracker that the test's parameter names, installed where accelerate looks for it."""
    name = request.param
    made = Calls()
    monkeypatch.setitem(sys.modules, name, mlflow(made) if name == "mlflow" else wandb_or_trackio(made))
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType(name)])
    made.name = name
    return made


@pytest.mark.parametrize("calls", ["wandb", "trackio", "mlflow"], indirect=True)
def test_a_run_that_goes_on_is_the_same_run_to_its_tracker(settings, calls, monkeypatch):
    results = train_with_a_break(settings | {"report_to": calls.name}, monkeypatch)
    broken, whole = calls.sessions
    told = defaultdict(set)
    for step, values in broken["rows"] + whole["rows"]:
        for name, value in values.items():
            told[name, step].add(value)
    expected = expected_points(results)
    assert told.keys() == expected.keys()
    for key, value in expected.items():
        assert value in told[key]
        measured = key[0] in ("tokens_per_second", "peak_memory_mb")
        assert measured or len(told[key]) == 1, key  # step 5 was taken twice, with the same result
    assert broken["end"] == (0 if calls.name == "trackio" else 1)  # trackio's finish knows no failure
    assert whole["end"] == 0

    begun, again = broken["begun"], whole["begun"]
    if calls.name == "wandb":
        assert begun["project"] == "tiny"
        assert begun["dir"] == results["run_dir"]
        assert begun["resume"] == "allow"
        assert begun == again
    elif calls.name == "trackio":
        assert begun["name"].startswith("run-")
        assert begun == again == {"project": "tiny", "name": begun["name"], "resume": "allow"}
    else:
        assert (begun["run_id"], again["run_id"]) == (None, "of mlflow's own")
        assert begun["run_name"] == "run"
    assert broken["config"]["lora_target_modules"].startswith("q_proj, ")
    assert broken["config"]["tokens_per_batch"] == 2048  # what was decided
    # mlflow refuses settings told again if one of them has changed, trackio forgets those that are not
    assert whole["config"].keys() == (set() if calls.name == "mlflow" else broken["config"].keys())


@pytest.mark.parametrize("calls", ["wandb"], indirect=True)
def test_runs_of_one_name_are_not_one_run(settings, calls, tmp_path):
    short = settings | {"report_to": "wandb", "max_steps": 1}
    for place in ("a", "b"):
        run_kd_pipeline(short | {"output_dir": str(tmp_path / place / "run")})
    ids = [session["begun"]["id"] for session in calls.sessions]
    assert len(set(ids)) == 2
    run_kd_pipeline(short | {"output_dir": str(tmp_path / "b" / "run")})
    assert len(calls.sessions) == 2  # a finished run has nothing to tell


@pytest.mark.parametrize("calls", ["wandb"], indirect=True)
def test_a_failed_run_is_reported_as_failed(settings, calls):
    with pytest.raises(UserError, match="lower --learning_rate"):
        run_kd_pipeline(settings | {"report_to": "wandb", "learning_rate": 1e30, "max_grad_norm": 0})
    [session] = calls.sessions
    assert session["end"] == 1
    assert not (Path(settings["output_dir"]) / "kd_results.json").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("notebook", "--report_to notebook: accelerate finds no such tracker here; it knows aim, tensorboard"),
        ("tensorbord", "did you mean tensorboard"),
        ("clearml", "--report_to clearml: it is not installed here; pip install clearml"),
    ],
)
def test_a_tracker_that_is_not_here_is_refused(settings, name, words):
    with pytest.raises(UserError) as caught:
        run_kd_pipeline(settings | {"report_to": name})
    assert words in str(caught.value)
    assert not Path(settings["output_dir"]).exists()


def test_no_tracker_leaves_no_trace(settings):
    results = run_kd_pipeline(settings | {"max_steps": 1})
    names = {path.name for path in Path(results["run_dir"]).iterdir()}
    assert not names & {"tracker.json", "tensorboard", "wandb"}
    assert read_json(Path(results["run_dir"]) / "kd_results.json")["steps"] == 1
