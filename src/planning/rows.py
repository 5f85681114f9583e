"""How many rows a profile has and how long they are: counted where the files are there, else assumed, and said so."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from src.distillation.base import encode_row, end_of_turn_id, load_tokenizer, prompt_ids, prompt_text
from src.distillation.batching import clean_files, read_clean
from src.planning.stages import Prompts, generation_of, prompts_of
from src.utils.common import UserError, read_jsonl

SAMPLE = 256  # rows that are counted for the means
EVALUATED = {"quick": 10, "medium": 50, "full": 350}  # rows at most, by the mode of the evaluation

# Tokens of a prompt with its instruction and template, and of an answer. Prompts: means of the public sets and of the
# packs by Qwen3's tokenizer (GSM8K 60, HumanEval 134, MBPP 110, aiops 202) and about 30 for what stands around them.
# Answers: assumed from what an instruct model writes when it reasons before it answers.
ASSUMED = {
    "gsm8k": (90, 300),
    "humaneval": (165, 300),
    "mbpp": (140, 250),
    "aiops": (230, 250),
    "maths": (65, 50),
    "ops_alerts": (60, 50),
}
OTHER = (230, 250)  # a pack that is not in the table, as aiops


@dataclass(frozen=True)
class Rows:
    """Rows of both splits and their mean lengths in tokens.

    kept: training rows as cleaning leaves them, where that is known already.
    source: where the numbers are from.
    """

    train: int
    evaluation: int
    prompt_tokens: float
    answer_tokens: float
    source: str

    @property
    def tokens(self) -> float:
        return self.prompt_tokens + self.answer_tokens

    @property
    def all(self) -> int:
        return self.train + self.evaluation


def read_rows(profile: dict[str, Any], prompt_tokens: float | None = None, answer_tokens: float | None = None) -> Rows:
    """The rows of a merged profile: its clean files, else its prompts, else what its sections ask for.

    Args:
        prompt_tokens: mean length to plan with, whatever would be counted or assumed; `answer_tokens` likewise.

    Raises:
        UserError: nothing says how many rows there will be, or a length is not above 0.
    """
    for name, tokens in (("prompt", prompt_tokens), ("answer", answer_tokens)):
        if tokens is not None and not 0 < tokens < math.inf:  # nan is neither
            raise UserError(f"--{name}_tokens {tokens:g}: a number above 0 is wanted")
    data, experiment = Path(profile.get("data_dir", "")), Path(profile.get("experiment_dir", ""))
    limit = generation_of(profile).max_new_tokens
    # the later a file is made, the more it tells: clean rows, else prompts, else what is asked for
    cleaned = all(path.is_file() for path in clean_files(experiment / "sft").values())
    collected = all((data / f"{split}_dataset.jsonl").is_file() for split in ("train", "eval"))
    # asked for where there is something to count: a hub that is away answers after half a minute
    tokenizer = _tokenizer(profile.get("teacher_model_name_or_path", "")) if cleaned or collected else None
    if cleaned and tokenizer:
        rows = _clean(experiment / "sft", tokenizer)
    elif collected:
        rows = _prompts(data, tokenizer)
    else:
        rows = _wanted(prompts_of(profile))
    said = [f"{name} tokens as given" for name, own in (("prompt", prompt_tokens), ("answer", answer_tokens)) if own]
    return Rows(
        rows.train,
        rows.evaluation,
        prompt_tokens or rows.prompt_tokens,
        min(answer_tokens or rows.answer_tokens, limit),  # no answer is longer than it may be
        "; ".join([rows.source, *said]),
    )


def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(name)
    except UserError:  # not here: lengths are assumed then, and said to be
        return None


def _sample(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    # every n-th, from the whole file
    return list(rows[:: max(1, len(rows) // SAMPLE)])


def _clean(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Rows:
    files, end = clean_files(folder), end_of_turn_id(tokenizer)
    train, evaluation = read_clean(files["train"]), read_clean(files["eval"])
    encoded = [encode_row(tokenizer, row, end) for row in _sample(train)]
    prompts = sum(len(row.prompt_ids) for row in encoded) / len(encoded)
    answers = sum(len(row.response_ids) for row in encoded) / len(encoded)
    source = f"counted in {files['train']}, {len(encoded)} rows by the teacher's tokenizer"
    return Rows(len(train), len(evaluation), prompts, answers, source)


def _prompts(data: Path, tokenizer: PreTrainedTokenizerBase | None) -> Rows:
    train = read_jsonl(data / "train_dataset.jsonl", ("source", "prompt"))
    evaluation = read_jsonl(data / "eval_dataset.jsonl", ("source", "prompt"))
    lengths = [ASSUMED.get(row["source"], OTHER) for row in train]
    prompts = sum(prompt for prompt, _ in lengths) / len(lengths)
    answers = sum(answer for _, answer in lengths) / len(lengths)
    counted = "prompts and answers as long as is usual for their source"
    if tokenizer:
        texts = []
        for row in _sample(train):
            system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
            texts.append(prompt_text(tokenizer, [*system, {"role": "user", "content": row["prompt"]}]))
        prompts = sum(map(len, prompt_ids(tokenizer, texts))) / len(texts)
        counted = "prompts counted by the teacher's tokenizer, answers as long as is usual for their source"
    return Rows(len(train), len(evaluation), prompts, answers, f"rows of {data}; {counted}")


def _wanted(asked: Prompts) -> Rows:
    """What the section download_datasets asks for."""
    if asked.prompts_file:
        raise UserError(
            "how many rows prompts_file gives is known once scripts/download_datasets.py has read it; run that first"
        )
    # source, training rows, evaluation rows
    wanted = [
        ("gsm8k", asked.gsm8k_train_rows, asked.gsm8k_eval_rows),
        ("humaneval", asked.humaneval_train_rows, asked.humaneval_eval_rows),
        ("mbpp", 0, asked.mbpp_eval_rows),
        # lists that do not match are the stage's to refuse
        *zip(asked.domains, asked.domain_train_rows, asked.domain_eval_rows, strict=False),
    ]
    train, evaluation = sum(rows for _, rows, _ in wanted), sum(rows for _, _, rows in wanted)
    if not train:
        raise UserError("the section download_datasets asks for no training rows; name a source and how many")
    # means over rows, not over sources
    prompts = sum(rows * ASSUMED.get(source, OTHER)[0] for source, rows, _ in wanted) / train
    answers = sum(rows * ASSUMED.get(source, OTHER)[1] for source, rows, _ in wanted) / train
    return Rows(train, evaluation, prompts, answers, "rows the profile asks for, of lengths usual for their source")
