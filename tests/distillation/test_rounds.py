"""On-policy rounds: what a step learns from, that nothing is lost with a kill, and that idle settings change nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights

from src.distillation import kd, rounds, training
from src.distillation.kd import run_kd_pipeline
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache
from src.utils.common import read_json, read_jsonl

MEASURED = ("tokens_per_second", "peak_memory_mb")  # columns of metrics.jsonl that no two runs share


@pytest.fixture
def settings(tmp_path, tiny_teacher, ending_teacher, clean_rows, write_sft):
    """A run of six steps in two rounds, of a student some of whose answers end."""
    experiment = write_sft(tmp_path / "experiment" / "tiny", clean_rows(40), clean_rows(8, start=100))
    return {
        "model_name_or_path": ending_teacher,
        "teacher_model_name_or_path": tiny_teacher,
        "experiment_dir": str(experiment),
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "max_length": 256,
        "save_steps": 2,
        "eval_steps": 100,
        "lora_r": 4,
        "bf16": False,
        "teacher_signal": "hidden",
        "compile_loss": False,
        "on_policy_rounds": 2,
        "on_policy_batch_size": 4,
        "on_policy_max_new_tokens": 24,
    }


def cached(settings: dict, **changes) -> dict:
    names = ("teacher_model_name_or_path", "experiment_dir", "max_length")
    plain = {name: settings[name] for name in names} | {"bf16": False, "temperatures": [2.5]}
    return make_cache(CacheTeacherConfig(**plain | changes))


def metrics(results: dict) -> list[dict]:
    rows = read_jsonl(Path(results["run_dir"]) / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def round_files(results: dict) -> dict[str, bytes]:
    """What each round has left but for times and versions."""
    found = {}
    for folder in sorted(Path(results["run_dir"]).glob("rounds/*")):
        for path in sorted([*folder.glob("sft/*"), *folder.glob("teacher_cache/*.safetensors")]):
            found[f"{folder.name}/{path.name}"] = path.read_bytes()
        facts = read_json(folder / "round.json")
        del facts["answering_seconds"], facts["caching_seconds"]
        found[f"{folder.name}/round.json"] = str(facts).encode()
    return found


def assert_same_run(one: dict, other: dict) -> None:
    assert metrics(one) == metrics(other)
    ours, theirs = (load_peft_weights(results["final_model"]) for results in (one, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Killed(BaseException):
    pass


def kill_after(calls: int, function: Callable) -> Callable:
    """The function, which does its work `calls` times and is killed then."""
    done = []

    def killed(*arguments, **keywords):
        if len(done) == calls:
            raise Killed
        done.append(True)
        return function(*arguments, **keywords)

    return killed


# where a run of two rounds of three steps is killed, one time after the other: with a third of a round's answers, with
# all of them, with the cache, at a step, between the rounds (there are checkpoints after steps 2, 3, 4 and 6)
KILLS = [
    (rounds, "append_jsonl", 1),
    (rounds, "_write_clean", 0),
    (rounds, "round_facts", 0),
    (training, "take_step", 1),
    (kd, "open_round", 1),
    (rounds, "append_jsonl", 2),
    (rounds, "make_cache", 0),
    (training, "take_step", 2),
    (kd, "_save_final", 0),
]


def test_a_run_killed_anywhere_ends_as_an_uninterrupted_one(settings, tmp_path, monkeypatch):
    cached(settings)
    whole = run_kd_pipeline(settings | {"output_dir": str(tmp_path / "whole")})
    cut = settings | {"output_dir": str(tmp_path / "cut")}
    for module, name, calls in KILLS:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, kill_after(calls, getattr(module, name)))
            with pytest.raises(Killed):
                run_kd_pipeline(cut)
    resumed = run_kd_pipeline(cut)
    assert_same_run(whole, resumed)
    assert round_files(whole) == round_files(resumed)
    assert whole["after"] == resumed["after"]
    assert [row["round"] for row in metrics(whole) if "loss" in row] == [1, 1, 1, 2, 2, 2]
    assert not list((tmp_path / "cut").glob("rounds/*/begun.json"))
