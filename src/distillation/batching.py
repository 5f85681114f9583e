"""Rows for training: a pair of encodings each, ordered into steps, and steps cut into passes that waste little."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from src.distillation.base import EncodedRow, answer_turn, encode_row, end_of_turn_id
from src.distillation.packing import MULTIPLE, segments
from src.utils.common import UserError, read_jsonl, sha256_file, sha256_text

Item = TypeVar("Item")
ROLES = ("system", "developer", "user", "assistant", "tool")  # whose words a chat template may know


@dataclass(frozen=True)
class Pair:
    """One row as each model reads it; the response ids are the same.

    own: the answer is the student's own: it has no cross-entropy, which would teach the student what it says already.
    """

    student: EncodedRow
    teacher: EncodedRow
    own: bool = False


@dataclass(frozen=True)
class Tokenizers:
    """Of both models; the teacher's out of its cache, where there is one."""

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase


def shared_end_of_turn(student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> int:
    """The token both end a turn with.

    Raises:
        UserError: they end it differently; the student would learn never to stop.
    """
    # what a template writes behind an answer is read off any question
    hello = [{"role": "user", "content": "hello"}]
    student, teacher = answer_turn(student_tokenizer, hello), answer_turn(teacher_tokenizer, hello)
    ids = [end_of_turn_id(tokenizer) for tokenizer in (student_tokenizer, teacher_tokenizer)]
    if ids[0] != ids[1] or student.end != teacher.end:
        raise UserError(
            f"the student ends a turn with {student.end}, the teacher with {teacher.end}; choose models of one family"
        )
    if student.gap != teacher.gap:
        raise UserError(
            f"before the end of a turn the student's chat template writes {student.gap!r}, the teacher's "
            f"{teacher.gap!r}; choose models of one family, or give both one chat_template.jinja"
        )
    return ids[0]


def encode_pairs(
    rows: Sequence[dict[str, Any]],
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    where: str,
) -> tuple[list[Pair], int]:
    """Encode clean rows for both models, dropping those longer than `max_length` tokens for either.

    Returns:
        The pairs kept, in order, and the number of rows dropped.

    Raises:
        UserError: the models end a turn with different tokens, more than 5 % would be dropped, or none is left.
    """
    end = shared_end_of_turn(student_tokenizer, teacher_tokenizer)
    pairs = [Pair(encode_row(student_tokenizer, row, end), encode_row(teacher_tokenizer, row, end)) for row in rows]
    kept = [pair for pair in pairs if max(len(pair.student), len(pair.teacher)) <= max_length]
    dropped = len(pairs) - len(kept)  # a pair goes whole, though one model may have room for it
    if dropped > 0.05 * len(pairs) or not kept:
        longest = max(max(len(pair.student), len(pair.teacher)) for pair in pairs)
        raise UserError(
            f"{where}: {dropped} of {len(pairs)} rows are longer than max_length = {max_length} tokens (the longest "
            f"has {longest}); raise --max_length, or shorten the answers"
        )
    return kept, dropped


def is_validation(row_id: str, fraction: float) -> bool:
    """Whether a training row is set aside: a function of its id alone, so that every run and every arm agree."""
    return int(sha256_text(f"validation/{row_id}")[:8], 16) < fraction * 2**32  # 8 hex digits: below 2**32, evenly


def _conversation(row: dict[str, Any], may_be_empty: bool) -> str | None:
    """What is wrong with a clean row's messages, or None."""
    messages = row["messages"]
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not good or len(messages) < 2 or messages[-1]["role"] != "assistant":
        return "messages must be a list of {role, content} that ends with the assistant's"
    roles = [message["role"] for message in messages]
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        return f"unknown role {unknown[0]!r} in messages; known are {', '.join(ROLES)}"
    if "system" in roles[1:]:
        return f"a system message stands first and once, the roles are {', '.join(roles)}; join or delete the others"
    if "user" not in roles:
        return f"nobody asks anything in messages, the roles are {', '.join(roles)}"
    return None if may_be_empty or messages[-1]["content"].strip() else "the assistant's answer is empty"


def _clean_fault(row: dict[str, Any], may_be_empty: bool = False) -> str | None:
    """What is wrong with a clean row, or None."""
    row_id, index = row["id"], row.get("sample_index", 0)
    if not isinstance(row_id, str):
        return f"id must be text, found {type(row_id).__name__}; put it in quotes"
    # in Python True is an int, and equals 1
    if not isinstance(index, int) or isinstance(index, bool):
        return f"sample_index must be a whole number, found {type(index).__name__}; leave it out for 0"
    ids = row.get("response_ids", [])
    if may_be_empty and not (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)):
        return "response_ids must be a list of token ids; leave it out to have the text encoded"
    return _conversation(row, may_be_empty)


