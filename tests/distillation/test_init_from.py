"""A run that begins from the adapter of another: those very weights, a fresh optimiser, an identity of its own."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights
from safetensors.torch import save_file

from src.distillation import kd, training
from src.distillation.kd import run_kd_pipeline
from src.distillation.sweep import make_plan, read_grid
from src.evaluation.arms import _difference
from src.utils.common import UserError, read_json, read_jsonl, sha256_file, write_json


@pytest.fixture
def settings(tmp_path, tiny_teacher, tiny_student, clean_rows, write_sft):
    experiment = write_sft(tmp_path / "experiment" / "tiny", clean_rows(24), clean_rows(4, start=100))
    return {
        "model_name_or_path": tiny_student, "teacher_model_name_or_path": tiny_teacher,
        "experiment_dir": str(experiment), "learning_rate": 1e-2, "warmup_steps": 2, "batch_size": 4,
        "gradient_accumulation_steps": 2, "max_steps": 3, "max_length": 256, "save_steps": 100, "eval_steps": 100,
        "lora_r": 4, "bf16": False, "teacher_signal": "online", "compile_loss": False,
    }  # fmt: skip


@pytest.fixture
def first(settings) -> dict:
    return run_kd_pipeline(settings)


def fingerprint(results: dict) -> dict:
    return read_json(Path(results["run_dir"]) / "kd_config.json")["fingerprint"]


def assert_same_weights(one: dict, other: dict) -> None:
    ours, theirs = (load_peft_weights(results["final_model"], device="cpu") for results in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def refused(settings: dict, words: str) -> None:
    root = Path(settings["experiment_dir"]).parent
    before = set(root.iterdir())
    with pytest.raises(UserError) as caught:
        run_kd_pipeline(settings)
    assert re.search(words, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert set(root.iterdir()) == before, "nothing is begun"


def test_it_begins_with_the_adapters_weights_and_a_fresh_optimiser(settings, first):
    """A rate at which fp32 weights do not move: the adapter is the first run's, bit for bit, and so is what it gives.

    `before` is the bare student in both.
    """
    still = settings | {"init_from": first["run_dir"], "learning_rate": 1e-30}
    second = run_kd_pipeline(still)
    assert_same_weights(first, second)
    assert second["after"] == first["after"]
    assert second["before"] == first["before"]
    rows = read_jsonl(Path(second["run_dir"]) / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [row["lr"] for row in rows if "loss" in row][:2] == [0, pytest.approx(0.5e-30)], "its own warm-up"


def test_the_adapter_is_part_of_what_the_run_is_and_its_place_is_not(settings, first, tmp_path):
    begun = settings | {"init_from": first["run_dir"], "max_steps": 1}
    second = run_kd_pipeline(begun)
    digest = sha256_file(Path(first["final_model"]) / "adapter_model.safetensors")
    assert fingerprint(second)["init_from"] == digest
    assert "init_from" not in fingerprint(first)
    assert read_json(Path(second["run_dir"]) / "kd_config.json")["init_from"] == first["run_dir"]
    card = Path(second["final_model"], "README.md").read_text()
    assert f"from the adapter of `{Path(first['run_dir']).name}` on (sha256 {digest[:16]})" in card
    copy = shutil.copytree(first["final_model"], tmp_path / "elsewhere")
    for place in (first["final_model"], str(copy)):
        assert run_kd_pipeline(begun | {"init_from": place})["run_dir"] == second["run_dir"]
    third = run_kd_pipeline(begun | {"init_from": second["run_dir"]})
    assert fingerprint(third)["init_from"] == second["adapter_sha256"]


def test_the_control_begins_where_its_run_begins(settings, first):
    begun = settings | {"init_from": first["final_model"], "max_steps": 1}
    kd_run, control, fresh = (
        read_json(Path(run_kd_pipeline(own)["run_dir"]) / "kd_config.json")
        for own in (begun, begun | {"alpha": 0}, settings | {"alpha": 0, "max_steps": 1})
    )
    assert _difference(kd_run, control) is None
    assert _difference(kd_run, fresh) == f"its init_from is None, the distilled student's {first['adapter_sha256']!r}"


@pytest.mark.parametrize("killed_at", [1, 3])
def test_a_killed_run_ends_as_an_uninterrupted_one(settings, first, tmp_path, monkeypatch, killed_at):
    """Before its first checkpoint it begins from the adapter again; after it the adapter is not loaded."""
    begun = settings | {"init_from": first["run_dir"], "save_steps": 2, "max_steps": 4}
    whole = run_kd_pipeline(begun | {"output_dir": str(tmp_path / "whole")})
    take_step = training.take_step

    def stop(run):
        if run.step == killed_at:
            raise KeyboardInterrupt
        return take_step(run)

    cut = begun | {"output_dir": str(tmp_path / "cut")}
    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", stop)
        with pytest.raises(KeyboardInterrupt):
            run_kd_pipeline(cut)
    if killed_at == 3:
        monkeypatch.setattr(kd, "begin_from", lambda *_: pytest.fail("loaded again"))
    assert_same_weights(whole, run_kd_pipeline(cut))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_r": 8}, "its r is 4, this run's 8; pass --lora_r 4"),
        ({"lora_alpha": 16}, "its lora_alpha is 128, this run's 16; pass --lora_alpha 128"),
        (
            {"lora_target_modules": ["q_proj"]},
            "its target_modules is .*; pass --lora_target_modules down_proj gate_proj",
        ),
        ({"model_name_or_path": "teacher"}, "is an adapter of .*student.*another model; name the adapter's with"),
        ({"init_from": "student"}, "no adapter_config.json there; name a run folder or its final_model"),
        ({"init_from": "no/such"}, "--init_from no/such: no adapter_config.json there"),
    ],
)
def test_an_adapter_of_another_make_is_refused(settings, first, tiny_teacher, tiny_student, change, words):
    places = {"teacher": tiny_teacher, "student": tiny_student}
    named = {name: places.get(value, value) if isinstance(value, str) else value for name, value in change.items()}
    refused(settings | {"init_from": first["run_dir"]} | named, words)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"use_rslora": True}, "its use_rslora is True; training goes on from plain LoRA"),
        ({"peft_type": "LOHA"}, "its peft_type is 'LOHA'"),
        ({"alpha_pattern": {"q_proj": 3}}, "its alpha_pattern is "),
        ({"init_lora_weights": "pissa"}, "its init_lora_weights is 'pissa'; training goes on from plain LoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "its init_lora_weights is 'pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "its init_lora_weights is 'olora'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "its init_lora_weights is 'loftq'"),
        ({"alora_invocation_tokens": [1, 2]}, r"its alora_invocation_tokens is \[1, 2\]"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "its layer_replication is "),
        ({"use_of_a_later_peft": True}, "its use_of_a_later_peft is True"),
        ({"base_model_name_or_path": "/gone/student"}, "/gone/student"),
    ],
)
def test_what_would_load_and_be_another_function_is_refused(settings, first, tmp_path, entry, words):
    """In a folder by itself, where no run says which model it is of."""
    folder = shutil.copytree(first["final_model"], tmp_path / "adapter")
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | entry)
    refused(settings | {"init_from": str(folder)}, words)


def test_how_an_adapter_was_begun_and_written_is_of_no_account(settings, first, tmp_path):
    """Defaults as another peft writes them, and a beginning that leaves the model's own weights as they are."""
    folder = shutil.copytree(first["final_model"], tmp_path / "adapter")
    other = {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "alpha_pattern": None, "use_of_a_later_peft": False}
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | other)
    still = settings | {"init_from": str(folder), "learning_rate": 1e-30, "max_steps": 1}
    assert_same_weights(first, run_kd_pipeline(still))


