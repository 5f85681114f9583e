"""Training runs with tiny models: what is learned does not depend on how the work is cut, and nothing is lost."""

import datetime
import json
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, load_peft_weights
from torch.distributed.utils import _to_kwargs
from transformers import AutoTokenizer, GenerationConfig, set_seed
from transformers.utils import chat_template_utils

from src.distillation import kd, run_folder, training
from src.distillation.base import collate, encode_row, load_model, load_tokenizer
from src.distillation.heldout import summarise
from src.distillation.kd import KDConfig, run_kd_pipeline
from src.distillation.kd_config import SECTION
from src.distillation.lora import add_lora
from src.distillation.run_card import model_card
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache
from src.utils import stages
from src.utils.common import ROOT, UserError, read_json, read_jsonl, sha256_file, write_json
from src.utils.config import build_config, load_config


@pytest.fixture
def settings(tmp_path, tiny_teacher, tiny_student, clean_rows, write_sft):
    """Settings of a small run over 40 training and 8 held-out rows."""
    experiment = write_sft(tmp_path / "experiment" / "tiny", clean_rows(40), clean_rows(8, start=100))
    return {
        "model_name_or_path": tiny_student,
        "teacher_model_name_or_path": tiny_teacher,
        "experiment_dir": str(experiment),
        "temperature": 2.5,
        "alpha": 0.8,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "batch_size": 4,
        "gradient_accumulation_steps": 4,
        "max_steps": 3,
        "max_length": 256,
        "save_steps": 100,
        "eval_steps": 100,
        "lora_r": 4,
        "bf16": False,
        "teacher_signal": "online",
        "compile_loss": False,
    }


def weights(results: dict) -> dict[str, torch.Tensor]:
    return load_peft_weights(results["final_model"])


def losses(results: dict) -> list[tuple]:
    """The columns of metrics.jsonl that do not measure time or memory."""
    names = ("step", "loss", "kd_loss", "ce_loss", "grad_norm", "lr")
    rows = read_jsonl(Path(results["run_dir"]) / "metrics.jsonl")
    return [tuple(row[name] for name in names) for row in rows if "loss" in row]


def assert_same(one: dict, other: dict, **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance)


def test_a_run_leaves_the_promised_artifacts(settings):
    results = run_kd_pipeline(settings)
    folder = Path(results["run_dir"])
    assert re.fullmatch(r"gpu_optimized_kd_\d{8}_\d{6}", folder.name)
    assert folder.parent == Path(settings["experiment_dir"]).parent
    config = read_json(folder / "kd_config.json")
    for name, value in settings.items():
        assert config[name] == value
    assert config["experiment"] == "tiny"
    assert {"hashes", "provenance", "fingerprint", "seed", "epochs", "weight_decay"} <= config.keys()
    stored = read_json(folder / "kd_results.json")
    assert stored == {k: v for k, v in results.items() if k not in ("run_dir", "final_model")}
    for arm in ("before", "after", "teacher"):
        assert stored[arm].keys() == {"kl_to_teacher", "nll", "top1_agreement", "expected_acceptance"}
    assert stored["after"]["kl_to_teacher"] < stored["before"]["kl_to_teacher"]
    assert stored["heldout_rows"] == 8
    assert stored["adapter_sha256"] == sha256_file(folder / "final_model" / "adapter_model.safetensors")
    assert stored["trainable_parameters"] == sum(tensor.numel() for tensor in weights(results).values())
    assert (folder / "final_model" / "README.md").is_file()


def test_the_adapter_loads_as_an_ordinary_peft_model(settings):
    results = run_kd_pipeline(settings)
    model = AutoPeftModelForCausalLM.from_pretrained(results["final_model"])
    assert load_tokenizer(results["final_model"]).chat_template
    assert sum("lora_B" in name and parameter.abs().sum() > 0 for name, parameter in model.named_parameters()) == 14


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_logged_loss_is_the_formula(settings, kind):
    results = run_kd_pipeline(settings | {"divergence": kind, "logging_steps": 2, "max_steps": 4})
    rows = losses(results)
    assert [row[0] for row in rows] == [2, 4]
    for _, loss, kd_loss, ce, *_ in rows:
        assert loss == pytest.approx(0.8 * 2.5**2 * kd_loss + 0.2 * ce, rel=1e-5)
        assert kd_loss > 0