BRING = "run scripts/fix_sft_data.py first, or bring the file"


def read_clean(path: Path, own_answers: bool = False) -> list[dict[str, Any]]:
    """The rows of a clean file.

    Args:
        own_answers: they are a student's as it gave them: one that ended its turn at once has said nothing.

    Raises:
        UserError: it is missing or broken, or a row is no conversation with an answer, or has another's id and
            sample_index; names file and line.
    """
    return read_jsonl(
        path,
        ("id", "messages"),
        BRING,
        functools.partial(_clean_fault, may_be_empty=own_answers),
        unique=("id", "sample_index"),
        twice="two clean rows share an id and a sample_index; remove one",
    )


def clean_files(folder: Path) -> dict[str, Path]:
    """Split -> its clean file in the folder sft/ of an experiment."""
    return {split: folder / f"sft_{split}_data_clean.jsonl" for split in ("train", "eval")}


def clean_hashes(folder: Path) -> dict[str, str]:
    """File name -> sha256 of the clean files, which no row is read for.

    Raises:
        UserError: one is missing.
    """
    # both, before either is hashed
    for path in clean_files(folder).values():
        if not path.is_file():
            raise UserError(f"{path}: no such file; {BRING}")
    return {path.name: sha256_file(path) for path in clean_files(folder).values()}


@dataclass(frozen=True)
class TrainingData:
    """A run's rows: to train on, set aside for choices, held out for the end; and how many were too long."""

    train: list[Pair]
    validation: list[Pair]
    heldout: list[Pair]
    hashes: dict[str, str]
    dropped: int

    def all(self) -> list[Pair]:
        return self.train + self.validation + self.heldout


def load_training_data(
    folder: Path,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    validation_fraction: float,
    rows_per_step: int,
) -> TrainingData:
    """Read and encode sft_{train,eval}_data_clean.jsonl of `folder`.

    Raises:
        UserError: a file is missing, broken or empty, the splits share a row, or there are too few rows for one step.
    """
    pairs, dropped = {}, 0
    for split, path in clean_files(folder).items():
        rows = read_clean(path)
        pairs[split], left_out = encode_pairs(rows, student_tokenizer, teacher_tokenizer, max_length, str(path))
        dropped += left_out
    # by id and not by sample: two answers to one question are one question
    shared = {pair.student.id for pair in pairs["train"]} & {pair.student.id for pair in pairs["eval"]}
    if shared:
        raise UserError(f"{folder}: row {min(shared)} is both a training and an evaluation row; split by id first")
    # by id, so that all answers to a question are on one side
    validation = [pair for pair in pairs["train"] if is_validation(pair.student.id, validation_fraction)]
    train = [pair for pair in pairs["train"] if not is_validation(pair.student.id, validation_fraction)]
    if len(train) < rows_per_step:
        raise UserError(
            f"{folder}: {len(train)} training rows, but one optimisation step takes {rows_per_step} "
            "(batch_size x gradient_accumulation_steps); lower --gradient_accumulation_steps or collect more rows"
        )
    return TrainingData(train, validation, pairs["eval"], clean_hashes(folder), dropped)


