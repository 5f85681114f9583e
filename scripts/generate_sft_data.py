"""Stage 2: the teacher answers the prompts.

    python scripts/generate_sft_data.py --config configs/embedded.yaml

Appends to `experiment_dir`/sft/sft_{train,eval}_data.jsonl, raw and in full; choosing happens in fix_sft_data.py. Safe
to kill and run again. A file of answers that somebody else made may stand there instead: it is then used as it is. The
summary (throughput, tokens, finish reasons) is generate_{train,eval}.json beside it. With `serve` in the profile, or
--serve '{"command": "vllm"}', the answers come from a server that runs as long as the stage.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

# a script's own folder is on the path, the repository is not: its modules are imported from here on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contextlib
import time
from collections import Counter
from typing import Any

from src.data.cleaning import brought_clean
from src.distillation.base import load_tokenizer, model_fingerprint, refuse_adapter
from src.distillation.batching import shared_end_of_turn
from src.distillation.engines import (
    Engine,
    EngineSettings,
    Generate,
    make_engine,
    opened,
    rows_that_fit,
    stage_serve,
    started,
)
from src.distillation.serving import Serve, answering, named_arms, teacher_server, with_open_port
from src.distillation.sft import Request, Sampling, make_requests
from src.grading.graders import read_dataset
from src.utils.common import (
    Progress,
    UserError,
    append_jsonl,
    finish_stage,
    logger,
    provenance,
    read_jsonl,
    repair_jsonl_tail,
    require_disk,
    run_cli,
    sha256_file,
    stage_state,
    start_stage,
)
from src.utils.config import load_config, setting
from src.utils.stages import hold

ANSWER_KEYS = ("id", "sample_index", "response", "finish_reason")


@dataclass
class GenerateSftDataConfig(EngineSettings):
    data_dir: str = setting("data/processed", "where the prompts are")
    experiment_dir: str = setting("outputs/experiment/default", "answers go to its folder sft/")
    teacher_model_name_or_path: str = setting("", "folder or hub id of the teacher", "teacher_model")
    model_name_or_path: str = setting("", "the student: must end a turn as the teacher does", "student_name_or_path")
    splits: list[str] = setting(["train", "eval"], "which data sets to answer")
    num_samples: int = setting(1, "answers a prompt")
    temperature: float = setting(0.7, "sampling temperature; 0 is greedy")
    top_p: float = setting(0.8, "nucleus; 1 is off")
    top_k: int = setting(20, "candidates a token; 0 is off")
    max_new_tokens: int = setting(768, "longest answer, end of turn included")
    enable_thinking: bool = setting(False, "let a hybrid teacher think first; cleaning cuts the thoughts off")
    served_model_name: str = setting("", "openai: a running server's name for the teacher, if it is another")
    seed: int = setting(42, "every answer's seed is made from this and its row")
    overwrite: bool = setting(False, "throw away the answers there are, once there are new ones")

    def __post_init__(self) -> None:
        if not self.splits or set(self.splits) - {"train", "eval"}:
            raise UserError(f"splits: {', '.join(self.splits) or 'none named'}; name train, eval or both")


@dataclass(frozen=True)
class Work:
    """What is left to do for a split: all its requests, the keys of those answered, and how many of these refused.

    target: the answers' file. marker: the file that says what they are of. replaces: all answers there are.
    """

    target: Path
    marker: Path
    replaces: bool
    fingerprint: dict[str, Any]
    requests: list[Request]
    done: set[tuple[str, int]]
    refused: int

    @property
    def missing(self) -> int:
        return sum((request.id, request.sample_index) not in self.done for request in self.requests)

    def begin(self) -> None:
        """Mark the answers as this stage's, without those that are replaced."""
        if self.replaces:
            stage_state(self.marker, self.fingerprint, True, [self.target])
        start_stage(self.marker, self.fingerprint)


def chosen_serve(config: GenerateSftDataConfig) -> Serve | None:
    """The server that this stage starts; None where it starts none.

    Raises:
        UserError: it cannot answer as the teacher.
    """
    serve = stage_serve(config)
    if serve is None:
        return None
    if config.served_model_name and serve.program != "other":
        raise UserError("served_model_name is for a server that runs elsewhere; serve's is asked by the model's name")
    if others := named_arms(serve) - {"teacher"}:
        raise UserError(
            f"serve: the command line names {{{min(others)}}}, which only the evaluation has; say that serve under "
            "evaluate_distillation, and one with {teacher} under generate_sft_data"
        )
    return with_open_port(serve)


