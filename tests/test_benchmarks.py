"""The benchmarks in tiny sizes: their records have the promised form, and what they measure of ours is right."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import harness, kd_loss, plan, sweep_generation, teacher_cache, train_job, train_peers, train_step
from src.distillation import kd
from src.distillation import teacher_cache as source_cache
from src.utils.common import write_jsonl

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("names", [("ours_plain", "plain_torch"), pytest.param(("ours",), marks=pytest.mark.slow)])
def test_kd_loss_writes_its_record(tmp_path, names):
    path = tmp_path / "record.json"
    command = [sys.executable, "benchmarks/kd_loss.py", "--quick", "--repeats", "1", "--dtype", "float32"]
    subprocess.run([*command, "--only", *names, "--output", path], cwd=ROOT, check=True, capture_output=True)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"results", "floor_seconds", "shapes", "versions", "machine", "ratios", "git_commit"} <= record.keys()
    assert record["floor_seconds"] > 0
    assert [result["name"] for result in record["results"]] == list(names)
    for result in record["results"]:
        assert {"name", "seconds", "peak_mb", "grad_rel_error", "loss"} <= result.keys()
        assert result["seconds"] > 0
        assert result["grad_rel_error"] < 1e-5
        assert [each["temperature"] for each in result["accuracy"]] == [1.0, 2.5, 4.0]
        for each in result["accuracy"]:
            assert each["grad_rel_error"] < 1e-5
            assert each["loss"] == pytest.approx(each["loss_fp64"], rel=1e-5)


def test_kd_loss_sees_a_wrong_objective(tmp_path, monkeypatch):
    job = {**kd_loss.QUICK, "dtype": "float32", "seed": 0, "reference": str(tmp_path / "reference.pt")}
    kd_loss.measure("reference", job)
    right = kd_loss.CONTENDERS["ours_plain"]()
    monkeypatch.setitem(kd_loss.CONTENDERS, "wrong", lambda: lambda *case: right(*case[:5], case[5] * 1.01, case[6]))
    assert kd_loss.measure("ours_plain", job)["grad_rel_error"] < 1e-5
    assert kd_loss.measure("wrong", job)["grad_rel_error"] > 1e-3


@pytest.fixture
def job(tmp_path, tiny_models, clean_rows, write_sft):
    settings = {"batch_size": 2, "gradient_accumulation_steps": 2, "lora_r": 4, "temperature": 2.0, "bf16": False}
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({"run_improved_kd": settings | {"alpha": 0.8}}), encoding="utf-8")
    arguments = argparse.Namespace(
        config=profile, model=tiny_models.student, teacher=tiny_models.teacher, quick=True, steps=None,
        random_weights=None,
        experiment_dir=write_sft(tmp_path / "experiment", clean_rows(30), clean_rows(2, start=100)),
    )  # fmt: skip
    return train_job.make_job(arguments, tmp_path)


def test_the_floor_counts_what_is_done(job):
    """Rows that begin alike are run from there on only; without a teacher there is less to multiply."""
    found = {}
    for shared in (0.0, 0.25):
        floor = train_step.measure("floor", job | {"shared": shared})["floor"]
        found[shared] = {name: floor[name]["tflop"] for name in ("sft", "hidden", "online")}
        assert floor["tokens"] == round(job["tokens"] * (1 - shared) / job["steps"])
    for floor in found.values():
        assert floor["sft"] < floor["hidden"] < floor["online"]
    for name in found[0.0]:
        assert found[0.25][name] < found[0.0][name]
    assert 0 < job["shared"] < 1


def test_train_step_measures_the_same_work(job):
    train_job.make_caches(job)
    found = {name: train_step.measure(name, job) for name in ("ours_hidden", "ours_online", "ours_sft", "plain_torch")}
    assert found["ours_hidden"]["loss"] == pytest.approx(found["ours_online"]["loss"], rel=0.01)
    assert found["plain_torch"]["loss"] == pytest.approx(found["ours_online"]["loss"], rel=0.05)  # another order
    for result in found.values():
        assert result["tokens_per_second"] * result["seconds"] == pytest.approx(job["tokens"] / job["steps"])
    for name, bound in (("ours_online", 1e-4), ("plain_torch", 1e-4), ("ours_hidden", 1e-4)):
        assert train_step.measure(f"{name}:gradient", job)["grad_rel_error"] < bound
    measured = train_step.measure("ours_online:parts", job)
    assert {"teacher", "student_forward", "loss", "backward", "optimizer", "rest"} == measured["parts"].keys()
    assert sum(measured["parts"].values()) == pytest.approx(measured["seconds"], rel=0.1)
    assert min(measured["parts"].values()) > 0


def test_random_weights_need_nothing_but_configurations(job, tmp_path, tiny_models, monkeypatch):
    """Folders without weights and no rows: a cache, our steps and a peer's, on made-up rows."""
    names = []
    for name in tiny_models:
        folder = tmp_path / Path(name).name
        shutil.copytree(name, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        names.append(str(folder))
    arguments = argparse.Namespace(
        config=tmp_path / "profile.yaml", model=None, teacher=None, quick=True, steps=None, experiment_dir=None,
        random_weights=names[::-1],
    )  # fmt: skip
    for module in (kd, source_cache, train_peers):
        monkeypatch.setattr(module, "load_model", module.load_model)  # as it was, when this ends
    arguments.config.write_text(yaml.safe_dump({"run_improved_kd": job["profile"] | {"max_length": 8192}}))
    made = train_job.make_job(arguments, tmp_path / "random")
    assert made["random_weights"]
    train_step.measure("caches", made)
    for name in ("ours_hidden", "ours_checkpointed", "plain_torch"):
        assert train_step.measure(name, made)["tokens_per_second"] > 0


def test_teacher_cache_tells_exact_from_biased(job, tmp_path):
    for kind in ("hidden", "topk"):
        job[kind] = str(tmp_path / kind)
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "sft").symlink_to(Path(job["profile"]["experiment_dir"]) / "sft")
        made = teacher_cache.measure(f"make:{kind}", job)
        assert made["bytes_per_token"] > 0
    job["reference"] = str(tmp_path / "reference.pt")
    teacher_cache.measure("reference", job)
    found = {name: teacher_cache.measure(name, job)["accuracy"] for name in teacher_cache.SIGNALS}
    for index, hidden in enumerate(found["hidden"]):
        online, topk = found["online"][index], found["topk"][index]
        assert hidden["loss"] == pytest.approx(online["loss"], rel=0.01)
        assert hidden["grad_rel_error"] < online["grad_rel_error"] + 0.01
        assert hidden["grad_rel_error"] < topk["grad_rel_error"]


