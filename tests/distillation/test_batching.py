import pytest
import torch

from src.distillation.base import IGNORED, EncodedRow
from src.distillation.batching import Pair, StepBatches, collate_pairs, encode_pairs, is_validation
from src.utils.common import UserError

ROWS, PER_STEP = 45, 8
LENGTHS = [(7 * index) % 23 + 3 for index in range(ROWS)]


def steps(batch_size, seed=0, epoch=0):
    """The rows of each optimisation step, in the order its micro-batches take them."""
    batches = StepBatches(LENGTHS, PER_STEP, batch_size, seed)
    batches.set_epoch(epoch)
    order = [row for batch in batches for row in batch]
    return [order[start : start + PER_STEP] for start in range(0, len(order), PER_STEP)]


# --- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_every_step_takes_its_rows(batch_size):
    """45 rows are 5 whole steps of 8 different rows; five rows sit the epoch out."""
    batches = StepBatches(LENGTHS, PER_STEP, batch_size, seed=0)
    micro = list(batches)
    assert len(batches) == len(micro) == 5 * PER_STEP // batch_size
    assert {len(batch) for batch in micro} == {batch_size}
    taken = [row for batch in micro for row in batch]
    assert len(set(taken)) == len(taken) == 40
    assert set(taken) <= set(range(ROWS))


@pytest.mark.parametrize("batch_size", [2, 4, 8])
@pytest.mark.parametrize("epoch", [0, 3])
def test_the_batch_size_does_not_move_a_row_to_another_step(batch_size, epoch):
    assert steps(batch_size, epoch=epoch) == steps(1, epoch=epoch)


def test_rows_of_a_step_are_sorted_by_length():
    for step in steps(4):
        lengths = [LENGTHS[row] for row in step]
        assert lengths == sorted(lengths, reverse=True)


def test_steps_are_drawn_from_all_lengths():
    """Sorting is within a step only: over the epoch short and long rows mix."""
    means = [sum(LENGTHS[row] for row in step) / PER_STEP for step in steps(1)]
    assert max(means) - min(means) < max(LENGTHS) / 2


def test_the_order_is_a_function_of_seed_and_epoch():
    """Not of how often it was asked, nor of torch's own random state; and it leaves that state alone."""
    torch.manual_seed(1)
    first, again = steps(2, seed=5, epoch=2), steps(2, seed=5, epoch=2)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn
    assert first == again
    orders = {str(steps(2, seed=seed, epoch=epoch)) for seed in (0, 1, 42) for epoch in range(4)}
    assert len(orders) == 12


# --- pairs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizers(make_tokenizer):
    """Student with an empty think block in its prompts, teacher without."""
    return make_tokenizer(hybrid=True), make_tokenizer()


def sized_rows(lengths):
    """Clean rows with answers of the given numbers of bytes."""
    return [
        {"id": f"r{i}", "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x" * length}]}
        for i, length in enumerate(lengths)
    ]


def test_pairs_share_the_answer_and_not_the_prompt(tokenizers, clean_rows):
    pairs, dropped = encode_pairs(clean_rows(6), *tokenizers, 1000, "here")
    assert dropped == 0
    assert [pair.student.id for pair in pairs] == [row["id"] for row in clean_rows(6)]
    for pair in pairs:
        assert pair.student.response_ids == pair.teacher.response_ids
        assert len(pair.student) == len(pair.teacher) + 6  # <think> \n \n </think> \n \n


def test_overlong_rows_are_dropped_whole_and_counted(tokenizers):
    """Five of a hundred, 5 % exactly, in order; one of them is too long for the student's template alone."""
    rows = sized_rows([10] * 95 + [500, 500, 500, 500, 66])
    row = encode_pairs(sized_rows([66]), *tokenizers, 1000, "here")[0][0]
    limit = len(row.student) - 1
    assert len(row.teacher) < limit
    pairs, dropped = encode_pairs(rows, *tokenizers, limit, "here")
    assert dropped == 5
    assert [pair.student.id for pair in pairs] == [f"r{i}" for i in range(95)]
    assert {len(pair.student.response_ids) for pair in pairs} == {11}


def test_a_row_of_max_length_is_kept(tokenizers):
    pair = encode_pairs(sized_rows([20]), *tokenizers, 1000, "here")[0][0]
    assert encode_pairs(sized_rows([20]), *tokenizers, len(pair.student), "here")[1] == 0


@pytest.mark.parametrize(("short", "long"), [(94, 6), (19, 2), (0, 3)])
def test_too_many_overlong_rows_stop_the_run(tokenizers, short, long):
    with pytest.raises(UserError, match=rf"^data\.jsonl: {long} of {short + long} rows .*--max_length") as caught:
        encode_pairs(sized_rows([10] * short + [500] * long), *tokenizers, 100, "data.jsonl")
    longest = len(encode_pairs(sized_rows([500]), *tokenizers, 1000, "here")[0][0].student)
    assert f"the longest has {longest}" in str(caught.value)


def test_different_ends_of_turn_are_refused(make_tokenizer):
    teacher = make_tokenizer()
    teacher.chat_template = teacher.chat_template.replace("<|im_end|>", "<|endoftext|>")
    with pytest.raises(UserError, match=r"student ends a turn with <\|im_end\|>, the teacher with <\|endoftext\|>"):
        encode_pairs(sized_rows([10]), make_tokenizer(), teacher, 100, "here")


def test_collate_pairs():
    pair = Pair(EncodedRow("a", (1, 2, 3), (4, 5)), EncodedRow("a", (1,), (4, 5)))
    student = {"input_ids", "attention_mask", "labels"}
    assert set(collate_pairs([pair], 0, with_teacher=False)) == student
    batch = collate_pairs([pair], 0, with_teacher=True)
    assert set(batch) == student | {f"teacher_{key}" for key in student}
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, IGNORED, 4, 5]]
    assert batch["teacher_labels"].tolist() == [[IGNORED, 4, 5]]


# --- validation rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3])
def test_validation_share(fraction):
    """Four standard deviations at most from the share asked for."""
    count = sum(is_validation(f"row-{i}", fraction) for i in range(10_000))
    assert abs(count - 10_000 * fraction) <= 4 * (10_000 * fraction * (1 - fraction)) ** 0.5


def test_validation_rows_do_not_change():
    """Pinned: another choice would move rows of earlier experiments between training and validation."""
    assert [i for i in range(100) if is_validation(f"row-{i}", 0.05)] == [5, 21, 25, 31, 32, 36, 41, 93]


def test_a_larger_share_keeps_the_rows_of_a_smaller_one():
    small, large = ({i for i in range(1000) if is_validation(str(i), share)} for share in (0.05, 0.2))
    assert small < large
