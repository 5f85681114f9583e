"""Stage settings: a dataclass, filled from a section of the profile's YAML and then from the command line.

Both go through transformers' HfArgumentParser, so that `2e-5` is a number, an alias is an alias and a misspelt name is
refused in either place.
"""

import dataclasses
import difflib
import json
import math
import sys
from collections.abc import Mapping, Sequence
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

# What a hardware overlay may say: where a run is computed and how its work is cut, which changes what is learned by
# rounding at most. `load_in_4bit`, and `serve` with another copy of the teacher in it, change more. Memory demands
# them, and what they make can be told apart: by a run's fingerprint, by the teacher's name stored with the answers.
ANSWERING = (
    "engine", "serve", "server", "base_url", "teacher_devices", "gpu_memory_gb", "batch_size", "concurrency",
    "request_timeout", "tries",
)  # fmt: skip
OVERLAID = {
    "generate_sft_data": ANSWERING,
    "cache_teacher": ("teacher_devices", "gpu_memory_gb", "cpu_offload", "tokens_per_batch"),
    "run_improved_kd": (
        "batch_size", "gradient_accumulation_steps", "packing", "tokens_per_batch", "gradient_checkpointing",
        "compile_loss", "compile_layers", "liger", "use_cpu", "teacher_devices", "student_devices", "gpu_memory_gb",
        "cpu_offload", "on_policy_batch_size", "on_policy_serve", "load_in_4bit", "logging_steps", "eval_steps",
        "save_steps", "save_total_limit", "report_to",
    ),
    "evaluate_distillation": (*ANSWERING, "student_devices", "teacher_base_url"),
}  # fmt: skip
OVERLAID_ABOVE = ("gpus", "launch", "serve")  # keys above the sections
STEP_ROWS = {"batch_size": 1, "gradient_accumulation_steps": 32}  # their product is the rows of a step; the defaults
OTHER_NAME = "per_device_train_batch_size"  # of batch_size
NO_OVERLAY = ("", "none")

# Settings that there were, and what to say instead.
GONE = {
    "hub_revision": "every data set has a revision of its own: gsm8k_path: hub@REVISION (humaneval_path and mbpp_path "
    "alike), prompts_file: owner/name@REVISION",
    "vllm_arguments": "say serve: {command: vllm, arguments: {...}}, which takes the flags of `vllm serve`",
    "server_command": "say serve: {command: ...}, which takes a whole command line too",
    "teacher_server_command": "say serve: {command: ...}, which starts the teacher's server too",
}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the settings)")


def nearest(name: str, known: list[str]) -> str:
    """A phrase that names the nearest known word, or nothing if none is near."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _instead(name: str, known: list[str]) -> str:
    """What to say instead of a setting that nobody knows, or no longer."""
    gone = GONE.get(name.lstrip("-"))  # a name in YAML, or a flag: "--hub_revision"
    return f"; {gone}" if gone else nearest(name, known)


def setting(default: Any, help: str, *aliases: str) -> Any:
    """A config field with its help text and further names; lists and dicts are copied for each config."""
    # as HfArgumentParser reads them
    metadata = {"help": help} | ({"aliases": [f"--{alias}" for alias in aliases]} if aliases else {})
    if isinstance(default, list | dict):
        # a copy: two configs must not share a list
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _names(config_class: type) -> dict[str, str]:
    """Every name a setting goes by -> its field."""
    names = {}
    for field in dataclasses.fields(config_class):
        if field.init:
            names[field.name] = field.name
            # {"kd_temperature": "temperature"}
            names |= {alias.lstrip("-"): field.name for alias in field.metadata.get("aliases", [])}
    return names


def field_of(config_class: type, name: str) -> str:
    """The field that a flag's name or alias means.

    Raises:
        UserError: there is no such setting; names the nearest known one.
    """
    names = _names(config_class)
    if name not in names:
        raise UserError(f"unknown setting --{name}{nearest(name, list(names))}")
    return names[name]


def _as_arguments(values: dict[str, Any], config_class: type, where: str) -> list[str]:
    """`{name: value}` from YAML or a caller -> the command line that says the same."""
    names, types = _names(config_class), get_type_hints(config_class)
    said: dict[str, str] = {}  # field -> the name it was said by
    arguments: list[str] = []
    for name, value in values.items():
        if name not in names:
            raise UserError(f"{where}: unknown setting {name!r}{_instead(str(name), list(names))}")
        if names[name] in said:
            raise UserError(f"{where}: {said[names[name]]} and {name} are the same setting; keep one")
        said[names[name]] = name
        if value is None:  # nothing said: the default stays
            continue
        # `bool | None` -> {bool | None, bool, NoneType}: what a value of this setting may be
        kinds = {types[names[name]], *get_args(types[names[name]])}
        if isinstance(value, bool) and bool not in kinds:
            value = "yes" if value else "no"  # YAML 1.1 reads the word no as a truth value
        if isinstance(value, dict):
            arguments.append(f"--{name}={json.dumps(value)}")
        elif isinstance(value, list | tuple):
            arguments += [f"--{name}", *map(str, value)]
        else:
            # "=": as a word of its own a value such as "-x" would pass for a flag
            arguments.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return arguments


class _EachKeyOnce(yaml.SafeLoader):
    """YAML wants keys to be unique; PyYAML would take the last of two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        # keys as they are written: construct_mapping has one of two left
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


