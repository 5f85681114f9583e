"""A whole plan: what it reads of a profile, whether it fits, the nearest change that does, and how it is shown."""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from src.distillation.base import LORA_TARGETS, config_folder
from src.distillation.engines import EngineSettings, stage_serve
from src.distillation.serving import students_server, teacher_server
from src.planning import changes, trace
from src.planning.caching import plan_caching
from src.planning.hardware import Device, Hardware
from src.planning.plan import make_plan
from src.planning.report import as_json, duration, lines, print_plan
from src.planning.rows import Rows
from src.planning.setup import caching, evaluation, generation, open_setup, trainings, weight_bytes
from src.planning.trace import LiveBytes, Pass
from src.planning.training import plan_training
from src.utils.common import ROOT, UserError
from src.utils.config import read_merged


@pytest.fixture
def profile(tiny_models, tmp_path):
    return {
        "data_dir": str(tmp_path / "data"),
        "experiment_dir": str(tmp_path / "experiment"),
        "teacher_model_name_or_path": tiny_models.teacher,
        "model_name_or_path": tiny_models.student,
        "download_datasets": {"gsm8k_train_rows": 400, "gsm8k_eval_rows": 20},
        "cache_teacher": {"max_length": 512},
        "run_improved_kd": {"max_steps": 10, "max_length": 512, "lora_r": 4},
    }


def gpus(count, memory_gb):
    return Hardware(count, Device("card", memory_gb, 100.0, 1000.0, 0.0))


def stages(plan):
    return {stage.stage: stage for stage in plan.stages}


def test_every_stage_is_planned(profile):
    plan = make_plan(profile, "2x40")
    assert [stage.stage for stage in plan.stages] == [
        "generate_sft_data", "cache_teacher", "run_improved_kd (sft)", "run_improved_kd (kd)", "evaluate_distillation",
        "export_model",
    ]  # fmt: skip
    assert plan.fits
    for stage in plan.stages:
        assert 0 < stage.hours[0] < stage.hours[1]
        assert stage.disk_gb > 0
    trained = stages(plan)["run_improved_kd (kd)"]
    assert trained.tokens > 10 * 32 * 390
    assert stages(plan)["run_improved_kd (sft)"].flops < trained.flops, "nobody asks the teacher"


def test_what_adapters_and_their_optimiser_take(profile):
    [use] = stages(make_plan(profile, "1x40"))["run_improved_kd (kd)"].uses
    trainable = 2 * 4 * ((32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 64))  # 2 layers, rank 4
    assert use.memory.gradients * 1e9 == pytest.approx(4 * trainable)
    assert use.memory.optimiser * 1e9 == pytest.approx(8 * trainable)
    assert use.memory.adapters * 1e9 == pytest.approx((4 + 2) * trainable), "and a copy in bf16"
    assert use.memory.teacher * 1e9 == pytest.approx(384 * 48 * 2), "its head, 288 columns filled up to 384"


def test_online_needs_the_teacher_and_no_cache(profile):
    cached = stages(make_plan(profile, "1x40"))
    profile["run_improved_kd"]["teacher_signal"] = "online"
    online = stages(make_plan(profile, "1x40"))
    assert "cache_teacher" not in online
    with_cache, with_teacher = (found["run_improved_kd (kd)"] for found in (cached, online))
    assert with_teacher.uses[0].memory.teacher > with_cache.uses[0].memory.teacher
    assert with_teacher.flops > with_cache.flops


def test_rounds_are_said_not_to_be_planned(profile):
    said = "the answers and caches of on-policy rounds are not in the plan"
    assert said not in make_plan(profile, "1x40").notes
    profile["run_improved_kd"] |= {"on_policy_rounds": 2}
    assert make_plan(profile, "1x40").notes.count(said) == 1


def test_a_teacher_on_the_gpu_of_the_student_counts_there(profile):
    """The control has it as well: it measures."""
    profile["run_improved_kd"] |= {"teacher_signal": "online", "teacher_devices": [0, 1], "student_devices": [1]}
    found = stages(make_plan(profile, "3x40"))
    for arm in ("sft", "kd"):
        first, second = found[f"run_improved_kd ({arm})"].uses
        assert (first.name, second.name) == ("GPU 0", "GPU 1")
        assert first.memory.weights == 0
        assert min(second.memory.weights, second.memory.teacher, first.memory.teacher) > 0
        assert second.memory.overhead == first.memory.overhead


