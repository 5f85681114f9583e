"""Run folders: naming, finding one to go on with, complete checkpoints, the metrics file."""

import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from src.utils.common import (
    UserError,
    logger,
    read_json,
    read_jsonl,
    refuse_mismatch,
    repair_jsonl_tail,
    sha256_file,
    write_json,
    write_jsonl,
)
from src.utils.stages import clear, is_empty

COMPLETE = "complete.json"  # written into a checkpoint once all of it is on the disk


def find_runs(root: Path, prefix: str, fingerprint: dict[str, Any]) -> tuple[Path | None, Path | None]:
    """The newest finished and the newest unfinished run under `root` with this fingerprint."""
    finished = unfinished = None
    # names end with the time of their beginning, so the last one that fits is the newest
    for folder in sorted(root.glob(f"{prefix}_*")):
        path = folder / "kd_config.json"
        if path.is_file() and read_json(path).get("fingerprint") == fingerprint:
            if (folder / "kd_results.json").is_file():
                finished = folder
            else:
                unfinished = folder
    return finished, unfinished


def new_run_folder(root: Path, prefix: str) -> Path:
    """Make `<prefix>_<timestamp>`; a second run in the same second gets the next one."""
    while True:
        folder = root / f"{prefix}_{time.strftime('%Y%m%d_%H%M%S')}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.2)
        else:
            return folder


def claim_folder(folder: Path, fingerprint: dict[str, Any], resume: bool, overwrite: bool) -> Path:
    """Take a folder the user named: new, this very run's, or (with `overwrite`) another run's.

    Raises:
        UserError: it belongs to a run with other settings (the first difference is named), or is no run's folder.
    """
    stored = folder / "kd_config.json"
    if stored.is_file() and overwrite:
        # the file that says whose it is goes last: after a kill in here it can be run again
        clear(folder, last=stored.name)
    elif stored.is_file():
        refuse_mismatch(folder, read_json(stored).get("fingerprint", {}), fingerprint)
        if not resume and not (folder / "kd_results.json").is_file():
            raise UserError(f"{folder} holds an unfinished run; let it --resume, or pass --overwrite")
    elif folder.is_dir() and not is_empty(folder):
        raise UserError(
            f"{folder} holds files but no kd_config.json, so it is no training run; name another --output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end, the newest first."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    # not "checkpoint-best", a user's copy; by number, for "checkpoint-1000" sorts before "checkpoint-200" as text
    numbered = [path for path in complete if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end and is still what was written."""
    for path in complete_checkpoints(folder):
        broken = _broken_file(path)
        if broken is None:
            return path
        logger.warning("%s is not as it was written; going on from the checkpoint before", broken)
    return None


def _broken_file(checkpoint: Path) -> Path | None:
    """The first file of a complete checkpoint that is missing or has other bytes than when it was written."""
    try:
        facts = read_json(checkpoint / COMPLETE)
    except UserError:
        facts = None
    if not isinstance(facts, dict):
        return checkpoint / COMPLETE
    for name, written in facts.get("sha256", {}).items():
        path = checkpoint / name
        if not path.is_file() or sha256_file(path) != written:
            return path
    return None


def cut_metrics(path: Path, step: int) -> None:
    """Forget the metrics of steps after `step`, which a resumed run will take again."""
    # a kill may have left half a line
    repair_jsonl_tail(path)
    if path.is_file() and path.stat().st_size:
        write_jsonl(path, [row for row in read_jsonl(path) if row["step"] <= step])


def peak_memory_mb() -> float:
    """Peak memory of this process, MiB: of all its GPUs where there are any, else resident."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux


def training_facts(folder: Path) -> dict[str, Any]:
    """Steps, time, tokens and memory of a whole run, over all its sessions, from metrics.jsonl."""
    # not the rows of validation
    metrics = [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    # time in steps alone, as each row has it: what a killed session lost is not in it
    seconds = sum(row["tokens"] / row["tokens_per_second"] for row in metrics)
    tokens = sum(row["tokens"] for row in metrics)
    return {
        "steps": metrics[-1]["step"],
        "final_loss": metrics[-1]["loss"],
        "train_seconds": seconds,
        "train_tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "peak_memory_mb": max(row["peak_memory_mb"] for row in metrics),
    }


def write_checkpoint(folder: Path, step: int, accelerator: Accelerator, save: Callable[[Path], None]) -> None:
    """Write `checkpoint-<step>` and mark it complete, with the hashes of its files, once every rank has written.

    Args:
        save: writes this rank's part into the folder that it is given.
    """
    checkpoint = folder / f"checkpoint-{step}"
    if accelerator.is_main_process:
        shutil.rmtree(checkpoint, ignore_errors=True)  # a half-written one of a run that was killed
        checkpoint.mkdir()
    accelerator.wait_for_everyone()  # the folder is there
    save(checkpoint)
    accelerator.wait_for_everyone()  # every rank's part is there
    if accelerator.is_main_process:
        files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
        hashes = {str(path.relative_to(checkpoint)): sha256_file(path) for path in files}
        write_json(checkpoint / COMPLETE, {"step": step, "sha256": hashes})


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Keep the newest `keep` complete checkpoints (0: all), and no half-written or half-deleted one."""
    complete = complete_checkpoints(folder)
    kept = set(complete[: keep or None])  # [:None] is all of them
    for path in folder.glob("checkpoint-*"):
        if path not in kept and path.name.removeprefix("checkpoint-").isdecimal():
            (path / COMPLETE).unlink(missing_ok=True)  # first: what a kill leaves of it is not complete
            shutil.rmtree(path)
