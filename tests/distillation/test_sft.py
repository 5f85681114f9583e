"""Generation: sampling is exact, an answer does not depend on its batch, an interruption changes nothing."""

import random

import pytest
import torch
from transformers import GenerationConfig

from src.distillation import sft
from src.distillation.base import load_model, load_tokenizer
from src.distillation.sft import Sampling, generate, make_requests, sample_tokens
from src.utils.common import UserError

ROWS = [{"id": f"row-{i}", "prompt": "Count: " + "one two three " * (i % 5) + str(i)} for i in range(11)]


@pytest.fixture(scope="module")
def loaded(tiny_teacher):
    return load_model(tiny_teacher, torch.float32), load_tokenizer(tiny_teacher)


def answers(loaded, sampling, batch_size=4, rows=ROWS, done=frozenset(), num_samples=1):
    requests = make_requests(rows, num_samples, 7, sampling)
    stored = {request for request in requests if (request.id, request.sample_index) in done}
    return [answer for part in generate(*loaded, requests, batch_size, stored) for answer in part]


def by_key(rows):
    return {
        (row["id"], row["sample_index"]): (row["response"], row["finish_reason"], row["num_tokens"]) for row in rows
    }


def test_sampled_frequencies_are_the_filtered_softmax():
    """20,000 draws per filter against probabilities computed by hand."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for temperature, top_p, top_k in [(1.0, 1.0, 0), (0.5, 1.0, 0), (1.0, 1.0, 2), (1.0, 0.8, 0), (2.0, 0.9, 4)]:
        drawn = sample_tokens(logits.expand(20_000, -1), uniform, Sampling(temperature, top_p, top_k, 1))
        p = (logits / temperature).softmax(-1)
        keep = torch.ones(5, dtype=torch.bool)
        if top_k:
            keep[top_k:] = False
        p = torch.where(keep, p, 0.0) / p[keep].sum()
        before = p.cumsum(-1) - p
        p = torch.where(before < top_p, p, 0.0)
        p = p / p.sum()
        seen = torch.bincount(drawn, minlength=5) / 20_000
        torch.testing.assert_close(seen, p, atol=0.015, rtol=0)
        assert not seen[p == 0].any()


def test_temperature_zero_is_greedy_and_the_edges_are_safe():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample_tokens(logits, torch.rand(50), Sampling(0.0, 1.0, 0, 1)), logits.argmax(-1))
    for uniform in (torch.zeros(50), torch.full((50,), 1 - 2**-24)):
        for sampling in (Sampling(1.0, 1.0, 0, 1), Sampling(1.0, 0.5, 5, 1), Sampling(1.0, 0.5, 0, 1)):
            tokens = sample_tokens(logits, uniform, sampling)
            assert ((tokens >= 0) & (tokens < 30)).all()


@pytest.mark.parametrize("sampling", [Sampling(0.0, 1.0, 0, 24), Sampling(1.0, 0.9, 20, 24), Sampling(1.2, 1.0, 0, 24)])
def test_an_answer_does_not_depend_on_its_batch(loaded, sampling, monkeypatch):
    reference = by_key(answers(loaded, sampling, batch_size=1))
    assert by_key(answers(loaded, sampling, batch_size=4)) == reference
    assert by_key(answers(loaded, sampling, batch_size=11)) == reference
    monkeypatch.setattr(sft, "SHRINK", 0.0)
    assert by_key(answers(loaded, sampling, batch_size=11)) == reference


@pytest.mark.parametrize("window", [None, 8])
def test_every_prompt_is_read_once_and_hardly_padded(make_model, window):
    """Answers are `generate`'s own for each prompt alone; a model with a sliding window reads all rows in full."""
    settings = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    model = make_model(**settings).eval()
    draw = random.Random(0)
    distinct = [[draw.randrange(256) for _ in range(length)] for length in (5, 6, 6, 7, 40)]
    read = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
    requests = make_requests([{"id": str(i), "prompt": ""} for i in range(15)], 1, 7, Sampling(0.0, 1, 0, 6))
    found = sft._answer_batch(model, 0, torch.tensor([287]), distinct * 3, requests)
    hook.remove()
    assert found[:5] == found[5:10] == found[10:]
    for prompt, ids in zip(distinct, found, strict=False):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=287)
        assert ids == alone[0, len(prompt) :].tolist()
    at_first = sum(size for size in read if size % 15 or size > 15)
    assert at_first == (15 * 40 if window else 4 * 6 + 39)


