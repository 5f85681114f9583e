"""The reference run's shapes: against what one H200 was measured to take, and against the figures it set out with."""

import dataclasses

import pytest
import torch

from src.distillation.base import LORA_TARGETS
from src.planning import memory
from src.planning.hardware import GPUS, Hardware
from src.planning.memory import Share, Step
from src.planning.plan import make_plan
from src.planning.shapes import lora_weights, read_shapes
from src.planning.trace import Pass
from src.utils.common import ROOT
from src.utils.config import read_merged

GIB = 2**30
ROW = 413  # tokens of the measured rows on average, some 70 % of them answers
TRAINABLE = 174_587_904
# What the allocator held at the most: no context. The largest size of a chunk of logits does not depend on more memory
H200 = Hardware(1, dataclasses.replace(GPUS["H200"], overhead_gb=0.0))


@pytest.fixture(scope="module")
def models(real_data):
    folders = real_data / "configs"
    return read_shapes(str(folders / "qwen3-8b")), read_shapes(str(folders / "qwen3-30b-a3b-instruct-2507"))


def planned(models, rows, attention="varlen", **changes):
    """Memory of a training step with passes of so many rows."""
    student, teacher = models
    resident = changes.pop("resident", False)
    traced = Pass(student.name, torch.bfloat16, ROW, attention, 64, LORA_TARGETS, **changes)
    step = Step(student, teacher, traced, 0.7, TRAINABLE, not resident, True, resident, 8, True, False)
    return memory.training_memory(step, Share(0, student.weights, student.layers), rows * ROW, H200)


def gib(found):
    return found.peak * 1e9 / GIB


def test_weights_are_those_of_the_models(models):
    student, teacher = models
    assert student.weights == 8_190_735_360
    assert teacher.weights == 30_532_122_624
    assert teacher.active_weights + 2 * teacher.vocab * teacher.hidden == pytest.approx(3.35e9, rel=0.01)
    assert lora_weights(student.name, 64, list(LORA_TARGETS))[0] == TRAINABLE


@pytest.mark.parametrize(("rows", "measured"), [(8, 20.2), (32, 24.5)])
def test_with_checkpointing_the_engine_hardly_matters(models, rows, measured):
    """A layer's input is kept, whatever computes the layer."""
    found = planned(models, rows, checkpointing=True)
    assert gib(found) == pytest.approx(measured, rel=0.15)
    before = planned(models, rows, "row_by_row", checkpointing=True)
    assert gib(before) == pytest.approx(gib(found), rel=0.02)


def test_a_pass_for_the_cache(models):
    _, teacher = models
    traced = Pass(teacher.name, torch.bfloat16, ROW, "varlen")
    share = Share(0, teacher.weights, teacher.layers)
    assert gib(memory.reading_memory(teacher, share, traced, 16384, 16384, H200)) == pytest.approx(59.2, rel=0.15)


@pytest.mark.parametrize(("resident", "measured"), [(False, 43.6), (True, 100.1)])
def test_without_checkpointing_each_kernel_has_its_share(models, resident, measured):
    """Measured with a fused call a row, which kept its own result beside the joined one; one call for all rows does
    not, and Liger's norms and SwiGLU keep fewer copies still."""
    student, _ = models
    row_by_row = planned(models, 8, "row_by_row", resident=resident)
    varlen = planned(models, 8, resident=resident)
    liger = planned(models, 8, resident=resident, liger=True)
    assert gib(row_by_row) == pytest.approx(measured, rel=0.15)
    result_bytes = 8 * ROW * student.layers * student.heads * student.head_dim * 2
    assert gib(row_by_row) - gib(varlen) == pytest.approx(result_bytes / GIB, rel=0.05)
    # norms: two fp32 copies of their input a layer, and of query and key; SwiGLU: silu of the gate
    assert 4 < gib(varlen) - gib(liger) < 8


def test_the_teacher_that_is_resident_is_what_online_adds(models):
    cached, online = planned(models, 8), planned(models, 8, resident=True)
    head = online.teacher - cached.teacher
    assert head == pytest.approx((30_532_122_624 - 151_936 * 2048) * 2 / 1e9, rel=1e-3)


@pytest.fixture(scope="module")
def reference_plan():
    """The shipped profile, whose models' shapes are in the repository."""
    profile = read_merged(ROOT / "configs" / "qwen3_30b_to_8b.yaml", "")
    six, two = list(range(6)), [6, 7]
    for section in ("generate_sft_data", "cache_teacher", "evaluate_distillation"):
        profile[section] = profile[section] | {"teacher_devices": six}
    profile["run_improved_kd"] = profile["run_improved_kd"] | {"student_devices": two}
    profile["evaluate_distillation"]["student_devices"] = two
    return make_plan(profile, "8xA100-40")


def stages(plan):
    return {stage.stage: stage for stage in plan.stages}


def test_the_reference_run_fits_eight_gpus_of_forty(reference_plan):
    assert reference_plan.fits
    teacher, student = reference_plan.models
    assert teacher.weights_gb == pytest.approx(61.1, abs=0.05)
    assert student.weights_gb == pytest.approx(16.4, abs=0.05)
    # the figures that the run set out with, about 120 GB and about 30 GB, are those of fp32 weights
    assert 2 * teacher.weights_gb == pytest.approx(120, rel=0.05)
    assert 2 * student.weights_gb == pytest.approx(30, rel=0.15)


def test_six_gpus_hold_the_teacher_in_equal_parts(reference_plan):
    caching = stages(reference_plan)["cache_teacher"]
    numbers = [1, 4, 1]  # GPU 0 has the embedding, GPU 5 the head, those between only layers
    held = sum(use.memory.weights * number for use, number in zip(caching.uses, numbers, strict=True))
    assert held == pytest.approx(61.1, abs=0.3)
    assert caching.disk_gb == pytest.approx((3514 * 284 * 4096 + 151_936 * 4096) / 1e9, rel=0.02)


def test_training_takes_two_gpus_and_minutes(reference_plan):
    """The hour it set out with was for a teacher asked in every step, padded rows and a trainer of its own."""
    training = stages(reference_plan)["run_improved_kd (kd)"]
    assert training.tokens == pytest.approx(100 * 32 * 422, rel=0.5)
    assert training.hours[1] < 1
    both = sum(use.memory.peak * (2 if "-" in use.name else 1) for use in training.uses)
    assert both < 80


def test_answers_by_transformers_take_what_was_expected(reference_plan):
    """Two to three hours: within the range of an engine that starts every kernel from Python."""
    low, high = stages(reference_plan)["generate_sft_data"].hours
    assert low < 2
    assert high > 3


def test_a_server_takes_minutes(reference_plan):
    profile = read_merged(ROOT / "configs" / "qwen3_30b_to_8b.yaml", "")
    served = profile | {"serve": {"command": "vllm", "devices": [0, 1, 2, 3, 4, 5], "gpu_memory_gb": 36}}
    stage = stages(make_plan(served, "8xA100-40"))["generate_sft_data"]
    assert "tensor 2 x data 3" in stage.how  # four key-value heads: not six, not three
    assert stage.hours[1] < stages(reference_plan)["generate_sft_data"].hours[0]
