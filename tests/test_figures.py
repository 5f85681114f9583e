"""The pictures in docs/figures are those that their numbers give, and the numbers are those that the formulas give."""

import math

import pytest

from benchmarks import figures
from src.utils.common import read_json


@pytest.fixture(scope="module")
def numbers() -> dict:
    return read_json(figures.FOLDER / "numbers.json")


def test_the_pictures_are_current(numbers):
    drawn = figures.figures(numbers)
    by_hand = {"data_path.svg"}
    assert {path.name for path in figures.FOLDER.glob("*.svg")} - by_hand == drawn.keys()
    for name, svg in drawn.items():
        assert (figures.FOLDER / name).read_text(encoding="utf-8") == svg, f"{name}: run benchmarks/figures.py"


def test_the_gradients_are_the_loss_s_own(numbers):
    found = numbers["gradients"]
    again = figures.gradients()
    for name, values in found.items():
        assert again[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    last = found["temperatures"][-1] / found["temperatures"][-2]
    # (q_T - p_T) / T, and q_T - p_T shrinks as 1 / T too: without T^2 the teacher fades as 1 / T^2
    assert found["without"][-2] / found["without"][-1] == pytest.approx(last**2, rel=0.1)
    assert found["with_t_squared"][-2] / found["with_t_squared"][-1] == pytest.approx(1, abs=0.1)


def test_a_cache_s_bytes_follow_from_the_teacher_s_shapes(numbers, real_data):
    config = real_data / "configs" / "qwen3-30b-a3b-instruct-2507" / "config.json"
    assert figures.shapes(config) == numbers["shapes"]
    sizes = figures.bytes_per_token(numbers)
    assert sizes == {"full logits": 2 * 151936, "hidden states": 4096, "top 512": 3072, "top 64": 384}


def test_a_distribution_is_measured_from_its_hidden_states(tmp_path, tiny_teacher, clean_rows, write_sft):
    """Against the model itself, at T = 1: entropy of its answers' tokens, and the mass outside the likeliest."""
    import torch

    from src.distillation.base import encode_row, end_of_turn_id, load_model, load_tokenizer
    from src.distillation.teacher_cache import CacheTeacherConfig, make_cache

    folder = write_sft(tmp_path, clean_rows(6), clean_rows(2, start=100))
    make_cache(CacheTeacherConfig(tiny_teacher, str(folder), bf16=False))
    found = figures.distribution(folder / "teacher_cache", "tiny")
    assert found["teacher"] == "tiny"

    model, tokenizer = load_model(tiny_teacher, torch.float32), load_tokenizer(tiny_teacher)
    entropy, outside = [], []
    for row in clean_rows(6) + clean_rows(2, start=100):
        encoded = encode_row(tokenizer, row, end_of_turn_id(tokenizer))
        ids = torch.tensor([encoded.prompt_ids + encoded.response_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(encoded.prompt_ids) - 1 : -1, :261]
        log_p = torch.log_softmax(logits, -1)
        entropy += (-(log_p.exp() * log_p).sum(-1)).tolist()
        outside += (1 - log_p.exp().max(-1).values).tolist()
    assert found["positions"] == len(entropy)  # fewer than are sampled
    assert found["entropy"][0] == pytest.approx(sum(entropy) / len(entropy), rel=1e-3)
    assert found["outside_top"]["1"][0] == pytest.approx(sum(outside) / len(outside), rel=1e-3)
    assert found["entropy"] == sorted(found["entropy"])  # a higher temperature is a more open choice
    assert found["entropy"][-1] < math.log(261)
