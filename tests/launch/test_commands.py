"""What is said of a stage before it runs: its GPUs, the servers that it starts, what it reads."""

import pytest

from src.launch.commands import STAGES, Launch, gpus_of
from src.launch.dry_run import notes_of, paths_of

TRAINING = {"teacher_devices": [2, 3], "student_devices": [0]}
ROUNDS = {"on_policy_rounds": 2}
SERVED = {"engine": "openai", "teacher_devices": [0, 1]}


@pytest.mark.parametrize(("stage", "values", "gpus"), [
    # a cached teacher reads nothing but the answers of a round, which the control does not make
    ("distil", {"run_improved_kd": TRAINING}, (0,)),
    ("distil", {"run_improved_kd": TRAINING | ROUNDS}, (0, 2, 3)),
    ("distil", {"run_improved_kd": TRAINING | ROUNDS | {"on_policy_fraction": 0}}, (0,)),
    ("distil", {"run_improved_kd": TRAINING | ROUNDS | {"on_policy_serve": {"devices": [4]}}}, (0, 2, 3, 4)),
    ("distil", {"run_improved_kd": TRAINING | {"on_policy_serve": {"devices": [4]}}}, (0,)),
    ("sft_control", {"run_improved_kd": TRAINING | ROUNDS}, (0,)),
    ("sft_control", {"run_improved_kd": TRAINING | {"teacher_signal": "online"}}, (0, 2, 3)),
    # the server's own stand in for the teacher's, where the stage asks it
    ("cache_teacher", {"serve": {"devices": [5]}, "cache_teacher": SERVED}, (5,)),
    ("cache_teacher", {"cache_teacher": {"engine": "openai", "serve": '{"devices": [5, 6]}'}}, (5, 6)),
    ("cache_teacher", {"serve": {"command": "vllm"}, "cache_teacher": SERVED}, (0, 1)),
    ("cache_teacher", {"serve": {"devices": [5]}, "cache_teacher": {"teacher_devices": [0, 1]}}, (0, 1)),
    ("generate_sft_data", {"serve": {"devices": [5]}, "generate_sft_data": {"teacher_devices": [0, 1]}}, (5,)),
    # students are served on them too
    ("evaluate_distillation", {"serve": {"devices": [5]}, "evaluate_distillation": TRAINING}, (5,)),
    ("evaluate_distillation", {"serve": {"command": "vllm"}, "evaluate_distillation": TRAINING}, (0, 2, 3)),
    # null in a section stands over what is above it, as the stage itself reads it
    ("cache_teacher", {"teacher_devices": [0, 1], "cache_teacher": {"teacher_devices": None}}, ()),
    ("cache_teacher", {"teacher_devices": [0, 1], "cache_teacher": None}, (0, 1)),
])  # fmt: skip
def test_the_gpus_of_a_stage(stage, values, gpus):
    assert gpus_of(stage, values, Launch()) == gpus


def test_rounds_read_with_the_teacher_itself():
    values = {"teacher_model_name_or_path": "owner/teacher", "run_improved_kd": ROUNDS}
    assert "owner/teacher" in paths_of("distil", values).reads
    assert "owner/teacher" not in paths_of("sft_control", values).reads
    assert "owner/teacher" not in paths_of("distil", values | {"run_improved_kd": {}}).reads
    online = paths_of("distil", values | {"run_improved_kd": ROUNDS | {"teacher_signal": "online"}})
    assert online.reads.count("owner/teacher") == 1


def test_models_by_the_other_names_that_a_section_may_give_them():
    values = {"teacher_model_name_or_path": "above/teacher", "model_name_or_path": "above/student",
              "run_improved_kd": {"teacher_model": "own/teacher", "student_name_or_path": "own/student",
                                  "teacher_signal": "online"}}  # fmt: skip
    reads = paths_of("distil", values).reads
    assert {"own/teacher", "own/student"} <= set(reads)
    assert not any(place.startswith("above/") for place in reads)


def test_sources_of_prompts_as_the_stage_reads_them():
    section = {"gsm8k_train_rows": 5, "gsm8k_path": None, "domains": "maths"}
    assert paths_of("download_datasets", {"download_datasets": section}).reads == (
        "openai/gsm8k", "data/domains/maths.yaml",
    )  # fmt: skip


@pytest.mark.parametrize(("stage", "section", "words"), [
    # it asks for as many log-probabilities as are kept
    ("cache_teacher", {"engine": "openai", "signal": "topk", "temperatures": [1.0], "top_k": 50}, "--max-logprobs 50"),
    # without adapters, whose rank may be above what vLLM takes
    ("generate_sft_data", {}, "--port 8000"),
    ("cache_teacher", {}, None),  # `serve` is said to all stages, the teacher's weights are read here
    ("distil", {"on_policy_rounds": 2, "on_policy_serve": {"command": "vllm"}, "lora_r": 20},
     "--enable-lora --max-lora-rank 32 --lora-modules student=outputs/runs/gpu_optimized_kd_<time>"),
    ("distil", {"on_policy_serve": {"command": "vllm"}}, None),  # no rounds
    ("sft_control", {"on_policy_rounds": 2, "on_policy_serve": {"command": "vllm"}}, None),
])  # fmt: skip
def test_the_servers_of_caching_and_of_rounds(tiny_models, stage, section, words):
    values = {
        "teacher_model_name_or_path": tiny_models.teacher,
        "model_name_or_path": tiny_models.student,
        "experiment_dir": "outputs/runs/rows",
        "serve": {"command": "vllm"},
        "run_improved_kd": {"lora_r": 1000},
        STAGES[stage]: section,
    }
    servers = [note for note in notes_of(stage, values) if "server" in note]
    if words is None:
        assert not servers
        return
    [server] = servers
    of = "students" if stage == "distil" else "teacher"
    model = tiny_models.student if stage == "distil" else tiny_models.teacher
    assert server.startswith(f"server of the {of}, GPUs none named: vllm serve {model} ")
    assert words in server.replace("'", "")