def overlay_path(hardware: str | Path) -> Path:
    """The file of a hardware overlay: a path, or a name in configs/hardware.

    Raises:
        UserError: there is none; names those that there are.
    """
    shipped = ROOT / "configs" / "hardware"
    for path in (Path(hardware), shipped / f"{hardware}.yaml"):
        if path.is_file():
            return path
    there = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml")))
    raise UserError(f"--hardware {hardware}: no such overlay; there are {there}, and none")


def _read_overlay(path: Path) -> dict[str, Any]:
    """A hardware overlay.

    Raises:
        UserError: it names a setting that is no matter of the hardware; the text names it.
    """
    overlay = _read_mapping(path)
    for key, value in overlay.items():
        if key not in (*OVERLAID_ABOVE, *OVERLAID):
            may = ", ".join((*OVERLAID_ABOVE, *OVERLAID))
            raise UserError(f"{path}: {key} belongs in the profile; an overlay says how a run is computed ({may})")
        if key in OVERLAID_ABOVE:
            continue
        for name in value or ():
            if name not in OVERLAID[key]:
                raise UserError(
                    f"{path} ({key}): {name} can change what is learned, so it belongs in the profile; an overlay may "
                    f"set {', '.join(OVERLAID[key])}{nearest(str(name), list(OVERLAID[key]))}"
                )
    return overlay


def step_sizes(training: dict[str, Any]) -> dict[str, Any]:
    """What a profile's section run_improved_kd says of `STEP_ROWS`, under these names, or their defaults."""
    # under either of its names
    said = {"batch_size": training.get(OTHER_NAME)} | training
    return {name: default if said.get(name) is None else said[name] for name, default in STEP_ROWS.items()}


def rows_of_a_step(training: dict[str, Any]) -> int | None:
    """What a profile's section run_improved_kd makes a step of; None where it does not say numbers."""
    sizes = step_sizes(training).values()
    # what is no number is refused later, by the stage whose setting it is
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _laid_over(profile: dict[str, Any], overlay: dict[str, Any], where: Path, profile_wins: bool) -> dict[str, Any]:
    """A profile's section run_improved_kd with an overlay's over it, or under it.

    Raises:
        UserError: a step would be of other rows.
    """
    # 1. the profile without the sizes of a step that it leaves open: null says nothing
    names = (*STEP_ROWS, OTHER_NAME)
    own = {name: value for name, value in profile.items() if name not in names or value is not None}
    # 2. the sizes of a step are the profile's or the overlay's, both: one of each would make steps of other rows
    if profile_wins and any(name in own for name in names):
        overlay = {name: value for name, value in overlay.items() if name not in names}
    if "batch_size" in overlay:
        own.pop(OTHER_NAME, None)
    merged = overlay | own if profile_wins else own | overlay
    before, after = rows_of_a_step(profile), rows_of_a_step(merged)
    if before != after:
        raise UserError(
            f"{where}: batch_size x gradient_accumulation_steps makes steps of {after} rows, the profile has {before}; "
            f"an overlay may cut a step otherwise, so choose two numbers whose product is {before}"
        )
    return merged


def read_merged(path: str | Path, hardware: str | None = None) -> dict[str, Any]:
    """A whole profile, with a hardware overlay laid over it, or under it where it names it: key by key.

    Args:
        path: of the profile.
        hardware: a name in configs/hardware, or the path of an overlay; None for the profile's own `hardware`, if it
            names one; `none` for none.

    Raises:
        UserError: no such file, broken YAML, a key nobody knows (names the nearest known one), or an overlay that says
            what belongs in the profile.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such profile; the shipped ones are in configs/")
    profile = _read_mapping(path)
    # 1. which overlay: the flag's, else the profile's own
    own = profile.pop("hardware", None)
    hardware = own if hardware is None else hardware
    if hardware is None or str(hardware) in NO_OVERLAY:
        return profile
    file = overlay_path(hardware)
    # what a profile says beside the overlay that it names itself, it means; an overlay asked for by a flag wins
    # 2. key by key; within a section setting by setting
    profile_wins = own is not None and str(hardware) == str(own)
    merged = profile | {"hardware": str(hardware)}
    for key, value in _read_overlay(file).items():
        said = profile.get(key)
        if key == "run_improved_kd":  # with a look at the rows of a step
            merged[key] = _laid_over(said or {}, value or {}, file, profile_wins)
        # the right side of | wins
        elif key in SECTIONS or (isinstance(value, dict) and isinstance(said, dict)):
            merged[key] = (value or {}) | (said or {}) if profile_wins else (said or {}) | (value or {})
        elif not (profile_wins and key in profile):
            merged[key] = value
    return merged


def read_profile(path: str | Path, section: str, config_class: type, hardware: str | None = None) -> dict[str, Any]:
    """One stage's values from a profile's file. See `read_merged` and `stage_values`."""
    return stage_values(config_class, read_merged(path, hardware), section)


def stage_values(config_class: type, profile: Mapping[str, Any], section: str) -> dict[str, Any]:
    """One stage's values from a merged profile: its section over the shared keys above it."""
    own = profile.get(section) or {}
    names = _names(config_class)
    said = {names.get(name) for name in own}
    # a stage without such a setting is not told of it; a section that says it by another name has said it
    shared = {key: profile[key] for key in SHARED if key in profile and key in names and key not in said}
    return shared | own


