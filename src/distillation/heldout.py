"""How close a student is to its teacher on text it was not trained on: sums per row, from which every mean is made."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from src.distillation.base import EncodedRow
from src.distillation.batching import Pair, consecutive
from src.distillation.losses import HeldoutStats, Stated, TopK, bounded_stats, heldout_stats
from src.distillation.teacher import Reader
from src.utils.common import UserError

Arm = Callable[[], contextlib.AbstractContextManager]
SUMS = ("kl_sum", "nll_sum", "teacher_nll_sum", "agreement_sum", "acceptance_sum")  # of the columns of HeldoutStats
POSITIONS = (0, 4, 8, 16, 32, 64, 128, 256)  # where a bin of response positions starts; the last has no end
SCORED_TOKENS = 2048  # read in one pass where nothing else is said
EXACT = "exact"  # what `kl_is` says where the teacher's whole distribution is known


def what_kl_is(believed: Tensor | Stated) -> str:
    """What a row's `kl_is` says: whether its KL is the KL, or of which tokens it is that."""
    if isinstance(believed, Tensor):
        return EXACT
    return f"lower bound over the top {believed.top.ids_NK.shape[1]} and the rest"


def what_acceptance_is(kl_is: str) -> str:
    """The same of the expected acceptance beside it, see `losses.bounded_stats`; NLL and agreement are always exact."""
    return EXACT if kl_is == EXACT else "lower bound over the same top tokens alone"


def score_heldout(
    student: Reader, teacher: Reader, pairs: Sequence[Pair], arms: dict[str, Arm], tokens: int = SCORED_TOKENS
) -> Iterator[list[dict[str, Any]]]:
    """Score arms of one loaded student (its adapters on, off or switched) against the teacher, batch by batch.

    Args:
        pairs: rows as the student's template and the teacher's render them.
        arms: name -> a context in which `student` is that arm.
        tokens: read in one pass; a longer row is one by itself.

    Raises:
        UserError: a row's measures are not finite.

    Yields:
        For each batch its rows `arm, id, sample_index, num_tokens, kl_sum, nll_sum, teacher_nll_sum, agreement_sum,
        acceptance_sum`: sums over the row's response tokens, at T = 1, in nats or tokens; `kl_by_position,
        agreement_by_position`: the same sums over each bin of `POSITIONS` that the row reaches; `kl_is`: see
        `what_kl_is`.
    """
    ordered = sorted(pairs, key=lambda pair: len(pair.student))
    # alike in length, so that padding wastes little; the teacher reads a batch once for all arms
    for batch in consecutive(ordered, tokens, lambda pair: max(len(pair.student), len(pair.teacher))):
        ours = [pair.student for pair in batch]
        believe = teacher.stated or teacher.hidden
        # a server's teacher has no hidden states, only what it stated of its tokens
        believed = believe([pair.teacher for pair in batch])
        scored: list[dict[str, Any]] = []
        for name, arm in arms.items():
            with arm():
                hidden = student.hidden(ours)
            stats = _measure(student, hidden, teacher, believed, ours)
            scored += [row | {"kl_is": what_kl_is(believed)} for row in _row_sums(name, ours, stats)]
        yield scored


def _measure(
    student: Reader, hidden: Tensor, teacher: Reader, believed: Tensor | Stated, rows: Sequence[EncodedRow]
) -> HeldoutStats:
    device = hidden.device
    # [N], the order of the hidden states: row after row
    labels = torch.tensor([token for row in rows for token in row.response_ids], device=device)
    if isinstance(believed, Stated):
        stated = Stated(TopK(*(part.to(device) for part in believed.top)), believed.label_log_p_N.to(device))
        head = student.head_on(device)
        return bounded_stats(hidden, head, stated, labels, student.logit_map, student.vocab_size)
    return heldout_stats(
        hidden,
        student.head_on(device),
        believed.to(device),
        teacher.head_on(device),
        labels,
        student.logit_map,
        teacher.logit_map,
        student.vocab_size,
    )


def _row_sums(arm: str, rows: Sequence[EncodedRow], stats: HeldoutStats) -> list[dict[str, Any]]:
    counts = [len(row.response_ids) for row in rows]
    # each measure [N] -> a piece a row; summed in fp64
    columns = [measure.double().cpu().split(counts) for measure in stats]
    found = []
    for row, count, *parts in zip(rows, counts, *columns, strict=True):
        if not all(part.isfinite().all() for part in parts):
            raise UserError(
                f"held-out row {row.id}, {arm}: its measures are not numbers (NaN or infinite); the "
                "weights of the student or the teacher are broken, or overflow"
            )
        sums = {name: part.sum().item() for name, part in zip(SUMS, parts, strict=True)}
        by_name = HeldoutStats(*parts)
        found.append(
            {"arm": arm, "id": row.id, "sample_index": row.sample_index, "num_tokens": count}
            | sums
            | {"kl_by_position": _by_position(by_name.kl_to_teacher)}
            | {"agreement_by_position": _by_position(by_name.top1_agreement)}
        )
    return found


def _by_position(measure_N: Tensor) -> list[float]:
    # 10 tokens reach the bins 0-3, 4-7 and 8-9: cut at 4 and 8, three sums
    starts = [start for start in POSITIONS if start < len(measure_N)]
    return [part.sum().item() for part in measure_N.tensor_split(starts[1:])]


def tokens_by_position(num_tokens: int) -> list[int]:
    """How many of a row's response tokens are in each bin of `POSITIONS` that it reaches."""
    # 10 -> [4, 4, 2]
    starts = [start for start in POSITIONS if start < num_tokens]
    return [end - start for start, end in zip(starts, [*starts[1:], num_tokens], strict=True)]


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Per-token means of one arm's rows: nats per response token, the share of equal top-1 tokens, and of drafted
    tokens that the teacher would accept."""
    # means over tokens, not over rows: a long answer weighs as much as it has tokens
    tokens = sum(row["num_tokens"] for row in rows)
    return {
        "kl_to_teacher": sum(row["kl_sum"] for row in rows) / tokens,
        "nll": sum(row["nll_sum"] for row in rows) / tokens,
        "top1_agreement": sum(row["agreement_sum"] for row in rows) / tokens,
        "expected_acceptance": sum(row["acceptance_sum"] for row in rows) / tokens,
    }


def summarise_teacher(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The teacher against itself, from any arm's rows: what a perfect student would reach."""
    tokens = sum(row["num_tokens"] for row in rows)
    nll = sum(row["teacher_nll_sum"] for row in rows) / tokens
    return {"kl_to_teacher": 0.0, "nll": nll, "top1_agreement": 1.0, "expected_acceptance": 1.0}


def gap_recovered(
    before: dict[str, float], after: dict[str, float], teacher: dict[str, float]
) -> dict[str, float | None]:
    """The share of the way to the teacher that training went; null where there was no way to go."""
    # of the KL the teacher's own value is 0, so that the whole of `before` is the way
    gap = before["nll"] - teacher["nll"]
    return {
        "kl_to_teacher": (before["kl_to_teacher"] - after["kl_to_teacher"]) / before["kl_to_teacher"]
        if before["kl_to_teacher"]
        else None,
        "nll": (before["nll"] - after["nll"]) / gap if gap > 0 else None,
    }
