"""The commands of the evaluation, from flags to files, and the outside judge."""

import contextlib
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from src.distillation.base import prompt_text
from src.evaluation import evaluator
from src.evaluation.evaluator import EvaluateConfig, resolve_arms
from src.evaluation.outside import judge_outside
from src.evaluation.results_schema import ARMS
from src.utils import common
from src.utils.common import ROOT, UserError, read_json, read_jsonl, write_jsonl
from tests.evaluation.tiny import config_for, run_of


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
        own = {"mode": "quick", "temperatures": [0.1, 1.2], "max_new_tokens": 8, "max_length": 256}
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
    with pytest.raises(UserError, match="mode"):
        load_script("test_kd_inference_v2.py").test_model(mode="hasty")


@pytest.fixture
def task_file(tmp_path, monkeypatch) -> Path:
    """A task of lm-evaluation-harness: a YAML file and its rows."""
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(5)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    task = {
        "task": "tiny_sums", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}", "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "tiny_sums.yaml").write_text(json.dumps(task))
    return tmp_path / "tiny_sums.yaml"


def evaluate_script(config: EvaluateConfig, monkeypatch, *arguments: object) -> int:
    said = [f"--{name}={getattr(config, name)}" for name in ("data_dir", "experiment_dir", "output_dir", "mode")]
    return run_script(monkeypatch, *said, "--no_heldout", "--temperatures", "0.7", *arguments)


def test_the_harness_judges_the_student_with_its_adapter(trained, tmp_path, scripted, monkeypatch, task_file):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-dev.txt)")
    config = config_for(trained, tmp_path / "out")
    arguments = ("--arms", "base", "kd", "--lm_eval_tasks", task_file)
    assert evaluate_script(config, monkeypatch, *arguments) == 0
    found = {arm: read_json(tmp_path / "out" / f"lm_eval_{arm}.json") for arm in ("base", "kd")}
    arms = resolve_arms(config)
    tokenizer = AutoTokenizer.from_pretrained(arms.base)
    kd = AutoPeftModelForCausalLM.from_pretrained(arms.found["kd"]).eval()
    losses = {}
    for arm, context in (("base", kd.disable_adapter()), ("kd", contextlib.nullcontext())):
        with torch.no_grad(), context:
            own = []
            for row in read_jsonl(tmp_path / "rows.jsonl"):
                prompt = prompt_text(tokenizer, [{"role": "user", "content": row["question"]}])
                asked = prompt.rstrip()  # the harness scores the blanks at the end of a prompt with the answer
                asked, said = (tokenizer(t)["input_ids"] for t in (asked, prompt[len(asked) :] + row["answer"]))
                logits = kd(torch.tensor([asked + said])).logits[0, len(asked) - 1 : -1].float()
                logits = logits[:, : len(tokenizer)] if arm == "kd" else logits  # it cuts padded columns of adapters
                own.append(torch.nn.functional.cross_entropy(logits, torch.tensor(said), reduction="sum").item())
        losses[arm] = math.log(found[arm]["results"]["tiny_sums"]["perplexity,none"])
        assert losses[arm] == pytest.approx(sum(own) / 5, rel=0.02), "the harness computes in bf16 where it can"
        assert found[arm]["settings"]["apply_chat_template"] is True
        assert found[arm]["configs"]["tiny_sums"]["output_type"] == "loglikelihood"
    assert losses["kd"] < 0.95 * losses["base"]
    assert found["kd"]["settings"]["model_args"]["peft"] == arms.found["kd"]

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("lm_eval_*.json")}
    assert evaluate_script(config, monkeypatch, *arguments) == 0, "a finished evaluation and its judge are left alone"
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    task_file.write_text(task_file.read_text().replace("{{question}}", "Say {{question}}"))
    assert evaluate_script(config, monkeypatch, *arguments) == 2


def test_a_task_that_cannot_be_run_is_one_line(trained, tmp_path, task_file):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-dev.txt)")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"lm-evaluation-harness cannot run .*tiny_sums\.yaml: FileNotFoundError"
    ) as error:
        judge_outside(config_for(trained, tmp_path / "out", lm_eval_tasks=[str(task_file)], arms=["kd"]))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("installed", "task", "words"),
    [
        (False, "arc_easy", "--lm_eval_tasks needs lm-evaluation-harness; pip install lm_eval"),
        (True, "arc_eazy", "no task and no YAML file 'arc_eazy'; did you mean arc_easy?"),
    ],
)
def test_the_harness_is_looked_for_first(trained, tmp_path, monkeypatch, capsys, installed, task, words):
    if installed:
        pytest.importorskip("lm_eval", reason="lm_eval is not installed (requirements-dev.txt)")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert evaluate_script(config_for(trained, tmp_path / "out"), monkeypatch, "--lm_eval_tasks", task) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not (tmp_path / "out").exists()