def test_a_teacher_that_is_streamed(profile):
    """What does not stay visits the GPU in every pass."""
    whole = stages(make_plan(profile, "1x40"))["cache_teacher"]
    profile["cache_teacher"] |= {"cpu_offload": True, "gpu_memory_gb": 0.0}
    streamed = stages(make_plan(profile, "1x40"))["cache_teacher"]
    assert streamed.uses[0].memory.weights < whole.uses[0].memory.weights
    assert streamed.hours[1] > whole.hours[1]
    assert "streamed from the machine's memory" in streamed.how


@pytest.mark.parametrize(
    ("signal", "training", "measuring"),
    # bf16 states of 48 numbers; 6 bytes for each of 8 tokens and 4 for each of 3 temperatures
    [("hidden", 2 * 48, 2 * 48), ("topk", 6 * 8 + 4 * 3, 2 * 48)],
)
def test_what_a_cache_takes_of_the_disk(profile, signal, training, measuring):
    """Rows that measure, a tenth of those to train on and all to evaluate, keep hidden states beside a top k."""
    profile["cache_teacher"] |= {
        "signal": signal, "top_k": 8, "temperatures": [1.0, 2.0, 4.0], "validation_fraction": 0.1
    }  # fmt: skip
    rows = Rows(400, 20, 90, 300, "")
    setup = open_setup(profile, gpus(1, 40), rows)
    stage = plan_caching(caching(setup), rows, setup.hardware)
    wanted = 300 * (360 * training + (40 + 20) * measuring) + setup.teacher.vocab * 48 * 2
    assert stage.disk_gb * 1e9 == pytest.approx(wanted)


def test_a_cache_that_a_server_is_asked_for_is_said_to_be_planned_without_it(profile):
    rows = Rows(400, 20, 90, 300, "")
    profile["serve"] = {"command": "vllm", "devices": [1]}
    profile["cache_teacher"] |= {"signal": "topk", "top_k": 8, "temperatures": [1.0]}
    setup = open_setup(profile, gpus(2, 40), rows)
    assert (caching(setup).devices, setup.notes) == ((0,), []), "the stage reads the weights itself"
    profile["cache_teacher"]["engine"] = "openai"
    setup = open_setup(profile, gpus(2, 40), rows)
    assert caching(setup).devices == (1,)
    assert setup.notes == [
        "cache_teacher asks a server for its top k; it is planned as if the stage read the weights itself"
    ]
    assert plan_caching(caching(setup), rows, setup.hardware).disk_gb * 1e9 == pytest.approx(
        300 * (380 * (6 * 8 + 4) + (20 + 20) * (8 * 8 + 4))
    ), "a twentieth of the rows to train on measures"


def test_settings_of_others_are_read(profile):
    """Those that a section's own class may not know yet."""
    plain = stages(make_plan(profile, "2x40"))["run_improved_kd (kd)"].uses[0].memory
    profile["run_improved_kd"]["load_in_4bit"] = True
    assert stages(make_plan(profile, "2x40"))["run_improved_kd (kd)"].uses[0].memory.weights < plain.weights
    profile["run_improved_kd"] = {"max_steps": 10, "max_length": 512, "lora_r": 4}
    profile["launch"] = {"processes": 2, "accelerate": "fsdp2"}
    sharded = stages(make_plan(profile, "2x40"))["run_improved_kd (kd)"]
    assert sharded.uses[0].name == "GPUs 0-1"
    assert sharded.uses[0].memory.gradients == pytest.approx(plain.gradients / 2)


def test_gpus_are_those_of_the_profile(profile):
    profile["gpus"] = "3x24"
    assert make_plan(profile).hardware.startswith("3 x A10")
    assert make_plan(profile, "1xH100").hardware.startswith("1 x H100")
    del profile["gpus"]
    assert make_plan(profile).hardware.startswith("no GPU")
    profile["run_improved_kd"]["student_devices"] = [0, 1]
    with pytest.raises(UserError, match="pass --gpus 8x40"):
        make_plan(profile)


