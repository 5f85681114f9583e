import contextlib

import pytest
import torch

from src.distillation.base import encode_row, load_model
from src.distillation.heldout import (
    POSITIONS,
    SUMS,
    gap_recovered,
    score_heldout,
    summarise,
    summarise_teacher,
    tokens_by_position,
)
from src.distillation.lora import add_lora
from src.distillation.teacher_signal import online_signal
from src.utils.common import UserError

PAD, END, TOKENS = 256, 258, 261


@pytest.fixture(scope="module")
def rows(make_tokenizer, clean_rows):
    """Six rows as the hybrid student's and the plain teacher's template render them."""
    return [[encode_row(make_tokenizer(hybrid), row, END) for row in clean_rows(6, 5)] for hybrid in (True, False)]


@pytest.fixture
def student(tiny_student):
    return load_model(tiny_student, torch.float32)


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_model(tiny_teacher, torch.float32)


def score(student, teacher, rows, batch_size=4, arms=None, packing=True):
    """arm -> id -> its row."""
    arms = arms or {"student": contextlib.nullcontext}
    signal = online_signal(teacher, PAD, packing).cut(TOKENS)
    parts = list(score_heldout(student, signal, *rows, TOKENS, PAD, batch_size, arms, packing))
    found = {arm: {} for arm in arms}
    for row in (row for part in parts for row in part):
        assert row["id"] not in found[row["arm"]]
        found[row["arm"]][row["id"]] = row
    return found


def test_a_model_that_is_broken_is_named_by_row_and_arm(student, teacher, rows):
    with torch.no_grad():
        student.get_output_embeddings().weight[5, 0] = torch.nan
    with pytest.raises(UserError, match=r"held-out row \S+, student: its measures are not numbers .*broken"):
        score(student, teacher, rows)


@torch.no_grad()
def expected_sums(student, teacher, ours, theirs):
    """One row alone, from both models' full logits cut to the vocabulary, in float64."""
    answer = torch.tensor(ours.response_ids)
    log_q, log_p = (
        model(input_ids=torch.tensor([row.prompt_ids + row.response_ids]))
        .logits[0, -len(answer) - 1 : -1, :TOKENS]
        .double()
        .log_softmax(-1)
        for model, row in ((student, ours), (teacher, theirs))
    )
    each = torch.arange(len(answer))
    kl, agreement = (log_p.exp() * (log_p - log_q)).sum(-1), (log_p.argmax(-1) == log_q.argmax(-1)).double()
    bins = [slice(*ends) for ends in zip(POSITIONS, (*POSITIONS[1:], None), strict=True) if ends[0] < len(answer)]
    return {
        "sample_index": 0,
        "num_tokens": len(answer),
        "kl_sum": kl.sum().item(),
        "kl_by_position": [kl[part].sum().item() for part in bins],
        "agreement_by_position": [agreement[part].sum().item() for part in bins],
        "nll_sum": -log_q[each, answer].sum().item(),
        "teacher_nll_sum": -log_p[each, answer].sum().item(),
        "agreement_sum": (log_p.argmax(-1) == log_q.argmax(-1)).sum().item(),
    }


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_sums_equal_full_logits_row_by_row(student, teacher, rows, batch_size, packing):
    found = score(student, teacher, rows, batch_size, packing=packing)["student"]
    assert len(found) == 6
    for ours, theirs in zip(*rows, strict=True):
        expected = expected_sums(student, teacher, ours, theirs)
        for key, value in expected.items():
            assert found[ours.id][key] == pytest.approx(value, rel=1e-5), key
    assert sum(row["agreement_sum"] for row in found.values()) > 0


def test_the_teacher_against_itself(teacher, rows):
    """KL is exactly 0 and every top-1 token agrees, where both read the same prompt."""
    found = score(teacher, teacher, [rows[1], rows[1]])["student"].values()
    assert all(row["kl_sum"] == 0 and row["agreement_sum"] == row["num_tokens"] for row in found)
    assert all(row["nll_sum"] == row["teacher_nll_sum"] for row in found)
    assert summarise(list(found)) == summarise_teacher(list(found))


