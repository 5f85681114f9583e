"""How many tokens a pass holds: measured, halved where memory runs out, and no part of what a run is."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import load_peft_weights

from src.distillation import gpu, kd, teacher_cache, training
from src.distillation.kd import run_kd_pipeline
from src.distillation.kd_config import KDConfig
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache
from src.utils.common import UserError, read_json, read_jsonl, write_json

GIB = 2**30


@dataclass
class FakeMemory:
    """GPUs that need `fixed + per_token x tokens` bytes for a pass."""

    left: list[int]
    fixed: int
    per_token: list[int]
    tokens: int = 0

    def free(self):
        return self.left

    def peak_of(self, work):
        work()
        return [self.fixed + each * self.tokens for each in self.per_token]


@pytest.mark.parametrize("reserved", [0, 2 * GIB])
def test_the_fullest_gpu_decides(reserved):
    memory = FakeMemory([40 * GIB, 20 * GIB], GIB, [5 * 2**20, 4 * 2**20])
    lengths = [300] * 64

    def work(rows):
        memory.tokens = sum(lengths[row] for row in rows)

    fits = gpu.tokens_that_fit(lengths, work, memory, reserved)
    assert fits == pytest.approx((0.85 * 20 * GIB - GIB - reserved) / (4 * 2**20), rel=0.01)


def test_what_cannot_be_measured():
    memory = FakeMemory([GIB], 2 * GIB, [2**20])
    assert gpu.tokens_that_fit([300, 200], lambda rows: None, memory) is None, "both passes are all rows"
    lengths = [500] * 20

    def work(rows):
        memory.tokens = sum(lengths[row] for row in rows)
        if len(rows) > 3:
            raise torch.OutOfMemoryError("too many")

    assert gpu.tokens_that_fit(lengths, work, memory) == 1500, "the smaller pass fits"


def test_a_long_row_is_measured_by_itself_and_with_another():
    memory = FakeMemory([40 * GIB], GIB, [2**20])
    lengths, passes = [5000, 300, 4500], []

    def work(rows):
        passes.append(rows)
        memory.tokens = sum(lengths[row] for row in rows)

    fits = gpu.tokens_that_fit(lengths, work, memory)
    assert fits == pytest.approx((0.85 * 40 * GIB - GIB) / 2**20, rel=0.01)
    assert passes == [[0], [0], [0, 2]]
    assert gpu.tokens_that_fit([5000], work, memory) is None, "there is no other"


@pytest.fixture
def settings(tmp_path, tiny_teacher, tiny_student, clean_rows, write_sft):
    experiment = write_sft(tmp_path / "experiment" / "tiny", clean_rows(40), clean_rows(8, start=100))
    return {
        "model_name_or_path": tiny_student, "teacher_model_name_or_path": tiny_teacher,
        "experiment_dir": str(experiment), "learning_rate": 1e-2, "warmup_steps": 0, "batch_size": 8,
        "gradient_accumulation_steps": 2, "max_steps": 3, "lora_r": 4, "bf16": False, "teacher_signal": "online",
        "compile_loss": False,
    }  # fmt: skip


def losses(results):
    return [row["loss"] for row in read_jsonl(Path(results["run_dir"]) / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("change", [{}, {"packing": False}, {"tokens_per_batch": 0}, {"lora_dropout": 0.1}])
def test_a_step_that_runs_out_of_memory_is_taken_again_in_smaller_passes(
    settings, change, tmp_path, monkeypatch, caplog
):
    """It learns what small passes learn from the start, and keeps to them."""
    small = {} if change.get("packing") is False else {"tokens_per_batch": 160}
    if "lora_dropout" in change:  # its draws go by the pass
        small = {"tokens_per_batch": 2048}
    whole = run_kd_pipeline(settings | change | small | {"output_dir": str(tmp_path / "whole")})
    pass_loss, refused, dropout = training.pass_loss, [], "lora_dropout" in change

    def limited(run, rows):
        tokens = sum(len(row.student) for row in rows)
        torch.rand(3)  # as a pass that got half way would have drawn
        if tokens > 200 and not (dropout and refused):
            refused.append(run.step)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pass_loss(run, rows)

    monkeypatch.setattr(training, "pass_loss", limited)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    found = run_kd_pipeline(settings | change | {"output_dir": str(tmp_path / "found")})
    assert refused
    assert set(refused) == {0}, "later steps begin with the smaller passes"
    assert "step 1: out of GPU memory; going on with passes of" in caplog.text
    if not dropout:
        assert losses(found) == pytest.approx(losses(whole), rel=1e-4)
        ours, theirs = (load_peft_weights(results["final_model"]) for results in (found, whole))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)


def test_not_even_a_row_fits(settings, monkeypatch):
    def full(run, rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "pass_loss", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(UserError, match=r"step 1: out of GPU memory; lower --tokens_per_batch .*--gradient_checkp"):
        run_kd_pipeline(settings)


def test_a_row_that_does_not_fit_ends_the_search(settings, clean_rows, write_sft, monkeypatch):
    """It is a pass by itself already; the others are halved until they are, too, and then the answer is no."""
    rows = clean_rows(40)
    for row in rows[::4]:
        row["messages"][1]["content"] = "It is easy. " * 40 + row["messages"][1]["content"]
    write_sft(settings["experiment_dir"], rows, clean_rows(8, start=100))
    pass_loss = training.pass_loss

    def limited(run, rows):
        if max(len(row.student) for row in rows) > 400:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pass_loss(run, rows)

    monkeypatch.setattr(training, "pass_loss", limited)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(UserError, match="out of GPU memory"):
        run_kd_pipeline(settings)


def killed_at(monkeypatch, step, settings):
    take_step = training.take_step

    def killed(run):
        if run.step == step:
            raise KeyboardInterrupt
        return take_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", killed)
        with pytest.raises(KeyboardInterrupt):
            run_kd_pipeline(settings)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"tokens_per_batch": 0}, {}),
        ({"packing": False}, {}),
        ({}, {"packing": False, "tokens_per_batch": 0}),
        ({"optim": "sgd"}, {"optim": "sgd"}),
        ({"logging_steps": 3}, {"logging_steps": 3}),
    ],
)
def test_a_killed_run_goes_on_however_its_work_is_cut_now(settings, first, then, tmp_path, monkeypatch):
    target = settings | {"save_steps": 1, "output_dir": str(tmp_path / "run")}
    whole = run_kd_pipeline(settings | first | {"save_steps": 1, "output_dir": str(tmp_path / "whole")})
    killed_at(monkeypatch, 2, target | first)
    found = run_kd_pipeline(target | then)
    assert losses(found) == pytest.approx(losses(whole), rel=1e-5)
    assert found["train_tokens"] == whole["train_tokens"]


def test_random_states_of_processes_that_were_not_there(settings, tmp_path, monkeypatch, caplog):
    target = settings | {"save_steps": 1, "output_dir": str(tmp_path / "run")}
    killed_at(monkeypatch, 2, target)
    for path in (tmp_path / "run").glob("checkpoint-*"):
        (path / "rng_0.safetensors").unlink()
        facts = read_json(path / "complete.json")
        del facts["sha256"]["rng_0.safetensors"]
        write_json(path / "complete.json", facts)
    assert run_kd_pipeline(target)["steps"] == 3
    assert "more processes than before" in caplog.text


@pytest.mark.parametrize(("stored", "here", "warned"), [(0, 0, False), (2, 0, True), (0, 1, True), (2, 1, True)])
def test_random_states_of_gpus_that_are_not_there(monkeypatch, caplog, stored, here, warned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    states = {f"cuda_{index:03d}": torch.get_rng_state() for index in range(stored)}
    training._set_random_states({"cpu": torch.get_rng_state()} | states)
    assert (f"random states of {stored} GPUs, here are {here}" in caplog.text) == warned


def test_dropout_makes_the_cut_part_of_a_run():
    plain, other = (KDConfig(tokens_per_batch=tokens) for tokens in (0, 100))
    assert plain.identity() == other.identity()
    plain, other = (KDConfig(tokens_per_batch=tokens, lora_dropout=0.1) for tokens in (0, 100))
    assert plain.identity() != other.identity()


def test_a_probe_that_runs_out_of_memory_leaves_no_gradient(settings, monkeypatch):
    """Step 1 would be taken with it."""
    prepare, runs = kd._prepare, []

    def prepared(*arguments):
        runs.append(prepare(*arguments))
        return runs[0]

    monkeypatch.setattr(kd, "_prepare", prepared)
    monkeypatch.setattr(kd, "train", lambda run, folder: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run_kd_pipeline(settings)
    [run] = runs
    assert training.probe_gradients(run)

    pass_loss = training.pass_loss

    def half_way(run, rows):
        pass_loss(run, rows).loss.backward()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "pass_loss", half_way)
    with pytest.raises(torch.OutOfMemoryError):
        training.probe_gradients(run)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_a_run_that_was_killed_keeps_its_smaller_passes(settings, tmp_path, monkeypatch):
    """Bit for bit: its sums stay in the order that they had."""
    target = settings | {"save_steps": 1, "output_dir": str(tmp_path / "run")}
    monkeypatch.setattr(kd, "CPU_TOKENS", 160)
    whole = run_kd_pipeline(target | {"output_dir": str(tmp_path / "whole")})
    killed_at(monkeypatch, 2, target)
    monkeypatch.setattr(kd, "CPU_TOKENS", 2048)
    assert losses(run_kd_pipeline(target)) == losses(whole)


def test_rows_of_a_step_are_the_run_and_not_their_cut(settings, monkeypatch):
    """Half the batch and twice the accumulation, as one is told where memory is short: the same run goes on."""
    first = run_kd_pipeline(settings)
    monkeypatch.setattr(kd, "load_training_data", lambda *_: pytest.fail("a finished run encodes nothing"))
    for same in ({"batch_size": 4, "gradient_accumulation_steps": 4}, {"tokens_per_batch": 100}, {"packing": False},
                 {"gradient_checkpointing": True}, {"save_steps": 1, "logging_steps": 3, "eval_steps": 0}):  # fmt: skip
        assert run_kd_pipeline(settings | same) == first


def test_caching_goes_on_in_smaller_passes(settings, monkeypatch, caplog):
    config = CacheTeacherConfig(settings["teacher_model_name_or_path"], settings["experiment_dir"], bf16=False)
    whole = make_cache(config)
    reader = teacher_cache.model_reader

    def limited(*arguments):
        made = reader(*arguments)

        def hidden(rows):
            if sum(map(len, rows)) > 300:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return made.hidden(rows)

        return teacher_cache.Reader(hidden, made.head, made.logit_map, made.vocab_size)

    monkeypatch.setattr(teacher_cache, "model_reader", limited)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    config.overwrite, config.tokens_per_shard = True, 400
    again = make_cache(config)
    assert again["rows"].keys() == whole["rows"].keys()
    said = [record.message for record in caplog.records if "out of GPU memory" in record.message]
    assert len(again["shards"]) > 2
    # 4096, 2048, ... 256, once; the next files begin with what was enough for the one before
    assert [message.partition(" (")[0] for message in said] == [
        f"out of GPU memory; passes of {tokens} tokens" for tokens in (2048, 1024, 512, 256)
    ]