def test_devices_that_are_not_there_are_said(profile):
    profile["cache_teacher"]["teacher_devices"] = [0, 1, 2]
    plan = make_plan(profile, "2x40")
    assert "cache_teacher.teacher_devices names 3 GPUs, of which 2 are planned: [0, 1]" in plan.notes


def test_a_model_that_cannot_be_had_is_one_line(profile):
    profile["model_name_or_path"] = "/nowhere/at-all"
    with pytest.raises(UserError, match="'/nowhere/at-all' cannot be loaded"):
        make_plan(profile, "1x40")


def test_shipped_profiles_need_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        profile = read_merged(path, "")
        for name in (profile["teacher_model_name_or_path"], profile["model_name_or_path"]):
            assert (ROOT / "configs" / "models").as_posix() in config_folder(name) or name == config_folder(name)


# What does not fit


LARGE = {"max_length": 4096, "tokens_per_batch": 8192, "gradient_accumulation_steps": 64}


def peak_of_training(profile, settings):
    """On a card of about the size that is wanted: the loss takes more on a larger one."""
    changed = profile | {"run_improved_kd": profile["run_improved_kd"] | settings}
    return stages(make_plan(changed, gpus(1, 0.2)))["run_improved_kd (kd)"].peak_gb


def test_the_nearest_change_is_one_that_fits(profile):
    """From what costs only time: smaller passes, then checkpointing, then both."""
    profile["run_improved_kd"] |= LARGE
    whole = peak_of_training(profile, {})
    small = peak_of_training(profile, {"tokens_per_batch": 4096})
    kept = peak_of_training(profile, {"gradient_checkpointing": True})
    both = peak_of_training(profile, {"gradient_checkpointing": True, "tokens_per_batch": 4096})
    assert both < small < kept < whole
    for memory_gb, settings in (
        ((small + kept) / 2, {"run_improved_kd.tokens_per_batch": 4096}),
        (
            (both + small) / 2,
            {"run_improved_kd.tokens_per_batch": 4096, "run_improved_kd.gradient_checkpointing": True},
        ),
    ):
        stage = stages(make_plan(profile, gpus(1, memory_gb)))["run_improved_kd (kd)"]
        [change] = stage.changes
        assert not stage.fits
        assert change.settings == settings
        assert change.peak_gb <= memory_gb
        applied = {key.partition(".")[2]: value for key, value in settings.items()}
        again = profile | {"run_improved_kd": profile["run_improved_kd"] | applied}
        assert stages(make_plan(again, gpus(1, memory_gb)))["run_improved_kd (kd)"].peak_gb == pytest.approx(
            change.peak_gb
        )


def test_nothing_helps(profile):
    plan = make_plan(profile, gpus(1, 1e-6))
    assert not plan.fits
    assert any("nothing that was tried does" in line for line in lines(plan))


def test_answers_that_do_not_fit_are_made_of_fewer_rows(profile):
    profile["generate_sft_data"] = {"batch_size": 256}
    whole = stages(make_plan(profile, "1x40"))["generate_sft_data"].peak_gb - 0.5
    stage = stages(make_plan(profile, gpus(1, 0.6 * whole)))["generate_sft_data"]
    assert stage.changes[0].settings == {"generate_sft_data.batch_size": 128}


def test_a_server_is_given_more_gpus(profile):
    """The teacher's weights do not fit on one: two halves do."""
    profile["serve"] = {"command": "vllm", "devices": [0], "gpu_memory_gb": 0.0001}
    stage = stages(make_plan(profile, gpus(2, 40)))["generate_sft_data"]
    assert "do not fit" in stage.problems[0]
    assert "parallelism" in stage.changes[0].words


def planned_answers(profile, hardware):
    """Of the teacher to all prompts; of the student and the teacher in the evaluation."""
    setup = open_setup(profile, hardware, Rows(400, 20, 90, 300, ""))
    return [generation(setup), *(work for _, work in evaluation(setup))]