def test_a_batch_may_mix_temperatures(loaded):
    """Each answer is the one it would be among its like."""
    kinds = [Sampling(0.0, 1.0, 0, 24), Sampling(1.0, 0.9, 20, 24), Sampling(1.2, 1.0, 0, 24)]
    alone = [by_key(answers(loaded, kind)) for kind in kinds]
    mixed = [kinds[number % 3] for number in range(11)]
    requests = [make_requests([row], 1, 7, own)[0] for row, own in zip(ROWS, mixed, strict=True)]
    rows = [answer for part in generate(*loaded, requests, 4) for answer in part]
    assert by_key(rows) == {(r.id, 0): alone[number % 3][r.id, 0] for number, r in enumerate(requests)}
    for row in rows:
        assert row["sampling"] == vars(mixed[int(row["id"].split("-")[1])])


def test_logits_that_are_not_numbers_are_named(tiny_teacher):
    model = load_model(tiny_teacher, torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[5, 0] = torch.nan
    with pytest.raises(UserError, match=r"logits are not numbers .*weights are broken"):
        answers((model, load_tokenizer(tiny_teacher)), Sampling(1.0, 1.0, 20, 4))


def test_an_interrupted_run_gets_the_missing_rows_with_the_same_text(loaded):
    sampling = Sampling(1.0, 1.0, 20, 16)
    whole = by_key(answers(loaded, sampling, num_samples=2))
    assert len(whole) == 22
    done = frozenset(list(whole)[:9:2])
    rest = by_key(answers(loaded, sampling, num_samples=2, done=done))
    assert rest == {key: value for key, value in whole.items() if key not in done}
    assert answers(loaded, sampling, num_samples=2, done=frozenset(whole)) == []


def test_rows_carry_what_made_them(loaded):
    sampling = Sampling(1.0, 1.0, 0, 6)
    rows = answers(loaded, sampling)
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    for row in rows:
        assert row["sampling"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6}
        assert (row["finish_reason"] == "length") <= (row["num_tokens"] == 6)
        assert "<|im_end|>" not in row["response"]
    assert len({row["seed"] for row in rows}) == len(rows)


@pytest.mark.parametrize(("token", "expected"), [(258, ("", "stop", 1)), (64, ("a" * 5, "length", 5))])
def test_the_end_of_turn_is_counted_and_ends_the_answer(loaded, monkeypatch, token, expected):
    monkeypatch.setattr(sft, "sample_tokens", lambda logits, *_: torch.full((len(logits),), token))
    assert loaded[1].decode([64]) == "a"
    assert set(by_key(answers(loaded, Sampling(1.0, 1.0, 0, 5))).values()) == {expected}


def test_the_models_own_generation_config_is_never_used(loaded):
    """The known trap: top_k and a temperature silently taken from the model's folder."""
    model, _ = loaded
    sampling = Sampling(1.0, 1.0, 0, 12)
    reference = by_key(answers(loaded, sampling))
    kept = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, temperature=0.01, repetition_penalty=5.0,
                                               max_new_tokens=2, eos_token_id=258)  # fmt: skip
    try:
        assert by_key(answers(loaded, sampling)) == reference
        assert model.generation_config.top_k == 1
    finally:
        model.generation_config = kept


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_new_tokens": 0},
    ],
)
def test_wrong_sampling_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
