"""The commands of the evaluation, from flags to files."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from src.evaluation import evaluator
from src.evaluation.results_schema import ARMS
from src.utils import common
from src.utils.common import ROOT, UserError, read_json
from tests.evaluation.tiny import run_of


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"script_{Path(name).stem}", ROOT / name)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look there
    spec.loader.exec_module(script)
    return script


def run_script(monkeypatch, *arguments: object) -> int:
    """The exit code of scripts/evaluate_distillation.py."""
    script = load_script("scripts/evaluate_distillation.py")
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    for name, value in (("handlers", []), ("propagate", True), ("level", common.logger.level)):
        monkeypatch.setattr(common.logger, name, value)  # put back what run_cli changes
    try:
        common.run_cli(script.main)
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def shipped(trained, tmp_path, monkeypatch) -> Path:
    """Two shipped profiles: that of `trained`, and one of an experiment without a run; the working folder is empty."""
    (tmp_path / "configs").mkdir()
    for name, root in (("tiny", trained), ("zz_other", tmp_path)):
        folders = {"data_dir": str(root / "data"), "experiment_dir": str(root / name)}
        own = {"mode": "quick", "temperatures": [0.1, 1.2], "max_new_tokens": 8}
        (tmp_path / "configs" / f"{name}.yaml").write_text(json.dumps(folders | {"evaluate_distillation": own}))
    monkeypatch.setattr(evaluator, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_path_is_enough_for_the_script(trained, shipped, scripted, monkeypatch):
    """Profile, base, teacher, control and held-out rows are those of the run's experiment."""
    arguments = ("--model_path", run_of(trained) / "final_model", "--output_dir", "out")
    assert run_script(monkeypatch, *arguments) == 0
    results = read_json(shipped / "out" / "results.json")
    assert (results["arms"].keys(), results["missing_arms"]) == (set(ARMS), {})
    assert results["heldout"]["rows"] == 6
    assert {score["temperature"] for score in results["graded"]["scores"]} == {0.1, 1.2}


def test_a_run_of_no_shipped_profile_asks_for_one(trained, shipped, monkeypatch, capsys):
    (shipped / "configs" / "tiny.yaml").unlink()
    assert run_script(monkeypatch, "--model_path", run_of(trained), "--output_dir", "out") == 2
    assert "is of no shipped profile's experiment; name its profile with --config" in capsys.readouterr().err
    with pytest.raises(UserError, match="no finished run of a shipped profile"):
        load_script("test_kd_inference_v2.py").test_model()


@pytest.mark.parametrize("model_path", [None, "run"])
def test_test_model_compares_at_one_temperature(trained, shipped, scripted, model_path):
    if model_path:
        model_path = str(run_of(trained))
    results = load_script("test_kd_inference_v2.py").test_model(temperature=0.7, mode="quick", model_path=model_path)
    assert results["output_dir"].startswith("outputs/inference_test/tiny/")
    assert {(s["arm"], s["temperature"]) for s in results["graded"]["scores"]} == {("base", 0.7), ("kd", 0.7)}
    assert {(c["a"], c["b"]) for c in results["graded"]["comparisons"]} == {("kd", "base")}
    assert results["missing_arms"] == {"sft": "not asked for", "teacher": "not asked for"}
    assert "The arm sft is missing: not asked for." in results["verdict"]
    stored = read_json(Path(results["output_dir"]) / "results.json")
    assert stored == {name: value for name, value in results.items() if name != "output_dir"}
    # of whoever calls it, not of the profile
    with pytest.raises(UserError, match=r"^test_model: .*mode: invalid choice: 'hasty'"):
        load_script("test_kd_inference_v2.py").test_model(mode="hasty")