def _checked(config_class: type, values: dict[str, Any] | None, argv: list[str], where: str,
             prog: str | None) -> tuple[_Parser, list[str]]:  # fmt: skip
    """The parser of a config, and the command line that says what `values` and, after them, `argv` say."""
    # 1. a parser of the settings and of the flags that every script has
    parser = _Parser(
        config_class,
        allow_abbrev=False,  # else --temp would be --temperature
        prog=prog,
        epilog="--debug shows a traceback where otherwise one clear line would stand.",
    )
    for action in parser._actions:
        action.nargs = "*" if action.nargs == "+" else action.nargs  # a list may be empty
    parser.add_argument("--config", metavar="PROFILE.yaml", help="the profile; flags beat what it says")
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        help="configs/hardware/NAME.yaml, or a path, over the profile instead of the overlay that it names; none: none",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the settings that take effect, for --config, and end"
    )
    # 2. the profile's values, and then the flags, which win as the later ones
    arguments = _as_arguments(values or {}, config_class, where)
    # argparse would name the flag, but not the nearest one
    known = parser._option_string_actions
    for word in argv:
        flag = word.split("=")[0]
        if word.startswith("--") and flag not in known:
            # HfArgumentParser takes --max-steps for --max_steps too: one spelling is enough to be told
            options = [name for name in known if name.startswith("--") and "-" not in name[2:]]
            raise UserError(f"unknown flag {flag}{_instead(flag, options)}")
    try:
        # 3. the profile's by themselves: a wrong value there is the profile's, and the message says so
        parser.parse_known_args(arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return parser, arguments + argv


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
    parser, arguments = _checked(config_class, values, argv or [], where, prog)
    try:
        # no args file: transformers would read scripts/NAME.args of whatever script runs
        config, _, rest = parser.parse_args_into_dataclasses(arguments, True, look_for_args_file=False)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r} (--help lists the settings)")
    return config


def read_section(config_class: type[Config], profile: Mapping[str, Any], section: str) -> Config:
    """The settings of a stage that a class has, from a merged profile; the others are the stage's to read."""
    names, values = _names(config_class), stage_values(config_class, profile, section)
    return build_config(config_class, {name: values[name] for name in values if name in names}, where=section)


def to_yaml(values: dict[str, Any]) -> str:
    """A profile's text."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def settings_text(config_class: type, section: str, values: dict[str, Any], argv: Sequence[str] = ()) -> str:
    """Every setting as it was said, or its default, as a profile with one section.

    What a config leaves to the machine (null) stays so: the text may be used on another one.
    """
    parser, arguments = _checked(config_class, values, list(argv), section, None)
    # parsed and not built: __post_init__ would fill in what is left to the machine
    said = vars(parser.parse_known_args(arguments)[0])
    settings = {field.name: said[field.name] for field in dataclasses.fields(config_class) if field.init}
    return to_yaml({section: settings})


def _argument(argv: Sequence[str], flag: str) -> str | None:
    """What stands behind a flag, if the command line has it."""
    for position, word in enumerate(argv):
        if word == flag:
            return argv[position + 1] if position + 1 < len(argv) else ""
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None


def profile_argument(argv: Sequence[str]) -> str | None:
    """The path behind `--config`, if the command line names one."""
    return _argument(argv, "--config")


def hardware_argument(argv: Sequence[str]) -> str | None:
    """The overlay behind `--hardware`, if the command line names one."""
    return _argument(argv, "--hardware")


def wants_config(argv: Sequence[str]) -> bool:
    """Whether the settings are to be printed, and nothing else done."""
    return "--print_config" in argv


def load_config(config_class: type[Config], section: str, argv: list[str] | None = None) -> Config:
    """What a script calls first: `--config PROFILE.yaml [--hardware NAME] [--field value ...]` -> its typed config.

    `--print_config` prints every setting instead, and ends the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    path, hardware = profile_argument(argv), hardware_argument(argv)
    if path is None and hardware is not None:
        raise UserError(f"--hardware {hardware} is laid over a profile; name one with --config")
    values = {} if path is None else read_profile(path, section, config_class, hardware)
    where = "command line" if path is None else f"{path} ({section})"
    config = build_config(config_class, values, argv, where, prog=f"scripts/{section}.py")
    if wants_config(argv):
        print(settings_text(config_class, section, values, argv), end="")
        sys.exit(0)
    return config
