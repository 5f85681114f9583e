"""The loss kernel in Triton's interpreter: what plain torch gives, whatever stands beyond the vocabulary.

Run by test_loss_kernel.py in a process of its own: Triton interprets only if it is told so before it is imported.
"""

import pytest
import torch

from src.distillation import losses
from src.distillation.loss_kernel import logits_to_gradient
from src.distillation.losses import DIVERGENCES, IDENTITY, LogitMap, kd_loss, plain_kd_loss

V, W, H, G = 5000, 5120, 24, 16  # three blocks of a row, the last one part padding


def wide_logits():
    """A row where both agree, rows where each is certain of something else, ordinary ones; rubbish in the padding."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, W, generator=generator) * 4 for _ in range(2))
    teacher[0, :V] = student[0, :V]
    for logits, token in ((student, 3), (teacher, 9)):
        logits[1, :V] = 0
        logits[1, token] = 1e4
        logits[:, V:] = torch.tensor([1e30, -1e30, torch.inf, torch.nan]).repeat((W - V) // 4)
    return student, teacher, torch.tensor([0, 3, V - 1, 17, 4097])


OBJECTIVES = [
    (1.0, 1.0, 0.8, 0.5, IDENTITY, IDENTITY),
    (2.5, 1.3, 0.7, 0.3, LogitMap(0.5), LogitMap(1.0, 5.0)),
    (4.0, 4.0, 1.0, 0.9, LogitMap(2.0, 7.0), IDENTITY),
]


@pytest.mark.parametrize("kind", ["none", *DIVERGENCES])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=["T1", "T2.5", "T4"])
def test_gradient_and_sums_are_those_of_plain_torch(kind, objective):
    temperature, teacher_temperature, alpha, beta, student_map, teacher_map = objective
    alpha = 0.0 if kind == "none" else alpha
    student, teacher, labels = wide_logits()
    beliefs = None if kind == "none" else teacher
    o = losses._Objective(temperature, teacher_temperature, alpha, kind, beta, student_map, teacher_map,
                          torch.float32, V)  # fmt: skip
    wanted, kd, ce = losses._plain_middle(student.clone(), beliefs, labels, o)
    found, kd_C, ce_C = logits_to_gradient(
        student, beliefs, labels, V, torch.float32, temperature=temperature, teacher_temperature=teacher_temperature,
        alpha=alpha, kind=kind, beta=beta, student_map=student_map, teacher_map=teacher_map,
    )  # fmt: skip
    assert (found[:, V:] == 0).all()
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert kd_C.sum().item() == pytest.approx(kd.item(), rel=2e-5)
    assert ce_C.sum().item() == pytest.approx(ce.item(), rel=1e-5)
    if kind != "none" and temperature == teacher_temperature and student_map == teacher_map:
        assert kd_C[0].abs() < 1e-5, "the two agree in the first row"


@pytest.mark.parametrize("cut", [{}, {"teacher_top_k": 20, "teacher_top_p": 0.9}, {"teacher_top_p": 0.9}])
def test_it_is_the_loss_where_it_stands_in(monkeypatch, cut):
    """Heads wider than the vocabulary, several chunks, bf16 heads: loss and gradient as full logits give them."""
    monkeypatch.setattr(losses, "_compiled_middle", lambda s, t, labels, o: middle(s, t, labels, o))
    monkeypatch.setattr(losses, "chunk_tokens", lambda *_: 4)

    def middle(student, teacher, labels, o):
        grad, kd, ce = logits_to_gradient(
            student.float(), None if teacher is None else teacher.float(), labels, o.vocab_size, o.dtype,
            temperature=o.temperature, teacher_temperature=o.teacher_temperature, alpha=o.alpha, kind=o.kind,
            beta=o.beta, student_map=o.student_map, teacher_map=o.teacher_map,
        )  # fmt: skip
        return grad, kd.sum(), ce.sum()

    torch.manual_seed(0)
    vocab, width = 301, 384
    hidden, head = torch.randn(10, H, requires_grad=True), torch.randn(width, H) / 3
    theirs, their_head = torch.randn(10, G), torch.randn(width, G) / 2
    labels = torch.randint(vocab, (10,))
    settings = {"temperature": 2.5, "alpha": 0.8, "kind": "jsd", "beta": 0.3} | cut
    sums = kd_loss(hidden, head, theirs, their_head, labels, **settings, compiled=True, vocab_size=vocab)
    [found] = torch.autograd.grad(sums.loss, hidden)
    wanted = plain_kd_loss((hidden @ head.T)[:, :vocab], (theirs @ their_head.T)[:, :vocab], labels, **settings)
    torch.testing.assert_close(sums.loss, wanted.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.loss, hidden)[0], rtol=1e-4, atol=1e-5)