def test_a_run_that_is_unfinished_or_of_no_known_make_is_refused(settings, first, tmp_path):
    run = shutil.copytree(first["run_dir"], tmp_path / "run")
    write_json(run / "kd_config.json", {"model": "student"})
    refused(settings | {"init_from": str(run)}, "kd_config.json beside it has no fingerprint of a student")
    (run / "final_model").rename(tmp_path / "adapter")
    refused(settings | {"init_from": str(run)}, "run: a run without a final_model, unfinished or moved away")


def test_a_run_is_found_again_where_the_adapter_lies_now(settings, first, tmp_path):
    """By the adapter's content; once it is gone nothing says which run is meant."""
    begun = settings | {"init_from": first["run_dir"], "max_steps": 1}
    second = run_kd_pipeline(begun)
    moved = Path(first["final_model"]).rename(tmp_path / "moved")
    refused(begun, "a run without a final_model")
    assert run_kd_pipeline(begun | {"init_from": str(moved)})["run_dir"] == second["run_dir"]


def test_weights_that_do_not_fit_or_are_no_safetensors_are_refused(settings, first, tmp_path):
    """peft would leave out what it does not know, keep fresh weights where some are missing, and read a pickle."""
    folder = shutil.copytree(first["final_model"], tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    weights = load_peft_weights(first["final_model"], device="cpu")
    name = min(weights)
    for broken in ({n: w for n, w in weights.items() if n != name}, weights | {name: torch.zeros(3, 3)}):
        save_file(broken, path)
        with pytest.raises(UserError, match=f"its {re.escape(name)} is .*name an adapter of this student"):
            run_kd_pipeline(settings | {"init_from": str(folder)})
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="its weights cannot be read"):
        run_kd_pipeline(settings | {"init_from": str(folder)})
    path.rename(folder / "adapter_model.bin")
    refused(
        settings | {"init_from": str(folder)}, "no adapter_model.safetensors there, and weights are read from nothing"
    )


def test_a_sweep_has_one_beginning(settings, first, tmp_path):
    """It is part of its runs' names; a sweep over beginnings is refused."""
    plans = []
    for begin in ([], ["--init_from", first["run_dir"]]):
        plans.append(make_plan(read_grid(["--alpha", "0", "0.5", *begin], settings), tmp_path))
    assert not plans[0].runs.keys() & plans[1].runs.keys()
    with pytest.raises(UserError, match="one value of init_from, for it has one beginning"):
        read_grid(["--init_from", "a", "b"], settings)
