"""Stage settings: a dataclass, filled from a section of the profile's YAML and then from the command line.

Both go through transformers' HfArgumentParser, so that `2e-5` is a number, an alias is an alias and a misspelt name is
refused in either place.
"""

import dataclasses
import difflib
import json
import sys
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from src.utils.common import ROOT, UserError

Config = TypeVar("Config")

# A profile's sections are named after the scripts that read them.
SECTIONS = (
    "prepare_models",
    "download_datasets",
    "generate_sft_data",
    "fix_sft_data",
    "cache_teacher",
    "run_improved_kd",
    "evaluate_distillation",
    "export_model",
)
# Keys above the sections: each reaches every stage that has such a setting; a section may say otherwise.
SHARED = ("data_dir", "experiment_dir", "model_name_or_path", "teacher_model_name_or_path", "seed", "serve")
# Keys of no stage: the overlay that a profile takes by default, the GPUs it is for, how training is started on them.
LAUNCHING = ("hardware", "gpus", "launch")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the settings)")


def nearest(name: str, known: list[str]) -> str:
    """A phrase that names the nearest known word, or nothing if none is near."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def setting(default: Any, help: str, *aliases: str) -> Any:
    """A config field with its help text and further names; lists and dicts are copied for each config."""
    metadata = {"help": help} | ({"aliases": [f"--{alias}" for alias in aliases]} if aliases else {})
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _names(config_class: type) -> dict[str, str]:
    """Every name a setting goes by -> its field."""
    names = {}
    for field in dataclasses.fields(config_class):
        if field.init:
            names[field.name] = field.name
            names |= {alias.lstrip("-"): field.name for alias in field.metadata.get("aliases", [])}
    return names


def _as_arguments(values: dict[str, Any], config_class: type, where: str) -> list[str]:
    """`{name: value}` from YAML or a caller -> the command line that says the same."""
    names, types = _names(config_class), get_type_hints(config_class)
    said: dict[str, str] = {}
    arguments: list[str] = []
    for name, value in values.items():
        if name not in names:
            raise UserError(f"{where}: unknown setting {name!r}{nearest(str(name), list(names))}")
        if names[name] in said:
            raise UserError(f"{where}: {said[names[name]]} and {name} are the same setting; keep one")
        said[names[name]] = name
        if value is None:
            continue
        kinds = {types[names[name]], *get_args(types[names[name]])}
        if isinstance(value, bool) and bool not in kinds:
            value = "yes" if value else "no"  # YAML 1.1 reads the word no as a truth value
        if isinstance(value, dict):
            arguments.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, list | tuple):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return arguments


class _EachKeyOnce(yaml.SafeLoader):
    """YAML wants keys to be unique; PyYAML would take the last of two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        UserError: not UTF-8, broken YAML, or a key that stands twice in a mapping (names the line).
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _read_mapping(path: Path) -> dict[str, Any]:
    """A profile or an overlay, as its file has it."""
    profile = read_yaml(path) or {}
    if not isinstance(profile, dict):
        raise UserError(f"{path}: a profile is a mapping of settings and sections, found {type(profile).__name__}")
    known = [*SECTIONS, *SHARED, *LAUNCHING]
    for key in profile:
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{nearest(str(key), known)}")
    for section in SECTIONS:
        own = profile.get(section) or {}
        if not isinstance(own, dict):
            raise UserError(f"{path}: section {section} must be a mapping, found {type(own).__name__}")
    return profile


def read_merged(path: str | Path, hardware: str | None = None) -> dict[str, Any]:
    """A whole profile, with a hardware overlay laid over it: section by section, key by key.

    Args:
        path: of the profile.
        hardware: a name in configs/hardware, or the path of an overlay; None for the profile's own `hardware`, if it
            names one, and empty for none.

    Raises:
        UserError: no such file, broken YAML, or a key nobody knows (names the nearest known one).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such profile; the shipped ones are in configs/")
    profile = _read_mapping(path)
    hardware = profile.get("hardware") if hardware is None else hardware
    if not hardware:
        return profile
    overlay_path = Path(hardware)
    if not overlay_path.is_file():
        overlay_path = ROOT / "configs" / "hardware" / f"{hardware}.yaml"
    if not overlay_path.is_file():
        there = ", ".join(sorted(file.stem for file in overlay_path.parent.glob("*.yaml"))) or "none"
        raise UserError(f"--hardware {hardware}: no such overlay; there are {there}")
    merged = profile | {"hardware": str(hardware)}
    for key, value in _read_mapping(overlay_path).items():
        merged[key] = (profile.get(key) or {}) | (value or {}) if key in SECTIONS else value
    return merged


def read_profile(path: str | Path, section: str, config_class: type, hardware: str | None = None) -> dict[str, Any]:
    """One stage's values from a profile: its section over the shared keys above it. See `read_merged`."""
    profile = read_merged(path, hardware)
    own = profile.get(section) or {}
    names = _names(config_class)
    said = {names.get(name) for name in own}
    shared = {key: profile[key] for key in SHARED if key in profile and key in names and key not in said}
    return shared | own


def build_config(config_class: type[Config], values: dict[str, Any] | None = None, argv: list[str] | None = None,
                 where: str = "config", prog: str | None = None) -> Config:  # fmt: skip
    """A typed config from a mapping and, over it, command-line arguments.

    Args:
        config_class: the dataclass.
        values: names (or aliases) to values, as YAML or a Python caller gives them.
        argv: arguments such as `["--alpha", "0.5"]`.
        where: what to call `values` in an error message.

    Raises:
        UserError: unknown name, or a value of the wrong type or out of range.
    """
    argv = argv or []
    parser = _Parser(
        config_class,
        allow_abbrev=False,
        prog=prog,
        epilog="--debug shows a traceback where otherwise one clear line would stand.",
    )
    for action in parser._actions:
        action.nargs = "*" if action.nargs == "+" else action.nargs  # a list may be empty
    parser.add_argument("--config", metavar="PROFILE.yaml", help="the profile; flags beat what it says")
    arguments = _as_arguments(values or {}, config_class, where)
    known = parser._option_string_actions
    for word in argv:
        if word.startswith("--") and word.split("=")[0] not in known:
            options = [name for name in known if name.startswith("--") and "-" not in name[2:]]
            raise UserError(f"unknown flag {word.split('=')[0]}{nearest(word.split('=')[0], options)}")
    try:
        parser.parse_known_args(arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    try:
        config, _, rest = parser.parse_args_into_dataclasses(arguments + argv, True, look_for_args_file=False)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r} (--help lists the settings)")
    return config


def profile_argument(argv: list[str]) -> str | None:
    """The path behind `--config`, if the command line names one."""
    for position, word in enumerate(argv):
        if word == "--config":
            return argv[position + 1] if position + 1 < len(argv) else ""
        if word.startswith("--config="):
            return word.partition("=")[2]
    return None


def load_config(config_class: type[Config], section: str, argv: list[str] | None = None) -> Config:
    """What a script calls first: `--config PROFILE.yaml [--field value ...]` -> its typed config."""
    argv = sys.argv[1:] if argv is None else argv
    path = profile_argument(argv)
    values = {} if path is None else read_profile(path, section, config_class)
    where = "command line" if path is None else f"{path} ({section})"
    return build_config(config_class, values, argv, where, prog=f"scripts/{section}.py")
