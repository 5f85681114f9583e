"""What is recorded of the data of a run: taken only where it is shown to be of the very rows that were trained on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.utils.common import read_json, read_jsonl, sha256_file, sha256_text

CLEAN = ("sft_train_data_clean.jsonl", "sft_eval_data_clean.jsonl")


@dataclass(frozen=True)
class DataRecords:
    """manifest: manifest.json, where the prompts are from. stats: stats.json, what cleaning left of the answers.

    Either is None where it is not shown to be of this run; `missing` says why, by file name. paths: of those that are.
    """

    manifest: Mapping[str, Any] | None
    stats: Mapping[str, Any] | None
    missing: Mapping[str, str]
    paths: Sequence[Path] = ()


def data_records(fingerprint: Mapping[str, Any], data_dir: Path, sft: Path) -> DataRecords:
    """Follow the chain from a run to the statistics of its answers and to the manifest of its prompts.

    Args:
        fingerprint: the run's, with the sha256 of its clean rows.
        sft: the folder of the clean rows, where cleaning recorded what it read (fix_sft_data.json).
    """
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    # the chain: clean rows of the run <- stats.json <- prompts that were cleaned <- manifest.json
    paths = {"stats.json": sft / "stats.json", "manifest.json": data_dir / "manifest.json"}
    reasons = {"stats.json": _why_not_stats(fingerprint, sft), "manifest.json": _why_not_manifest(data_dir, sft)}
    for name, path in paths.items():
        why = reasons["stats.json"] or reasons[name]  # the manifest's chain begins with the statistics'
        if why:
            missing[name] = why
        else:
            found[name] = read_json(path)
    taken = [paths[name] for name in found]
    return DataRecords(found.get("manifest.json"), found.get("stats.json"), missing, taken)


def _why_not_stats(fingerprint: Mapping[str, Any], sft: Path) -> str | None:
    """Why stats.json is not of the rows that were trained on; None if it is."""
    # 1. the clean rows are those of the run
    for name in CLEAN:
        path = sft / name
        if not path.is_file() or sha256_file(path) != fingerprint.get(name):
            return f"{name} is no longer the file that was trained on"
    # 2. cleaning has recorded what it did, and had finished
    for name in ("fix_sft_data.json", "stats.json"):
        if not (sft / name).is_file():
            return f"there is no {name} beside the clean rows"
    if not read_json(sft / "fix_sft_data.json").get("finished"):
        return "the cleaning of the answers is not finished"
    # 3. the statistics count these rows
    stats = read_json(sft / "stats.json")
    for name, split in zip(CLEAN, ("train", "eval"), strict=True):
        if stats[split]["kept"] != len(read_jsonl(sft / name)):
            return f"stats.json counts other rows than {name} has"
    return None


def _why_not_manifest(data_dir: Path, sft: Path) -> str | None:
    """Why manifest.json is not of the prompts whose answers were cleaned; None if it is."""
    # 1. the prompts are those whose answers were cleaned: cleaning recorded their hash
    prompts, manifest = data_dir / "train_dataset.jsonl", data_dir / "manifest.json"
    if not manifest.is_file():
        return "there is no manifest.json beside the prompts"
    marker = sft / "fix_sft_data.json"
    cleaned = read_json(marker)["fingerprint"].get(prompts.name) if marker.is_file() else None
    if not prompts.is_file() or sha256_file(prompts) != cleaned:
        return f"{prompts.name} beside manifest.json is not the file whose answers were cleaned"
    # each part of the file was written in one piece, in the manifest's order
    rows, start = read_jsonl(prompts), 0
    for entry in read_json(manifest)["sources"]:
        if entry["split"] != "train":  # parts of the other file
            continue
        part = rows[start : start + entry["rows"]]
        start += entry["rows"]
        # the hash that download_datasets.py takes of a part
        if sha256_text("".join(json.dumps(row, sort_keys=True) for row in part)) != entry["sha256"]:
            return f"manifest.json describes other rows of {entry['source']} than {prompts.name} has"
    return None if start == len(rows) else f"manifest.json describes {start} rows, {prompts.name} has {len(rows)}"