def teacher_engine(config: GenerateSftDataConfig, serve: Serve | None) -> Engine:
    teacher = config.teacher_model_name_or_path
    if config.num_samples < 1:
        raise UserError("num_samples must be at least 1")
    name = config.served_model_name or (serve.model if serve else "")
    engine = make_engine(config, teacher, config.teacher_devices, serve, name,
                         enable_thinking=config.enable_thinking, experiment_dir=config.experiment_dir)  # fmt: skip
    if not teacher and not (engine.name == "openai" and config.served_model_name):
        raise UserError("teacher_model_name_or_path is not set; name a profile with --config")
    if engine.name == "transformers":
        refuse_adapter(teacher)  # before anything is written; a server that is started refuses it itself
    return engine


def who_answers(engine: Engine, serve: Serve | None) -> dict[str, Any]:
    """The part of the fingerprint that says what answers: the stand-in and the flags of `serve` answer too."""
    if engine.name == "transformers":
        return {"teacher": model_fingerprint(engine.model)}  # its weights are here
    if serve is None or (serve.program == "other" and not named_arms(serve)):  # its name is all that is known
        return {"teacher": engine.server.model}
    flags = answering(serve)
    return {"teacher": model_fingerprint(serve.model or engine.model)} | ({"server_arguments": flags} if flags else {})


def stored_answers(target: Path) -> list[dict[str, Any]]:
    """The answers that are there, without one that a kill has torn: it is given again."""
    repair_jsonl_tail(target)
    has_rows = target.is_file() and target.stat().st_size > 0  # `read_jsonl` refuses a file without rows
    return read_jsonl(target, ANSWER_KEYS) if has_rows else []


def pending(
    config: GenerateSftDataConfig, split: str, sampling: Sampling, engine: Engine, serve: Serve | None
) -> Work | None:
    """What is left to do for the split; None if there is nothing."""
    # 1. rows or answers that somebody brought stand there without the marker of the stage that makes them
    source = Path(config.data_dir) / f"{split}_dataset.jsonl"
    target = Path(config.experiment_dir) / "sft" / f"sft_{split}_data.jsonl"
    marker = target.with_name(f"generate_{split}.json")
    if not config.overwrite and brought_clean(target.parent):
        logger.info("%s: clean rows brought ready-made; no answers are generated", target.parent)
        return None
    if target.is_file() and not marker.is_file() and not config.overwrite:
        answers = read_jsonl(target, ANSWER_KEYS)
        logger.info("%s: %d answers brought ready-made; used as they are", target, len(answers))
        return None
    # 2. what is asked, and what tells these answers from others
    rows = read_dataset(source)
    requests = make_requests(rows, config.num_samples, config.seed, sampling, "sft")
    batch_size = None  # only the transformers engine has batches of a fixed make-up
    if engine.name == "transformers":
        tokenizer = load_tokenizer(engine.model, config.experiment_dir)
        # 0: from the memory, the same number on every start; it decides what a batch holds, and so its rounding
        batch_size = engine.batch_size or rows_that_fit(engine, tokenizer, requests)
    fingerprint = {
        "prompts": sha256_file(source),
        "sampling": asdict(sampling),
        "enable_thinking": config.enable_thinking,
        "num_samples": config.num_samples,
        "batch_size": batch_size,
        "seed": config.seed,
        "engine": engine.name,
    } | who_answers(engine, serve)
    # 3. what is there of it; answers that will be replaced count as none
    if not config.overwrite and stage_state(marker, fingerprint, False, [target]) == "done":
        logger.info("%s is complete; nothing to do", target)
        return None
    answers = [] if config.overwrite else stored_answers(target)
    done = {(row["id"], row["sample_index"]) for row in answers}
    # max_refused is a share of all answers, those of earlier sessions too
    refused = sum(row["finish_reason"] == "refused" for row in answers)
    work = Work(target, marker, config.overwrite, fingerprint, requests, done, refused)
    if not work.missing:
        summarise(work, split)  # a kill came before it
        return None
    if done:
        logger.info("%s: %d of %d answers are there, going on", target, len(done), len(requests))
    return work


def check_student(config: GenerateSftDataConfig) -> None:
    """Refuse a student that ends a turn otherwise, before any answer is made rather than after all are."""
    if config.model_name_or_path and config.teacher_model_name_or_path:
        names = (config.model_name_or_path, config.teacher_model_name_or_path)
        shared_end_of_turn(*(load_tokenizer(name, config.experiment_dir) for name in names))
    else:
        logger.info("teacher and student are not both named: whether they end a turn alike is checked in training only")


def count_tokens(rows: list[dict]) -> tuple[int, int]:
    """The tokens of those answers whose tokens were counted, and the number of those whose were not."""
    counts = [row["num_tokens"] for row in rows]
    return sum(count for count in counts if count is not None), counts.count(None)


