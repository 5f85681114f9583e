"""The profile that a pipeline's stages read: the user's file, or one with another overlay or seed laid over it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.utils.common import ROOT, UserError
from src.utils.config import NO_OVERLAY, SECTIONS, read_merged, read_yaml, to_yaml

RESOLVED = ROOT / "outputs" / "profiles"


@dataclass(frozen=True)
class Profile:
    """A profile with its overlay and seed.

    path: the file that the stages read.
    text: what is to be written there; empty where it is the user's own file.
    """

    path: Path
    values: dict[str, Any]
    text: str


def shown(path: Path) -> str:
    """A path as one types it in the repository's folder."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def find_profile(name: str) -> Path:
    for path in (Path(name), ROOT / "configs" / f"{name}.yaml"):
        if path.is_file():
            return path.absolute()
    there = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
    raise UserError(f"--profile {name}: no such profile; there are {there}, or name a file")


def reseeded(values: dict[str, Any], seed: int) -> dict[str, Any]:
    """The profile with another seed, and folders of its own; the models stay the same."""
    # folders that are not said have defaults, which another seed must not write to either
    changed = {"data_dir": "data/processed", "experiment_dir": "outputs/experiment/default"} | values | {"seed": seed}
    # the models are made with the profile's seed still: other ones would be another comparison
    changed["prepare_models"] = {"seed": values.get("seed", 42)} | (values.get("prepare_models") or {})
    changed["evaluate_distillation"] = {"output_dir": "outputs/evaluation"} | (
        values.get("evaluate_distillation") or {}
    )
    for name in SECTIONS:
        # a section that says a seed of its own gets the other one too
        if name in changed and name != "prepare_models":
            section = dict(changed[name] or {})
            section |= {key: seed for key in ("seed", "data_seed") if key in section}
            changed[name] = _with_own_folders(section, seed)
    return _with_own_folders(changed, seed)


def _with_own_folders(said: dict[str, Any], seed: int) -> dict[str, Any]:
    """What it says of folders, with the seed in their names."""
    folders = {
        name: f"{said[name]}_seed_{seed}" for name in ("data_dir", "experiment_dir", "output_dir") if name in said
    }
    return said | folders


def resolve(path: Path, hardware: str | None, seed: int | None) -> Profile:
    """Lay overlay and seed over the profile; where that is another thing than the file says, it gets one of its own."""
    values = read_merged(path, hardware)
    # what the file itself names, before anything is laid over it
    own = str((read_yaml(path) or {}).get("hardware") or "none")
    other_hardware = hardware is not None and str(hardware) != own and not (own == "none" and hardware in NO_OVERLAY)
    if not other_hardware and seed is None:
        return Profile(path, values, "")
    name, said = path.stem, f"# {shown(path)}"
    if other_hardware:
        name += f"_{Path(hardware).stem or 'none'}"  # "8x40" of configs/hardware/8x40.yaml
        said += f", hardware {hardware or 'none'}"
    if seed is not None:
        name += f"_seed_{seed}"
        said += f", seed {seed}"
        values = reseeded(values, seed)
    text = f"{said}: written by scripts/run_stages.py\n" + to_yaml(without_overlay(values))
    return Profile(RESOLVED / f"{name}.yaml", values, text)


def without_overlay(values: dict[str, Any]) -> dict[str, Any]:
    """What is laid over already must not be laid over again."""
    return {name: value for name, value in values.items() if name != "hardware"}
