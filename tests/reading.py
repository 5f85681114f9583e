"""What a stage left, in a form that can be compared."""

import json
from pathlib import Path

from src.utils.common import read_jsonl


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def as_set(path: Path) -> set[str]:
    return {json.dumps(row, sort_keys=True) for row in read_jsonl(path)}
