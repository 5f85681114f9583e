"""The pictures in docs/figures are those that their numbers give, and the numbers are those that the formulas give."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from benchmarks import figures
from src.utils.common import read_json

HAND_MADE = {"data_path.svg"}  # drawn from no numbers


@pytest.fixture(scope="module")
def numbers() -> dict:
    return read_json(figures.FOLDER / "numbers.json")


def test_the_pictures_are_current(numbers):
    drawn = figures.figures(numbers)
    assert {path.name for path in figures.FOLDER.glob("*.svg")} == drawn.keys() | HAND_MADE
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


def test_what_is_said_of_t_squared_is_what_is_drawn(numbers):
    """The sentence's own numbers, and "levels off" at every step of the range."""
    found = numbers["gradients"]
    said = figures.t_squared_said(found)
    fold, to_four, lost, cross_entropy = re.findall(r"[0-9.]*[0-9](?=-fold|%|, which)", said)
    scaled = dict(zip(found["temperatures"], found["with_t_squared"], strict=True))
    assert found["without"][0] / found["without"][-1] == pytest.approx(float(fold), abs=0.5)
    assert scaled[1] / scaled[4] == pytest.approx(float(to_four), abs=0.05)
    assert 100 * (1 - scaled[6] / scaled[4]) == pytest.approx(float(lost), abs=0.5)
    assert float(cross_entropy) == pytest.approx(found["cross_entropy"], abs=0.005)
    assert max(scaled.values()) < float(cross_entropy)
    # a step of T below 4 takes more than a tenth of it, one above 4 a tenth at most, and less at every step
    whole = [scaled[at] for at in (1, 2, 3, 4, 5, 6)]
    losses = [1 - after / before for before, after in pairwise(whole)]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] > 0.15
    assert losses[3] < 0.11
    assert "keeps" not in said
    assert said in (figures.FOLDER / "t_squared.svg").read_text(encoding="utf-8").replace("&#39;", "'")


def test_a_figure_names_its_models_where_they_are_seen(numbers):
    """In lines of text, for a title and a description are not shown; and a line fits the drawing."""
    named = {
        "signals.svg": [numbers["distribution"]["teacher"], numbers["shapes"]["teacher"]],
        "alpha.svg": [*numbers["alpha"]["models"].values(), numbers["alpha"]["fixed"]],
        "temperature.svg": [numbers["distribution"]["teacher"]],
    }
    for name, words in named.items():
        root = ElementTree.fromstring((figures.FOLDER / name).read_text(encoding="utf-8"))
        lines = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        for word in words:
            assert any(word in line for line in lines), f"{name}: {word}"
        assert all(7 * len(line) < float(root.attrib["width"]) for line in lines if line.startswith("Models"))


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
