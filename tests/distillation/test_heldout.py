import contextlib

import pytest
import torch

from src.distillation.base import encode_row, load_model
from src.distillation.batching import Pair
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
from src.distillation.teacher import model_reader
from src.utils.common import UserError

PAD, END, TOKENS = 256, 258, 261


@pytest.fixture(scope="module")
def rows(make_tokenizer, clean_rows):
    """Six rows as the hybrid student's and the plain teacher's template render them."""
    encoded = [[encode_row(make_tokenizer(hybrid), row, END) for row in clean_rows(6, 5)] for hybrid in (True, False)]
    return [Pair(ours, theirs) for ours, theirs in zip(*encoded, strict=True)]


@pytest.fixture
def student(tiny_student):
    return load_model(tiny_student, torch.float32)


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return load_model(tiny_teacher, torch.float32)


def score(student, teacher, rows, tokens=100, arms=None, packing=True):
    """arm -> id -> its row."""
    arms = arms or {"student": contextlib.nullcontext}
    readers = [model_reader(model, PAD, packing).cut(TOKENS) for model in (student, teacher)]
    parts = list(score_heldout(*readers, rows, arms, tokens))
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
        "acceptance_sum": torch.minimum(log_p.exp(), log_q.exp()).sum().item(),
    }


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("tokens", [1, 100, 10_000])
def test_sums_equal_full_logits_row_by_row(student, teacher, rows, tokens, packing):
    found = score(student, teacher, rows, tokens, packing=packing)["student"]
    assert len(found) == 6
    for pair in rows:
        expected = expected_sums(student, teacher, pair.student, pair.teacher)
        for key, value in expected.items():
            assert found[pair.student.id][key] == pytest.approx(value, rel=1e-5), key
    assert sum(row["agreement_sum"] for row in found.values()) > 0


def test_the_teacher_against_itself(teacher, rows):
    """KL is exactly 0 and every top-1 token agrees, where both read the same prompt."""
    found = score(teacher, teacher, [Pair(pair.teacher, pair.teacher) for pair in rows])["student"].values()
    assert all(row["kl_sum"] == 0 and row["agreement_sum"] == row["num_tokens"] for row in found)
    assert all(row["nll_sum"] == row["teacher_nll_sum"] for row in found)
    assert summarise(list(found)) == pytest.approx(summarise_teacher(list(found)), rel=1e-6)


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

    found = score(model, teacher, rows, 100, {"before": adapters_off, "after": contextlib.nullcontext})
    assert len(entered) > 2
    assert entered == ["in", "out"] * (len(entered) // 2)
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


@pytest.mark.parametrize(("tokens", "bins"), [(1, [1]), (4, [4]), (5, [4, 1]), (300, [4, 4, 8, 16, 32, 64, 128, 44])])
def test_tokens_by_position(tokens, bins):
    assert tokens_by_position(tokens) == bins


def test_summaries_are_means_over_tokens():
    """Not over rows: the long row weighs nine times the short one."""
    rows = [
        {
            "num_tokens": 1,
            "kl_sum": 2.0,
            "nll_sum": 3.0,
            "teacher_nll_sum": 1.0,
            "agreement_sum": 0.0,
            "acceptance_sum": 0.5,
        },
        {
            "num_tokens": 9,
            "kl_sum": 0.0,
            "nll_sum": 0.0,
            "teacher_nll_sum": 4.0,
            "agreement_sum": 9.0,
            "acceptance_sum": 6.5,
        },
    ]
    means = {"kl_to_teacher": 0.2, "nll": 0.3, "top1_agreement": 0.9, "expected_acceptance": 0.7}
    assert summarise(rows) == pytest.approx(means)
    perfect = {"kl_to_teacher": 0.0, "nll": 0.5, "top1_agreement": 1.0, "expected_acceptance": 1.0}
    assert summarise_teacher(rows) == pytest.approx(perfect)


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