@pytest.mark.parametrize("section", [
    {"temperature": 0.7, "arms": "kd"}, {"temperatures": [0.7], "arms": ["kd"], "num_samples": None, "mode": None},
])  # fmt: skip
def test_answers_are_counted_as_their_stage_reads_its_section(profile, section):
    """A setting by its other name, one value for a list, null for what is not said."""
    profile |= {"evaluate_distillation": section, "generate_sft_data": {"num_samples": None, "max_new_tokens": None}}
    teacher, student = planned_answers(profile, gpus(1, 40))
    assert (teacher.answers, teacher.new_tokens, student.what, student.answers) == (420, 768, "kd", 20)


def test_a_section_may_name_the_student_again_by_another_name(profile):
    profile["run_improved_kd"]["student_name_or_path"] = profile["model_name_or_path"]
    assert len(trainings(open_setup(profile, gpus(1, 40), Rows(400, 20, 90, 300, "")))) == 2


@pytest.mark.parametrize("above", [True, False])
def test_what_serve_says_stands_over_what_the_stage_says(profile, above):
    """As it does where the server is started: the teacher's, and the students' too."""
    serve = {"command": "vllm", "devices": [2, 3], "gpu_memory_gb": 20.0, "tensor_parallel": 2}
    stage = {"teacher_devices": [0, 1], "gpu_memory_gb": 30.0} | ({} if above else {"serve": serve})
    profile |= {"serve": serve} if above else {}
    profile["generate_sft_data"] = stage
    profile["evaluate_distillation"] = stage | {"student_devices": [1], "arms": ["base", "teacher"]}
    said = stage_serve(EngineSettings(serve=json.dumps(serve), gpu_memory_gb=30.0))
    teacher = teacher_server(said, profile["teacher_model_name_or_path"], [0, 1])
    student = students_server(said, profile["model_name_or_path"], {}, [1])
    found = planned_answers(profile, gpus(4, 40))
    names = ("generate_sft_data", "evaluate_distillation", "evaluate_distillation")
    for work, started, name in zip(found, (teacher, student, teacher), names, strict=True):
        assert work.devices == started.devices == (2, 3)
        assert work.budget_gb == said.gpu_memory_gb == 20.0
        assert work.parallel == (2, 1, 1), "data parallelism follows"
        key = "serve" if above else f"{name}.serve"
        assert (work.devices_key, work.budget_key) == (f"{key}.devices", f"{key}.gpu_memory_gb")


def test_a_change_is_to_the_setting_that_counts(profile):
    """Of four GPUs, one that does not hold the model: what is said in serve is not changed in the section."""
    profile["serve"] = {"command": "vllm", "devices": [0], "gpu_memory_gb": 0.0001}
    [change] = stages(make_plan(profile, gpus(4, 40)))["generate_sft_data"].changes
    assert change.settings["serve.gpu_memory_gb"] == 34.0
    assert not any(key.startswith("generate_sft_data.") for key in change.settings)
    profile["serve"] |= {key.partition(".")[2]: value for key, value in change.settings.items()}
    assert stages(make_plan(profile, gpus(4, 40)))["generate_sft_data"].fits


def test_a_teacher_that_a_server_elsewhere_answers_as_is_not_the_copy_that_serve_names(profile):
    profile["serve"] = {"command": "vllm", "model": "copy-FP8", "devices": [1]}
    profile["evaluate_distillation"] = {"arms": ["teacher"], "teacher_base_url": "http://elsewhere/v1"}
    [_, teacher] = planned_answers(profile, gpus(2, 40))
    assert (teacher.weight_bytes, teacher.devices) == (2.0, (0,))


def test_gpus_of_a_server_want_a_size_too(profile):
    for serve in ({"devices": [0]}, '{"devices": [0]}'):
        for named in ({"serve": serve}, {"generate_sft_data": {"serve": serve}}):
            with pytest.raises(UserError, match="pass --gpus 8x40"):
                make_plan(profile | named)


@pytest.mark.parametrize(
    ("serve", "said"), [("{", "serve is not JSON"), ([1], "must be a mapping"), ("[1]", "must be a mapping")]
)
def test_a_server_that_is_no_mapping(profile, serve, said):
    with pytest.raises(UserError, match=said):
        make_plan(profile | {"serve": serve}, "1x40")


