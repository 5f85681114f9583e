"""Run folders: naming, finding one to go on with, complete checkpoints, the metrics file."""

import math
import resource
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from src.utils.common import (
    Progress,
    UserError,
    append_jsonl,
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
        clear(folder)
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


def newest_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end and is still what was written; Trainer's own finder takes a
    half-written one."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    numbered = [path for path in complete if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
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
    repair_jsonl_tail(path)
    if path.is_file() and path.stat().st_size:
        write_jsonl(path, [row for row in read_jsonl(path) if row["step"] <= step])


def peak_memory_mb() -> float:
    """Peak memory of this process, MiB: of all its GPUs where there are any, else resident."""
    if torch.cuda.is_available():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def training_facts(folder: Path) -> dict[str, Any]:
    """Steps, time, tokens and memory of a whole run, over all its sessions, from metrics.jsonl."""
    metrics = [row for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
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


class RunRecorder(TrainerCallback):
    """Shows the progress, writes metrics.jsonl, marks complete checkpoints, stops a run whose loss is not a number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.progress: Progress | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.progress = Progress(state.max_steps, f"training {self.folder.name}", "step")
            self.progress.skip(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.progress:
            self.progress.close()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        row = {name: value for name, value in logs.items() if name != "epoch"}
        if not {"loss", "validation_nll"} & row.keys():
            return
        for name in ("loss", "grad_norm"):
            scaled = args.fp16 and name == "grad_norm"  # then the scaler takes an infinite gradient for what it is
            if not scaled and not math.isfinite(row.get(name, 0.0)):
                raise UserError(
                    f"{self.folder}: step {state.global_step}: {name} is {row[name]}; lower --learning_rate or raise "
                    "--warmup_steps (checkpoints up to here are kept)"
                )
        if not state.is_world_process_zero:
            return
        if "learning_rate" in row:
            row["lr"] = row.pop("learning_rate")
        append_jsonl(self.folder / "metrics.jsonl", [{"step": state.global_step, **row}])
        if self.progress and "loss" in row:
            speed = f"{row['tokens_per_second']:.0f}"
            self.progress.say(loss=f"{row['loss']:.4f}", kd=f"{row['kd_loss']:.4f}", tokens_per_second=speed)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_log |= state.global_step == state.max_steps  # the run's facts are those of its last step
        if self.progress:
            self.progress.advance()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        for name, parameter in model.named_parameters():  # a step between two log lines may have broken them
            own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter.requires_grad and not own.isfinite().all():
                raise UserError(
                    f"{self.folder}: step {state.global_step}: {name} is not a number; lower --learning_rate or raise "
                    "--warmup_steps (checkpoints before this one are kept)"
                )
        PartialState().wait_for_everyone()  # each rank has written its random state by then
        if state.is_world_process_zero:
            folder = self.folder / f"checkpoint-{state.global_step}"
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            hashes = {str(path.relative_to(folder)): sha256_file(path) for path in files}
            write_json(folder / COMPLETE, {"step": state.global_step, "sha256": hashes})
