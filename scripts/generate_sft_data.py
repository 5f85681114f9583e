"""Stage 2: the teacher answers the prompts.

    python scripts/generate_sft_data.py --config configs/embedded.yaml

Appends to `experiment_dir`/sft/sft_{train,eval}_data.jsonl, raw and in full; choosing happens in fix_sft_data.py. Safe
to kill and run again. A file of answers that somebody else made may stand there instead: it is then used as it is.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import time
from collections import Counter

from src.distillation.base import compute_dtype, load_model, load_tokenizer, model_fingerprint, place
from src.distillation.sft import ENGINE, Request, Sampling, generate, make_requests
from src.utils.common import (
    ROW_KEYS,
    Progress,
    UserError,
    append_jsonl,
    check_dataset_row,
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

ANSWER_KEYS = ("id", "sample_index", "response", "finish_reason")


@dataclass
class GenerateSftDataConfig:
    data_dir: str = setting("data/processed", "where the prompts are")
    experiment_dir: str = setting("outputs/experiment/default", "answers go to its folder sft/")
    teacher_model_name_or_path: str = setting("", "folder or hub id of the teacher", "teacher_model")
    splits: list[str] = setting(["train", "eval"], "which data sets to answer")
    num_samples: int = setting(1, "answers a prompt")
    temperature: float = setting(0.7, "sampling temperature; 0 is greedy")
    top_p: float = setting(0.8, "nucleus; 1 is off")
    top_k: int = setting(20, "candidates a token; 0 is off")
    max_new_tokens: int = setting(768, "longest answer, end of turn included")
    batch_size: int = setting(32, "rows in one forward pass")
    teacher_devices: list[int] = setting([], "GPUs the teacher is spread over")
    gpu_memory_gb: float = setting(36.0, "weights one GPU may hold, 1e9 bytes")
    seed: int = setting(42, "every answer's seed is made from this and its row")
    overwrite: bool = setting(False, "throw away the answers there are")


def pending(config: GenerateSftDataConfig, split: str, sampling: Sampling) -> tuple[dict, list[Request], set] | None:
    """The split's fingerprint, all its requests and the keys already answered; None if there is nothing to do."""
    clean = Path(config.experiment_dir) / "sft" / f"sft_{split}_data_clean.jsonl"
    if clean.is_file() and not clean.with_name("fix_sft_data.json").is_file() and not config.overwrite:
        logger.info("%s: clean rows brought ready-made; no answers are generated", clean)
        return None
    source = Path(config.data_dir) / f"{split}_dataset.jsonl"
    target = Path(config.experiment_dir) / "sft" / f"sft_{split}_data.jsonl"
    marker = target.with_name(f"generate_{split}.json")
    if target.is_file() and not marker.is_file() and not config.overwrite:
        answers = read_jsonl(target, ANSWER_KEYS)
        logger.info("%s: %d answers brought ready-made; used as they are", target, len(answers))
        return None
    rows = read_jsonl(source, ROW_KEYS, "run scripts/download_datasets.py first", check_dataset_row)
    requests = make_requests(rows, config.num_samples, config.seed, "sft")
    fingerprint = {
        "prompts": sha256_file(source),
        "teacher": model_fingerprint(config.teacher_model_name_or_path),
        "sampling": asdict(sampling),
        "num_samples": config.num_samples,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "engine": ENGINE,
    }
    state = stage_state(marker, fingerprint, config.overwrite, [target])
    if state == "done":
        logger.info("%s is complete; nothing to do", target)
        return None
    start_stage(marker, fingerprint)
    repair_jsonl_tail(target)
    has_rows = target.is_file() and target.stat().st_size > 0
    done = {(row["id"], row["sample_index"]) for row in read_jsonl(target, ANSWER_KEYS)} if has_rows else set()
    if done:
        logger.info("%s: %d of %d answers are there, going on", target, len(done), len(requests))
    return fingerprint, requests, done


def main() -> None:
    config = load_config(GenerateSftDataConfig, "generate_sft_data")
    if not config.teacher_model_name_or_path:
        raise UserError("teacher_model_name_or_path is not set; name a profile with --config")
    if min(config.num_samples, config.batch_size) < 1:
        raise UserError("num_samples and batch_size must be at least 1")
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)
    work = {split: found for split in config.splits if (found := pending(config, split, sampling))}
    if not work:
        return
    answers = sum(len(requests) for _, requests, _ in work.values())
    require_disk(config.experiment_dir, answers * (4 * config.max_new_tokens + 2000), "the answers")

    dtype = compute_dtype()
    name = config.teacher_model_name_or_path
    tokenizer = load_tokenizer(name)
    device_map = place(name, config.teacher_devices, dtype, config.gpu_memory_gb)
    model = load_model(name, dtype, device_map)
    logger.info("%s in %s; %d answers, %s", name, str(dtype).removeprefix("torch."), answers, asdict(sampling))
    for split, (fingerprint, requests, done) in work.items():
        target = Path(config.experiment_dir) / "sft" / f"sft_{split}_data.jsonl"
        started, tokens = time.monotonic(), 0
        with Progress(len(requests), f"teacher answers ({split})") as progress:
            progress.skip(len(done))
            for rows in generate(model, tokenizer, requests, sampling, config.batch_size, frozenset(done)):
                append_jsonl(target, rows)
                tokens += sum(row["num_tokens"] for row in rows)
                progress.advance(len(rows), tokens_per_second=f"{tokens / (time.monotonic() - started):.0f}")
        seconds = time.monotonic() - started
        stored = read_jsonl(target, ANSWER_KEYS)
        reasons = Counter(row["finish_reason"] for row in stored)
        finish_stage(
            target.with_name(f"generate_{split}.json"), fingerprint,
            answers=len(stored), finish_reasons=dict(reasons), tokens=sum(row["num_tokens"] for row in stored),
            last_session={"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds},
            provenance=provenance(),
        )  # fmt: skip
        print(
            f"{split}: {len(stored)} answers in {target}, {tokens / seconds:.0f} tokens/s, "
            f"{reasons['length']} cut at {config.max_new_tokens} tokens ({reasons['length'] / len(stored):.1%})"
        )


if __name__ == "__main__":
    run_cli(main)
