"""Stage 2b: keep the answers worth learning from, count the rest.

    python scripts/fix_sft_data.py --config configs/embedded.yaml

Reads the raw answers, writes sft_{train,eval}_data_clean.jsonl, rejected.jsonl and stats.json beside them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# a script's own folder is on the path, the repository is not: its modules are imported from here on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contextlib

from rich.table import Table

from src.data.cleaning import brought_clean, clean
from src.grading.graders import read_dataset
from src.grading.rows import Row
from src.grading.sandbox import open_sandbox
from src.report.tables import make_console
from src.utils.common import (
    finish_stage,
    logger,
    provenance,
    read_json,
    read_jsonl,
    run_cli,
    sha256_file,
    stage_state,
    start_stage,
    write_json,
    write_jsonl,
)
from src.utils.config import load_config, setting
from src.utils.stages import graders_sha256, hold

ANSWER_KEYS = ("id", "sample_index", "response", "finish_reason")


def check_answer(row: dict[str, Any]) -> str | None:
    """What is wrong with the types of a raw answer, or None."""
    for key, kind in zip(ANSWER_KEYS, (str, int, str, str), strict=True):
        if not isinstance(row[key], kind) or isinstance(row[key], bool):  # True is an int to Python
            return f"{key} must be {'text' if kind is str else 'a whole number'}, found {type(row[key]).__name__}"
    return None


@dataclass
class FixSftDataConfig:
    data_dir: str = setting("data/processed", "where the prompts are")
    experiment_dir: str = setting("outputs/experiment/default", "the answers are in its folder sft/")
    select: Literal["first_correct", "all_correct", "shortest_correct", "all"] = setting(
        "all_correct",
        "which answers stay: correct ones (all, or one a prompt: the first, the shortest), or `all`, labelled; what "
        "nothing can judge stays, labelled null",
    )
    allow_unsafe_execution: bool = setting(False, "run code answers even where the host allows limits only")
    overwrite: bool = setting(False, "clean again")


def print_stats(stats: dict[str, dict]) -> None:
    columns = ("answers", "accepted", "kept", "verified", "wrong", "unverifiable")
    table = Table("split", "source", *columns, "rejected because")
    for split, numbers in stats.items():
        for source, one in numbers["by_source"].items():
            verified = one["verified"]
            why = ", ".join(f"{reason} {count}" for reason, count in one["rejected"].items() if count) or "-"
            rate = one["acceptance_rate"]
            accepted = "-" if rate is None else f"{rate:.0%}"  # None: nothing of it could be judged
            cells = (one["answers"], accepted, one["kept"], verified["true"], verified["false"], verified["null"])
            table.add_row(split, source, *map(str, cells), why)
    make_console().print(table)


def main() -> None:
    config = load_config(FixSftDataConfig, "fix_sft_data")
    folder = Path(config.experiment_dir) / "sft"
    with contextlib.ExitStack() as held:
        for split in ("train", "eval"):  # the locks under which the answers are written: they are not read meanwhile
            held.enter_context(hold(folder, "fix_sft_data", split, f"*_{split}*"))
        held.enter_context(hold(folder, "fix_sft_data"))  # of rejected.jsonl and stats.json, which are of both splits
        fix(config, folder)


def say_if_outdated(config: FixSftDataConfig, marker: Path, stats: Path, rows: list[Row]) -> None:
    """Say where the answers behind clean rows that are kept would be judged otherwise today.

    No part of the fingerprint: for a comment in a grader, rows would be refused that training has begun on.
    """
    now = graders_sha256()
    if read_json(marker).get("graders", now) != now:  # an earlier version did not record it
        logger.warning("the answers were judged by other graders than there are now; --overwrite judges them again")
    # a sandbox is opened, which probes the host, only where it could make a difference
    if read_json(stats).get("sandbox_level") != "none" or all(row["grader"] != "python_tests" for row in rows):
        return
    if open_sandbox(config.allow_unsafe_execution).executes:
        logger.warning("code answers were not executed, which this host can do; --overwrite judges them again")


def fix(config: FixSftDataConfig, folder: Path) -> None:
    """Clean the answers in `folder`, which is held."""
    # 1. clean rows that somebody brought stand there without this stage's marker
    raw = {split: folder / f"sft_{split}_data.jsonl" for split in ("train", "eval")}
    clean_files = {split: folder / f"sft_{split}_data_clean.jsonl" for split in raw}
    marker = folder / "fix_sft_data.json"
    if not config.overwrite and brought_clean(folder):
        logger.info("%s: clean rows brought ready-made; used as they are", folder)
        return
    # 2. everything is read, and refused if need be, before anything is written
    data = {split: Path(config.data_dir) / f"{split}_dataset.jsonl" for split in raw}
    rows = {split: read_dataset(path) for split, path in data.items()}
    hint = "run scripts/generate_sft_data.py"
    answers = {split: read_jsonl(path, ANSWER_KEYS, hint, check_answer) for split, path in raw.items()}
    fingerprint = {"select": config.select, "allow_unsafe_execution": config.allow_unsafe_execution}
    # by name: `report.data_records` looks train_dataset.jsonl up here
    fingerprint |= {path.name: sha256_file(path) for path in (*data.values(), *raw.values())}
    outputs = [*clean_files.values(), folder / "rejected.jsonl", folder / "stats.json"]
    if not config.overwrite and stage_state(marker, fingerprint, False, outputs) == "done":
        logger.info("%s is clean already; nothing to do", folder)
        say_if_outdated(config, marker, outputs[-1], [row for part in rows.values() for row in part])
        return
    # 3. each split by itself; rejections and counts of both in one file each
    sandbox = open_sandbox(config.allow_unsafe_execution)
    stats, all_kept, all_rejected = {}, {}, []
    for split in raw:
        # what is trained on must not quote the evaluation; answers to the evaluation do
        eval_rows = rows["eval"] if split == "train" else []
        kept, rejected, stats[split] = clean(answers[split], rows[split], eval_rows, config.select, sandbox=sandbox)
        all_kept[split] = kept
        all_rejected += [{**row, "split": split} for row in rejected]
    # 4. the files, now that nothing is left to refuse
    if config.overwrite:
        stage_state(marker, fingerprint, True, outputs)
    start_stage(marker, fingerprint)
    for split, path in clean_files.items():
        write_jsonl(path, all_kept[split])
    write_jsonl(outputs[2], all_rejected)
    facts = {"select": config.select, "sandbox_level": sandbox.used_level, "provenance": provenance()}
    write_json(outputs[3], {**stats, **facts})
    finish_stage(marker, fingerprint, graders=graders_sha256())
    print_stats(stats)
    print(f"clean rows in {folder}; rejected answers and reasons in rejected.jsonl, counts in stats.json")


if __name__ == "__main__":
    run_cli(main)
