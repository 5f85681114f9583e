"""The GPUs that a stage is said to work on: those that it is given, and those of the servers that it starts."""

import pytest

from src.launch.commands import Launch, gpus_of
from src.launch.dry_run import paths_of

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
