"""How close a student is to its teacher on text it was not trained on: sums per row, from which every mean is made."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from src.distillation.base import EncodedRow, head_weight, logit_map, response_hidden
from src.distillation.losses import heldout_stats
from src.distillation.packing import attention_of_packs, batch_of
from src.distillation.teacher_signal import TeacherSignal
from src.utils.common import UserError

Arm = Callable[[], contextlib.AbstractContextManager]
SUMS = ("kl_sum", "nll_sum", "teacher_nll_sum", "agreement_sum")
POSITIONS = (0, 4, 8, 16, 32, 64, 128, 256)  # where a bin of response positions starts; the last has no end


@torch.no_grad()
def score_heldout(
    student: nn.Module,
    teacher: TeacherSignal,
    student_rows: Sequence[EncodedRow],
    teacher_rows: Sequence[EncodedRow],
    vocab_size: int,
    pad_id: int,
    batch_size: int,
    arms: dict[str, Arm],
    packing: bool,
) -> Iterator[list[dict[str, Any]]]:
    """Score arms of one loaded student (its adapters on, off or switched) against the teacher, batch by batch.

    Args:
        student_rows: rows as the student's template renders them; `teacher_rows` the same rows by the teacher's.
        vocab_size: the shared vocabulary.
        arms: name -> a context in which `student` is that arm.
        packing: read a batch's rows end to end, without padding.

    Raises:
        UserError: a row's measures are not finite.

    Yields:
        For each batch its rows `arm, id, sample_index, num_tokens, kl_sum, nll_sum, teacher_nll_sum, agreement_sum`:
        sums over the row's response tokens, at T = 1, in nats; `kl_by_position, agreement_by_position`: the same sums
        over each bin of `POSITIONS` that the row reaches.
    """
    order = sorted(range(len(student_rows)), key=lambda index: len(student_rows[index]))
    training = student.training
    student.eval()
    own_map = logit_map(student)
    try:
        for start in range(0, len(order), batch_size):
            ours = [student_rows[index] for index in order[start : start + batch_size]]
            theirs = [teacher_rows[index] for index in order[start : start + batch_size]]
            teacher_hidden = teacher.hidden(theirs)
            batch = batch_of(ours, pad_id, packing)
            counts = [len(row.response_ids) for row in ours]
            scored = []
            for name, arm in arms.items():
                with arm(), attention_of_packs(student, packing):
                    hidden, labels = response_hidden(student, batch)
                    head = head_weight(student, vocab_size).to(hidden.device)
                    beliefs = teacher_hidden.to(hidden.device), teacher.head_on(hidden.device)
                    stats = heldout_stats(hidden, head, *beliefs, labels, own_map, teacher.logit_map)
                columns = [measure.double().cpu().split(counts) for measure in stats]
                for row, count, *parts in zip(ours, counts, *columns, strict=True):
                    if not all(part.isfinite().all() for part in parts):
                        raise UserError(
                            f"held-out row {row.id}, {name}: its measures are not numbers (NaN or infinite); the "
                            "weights of the student or the teacher are broken, or overflow"
                        )
                    key = {"arm": name, "id": row.id, "sample_index": row.sample_index, "num_tokens": count}
                    sums = {column: part.sum().item() for column, part in zip(SUMS, parts, strict=True)}
                    by_position = {"kl_by_position": _by_position(parts[0]),
                                   "agreement_by_position": _by_position(parts[3])}  # fmt: skip
                    scored.append(key | sums | by_position)
            yield scored
    finally:
        student.train(training)


def _by_position(measure_N: torch.Tensor) -> list[float]:
    starts = [start for start in POSITIONS if start < len(measure_N)]
    return [part.sum().item() for part in measure_N.tensor_split(starts[1:])]


def tokens_by_position(num_tokens: int) -> list[int]:
    """How many of a row's response tokens are in each bin of `POSITIONS` that it reaches."""
    starts = [start for start in POSITIONS if start < num_tokens]
    return [end - start for start, end in zip(starts, [*starts[1:], num_tokens], strict=True)]


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Per-token means of one arm's rows: nats per response token, and the share of equal top-1 tokens."""
    tokens = sum(row["num_tokens"] for row in rows)
    return {
        "kl_to_teacher": sum(row["kl_sum"] for row in rows) / tokens,
        "nll": sum(row["nll_sum"] for row in rows) / tokens,
        "top1_agreement": sum(row["agreement_sum"] for row in rows) / tokens,
    }


def summarise_teacher(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The teacher against itself, from any arm's rows: what a perfect student would reach."""
    tokens = sum(row["num_tokens"] for row in rows)
    return {"kl_to_teacher": 0.0, "nll": sum(row["teacher_nll_sum"] for row in rows) / tokens, "top1_agreement": 1.0}


def gap_recovered(
    before: dict[str, float], after: dict[str, float], teacher: dict[str, float]
) -> dict[str, float | None]:
    """The share of the way to the teacher that training went; null where there was no way to go."""
    gap = before["nll"] - teacher["nll"]
    return {
        "kl_to_teacher": (before["kl_to_teacher"] - after["kl_to_teacher"]) / before["kl_to_teacher"]
        if before["kl_to_teacher"]
        else None,
        "nll": (before["nll"] - after["nll"]) / gap if gap > 0 else None,
    }