def test_a_server_elsewhere_is_said(profile):
    profile["generate_sft_data"] = {"engine": "openai"}
    plan = make_plan(profile, "2x40")
    assert any("generate_sft_data asks a server that runs elsewhere" in note for note in plan.notes)
    assert "by a server" in stages(plan)["generate_sft_data"].how


def test_a_smaller_pass_is_tried_before_another_machine(profile):
    rows = Rows(400, 20, 90, 300, "")
    setup = open_setup(profile, gpus(1, 40), rows)
    work = trainings(setup)[1]
    words = [option.words for option in changes.training_options(work, setup.hardware)]
    assert words[0] == "smaller passes, the same rows a step"
    assert words[-1] == "2 GPUs of 40 GB", "a layer for each"
    same_rows = plan_training(next(iter(changes.training_options(work, setup.hardware))).work, rows, setup.hardware)
    assert same_rows.how.startswith("10 steps of 32 rows")


# What is counted on the meta device


def test_live_bytes_follow_tensors():
    kept = torch.empty(1000, device="meta")
    with LiveBytes([kept]) as live:
        doubled = kept * 2
        view = doubled[:10]
        assert live.now == 4000
        more = doubled + 1
        assert live.now == live.peak == 8000
        del doubled, more
        assert live.now == 4000, "the view holds on to it"
        del view
        assert live.now == 0
        kept.add_(1)
    assert live.now == 0
    assert live.peak == 8000


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_and_tokens_add_up(tiny_student, checkpointing):
    """What two small models say of a larger one is what the larger one says."""
    wanted = Pass(tiny_student, torch.bfloat16, 40, "varlen", 4, LORA_TARGETS, checkpointing)
    found = trace.trace(wanted).at(5, 6 * 40)
    exact = trace._count(wanted, 5, 6)
    for name, value in dataclasses.asdict(found).items():
        assert value == pytest.approx(getattr(exact, name), rel=0.01)


# How it is shown


def test_words_and_numbers_agree(profile):
    plan = make_plan(profile, "2x40")
    said = json.loads(as_json(plan))
    assert said["fits"] is True
    for stage, own in zip(plan.stages, said["stages"], strict=True):
        assert own["peak_gb"] == stage.peak_gb
        parts = own["uses"][0]["memory"]
        assert parts.pop("peak") == pytest.approx(sum(parts.values()))
    text = lines(plan)
    assert text[0] == "plan for 2 x A100 40 GB, 40 GB each"
    assert any(line.startswith("run_improved_kd (kd): 10 steps of 32 rows") for line in text)
    assert text.count("    fits") == len(plan.stages)


def test_a_terminal_gets_a_table_and_a_log_plain_lines(profile):
    plan = make_plan(profile, "1x40")
    for terminal in (False, True):
        out = io.StringIO()
        print_plan(plan, Console(file=out, force_terminal=terminal, width=200))
        assert ("━" in out.getvalue()) is terminal
        assert "export_model" in out.getvalue()
        if not terminal:
            assert out.getvalue().splitlines() == lines(plan)


@pytest.mark.parametrize(
    ("hours", "said"), [((0.005, 0.01), "18 to 36 s"), ((0.1, 1.0), "6 to 60 min"), ((1.0, 2.5), "1.0 to 2.5 h")]
)
def test_a_range_of_time(hours, said):
    assert duration(hours) == said


@pytest.mark.parametrize(
    ("name", "size"),
    [("a/b-FP8", 1.0), ("a/b-AWQ", 0.55), ("b-GPTQ-Int4", 0.55), ("b-w8a8", 1.0), ("Qwen/Qwen3-8B", 2.0), ("", 2.0)],
)
def test_copies_say_how_small_they_are(name, size):
    assert weight_bytes(name) == size


@pytest.mark.parametrize("key", ["model_name_or_path", "teacher_model_name_or_path"])
def test_an_adapter_is_not_planned_as_a_model(profile, tmp_path, key):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base/model"}))
    with pytest.raises(UserError, match="is an adapter of 'base/model', not a model"):
        make_plan(profile | {key: str(tmp_path)}, "1x40")