def test_each_arm_is_scored_in_its_context(student, teacher, rows):
    """With adapters off the student is the base model again; each context is entered once a batch and left."""
    base = score(student, teacher, rows)["student"]
    model = add_lora(student, 4, 8, 0.0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    entered = []

    @contextlib.contextmanager
    def adapters_off():
        entered.append("in")
        with model.disable_adapter():
            yield
        entered.append("out")

    found = score(model, teacher, rows, 4, {"before": adapters_off, "after": contextlib.nullcontext})
    assert entered == ["in", "out"] * 2
    for key, row in base.items():
        assert {k: found["before"][key][k] for k in SUMS} == pytest.approx({k: row[k] for k in SUMS}, rel=1e-6)
        assert found["after"][key]["kl_sum"] != pytest.approx(row["kl_sum"], rel=1e-3)
        assert found["after"][key]["teacher_nll_sum"] == row["teacher_nll_sum"]


def test_dropout_is_off_and_the_mode_comes_back(student, teacher, rows):
    """Scoring in the middle of training: as in eval mode, and training goes on after it, even if it was broken off."""
    model = add_lora(student, 4, 8, 0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    assert score(model.eval(), teacher, rows) == score(model.train(), teacher, rows)
    assert model.training
    assert not next(parameter for parameter in model.parameters() if parameter.requires_grad).grad_fn
    signal = online_signal(teacher, PAD, True).cut(TOKENS)
    parts = score_heldout(model, signal, *rows, TOKENS, PAD, 1, {"student": contextlib.nullcontext}, True)
    next(parts)
    parts.close()
    assert model.training


@pytest.mark.parametrize(("tokens", "bins"), [(1, [1]), (4, [4]), (5, [4, 1]), (300, [4, 4, 8, 16, 32, 64, 128, 44])])
def test_tokens_by_position(tokens, bins):
    assert tokens_by_position(tokens) == bins


def test_summaries_are_means_over_tokens():
    """Not over rows: the long row weighs nine times the short one."""
    rows = [
        {"num_tokens": 1, "kl_sum": 2.0, "nll_sum": 3.0, "teacher_nll_sum": 1.0, "agreement_sum": 0.0},
        {"num_tokens": 9, "kl_sum": 0.0, "nll_sum": 0.0, "teacher_nll_sum": 4.0, "agreement_sum": 9.0},
    ]
    assert summarise(rows) == pytest.approx({"kl_to_teacher": 0.2, "nll": 0.3, "top1_agreement": 0.9})
    assert summarise_teacher(rows) == pytest.approx({"kl_to_teacher": 0.0, "nll": 0.5, "top1_agreement": 1.0})


@pytest.mark.parametrize(
    ("before", "after", "teacher_nll", "expected"),
    [
        ((2.0, 3.0), (0.5, 1.5), 1.0, (0.75, 0.75)),
        ((2.0, 3.0), (0.0, 1.0), 1.0, (1.0, 1.0)),
        ((2.0, 3.0), (2.0, 3.0), 1.0, (0.0, 0.0)),
        ((2.0, 3.0), (3.0, 4.0), 1.0, (-0.5, -0.5)),
        ((2.0, 3.0), (1.0, 0.5), 1.0, (0.5, 1.25)),
        ((0.0, 1.0), (0.0, 1.0), 1.0, (None, None)),
        ((2.0, 1.0), (1.0, 0.9), 1.5, (0.5, None)),
    ],
    ids=["some", "all", "nothing", "worse", "beyond the teacher", "student is the teacher", "student was better"],
)
def test_gap_recovered(before, after, teacher_nll, expected):
    names = ("kl_to_teacher", "nll")
    teacher = {"kl_to_teacher": 0.0, "nll": teacher_nll}
    found = gap_recovered(dict(zip(names, before, strict=True)), dict(zip(names, after, strict=True)), teacher)
    assert found == dict(zip(names, expected, strict=True))
