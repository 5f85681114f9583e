"""What a stage left, in a form that can be compared."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from src.utils.common import read_jsonl


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def as_set(path: Path) -> set[str]:
    return {json.dumps(row, sort_keys=True) for row in read_jsonl(path)}


def tensors(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a model's or an adapter's folder."""
    found: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found