def test_teacher_generation_writes_its_record(tmp_path, tiny_teacher):
    """Without vLLM: its two names stand under `absent`, not among the results."""
    path = tmp_path / "record.json"
    command = [sys.executable, "benchmarks/teacher_generation.py", "--teacher", tiny_teacher, "--output", path,
               "--rows", "5", "--rows_one_by_one", "2", "--max_new_tokens", "4",
               "--vllm_python", "/bin/false"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [result["name"] for result in record["results"]] == ["ours", "one_by_one", "unsorted_batch"]
    assert [absent["name"] for absent in record["absent"]] == ["vllm", "openai_server"]
    assert all(result["tokens_per_second"] > 0 for result in record["results"])
    assert [result["tokens"] for result in record["results"]] == [20, 8, 20]
    assert record["ratios"].keys() == {"ours / one_by_one", "ours / unsorted_batch"}


def test_sweep_generation_asks_both_for_the_same_answers(job, tmp_path):
    profile = job["profile"]
    train_job.train_ours({**job, "epochs": 1}, Path(job["data"]), "online", 0.8)
    [run] = Path(job["data"]).glob("run_*")
    rows = [{"id": f"{i}", "source": "sums", "domain": "maths", "prompt": f"{i} + {i}?", "reference": str(2 * i),
             "grader": "numeric", "grader_args": "{}"} for i in range(3)]  # fmt: skip
    write_jsonl(tmp_path / "eval_dataset.jsonl", rows)
    found = {"base": profile["model_name_or_path"], "teacher": profile["teacher_model_name_or_path"],
             "kd": str(run / "final_model")}  # fmt: skip
    settings = {"data_dir": str(tmp_path), "mode": "quick", "temperatures": [0.0, 1.0], "num_samples": 2,
                "max_new_tokens": 4, "allow_unsafe_execution": True}  # fmt: skip
    job = {"settings": settings, "models": found}
    for arm in found:
        for what in ("sweep", "stage_1"):
            measured = sweep_generation.measure(f"{what}_{arm}", job)
            assert measured["answers"] == 3 * 2 * 2, (what, arm)


@pytest.fixture(scope="module")
def planned_and_measured(tmp_path_factory, tiny_models):
    """The record of all three stages, with random weights on folders without any."""
    root = tmp_path_factory.mktemp("plan")
    names = []
    for name in (tiny_models.student, tiny_models.teacher):
        folder = root / Path(name).name
        shutil.copytree(name, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        names.append(str(folder))
    settings = {"teacher_signal": "hidden", "batch_size": 2, "gradient_accumulation_steps": 2, "lora_r": 4,
                "alpha": 0.8, "max_length": 8192, "compile_loss": False, "warmup_steps": 0, "bf16": False}  # fmt: skip
    overlay = {"cache_teacher": {"tokens_per_batch": 10_000}, "run_improved_kd": {"tokens_per_batch": 9000}}
    caching = {"max_length": 8192, "bf16": False}
    (root / "profile.yaml").write_text(yaml.safe_dump({"run_improved_kd": settings, "cache_teacher": caching}))
    (root / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    arguments = argparse.Namespace(
        config=root / "profile.yaml", hardware=str(root / "overlay.yaml"), stages=["export"], random_weights=names,
        quick=True, steps=None, rows=20, output=root / "record.json",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # in this process: a fresh one imports for ten seconds
        patch.setattr(harness, "run_worker", lambda _, stage, job, minutes: plan.measure(stage, job))
        plan.parent(arguments)
    return json.loads(arguments.output.read_text(encoding="utf-8"))


def test_plan_measures_every_stage_as_the_overlay_says(planned_and_measured):
    record = planned_and_measured
    cache, train, export = record["results"]
    assert [result["name"] for result in record["results"]] == ["cache", "train", "export"]
    assert {"machine", "versions", "git_commit", "planned_for", "rows", "settings"} <= record.keys()
    assert "passes of 10,000 tokens" in cache["planned"]["how"]
    assert "2 steps of 4 rows" in train["planned"]["how"]
    for stage, tokens in (("cache", 10_000), ("train", 9000)):  # what was run
        assert record["settings"][stage]["tokens_per_batch"] == tokens
    rows = record["rows"]
    assert cache["planned"]["tokens"] == pytest.approx(21 * (rows["prompt_tokens"] + rows["answer_tokens"]))
    assert len(train["step_seconds"]) == 1
    assert export["check"]["error"] <= 1.5 * export["check"]["rounding"]
    assert 0 < export["merge_gb"] <= export["measured_gb"]


def test_plan_judges_by_what_it_records(planned_and_measured):
    for result in planned_and_measured["results"]:
        parts, (low, high) = result["planned"]["parts_gb"], result["planned"]["seconds"]
        assert result["planned"]["planned_gb"] == pytest.approx(sum(parts.values()) - parts["overhead"])
        assert result["ratio"] == pytest.approx(result["planned"]["planned_gb"] / result["measured_gb"])
        assert result["close"] == (0.85 <= result["ratio"] <= 1.15)
        assert result["in_range"] == (low <= result["seconds"] <= high)
        assert result["made_seconds"] > 0
        assert result["planned"]["work_seconds"][0] < low


def test_plan_sees_a_wrong_plan():
    made = {"planned_gb": 10.0, "seconds": [20.0, 60.0]}
    for gb, seconds, close, in_range in ((9.0, 30, True, True), (8.0, 61, False, False), (12.0, 19, False, False)):
        found = plan.compared("cache", made, {"measured_gb": gb, "seconds": seconds}, 3)
        assert (found["close"], found["in_range"]) == (close, in_range), gb
    assert "ratio" not in plan.compared("cache", made, {"absent": "no memory"}, 3)