def share_out(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices in `parts` groups of about equal tokens, none empty: the longest row goes to the group with the fewest
    (Graham 1969). A pack costs what its tokens cost, so how many rows a group has does not matter."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    held = [0] * parts
    # lengths [5, 4, 3, 2] in 2 parts: [0, 3] and [1, 2], 7 tokens each
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = min(range(parts), key=lambda g: (held[g], g))
        groups[least].append(index)
        held[least] += lengths[index]
    return groups


def alike(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Indices in `parts` groups of equally many rows, alike in length: padding to the longest wastes least."""
    # lengths [5, 9, 4, 8] in 2 parts: [1, 3] and [0, 2]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    size = len(order) // parts
    return [order[start : start + size] for start in range(0, len(order), size)]


def within(lengths: Sequence[int], tokens: int, ranks: int = 1) -> list[list[int]]:
    """Indices in the fewest groups, a multiple of `ranks`, of which none holds more than `tokens`; a longer row is a
    group by itself."""
    # 5, 4, 3 and 2 tokens with 8 at most, 1 rank: one group holds 14, two hold 7 and 7
    parts = ranks
    while parts < len(lengths):
        groups = share_out(lengths, parts)
        if all(len(group) == 1 or sum(lengths[index] for index in group) <= tokens for group in groups):
            return groups
        parts += ranks
    # a row each: what is longer than `tokens` cannot be cut
    return share_out(lengths, len(lengths))


def consecutive(items: Sequence[Item], size: int, size_of: Callable[[Item], int]) -> list[list[Item]]:
    """Items in their order, in groups whose sizes add up to `size` at most, of one item at least."""
    groups: list[list[Item]] = []
    held = size  # full, so that the first item opens a group
    for item in items:
        if held + size_of(item) > size:
            groups.append([])
            held = 0
        groups[-1].append(item)
        held += size_of(item)
    return groups


@dataclass(frozen=True)
class StepOrder:
    """Which rows every optimisation step takes: `rows_per_step` of them, however they are cut into passes.

    Each epoch is a new permutation of `rows` rows, a function of (seed, epoch). Rows beyond the last whole step sit
    that epoch out.
    """

    rows: int
    rows_per_step: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // self.rows_per_step

    def rows_of(self, step: int) -> list[int]:
        """The indices of step 0, 1, ..."""
        epoch, place = divmod(step, self.steps_per_epoch)  # step 7 at 3 steps an epoch: epoch 2, place 1
        # no two (seed, epoch) share a number while epochs stay below 1,000,003
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        return order[place * self.rows_per_step : (place + 1) * self.rows_per_step]


@dataclass(frozen=True)
class Cutting:
    """How the rows of a step become forward passes.

    tokens: most in one packed pass; 0: as many passes as `parts` says.
    parts: passes of a step over all ranks, where tokens do not decide.
    ranks: processes; each takes every `ranks`-th pass, and all take equally many.
    packing: share rows out by their tokens; else by their number, alike in length.
    """

    tokens: int
    parts: int
    ranks: int
    packing: bool

    def passes(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices into `lengths`, a group for every pass of all ranks."""
        # a limit on tokens is one of packed passes: padded ones go by their number of rows
        if self.tokens and self.packing:
            return within(lengths, self.tokens, self.ranks)
        return share_out(lengths, self.parts) if self.packing else alike(lengths, self.parts)


def waste(rows: Sequence[EncodedRow], order: StepOrder, cutting: Cutting) -> tuple[float, float, float]:
    """Of one epoch: passes a step, the share of padding in them, and the share of the rows' tokens that shared
    beginnings spare them."""
    # tokens of the rows one by one, of these once shared beginnings are read once, and with padding
    own = run = computed = passes = 0
    for step in range(order.steps_per_epoch):
        taken = [rows[index] for index in order.rows_of(step)]
        for part in cutting.passes([len(row) for row in taken]):
            group = [taken[index] for index in part]
            lengths = [len(row) for row in group]
            # what a pass would have read row by row, and what it reads
            passes += 1
            own += sum(lengths)
            if cutting.packing:
                tokens = sum(segment.end - segment.start for segment in segments(group))
                run += tokens
                computed += -(-tokens // MULTIPLE) * MULTIPLE  # filled up, as `pack` does
            else:
                run += sum(lengths)
                computed += max(lengths) * len(lengths)  # as `collate` pads
    return passes / order.steps_per_epoch, 1 - run / computed, 1 - run / own