def test_micro_batches_of_any_size_give_the_same_run(settings):
    """Answers differ in length, so a wrong weighting of micro-batches would show."""
    shapes = [(16, 1, True), (4, 4, True), (1, 16, True), (4, 4, False)]
    made = [
        run_kd_pipeline(settings | {"batch_size": b, "gradient_accumulation_steps": a, "packing": packing})
        for b, a, packing in shapes
    ]
    made.append(run_kd_pipeline(settings | {"tokens_per_batch": 400}))
    for other in made[1:]:
        assert_same(weights(made[0]), weights(other), atol=1e-5, rtol=0)
        for ours, theirs in zip(losses(made[0]), losses(other), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_alpha_0_is_plain_sft(settings, tmp_path, make_model, make_tokenizer, save_model):
    """One step of SGD moves the weights by the gradient of the model's own loss, the mean over all answer tokens.

    The student has no padded logits here, for the model's own loss would count them.
    """
    settings["model_name_or_path"] = save_model(tmp_path / "unpadded", make_model(vocab_size=261), make_tokenizer())
    results = run_kd_pipeline(
        settings
        | {"alpha": 0.0, "optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "weight_decay": 0.0}
        | {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "gradient_accumulation_steps": 8,
           "validation_fraction": 0.0, "batch_size": 5}
    )  # fmt: skip
    assert Path(results["run_dir"]).name.startswith("sft_control_")
    [(_, loss, kd_loss, ce, *_)] = losses(results)
    assert kd_loss == 0
    tokenizer = load_tokenizer(settings["model_name_or_path"])
    set_seed(42)
    model = add_lora(load_model(settings["model_name_or_path"], torch.float32), 4, 128, 0.0)
    rows = read_jsonl(Path(settings["experiment_dir"]) / "sft" / "sft_train_data_clean.jsonl")
    batch = collate([encode_row(tokenizer, row, 258) for row in rows], 256)
    reference = model(**batch).loss
    reference.backward()
    assert loss == pytest.approx(reference.item(), rel=1e-5)
    assert ce == pytest.approx(reference.item(), rel=1e-5)
    made = weights(results)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            key = name.replace(".default", "")
            torch.testing.assert_close(made[key], -parameter.grad, atol=1e-5, rtol=1e-4)


def test_a_hybrid_student_learns_from_a_plain_teacher(settings, hybrid_student):
    """The student's prompt is longer by an empty think block; answers are matched by their own positions."""
    results = run_kd_pipeline(settings | {"model_name_or_path": hybrid_student, "max_steps": 20})
    assert results["after"]["kl_to_teacher"] < 0.9 * results["before"]["kl_to_teacher"]


def cached(settings: dict, **changes) -> dict:
    """The cache of the run's teacher and rows, in several files."""
    names = ("teacher_model_name_or_path", "experiment_dir", "max_length")
    plain = {"tokens_per_batch": 300, "tokens_per_shard": 200, "temperatures": [1.0, 2.5], "bf16": False}
    return make_cache(build_config(CacheTeacherConfig, {name: settings[name] for name in names} | plain | changes))


@pytest.mark.parametrize("change", [{}, {"divergence": "jsd", "temperature": 1.3}, {"alpha": 0.0}])
def test_cached_hidden_states_are_the_resident_teacher(settings, change, monkeypatch):
    """The same loss curve, adapter and held-out numbers; and the teacher's weights are not touched."""
    index = cached(settings)
    assert len(index["shards"]) > 3
    online = run_kd_pipeline(settings | change)
    load = kd.load_model
    with monkeypatch.context() as patch:
        forbidden = settings["teacher_model_name_or_path"]
        patch.setattr(kd, "load_model", lambda name, *a: pytest.fail("loaded") if name == forbidden else load(name, *a))
        hidden = run_kd_pipeline(settings | change | {"teacher_signal": "hidden"})
    assert hidden["run_dir"] != online["run_dir"]
    for ours, theirs in zip(losses(hidden), losses(online), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert_same(weights(hidden), weights(online), atol=1e-4, rtol=0)
    for arm in ("before", "after", "teacher"):
        assert hidden[arm] == pytest.approx(online[arm], rel=1e-4)


def test_a_top_k_of_all_but_one_token_is_nearly_the_whole_teacher(settings):
    online = run_kd_pipeline(settings)
    cached(settings, signal="topk", top_k=260)
    wide = run_kd_pipeline(settings | {"teacher_signal": "topk"})
    for ours, theirs in zip(losses(wide), losses(online), strict=True):
        assert ours[1:4] == pytest.approx(theirs[1:4], rel=5e-3)
    cached(settings, signal="topk", top_k=2, overwrite=True)
    narrow = run_kd_pipeline(settings | {"teacher_signal": "topk", "overwrite": True})
    assert losses(narrow)[0][2] < 0.9 * losses(online)[0][2]  # what lies in the bucket cannot differ


def test_an_interrupted_run_ends_as_an_uninterrupted_one(settings, tmp_path, monkeypatch):
    long = settings | {"max_steps": 7, "save_steps": 2}
    whole = run_kd_pipeline(long | {"output_dir": str(tmp_path / "whole")})

    take_step = training.take_step

    def stop_at_five(run):
        if run.step == 5:
            raise KeyboardInterrupt
        return take_step(run)

    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", stop_at_five)
        with pytest.raises(KeyboardInterrupt):
            run_kd_pipeline(long | {"output_dir": str(tmp_path / "cut")})
    half_written = tmp_path / "cut" / "checkpoint-6"
    half_written.mkdir()
    (half_written / "training_state.json").write_text("{")
    resumed = run_kd_pipeline(long | {"output_dir": str(tmp_path / "cut")})
    assert_same(weights(whole), weights(resumed), atol=0, rtol=0)
    assert losses(whole) == losses(resumed)
    assert whole["adapter_sha256"] == resumed["adapter_sha256"]
    for arm in ("before", "after"):
        assert whole[arm] == resumed[arm]


def test_a_run_killed_after_its_last_step_is_only_finished(settings, tmp_path):
    target = {"output_dir": str(tmp_path / "run")}
    whole = run_kd_pipeline(settings | target)
    for name in ("kd_results.json", "final_model"):
        path = tmp_path / "run" / name
        path.rename(tmp_path / name)
    again = run_kd_pipeline(settings | target)
    assert_same(load_peft_weights(str(tmp_path / "final_model")), weights(again), atol=0, rtol=0)
    assert losses(whole) == losses(again)
    assert whole["after"] == again["after"]


def test_an_unfinished_run_of_the_same_settings_is_found(settings, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("src.distillation.kd.train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_kd_pipeline(settings)
    [folder] = Path(settings["experiment_dir"]).parent.glob("gpu_optimized_kd_*")
    assert run_kd_pipeline(settings)["run_dir"] == str(folder)


def test_a_finished_run_is_returned_and_other_settings_start_another(settings, monkeypatch):
    first = run_kd_pipeline(settings)
    with monkeypatch.context() as patch:
        patch.setattr("src.distillation.kd.load_model", lambda *_: pytest.fail("the finished run was trained again"))
        assert run_kd_pipeline(settings) == first
    assert run_kd_pipeline(settings | {"temperature": 1.0})["run_dir"] != first["run_dir"]
    assert run_kd_pipeline(settings | {"overwrite": True})["run_dir"] != first["run_dir"]


def refused(settings: dict, words: str) -> None:
    with pytest.raises(UserError) as caught:
        run_kd_pipeline(settings)
    assert re.search(words, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0}, "temperature must be above 0"),
        ({"teacher_temperature": 0}, "teacher_temperature must be above 0"),
        ({"teacher_top_k": -1}, r"teacher_top_k must be 0 \(all\) or more"),
        ({"teacher_top_p": 0}, "teacher_top_p must be above 0 and at most 1"),
        ({"teacher_top_k": 5, "divergence": "reverse_kl"}, "reverse_kl is infinite where .*--divergence forward_kl or"),
        ({"teacher_top_p": 0.9, "teacher_signal": "topk"}, "whole distribution.* take --teacher_signal hidden"),
        ({"alpha": 1.5}, "alpha must be between 0 and 1"),
        ({"divergence": "jsd", "beta": 1e-9}, "beta must be at least 1e-6 and at most"),
        ({"divergence": "jsd", "beta": 1.0}, "beta must be at least 1e-6 and at most"),
        ({"max_length": 20}, r"40 of 40 rows are longer than max_length = 20.*--max_length"),
        ({"gradient_accumulation_steps": 64}, "training rows, but one optimisation step takes 256"),
        ({"model_name_or_path": "no/such/folder"}, "'no/such/folder' cannot be loaded"),
        ({"model_name_or_path": ""}, "model_name_or_path is not set"),
        ({"lora_target_modules": ["c_attn"]}, "no module named c_attn"),
        ({"learning_rat": 1e-3}, "unknown setting 'learning_rat'; did you mean learning_rate"),
        ({"divergence": "kl"}, "invalid choice: 'kl'"),
        ({"batch_size": 2, "per_device_train_batch_size": 4}, "are the same setting"),
        (
            {"teacher_signal": "topk", "divergence": "reverse_kl"},
            "a top-k cache knows forward_kl only; reverse_kl",
        ),
        ({"save_only_model": True}, "unknown setting 'save_only_model'"),
        ({"resume_from_checkpoint": "x"}, "unknown setting 'resume_from_checkpoint'"),
        ({"use_liger_kernel": True}, "unknown setting 'use_liger_kernel'"),
        ({"dataloader_drop_last": True}, "unknown setting 'dataloader_drop_last'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "invalid choice: 'reduce_lr_on_plateau'"),
        ({"warmup_steps": -1}, "warmup_steps must not be below 0"),
        ({"packing": False, "tokens_per_batch": 100}, "tokens_per_batch counts packed tokens"),
        ({"liger": True}, "--liger: the package is not here|its kernels run on a GPU"),
        ({"learning_rate": "fast"}, "invalid float value: 'fast'"),
        ({"learning_rate": 1e30, "max_grad_norm": 0}, r"step \d: (loss|grad_norm) is (nan|inf); lower --learning_rate"),
    ],
)
def test_wrong_settings(settings, change, words):
    refused(settings | change, words)


def test_a_vocabulary_mismatch_names_both_sizes(settings, make_tokenizer, make_model, save_model, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<other>"])
    settings["teacher_model_name_or_path"] = save_model(tmp_path / "other", make_model(), tokenizer)
    refused(settings, r"has 261 tokens.*has 262")


def test_a_broken_line_is_named(settings):
    path = Path(settings["experiment_dir"]) / "sft" / "sft_train_data_clean.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2][:30] + "\n", *lines[3:]]))
    refused(settings, r"sft_train_data_clean\.jsonl:3: not valid JSON")
    row = json.loads(lines[1])
    row["messages"][-1]["content"] = " "
    path.write_text("".join([lines[0], json.dumps(row) + "\n", *lines[2:]]))
    refused(settings, r"sft_train_data_clean\.jsonl:2: the assistant's answer is empty")


def test_empty_and_missing_data(settings):
    path = Path(settings["experiment_dir"]) / "sft" / "sft_eval_data_clean.jsonl"
    path.write_text("")
    refused(settings, r"sft_eval_data_clean\.jsonl: the file holds no rows")
    path.unlink()
    refused(settings, r"sft_eval_data_clean\.jsonl: no such file; run scripts/fix_sft_data.py")


def test_rows_in_both_splits_are_refused(settings, clean_rows, write_sft):
    write_sft(settings["experiment_dir"], clean_rows(40), clean_rows(4, start=39))
    refused(settings, "row sum-00039 is both a training and an evaluation row")


def test_a_folder_of_another_run_is_refused_by_the_field(settings, tmp_path):
    target = {"output_dir": str(tmp_path / "run")}
    run_kd_pipeline(settings | target | {"max_steps": 1})
    refused(
        settings | target | {"max_steps": 1, "temperature": 1.0}, r"temperature = 2\.5, this run has 1\.0.*--overwrite"
    )
    run_kd_pipeline(settings | target | {"max_steps": 1, "temperature": 1.0, "overwrite": True})
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("precious")
    refused(settings | {"output_dir": str(other), "overwrite": True}, "no training run; name another --output_dir")
    assert (other / "chapter1.tex").read_text() == "precious"


def test_a_full_disk_is_seen_before_the_work(settings, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10_000})())
    refused(settings, r"0\.00 GB free, the run's checkpoints needs")


def test_how_many_checkpoints_a_disk_must_hold(settings):
    def kept(**changes) -> int:
        return build_config(KDConfig, settings | {"save_steps": 10} | changes).kept_checkpoints(95)

    assert kept(save_total_limit=3) == 3
    assert kept(save_total_limit=0) == 10, "all: after 10, 20, ..., 90 and 95"
    assert kept(save_total_limit=0, save_steps=0) == 0
    assert kept(save_total_limit=0, on_policy_rounds=4) == 14


def test_more_ranks_take_a_share_of_the_accumulation(settings, monkeypatch):
    config = build_config(KDConfig, settings | {"batch_size": 4, "gradient_accumulation_steps": 3})
    odd = build_config(KDConfig, settings | {"batch_size": 3, "gradient_accumulation_steps": 3})
    monkeypatch.setattr(kd.Accelerator, "num_processes", 2)
    kd._open_accelerator(config)  # six rows each
    with pytest.raises(UserError, match="rows of a step = 9 does not divide among 2 processes"):
        run_kd_pipeline(odd)
    config.tokens_per_batch = 0  # three passes of four rows
    with pytest.raises(UserError, match="does not divide among 2 processes; a step always takes 12 rows"):
        run_kd_pipeline(config)


def test_the_commands_for_several_processes_are_accepted(monkeypatch):
    """Every `accelerate launch` line: its profile and flags make a run of eight processes."""
    text = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    commands = re.findall(r"^accelerate launch .*scripts/run_improved_kd\.py (.*)$", text, re.MULTILINE)
    assert len(commands) >= 2
    monkeypatch.setattr(kd.Accelerator, "num_processes", 8)
    monkeypatch.chdir(ROOT)
    for command in commands:
        config = load_config(KDConfig, SECTION, command.split())
        assert config.rows_per_step == 32
        kd._open_accelerator(config)
        config.teacher_signal, config.teacher_devices = "online", [0]
        with pytest.raises(UserError, match="are for one process; with several pass --student_devices"):
            kd._open_accelerator(config)


def test_the_last_step_is_always_logged(settings):
    """kd_results.json tells what the last row of the metrics tells, at any distance between two rows."""
    results = run_kd_pipeline(settings | {"max_steps": 3, "logging_steps": 2})
    rows = [row["step"] for row in read_jsonl(Path(results["run_dir"]) / "metrics.jsonl") if "loss" in row]
    assert (rows, results["steps"]) == ([2, 3], 3)
    assert run_kd_pipeline(settings | {"max_steps": 3, "logging_steps": 50, "seed": 5})["steps"] == 3


def test_an_adapter_is_no_model(settings, tmp_path):
    """It would be thrown away: transformers loads what it was trained on, and a fresh adapter would take its place."""
    first = run_kd_pipeline(settings)
    before = set(Path(settings["experiment_dir"]).parent.iterdir())
    for field in ("model_name_or_path", "teacher_model_name_or_path"):
        with pytest.raises(UserError, match=r"is an adapter of .*, not a model; merge it into that") as refused:
            run_kd_pipeline(settings | {field: first["final_model"], "alpha": 0.5})
        assert first["final_model"] in str(refused.value)
    assert set(Path(settings["experiment_dir"]).parent.iterdir()) == before, "nothing is begun"
    with pytest.raises(UserError, match="is an adapter"):
        load_model(first["final_model"], torch.float32)
    with pytest.raises(UserError, match="is an adapter"):
        make_cache(CacheTeacherConfig(first["final_model"], settings["experiment_dir"]))


def test_a_base_student_is_saved_with_the_end_of_turn_it_learnt(
    settings, make_model, make_tokenizer, save_model, tmp_path
):
    """A base model stops at the end of a text; an engine that reads the saved model must stop at the end of a turn."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    base = save_model(tmp_path / "base", make_model(seed=2, eos_token_id=256), tokenizer)
    final = run_kd_pipeline(settings | {"model_name_or_path": base})["final_model"]
    assert GenerationConfig.from_pretrained(final).eos_token_id == [256, 258]
    saved = AutoTokenizer.from_pretrained(final)
    assert (saved.eos_token, saved.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert saved.chat_template == tokenizer.chat_template
    assert "ends a turn with `<|im_end|>`" in Path(final, "README.md").read_text()


def test_the_model_card_names_no_path_and_the_steps_taken(settings, monkeypatch):
    """The hub refuses a card with a path as base_model; a run killed after its last step knows how many it took."""

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    by_epochs = settings | {"max_steps": -1, "epochs": 1, "save_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(kd, "_save_final", kill)
        with pytest.raises(Killed):
            run_kd_pipeline(by_epochs)
    results = run_kd_pipeline(by_epochs)
    card = Path(results["final_model"], "README.md").read_text()
    assert "base_model" not in card
    assert results["steps"] == 2
    assert "in 2 steps of 16" in card
    monkeypatch.chdir(Path(settings["model_name_or_path"]).parent)
    with_hub_id = model_card(build_config(KDConfig, settings | {"model_name_or_path": "Qwen/Qwen3-8B"}), 1, 1, "x")
    assert "\nbase_model: Qwen/Qwen3-8B\n" in with_hub_id


def test_the_day_does_not_change_what_is_read(settings, tmp_path, make_model, make_tokenizer, save_model, monkeypatch):
    """A template with a date: cached today, trained on another day, the rows are the same, and so are the control's."""
    dated = make_tokenizer()
    dated.chat_template = "{{ 'Today: ' + strftime_now('%d %b %Y') }}" + dated.chat_template
    names = {
        "model_name_or_path": save_model(tmp_path / "student", make_model(seed=2), dated),
        "teacher_model_name_or_path": save_model(tmp_path / "teacher", make_model(seed=1), dated),
    }
    make_cache(CacheTeacherConfig(names["teacher_model_name_or_path"], settings["experiment_dir"], bf16=False))

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, *_):
            return cls(2031, 3, 9)

    cached = settings | names | {"teacher_signal": "hidden"}
    run = run_kd_pipeline(cached)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert run_kd_pipeline(cached)["run_dir"] == run["run_dir"], "the same run"
    control = run_kd_pipeline(cached | {"alpha": 0})
    fingerprints = [read_json(Path(r["run_dir"], "kd_config.json"))["fingerprint"] for r in (run, control)]
    assert [f["prompt_date"] for f in fingerprints] == [datetime.date.today().isoformat()] * 2


def test_a_checkpoint_with_other_bytes_is_passed_over(settings, tmp_path, monkeypatch, caplog):
    """Zeroed at its size, it would train on without a word; the one before it leads to the same adapter."""
    whole = run_kd_pipeline(settings | {"save_steps": 1, "output_dir": str(tmp_path / "whole")})

    def stop(*_):
        raise KeyboardInterrupt

    cut = settings | {"save_steps": 1, "output_dir": str(tmp_path / "cut")}
    with monkeypatch.context() as patch:
        patch.setattr(kd, "_save_final", stop)
        with pytest.raises(KeyboardInterrupt):
            run_kd_pipeline(cut)
    broken = tmp_path / "cut" / "checkpoint-3" / "adapter_model.safetensors"
    broken.write_bytes(bytes(broken.stat().st_size))
    for name in ("checkpoint-9", "checkpoint-best", "checkpoint-3-backup"):  # zeroed; a person's own copies
        (tmp_path / "cut" / name).mkdir()
        (tmp_path / "cut" / name / "complete.json").write_bytes(bytes(20))
    results = run_kd_pipeline(cut)
    assert f"{broken} is not as it was written; going on from the checkpoint before" in caplog.text
    assert_same(weights(results), weights(whole), atol=0, rtol=0)
    assert losses(results) == losses(whole)


def test_the_teachers_own_temperature_is_a_setting_of_the_run(settings):
    """It changes what is learned and is recorded; at T it is the default, bit for bit; a cache gives it too."""
    default = run_kd_pipeline(settings)
    same = run_kd_pipeline(settings | {"teacher_temperature": 2.5})
    assert_same(weights(default), weights(same), atol=0, rtol=0)
    sharper = settings | {"temperature": 1.0, "teacher_temperature": 0.2}
    online = run_kd_pipeline(sharper)
    assert read_json(Path(online["run_dir"]) / "kd_config.json")["teacher_temperature"] == 0.2
    assert losses(online)[0][2] > 1.2 * losses(run_kd_pipeline(settings | {"temperature": 1.0}))[0][2]
    cached(settings, temperatures=[0.2], signal="hidden")
    hidden = run_kd_pipeline(sharper | {"teacher_signal": "hidden"})
    for ours, theirs in zip(losses(hidden), losses(online), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert "(the teacher at 0.2)" in Path(online["final_model"], "README.md").read_text()


def test_a_warm_up_that_does_not_end_is_said(settings, caplog):
    run_kd_pipeline(settings | {"max_steps": 2, "warmup_steps": 2, "output_dir": f"{settings['experiment_dir']}/run"})
    assert "warmup_steps = 2 of 2 steps: the learning rate never reaches 0.01; lower --warmup_steps" in caplog.text
    caplog.clear()
    run_kd_pipeline(settings | {"max_steps": 2, "warmup_steps": 1})
    assert "never reaches" not in caplog.text


def test_what_the_teachers_sampling_kept_is_a_setting_of_the_run(settings):
    """It changes what is learned and is recorded; a cache gives it too; the control may name it."""
    sampled = {"temperature": 1.0, "teacher_temperature": 0.2, "teacher_top_k": 20, "teacher_top_p": 0.9}
    online = run_kd_pipeline(settings | sampled)
    stored = read_json(Path(online["run_dir"]) / "kd_config.json")
    assert stored | sampled == stored
    assert stored["fingerprint"] | sampled == stored["fingerprint"]
    assert "(the teacher at 0.2, top_k 20, top_p 0.9)" in Path(online["final_model"], "README.md").read_text()
    uncut = run_kd_pipeline(settings | sampled | {"teacher_top_k": 0, "teacher_top_p": 1.0})
    assert losses(uncut)[0][2] != pytest.approx(losses(online)[0][2], rel=1e-3)
    cached(settings, temperatures=[0.2], signal="hidden")
    hidden = run_kd_pipeline(settings | sampled | {"teacher_signal": "hidden"})
    for ours, theirs in zip(losses(hidden), losses(online), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_runs_from_before_a_setting_are_the_same_runs():
    """What was added later counts where it was asked for alone; a control may keep what only its teacher would heed."""
    later = {"load_in_4bit": True, "teacher_top_k": 20, "teacher_top_p": 0.9}
    assert not later.keys() & KDConfig().identity().keys()
    assert KDConfig(**later).identity() == KDConfig().identity() | later
    assert KDConfig(alpha=0, divergence="reverse_kl", teacher_signal="topk", teacher_top_k=20).arm == "sft"


def test_a_broken_adapter_is_no_complete_checkpoint(settings, tmp_path):
    """Between two log lines nobody looks at the loss; a run must not go on from weights that are not numbers."""
    broken = settings | {"learning_rate": 1e38, "max_grad_norm": 0, "logging_steps": 50, "save_steps": 1}
    refused(
        broken | {"max_steps": 5, "output_dir": str(tmp_path / "run")},
        r"step \d: .*lora_.* is not a number; lower --learning_rate",
    )
    assert not list((tmp_path / "run").glob("checkpoint-*/complete.json"))


def test_refused_rows_leave_no_run_behind(settings):
    """The folder was taken before the rows were read."""
    root = Path(settings["experiment_dir"]).parent
    before = set(root.iterdir())
    refused(settings | {"max_length": 20}, "rows are longer than max_length")
    assert set(root.iterdir()) == before


def test_only_whole_checkpoints_stay(settings, tmp_path):
    """As many as asked for; a half-written one of a killed run goes, a person's own copy stays."""
    folder = tmp_path / "run"
    run_kd_pipeline(settings | {"save_steps": 1, "max_steps": 5, "output_dir": str(folder)})
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-best").mkdir()
    run_folder.remove_old_checkpoints(folder, 2)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5", "checkpoint-best"}
    run_folder.remove_old_checkpoints(folder, 0)
    assert (folder / "checkpoint-4").is_dir()
    every = run_kd_pipeline(settings | {"save_steps": 1, "save_total_limit": 0, "alpha": 0.5})
    assert len(list(Path(every["run_dir"]).glob("checkpoint-*"))) == 3


def test_a_kill_within_an_overwrite_can_be_run_again(settings, tmp_path, monkeypatch):
    """What says that it is a run's folder goes last."""
    target = settings | {"output_dir": str(tmp_path / "run"), "overwrite": True, "max_steps": 1}
    run_kd_pipeline(target)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run_kd_pipeline(target)
    assert run_kd_pipeline(target)["steps"] == 1


def test_a_cache_that_keeps_other_things_is_another_teacher(settings):
    """The same teacher, but more or fewer tokens of it: what was trained on the one is not returned for the other."""
    cached(settings, signal="topk", top_k=4)
    first = run_kd_pipeline(settings | {"teacher_signal": "topk"})
    cached(settings, signal="topk", top_k=200, overwrite=True)
    assert run_kd_pipeline(settings | {"teacher_signal": "topk"})["run_dir"] != first["run_dir"]


def test_a_cache_of_the_version_before_is_taken_over(settings):
    """It counted the tokens of a pass among what it was made of."""
    index = cached(settings)
    marker = Path(settings["experiment_dir"]) / "teacher_cache" / "stage.json"
    stage = read_json(marker)
    stage["fingerprint"]["tokens_per_batch"] = 2048
    write_json(marker, stage)
    assert cached(settings) == index


def test_choices_are_checked_for_callers_in_python():
    for name in ("optim", "lr_scheduler_type", "divergence", "teacher_signal"):
        with pytest.raises(UserError, match=f"{name}: invalid choice: 'adafactor'"):
            KDConfig(**{name: "adafactor"})


def test_kd_config_tells_what_was_decided(settings):
    """Where a setting leaves it open."""
    stored = read_json(Path(run_kd_pipeline(settings)["run_dir"]) / "kd_config.json")
    assert stored["tokens_per_batch"] is None
    decided = {"compile_loss": False, "compile_layers": False, "liger": False, "tokens_per_batch": 2048}
    assert stored["took_effect"] == decided


def test_a_function_runs_inside_the_wrapped_forward():
    """DDP on GPUs moves its inputs and wants one; gloo does not, so that two CPU processes cannot show it."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *inputs):
            moved = _to_kwargs(inputs, {}, torch.device("cpu"), False)[0][0]
            return self.module(*moved)

    model = torch.nn.Linear(2, 2)
    assert training.call_inside(Wrapper(model), model, lambda: "here") == "here"
    assert "forward" not in model.__dict__


def test_held_out_rows_are_written_by_the_run(settings):
    results = run_kd_pipeline(settings)
    rows = read_jsonl(Path(results["run_dir"]) / "heldout.jsonl")
    assert len(rows) == 2 * 8
    for arm in ("before", "after"):
        assert summarise([row for row in rows if row["arm"] == arm]) == results[arm]
    assert 0 < results["before"]["expected_acceptance"] < results["after"]["expected_acceptance"] < 1