def summarise(work: Work, split: str, tokens: int = 0, seconds: float = 0.0, uncounted: int = 0) -> None:
    """The summary beside the answers; `tokens`, `seconds` and `uncounted` answers are this session's."""
    # the counts are of the whole file, the speed is of this session
    stored = read_jsonl(work.target, ANSWER_KEYS)
    reasons = Counter(row["finish_reason"] for row in stored)
    all_tokens, all_uncounted = count_tokens(stored)
    # a part of the tokens over all of the time says nothing, and nor does no time
    rate = tokens / seconds if seconds and not uncounted else None
    finish_stage(
        work.marker, work.fingerprint,
        answers=len(stored), finish_reasons=dict(reasons), tokens=all_tokens,
        answers_without_token_count=all_uncounted,
        last_session={"seconds": seconds, "tokens": tokens, "tokens_per_second": rate},
        provenance=provenance(),
    )  # fmt: skip
    speed = "an unknown number of tokens/s" if rate is None else f"{rate:.0f} tokens/s"
    print(
        f"{split}: {len(stored)} answers in {work.target}, {speed}, {reasons['length']} cut at "
        f"{work.fingerprint['sampling']['max_new_tokens']} tokens ({reasons['length'] / len(stored):.1%})"
    )
    if reasons["refused"]:
        print(f"{split}: {reasons['refused']} of them refused by the server; their rows say why in `refusal`")
    if all_uncounted:
        print(
            f"{split}: {all_uncounted} of them without a count of tokens, which the server does not give; name a "
            "teacher_model_name_or_path whose tokenizer can be loaded to have them counted"
        )


def main() -> None:
    config = load_config(GenerateSftDataConfig, "generate_sft_data")
    folder = Path(config.experiment_dir) / "sft"
    with contextlib.ExitStack() as held:
        for split in dict.fromkeys(config.splits):  # each once
            # a lock a split, and its files: "generate_train.json", "sft_train_data.jsonl"
            held.enter_context(hold(folder, "generate_sft_data", split, f"*_{split}*"))
        answer_prompts(config)


def answer_prompts(config: GenerateSftDataConfig) -> None:
    """Answer what is missing of the splits, whose files are held."""
    # 1. who answers; nothing is loaded or started yet
    serve = chosen_serve(config)
    engine = teacher_engine(config, serve)
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)
    # 2. what is left to do of each split
    left = {split: pending(config, split, sampling, engine, serve) for split in config.splits}
    left = {split: work for split, work in left.items() if work is not None}
    if not left:
        return
    # 3. what would make the work useless is asked before it
    answers = sum(work.missing for work in left.values())
    # 4 bytes a token, 2 kB for the other fields of a row
    require_disk(config.experiment_dir, answers * (4 * config.max_new_tokens + 2000), "the answers")
    check_student(config)
    logger.info("%s: %d answers by %s, %s", engine.model or engine.server.model, answers, engine.name, asdict(sampling))
    folder = Path(config.experiment_dir) / "sft"
    # 4. one server or one loaded model for both splits
    planned = teacher_server(serve, engine.model, config.teacher_devices) if serve else None
    with started(planned, folder / "server.log"), opened(engine) as generate:
        waiting = list(left.values())  # both splits begin with the first answer
        for split, work in left.items():
            answer_split(split, work, generate, waiting)


def answer_split(split: str, work: Work, generate: Generate, waiting: list[Work]) -> None:
    """Append the answers that a split lacks, then its summary; what is `waiting` begins with the first of them."""
    begin, tokens, uncounted = time.monotonic(), 0, 0
    with Progress(len(work.requests), f"teacher answers ({split})") as progress:
        progress.skip(len(work.done))
        stored = frozenset(r for r in work.requests if (r.id, r.sample_index) in work.done)
        # all requests, answered ones too: transformers cuts the batches that an uninterrupted run would have had
        for rows in generate(work.requests, stored, work.refused):
            while waiting:  # only now: a server may refuse, or not be there, and old answers would be lost for nothing
                waiting.pop().begin()
            append_jsonl(work.target, rows)  # on the disk part by part: a kill costs what is under way
            counted, without = count_tokens(rows)
            tokens, uncounted = tokens + counted, uncounted + without
            speed = "unknown" if uncounted else f"{tokens / (time.monotonic() - begin):.0f}"
            progress.advance(len(rows), tokens_per_second=speed)
    summarise(work, split, tokens, time.monotonic() - begin, uncounted)


if __name__ == "__main__":
    run_cli(main)
