"""Where training begins if not at a fresh adapter: another run's adapter, `init_from`.

The optimiser and the schedule begin anew. What is compared before anything is loaded is what peft would not refuse:
an adapter of another scale or for other weights loads, and is another function.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError

from src.distillation.base import adapter_folder, base_of_adapter, model_fingerprint
from src.distillation.kd_config import KDConfig
from src.utils.common import UserError, read_json, sha256_file

WEIGHTS = "adapter_model.safetensors"
# ways to begin that leave the model's own weights alone; all others (pissa, olora, loftq ...) train beside changed ones
KEEP_MODEL = (True, False, "gaussian", "orthogonal", "eva")
# of an adapter's settings, those compared by themselves, and those that its weights' function does not depend on
COMPARED = ("r", "lora_alpha", "target_modules", "base_model_name_or_path", "revision", "init_lora_weights")
WITHOUT_EFFECT = (
    "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """An adapter that training begins from. sha256: of its weights, which is what identifies it."""

    folder: Path
    sha256: str


def find_start(config: KDConfig) -> Start | None:
    """The adapter that `init_from` names; None where it names none.

    Raises:
        UserError: it is no adapter in safetensors, or its rank, scale, modules or model are not this run's.
    """
    if config.init_from is None:
        return None
    folder = adapter_folder(config.init_from, "init_from")
    # 1. an adapter in safetensors, and a plain LoRA one
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"--init_from {folder}: no {WEIGHTS} there, and weights are read from nothing else")
    found = read_json(folder / "adapter_config.json")
    _check_kind(folder, found)
    # 2. its shape is this run's; modules are compared without their order
    for flag, name, ours in (
        ("lora_r", "r", config.lora_r),
        ("lora_alpha", "lora_alpha", config.lora_alpha),
        ("lora_target_modules", "target_modules", sorted(config.lora_target_modules)),
    ):
        theirs = sorted(found[name]) if isinstance(found.get(name), list) else found.get(name)
        if theirs != ours:
            words = " ".join(theirs) if isinstance(theirs, list) else theirs
            raise UserError(f"--init_from {folder}: its {name} is {theirs}, this run's {ours}; pass --{flag} {words}")
    # 3. it was trained for this student
    _check_base(folder, found, config.model_name_or_path)
    return Start(folder, sha256_file(folder / WEIGHTS))


def _check_kind(folder: Path, found: dict[str, Any]) -> None:
    """Refuse what has the weights of a plain LoRA adapter and is another function of them.

    A setting that this peft does not know counts as one that changes the function.

    Raises:
        UserError: names the setting.
    """
    # what a fresh adapter of this peft has: a value equal to that is no setting
    plain = LoraConfig().to_dict()
    wrong = [name for name in sorted(found.keys() - {*COMPARED, *WITHOUT_EFFECT}) if _is_set(found, plain, name)]
    if found.get("init_lora_weights", True) not in KEEP_MODEL:
        wrong.append("init_lora_weights")
    if wrong:
        raise UserError(
            f"--init_from {folder}: its {wrong[0]} is {found[wrong[0]]!r}; training goes on from plain LoRA adapters "
            "alone, so merge it into its model, and name that with --model_name_or_path"
        )


def _is_set(found: dict[str, Any], plain: dict[str, Any], name: str) -> bool:
    """Null, false and empty are one: versions of peft write a default in either way."""
    return bool(found[name]) and found[name] != plain.get(name)


def _check_base(folder: Path, found: dict[str, Any], student: str) -> None:
    """An adapter of a run of ours names its student by fingerprint, wherever that lies now; any other by its name.

    Raises:
        UserError: it is of another model, or its own cannot be had to compare the two.
    """
    base, run = base_of_adapter(found), folder.parent / "kd_config.json"
    if run.is_file():
        theirs = read_json(run).get("fingerprint", {}).get("student")
        if theirs is None:
            raise UserError(
                f"--init_from {folder}: {run} beside it has no fingerprint of a student, so it is of no run of this "
                "project; move the adapter to a folder by itself, and name that"
            )
    else:
        # an adapter from elsewhere: its base is looked up under the name that it gives
        theirs = model_fingerprint(base)
    if theirs != model_fingerprint(student):
        raise UserError(
            f"--init_from {folder}: it is an adapter of {base!r} ({theirs}), this run's student is {student!r}, "
            "another model; name the adapter's with --model_name_or_path"
        )


def begin_from(model: PeftModel, start: Start) -> None:
    """Put the adapter's weights in the place of the fresh ones; before the model is wrapped.

    Raises:
        UserError: they cannot be read, or are not the weights that this model's adapters have.
    """
    try:
        weights = load_peft_weights(str(start.folder), device="cpu")
    except SafetensorError as error:
        raise UserError(f"--init_from {start.folder}: its weights cannot be read ({error})") from error
    # the names and shapes that this model's own adapters have
    fresh = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(fresh.keys() | weights.keys()):  # peft would pass over what does not fit
        # [[64, 576], "missing"]
        shapes = [list(own[name].shape) if name in own else "missing" for own in (weights, fresh)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"--init_from {start.folder}: its {name} is {shapes[0]}, this run's {shapes[1]}; name an adapter of "
                "this student with the same lora_target_modules on every layer"
            )
    set_peft_model_state_dict(model, weights)
