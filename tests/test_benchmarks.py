"""The benchmarks in tiny sizes: their records have the promised form, and what they measure of ours is right."""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from benchmarks import (
    harness,
    kd_loss,
    kd_reference,
    plan,
    step_parts,
    sweep_generation,
    teacher_cache,
    teacher_generation,
    train_job,
    train_peers,
    train_step,
)
from src.distillation import kd, losses, training
from src.distillation import teacher_cache as source_cache
from src.distillation.sft import Sampling
from src.planning.shapes import read_shapes
from src.planning.timing import starting
from src.utils.common import UserError, write_json, write_jsonl
from src.utils.config import build_config

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
    right = kd_loss.CONTENDERS["ours_plain"](job["vocab_size"])
    monkeypatch.setitem(kd_loss.CONTENDERS, "wrong", lambda _: lambda *case: right(*case[:5], case[5] * 1.01, case[6]))
    monkeypatch.setattr(kd_loss, "OURS", (*kd_loss.OURS, "wrong"))
    assert kd_loss.measure("ours_plain", job)["grad_rel_error"] < 1e-5
    assert kd_loss.measure("wrong", job)["grad_rel_error"] > 1e-3


def test_on_a_gpu_our_head_is_a_view_of_what_the_peers_multiply():
    """The next width that tensor cores like is stored, so that nothing is copied while memory is measured."""
    shape = kd_loss.ON_GPU
    assert shape["vocab_size"] < -(-shape["vocab_size"] // losses.ALIGNED) * losses.ALIGNED <= shape["V"]
    for name in kd_loss.CONTENDERS:
        assert kd_loss.width_of(name, shape) == shape["vocab_size" if name in kd_loss.OURS else "V"]


def test_labels_are_tokens_and_stand_out_as_much_as_is_said():
    shape = {**kd_loss.QUICK, "N": 500}
    student, student_head, teacher, teacher_head, labels = kd_reference.inputs(shape | {"dtype": "float32", "seed": 0})
    assert labels.max() < shape["vocab_size"] < len(student_head)
    for states, head, above in ((teacher, teacher_head, 15), (student, student_head, 11.25)):
        logits = states @ head.T
        found = logits.gather(1, labels[:, None])[:, 0] - logits.mean(-1)
        assert found.mean().item() == pytest.approx(above, rel=0.1)


def test_growth_takes_rounds_and_refuses_contenders(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(harness, "run_worker", lambda _, name, job: asked.append(job) or {"name": name, "seconds": 1.0})
    found = kd_loss.growth({"H": 8, "dtype": "float32"}, quick=True, repeats=3)
    assert len(asked) == 3 * len(found)
    assert all(job["V"] == job["vocab_size"] for job in asked)
    arguments = argparse.Namespace(
        quick=True, dtype="float32", growth=True, only=["liger"], repeats=1, output=tmp_path / "record.json"
    )
    with pytest.raises(UserError, match="leave out --only"):
        kd_loss.parent(arguments)


def test_every_worker_says_where_the_machine_was_not_quiet(monkeypatch, capsys):
    busy = {"busy_elsewhere": 0.5}

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        write_json(Path(command[-1]).with_suffix(".result"), {"seconds": 1.0} | busy)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert harness.run_worker("python", "caches", {})["seconds"] == 1.0
    assert "caches: NOT QUIET: others used 50%" in capsys.readouterr().err
    busy["busy_elsewhere"] = harness.NOISE / 2
    harness.run_worker("python", "caches", {})
    assert "NOT QUIET" not in capsys.readouterr().err


def test_a_round_that_failed_is_told_of(capsys):
    rounds = [{"name": "liger", "seconds": 2.0, "peak_mb": 5.0}, {"name": "liger", "absent": "no memory"}]
    best = harness.best_of(rounds)
    assert (best["seconds"], best["failed_rounds"]) == (2.0, ["no memory"])
    assert "failed_rounds" not in harness.best_of(rounds[:1])
    harness.print_table([best], {"seconds": ".1f"})
    assert "1 of its rounds failed" in capsys.readouterr().out


def test_a_peer_that_could_not_be_installed_is_tried_again(monkeypatch, tmp_path):
    """One fault of the network leaves nobody absent for good."""
    broken, installed = {harness.RIVAL_PACKAGES[0]}, []

    def run(command: list, **_: object) -> subprocess.CompletedProcess:
        if "venv" in command:
            (tmp_path / "rivals" / "lib" / "python3" / "site-packages").mkdir(parents=True, exist_ok=True)
            return subprocess.CompletedProcess(command, 0)
        installed.append(command[-1])
        return subprocess.CompletedProcess(command, int(command[-1] in broken))

    monkeypatch.setattr(harness, "RIVALS", tmp_path / "rivals")
    monkeypatch.setattr(subprocess, "run", run)
    harness.rivals_python()
    broken.clear()
    harness.rivals_python()
    assert installed == [*harness.RIVAL_PACKAGES, *harness.RIVAL_PACKAGES]
    harness.rivals_python()
    assert len(installed) == 2 * len(harness.RIVAL_PACKAGES)


PROFILE = {"batch_size": 2, "gradient_accumulation_steps": 2, "lora_r": 4, "temperature": 2.0, "bf16": False}


@pytest.mark.parametrize("floor_fails", [False, True])
def test_train_step_assembles_its_record_whoever_fails(monkeypatch, tmp_path, capsys, floor_fails):
    """All contenders of a GPU by their names alone; each of ours beside the floor of what it does."""
    job = {"profile": {"alpha": 0.8}, "random_weights": False, "data": "", "probe": ""}
    floors = {"sft": 1.0, "hidden": 2.0, "online": 4.0}

    def run_worker(_: str, name: str, __: dict) -> harness.Result:
        if name in ("plain_torch:gradient", "ours_sft:parts") or (name == "floor" and floor_fails):
            return {"name": name, "absent": "no memory"}
        kinds = {kind: {"seconds": seconds} for kind, seconds in floors.items()}
        return {"name": name, "seconds": 8.0, "peak_mb": 1.0, "floor": kinds, "grad_rel_error": 0.01, "parts": {}}

    monkeypatch.setattr(harness, "run_worker", run_worker)
    monkeypatch.setattr(harness, "device", lambda: "cuda")
    monkeypatch.setattr(harness, "rivals_python", lambda: "python")
    monkeypatch.setattr(train_step, "make_job", lambda *_: job)
    output = tmp_path / "record.json"
    train_step.parent(argparse.Namespace(only=None, repeats=2, output=output))
    record = json.loads(output.read_text(encoding="utf-8"))
    assert {result["name"] for result in record["results"]} == train_step.CONTENDERS.keys()
    absent = ["floor"] * floor_fails + ["ours_sft:parts", "plain_torch:gradient"]
    assert [(each["name"], each["absent"]) for each in record["absent"]] == [(name, "no memory") for name in absent]
    said = capsys.readouterr().err
    assert all(f"{name}: absent: no memory" in said for name in absent)
    for result in record["results"]:
        name = result["name"]
        if name in train_step.OURS:
            kind = {"ours_sft": "sft", "ours_online": "online"}.get(name, "hidden")
            assert result.get("share_of_matmul_rate") == (None if floor_fails else floors[kind] / 8)
            assert record["ratios"][name].get("over_floor") == (None if floor_fails else 8 / floors[kind])


@pytest.fixture
def job(tmp_path, tiny_models, clean_rows, write_sft, request):
    """Of a profile with alpha 0.8, and the settings that a test gives by `indirect`."""
    settings = PROFILE | {"alpha": 0.8} | getattr(request, "param", {})
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({"run_improved_kd": settings}), encoding="utf-8")
    arguments = argparse.Namespace(
        config=profile, model=tiny_models.student, teacher=tiny_models.teacher, quick=True, steps=None,
        random_weights=None,
        experiment_dir=write_sft(tmp_path / "experiment", clean_rows(30), clean_rows(2, start=100)),
    )  # fmt: skip
    return train_job.make_job(arguments, tmp_path)


OWN = {
    "teacher_temperature": 0.2,
    "teacher_top_k": 20,
    "teacher_top_p": 0.9,
    "divergence": "jsd",
    "on_policy_rounds": 2,
}


@pytest.mark.parametrize("job", [OWN], indirect=True)
def test_all_contenders_have_one_objective(job):
    """What a profile asks that no peer can do is switched off for ours too; T and alpha are the profile's."""
    config = build_config(kd.KDConfig, job["profile"])
    plain = kd.KDConfig(divergence="forward_kl")
    assert {name: getattr(config, name) for name in OWN} == {name: getattr(plain, name) for name in OWN}
    assert (config.temperature, config.alpha) == (2.0, 0.8)
    for name in train_step.CONTENDERS:  # the loss of TRL's trainer reads no temperature
        assert train_step.temperature_of(name, job) == (1.0 if name.startswith("trl_gkd") else 2.0)


def test_a_gradient_is_held_against_what_its_contender_trains(job, monkeypatch):
    """A stand-in for TRL's trainer that does as it does: T = 1 and alpha = 1, whatever the profile says."""

    def like_gkd(name: str, job: dict, folder: Path) -> list[float]:
        profile = job["profile"] | {"temperature": 1.0, "alpha": 1.0}
        return train_peers.plain_torch(name, job | {"profile": profile}, folder)

    monkeypatch.setitem(train_step.CONTENDERS, "trl_gkd", like_gkd)
    assert train_step.gradient_error("trl_gkd", job, Path(job["probe"])) < 1e-4
    monkeypatch.setattr(train_step, "temperature_of", lambda *_: 2.0)
    assert train_step.gradient_error("trl_gkd", job, Path(job["probe"])) > 1e-2


def test_the_floor_is_of_the_passes_that_were_run(job, tmp_path):
    """Smaller passes share fewer beginnings; a run's own are in its folder, the newest run's count."""
    for stamp, tokens in ((8, 2048), (9, 0)):
        took = {"took_effect": {"tokens_per_batch": tokens}}
        write_json(tmp_path / "runs" / f"run_{stamp}" / "kd_config.json", took)
    ran = train_job.tokens_of_a_pass(tmp_path / "runs")
    assert ran == 0
    assert train_step.as_run(job, [{"name": "ours_hidden", "tokens_per_batch": 2048}])["shared"] == job["shared"]
    assert train_step.as_run(job, [{"name": "ours_hidden", "tokens_per_batch": ran}])["shared"] < job["shared"]
    assert train_step.as_run(job, [{"name": "plain_torch"}]) == job


@pytest.mark.parametrize("mixture", [False, True])
def test_the_products_are_those_of_all_weights_that_a_token_visits(tiny_models, mixture):
    name = tiny_models.teacher if mixture else tiny_models.student
    shapes = read_shapes(name)
    assert bool(shapes.experts) == mixture
    found = step_parts.body_products(name, 64, 16, 0, backward=False)
    flops = sum(2 * batch * m * k * n * count for (batch, m, k, n), count in found.items())
    # scores and values: heads x length^2 x width each, in 4 rows
    attention = 2 * 2 * 4 * shapes.layers * shapes.heads * 16 * 16 * shapes.head_dim
    assert flops - attention == 2 * 64 * shapes.active_weights


def test_a_part_takes_what_it_has_queued(monkeypatch):
    """A queue that is worked off when it is waited for: its time belongs to whoever filled it."""
    queued, clock = [], [0.0]

    def wait() -> None:
        clock[0] += sum(queued)
        queued.clear()

    places = {"teacher": (training, "_beliefs"), "student_forward": (training, "response_hidden"),
              "loss": (training, "kd_loss"), "backward": (step_parts.Accelerator, "backward")}  # fmt: skip
    for place in places.values():
        monkeypatch.setattr(*place, lambda: queued.append(1.0))
    monkeypatch.setattr(harness, "device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    with step_parts.parts_of_a_step(1) as parts:
        for _ in range(3):
            for place in places.values():
                getattr(*place)()
            optimizer.step()
    assert parts == dict.fromkeys(places, 1.0) | {"optimizer": 0.0, "rest": 0.0}


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
    assert found["ours_hidden"]["tokens_per_batch"] == kd.CPU_TOKENS
    for result in found.values():
        assert result["seconds_to_first_update"] > 0
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


def test_a_cache_of_two_kinds_has_two_sizes(tmp_path):
    save_file({"hidden": torch.zeros(5, 4)}, tmp_path / "a")
    for name, positions in (("b", 10), ("c", 30)):
        save_file({"ids": torch.zeros(positions, 2), "log_p": torch.zeros(positions, 2)}, tmp_path / name)
    shards = {name: {"bytes": size} for name, size in (("a", 500), ("b", 300), ("c", 500))}
    assert teacher_cache.bytes_by_kind(tmp_path, {"shards": shards}) == {"hidden": 100, "topk": 20}


def test_a_run_has_the_steps_of_the_profile_s_rows(job):
    """30 clean rows, 4 to a step; the job's own rows are fewer."""
    config = build_config(kd.KDConfig, job["profile"] | {"validation_fraction": 0.0, "epochs": 2})
    assert teacher_cache.steps_of_a_run(config) == 30 // 4 * 2 > job["steps"] * 2
    config.max_steps = 9
    assert teacher_cache.steps_of_a_run(config) == 9
    results = [{"name": "online", "seconds": 3.0, "opening_seconds": 5.0},
               {"name": "hidden", "seconds": 1.0, "opening_seconds": 2.0}]  # fmt: skip
    found = teacher_cache.paid(results, 46.0, 10)
    assert (found["seconds_saved_a_run"], found["runs_until_it_has_paid"]) == (23.0, 2.0)


def test_teacher_cache_tells_exact_from_biased(job, tmp_path):
    for kind in ("hidden", "topk"):
        job[kind] = str(tmp_path / kind)
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "sft").symlink_to(Path(job["profile"]["experiment_dir"]) / "sft")
        made = teacher_cache.measure(f"make:{kind}", job)
        assert made["bytes_by_kind"].keys() == {"hidden", kind}
        assert min(made["bytes_by_kind"].values()) <= made["bytes_per_token"] <= max(made["bytes_by_kind"].values())
    job["reference"] = str(tmp_path / "reference.pt")
    teacher_cache.measure("reference", job)
    found = {name: teacher_cache.measure(name, job)["accuracy"] for name in teacher_cache.SIGNALS}
    for index, hidden in enumerate(found["hidden"]):
        online, topk = found["online"][index], found["topk"][index]
        assert hidden["loss"] == pytest.approx(online["loss"], rel=0.01)
        assert hidden["grad_rel_error"] < online["grad_rel_error"] + 0.01
        assert hidden["grad_rel_error"] < topk["grad_rel_error"]


def test_teacher_generation_writes_its_record(tmp_path, tiny_teacher):
    """Without vLLM: all that run on it stand under `absent`, not among the results."""
    path = tmp_path / "record.json"
    command = [sys.executable, "benchmarks/teacher_generation.py", "--teacher", tiny_teacher, "--output", path,
               "--rows", "5", "--rows_one_by_one", "2", "--max_new_tokens", "4",
               "--vllm_python", "/bin/false"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert [result["name"] for result in record["results"]] == ["ours", "one_by_one", "unsorted_batch"]
    absent = [absent["name"] for absent in record["absent"]]
    assert absent == ["vllm", "vllm_without_seeds", "vllm_all_cores", "openai_server"]
    assert all(result["tokens_per_second"] > 0 for result in record["results"])
    assert [result["tokens"] for result in record["results"]] == [20, 8, 20]
    assert record["ratios"].keys() == {"ours / one_by_one", "ours / unsorted_batch"}


FAKE_VLLM = """
from types import SimpleNamespace as Of

class SamplingParams:
    def __init__(self, seed, **_):
        self.seed = seed

class LLM:
    def __init__(self, model, **_):
        pass

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, parameters, use_tqdm):
        if parameters[0].seed is None:
            raise RuntimeError("seeds are needed")
        return [Of(outputs=[Of(token_ids=[1, 2])]) for _ in prompts]
"""


def test_what_vllm_had_measured_when_it_failed_is_kept(monkeypatch, tmp_path):
    """The second of two in one process fails: the first has a result, it a reason, and the other process its own."""
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    requests = teacher_generation.make_requests(teacher_generation.make_rows(3), 1, 42, Sampling(0.7, 0.8, 20, 4))
    asked = teacher_generation.Asked(
        "teacher", requests, ["a"] * 3, [[1], [2], [3]], requests[0].sampling, [0], torch.float32
    )
    results, absent = teacher_generation.measure_offline(asked, sys.executable, 0.4, tmp_path)
    assert [(result["name"], result["tokens"]) for result in results] == [("vllm", 6), ("vllm_all_cores", 6)]
    [why] = absent
    assert why["name"] == "vllm_without_seeds"
    assert "ended with code 1" in why["why"]


def test_a_server_that_does_not_end_is_killed():
    said = []

    class Stuck:
        def terminate(self) -> None:
            said.append("terminate")

        def kill(self) -> None:
            said.append("kill")

        def wait(self, timeout: float | None = None) -> None:
            if "kill" not in said:
                raise subprocess.TimeoutExpired("server", timeout)

    teacher_generation.stop(Stuck())
    assert said == ["terminate", "kill"]


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
        gb, seconds, begun = result["measured_gb"], result["seconds"], (0.0, 0.0)
        if result["name"] == "export":  # without the check, and the start of the process
            gb, seconds, begun = result["merge_gb"], result["merge_and_write_seconds"], starting(0)
        assert result["ratio"] == pytest.approx(result["planned"]["planned_gb"] / gb)
        assert result["close"] == (0.85 <= result["ratio"] <= 1.15)
        assert result["in_range"] == (low - begun[0] <= seconds <= high - begun[1])
        assert result["made_seconds"] > 0
        assert result["planned"]["work_seconds"][0] < low


def test_plan_sees_a_wrong_plan():
    made = {"planned_gb": 10.0, "seconds": [20.0, 60.0]}
    for gb, seconds, close, in_range in ((9.0, 30, True, True), (8.0, 61, False, False), (12.0, 19, False, False)):
        found = plan.compared("cache", made, {"measured_gb": gb, "seconds": seconds}, 3)
        assert (found["close"], found["in_range"]) == (close, in_range), gb
    assert "ratio" not in plan.compared("cache", made, {"absent": "no memory"}, 3)


def test_of_an_export_the_merge_is_judged():
    """The check after it loads two models more, and takes as long again: the plan knows nothing of it."""
    low, high = (seconds + 30 for seconds in starting(0))
    made = {"planned_gb": 10.0, "seconds": [low - 10, high + 10]}
    measured = {"measured_gb": 20.0, "seconds": 10 * high, "merge_gb": 9.5, "merge_and_write_seconds": 30.0}
    found = plan.compared("export", made, measured, 3)
    assert (found["close"], found["in_range"]) == (True, True)
    late = plan.compared("export", made, measured | {"merge_and_write_seconds": 41.0}, 3)
    assert not late["in_range"]
    assert late["judged"]["planned_seconds"] == [20.0, 40.0]
