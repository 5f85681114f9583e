"""Models and rows, the same way for every stage: loading, LoRA, placement on devices, encoding, hidden states."""

import copy
import datetime
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.peft_utils import find_adapter_config_file

from src.distillation.losses import LogitMap
from src.distillation.quantisation import (
    add_quantiser,
    cannot_load_quantised,
    check_head,
    check_machine,
    elements,
    four_bit,
    method_of,
    parameter_bytes,
)
from src.utils.answers import OPENS
from src.utils.common import ROOT, UserError, logger, read_json
from src.utils.stages import experiment_date

SHIPPED = ROOT / "configs" / "models"  # shapes of the shipped profiles' models, for plans that need no network
IGNORED = -100  # the label of a position that is not a response token
ANY_DAY = datetime.date(2025, 1, 1)  # what a template that asks for the day reads outside an experiment
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def compute_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """bf16 where the processor multiplies it natively, else fp32."""
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        # by default torch counts an emulated bf16 as supported
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capabilities = torch.cpu.get_capabilities()
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


@dataclass(frozen=True)
class ModelName:
    """A model as a user names it: a local folder, or a hub id that may be pinned to a revision.

    id: the folder or the hub id, without the revision.
    revision: a commit, tag or branch; None for a folder, and for whatever the hub has by default.
    """

    id: str
    revision: str | None = None

    @property
    def pin(self) -> dict[str, str]:
        """What `from_pretrained` is called with beside the id."""
        return {} if self.revision is None else {"revision": self.revision}

    @property
    def full(self) -> str:
        """The name as a user would write it."""
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def model_name(name: str) -> ModelName:
    """`Qwen/Qwen3-8B@b968826d` -> id and revision. What exists on the disk is a folder, whatever it is called.

    Raises:
        UserError: one of the two sides of the @ is empty.
    """
    own_id, at, revision = name.partition("@")  # no hub id has one
    if not at or Path(name).exists():
        return ModelName(name)
    if not own_id or not revision:
        raise UserError(f"model {name!r}: name a hub id before the @ and a commit, tag or branch behind it")
    return ModelName(own_id, revision)


def base_of_adapter(adapter: dict[str, Any]) -> str:
    """The model that an adapter_config.json names, as a name of ours."""
    return ModelName(adapter.get("base_model_name_or_path") or "", adapter.get("revision")).full


def _cannot_load(what: str, name: str, error: Exception) -> UserError:
    # a library's error may be many lines
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{what} {name!r} cannot be loaded: {reason}; name a local folder or a hub id that can be reached")


def adapter_folder(path: str, flag: str) -> Path:
    """The folder of an adapter that is named by a run's folder or by itself.

    Raises:
        UserError: there is none, or not yet; `flag` is what named it.
    """
    folder = Path(path)
    folder = folder / "final_model" if (folder / "final_model").is_dir() else folder
    if (folder / "kd_config.json").is_file():
        raise UserError(
            f"--{flag} {path}: a run without a final_model, unfinished or moved away; go on with it by its command, "
            "or name the folder where its final_model is"
        )
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"--{flag} {path}: no adapter_config.json there; name a run folder or its final_model")
    return folder


def refuse_adapter(name: str) -> None:
    """Refuse an adapter where a model is wanted: transformers would load what it was trained on, with it or without.

    Raises:
        UserError: the folder or hub id holds an adapter.
    """
    own = model_name(name)
    try:
        found = find_adapter_config_file(own.id, revision=own.revision)
    except (OSError, ValueError):  # no such place; loading the model will say so
        return
    if found is not None:
        base = base_of_adapter(read_json(found))
        raise UserError(
            f"{name!r} is an adapter of {base!r}, not a model; merge it into that (scripts/export_model.py for a run "
            "of this project), and name the folder with the merged model; to train on from it, name its base and "
            "pass --init_from"
        )


def load_model_config(name: str) -> PreTrainedConfig:
    """A model's configuration; one that cannot be had, or is an adapter's, is a UserError."""
    refuse_adapter(name)
    own = model_name(name)
    try:
        return AutoConfig.from_pretrained(own.id, **own.pin, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_load("model", name, error) from error


def config_folder(name: str) -> str:
    """Where a model's shapes can be read: its own folder, configs/models where it is a shipped profile's, or the hub.

    >>> config_folder("Qwen/Qwen3-8B").endswith("configs/models/Qwen--Qwen3-8B")
    True
    """
    if Path(name).is_dir():
        return name
    base = name.partition("@")[0].rstrip("/").removeprefix("outputs/models/")  # "Qwen/Qwen3-8B@main"
    ours = SHIPPED / base.replace("/", "--")
    return str(ours) if ours.is_dir() else name


def load_tokenizer(name: str, experiment_dir: str | Path = "") -> PreTrainedTokenizerBase:
    """A tokenizer with a chat template.

    Args:
        name: folder or hub id, see `model_name`.
        experiment_dir: where it is used. A template that asks for the day reads the experiment's (see
            `experiment_date`); without an experiment always the same one.

    Raises:
        UserError: it cannot be loaded, or has no chat template.
    """
    own = model_name(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(own.id, **own.pin, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _cannot_load("tokenizer", name, error) from error
    if not tokenizer.chat_template:
        raise UserError(f"tokenizer {name!r} has no chat template; use an instruct model, or add chat_template.jinja")
    try:
        tokenizer.chat_template = tokenizer.get_chat_template()  # of several with names, the one named default
    except ValueError as error:
        raise _cannot_load("tokenizer", name, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked: any token will do
    if "strftime_now" in tokenizer.chat_template:
        tokenizer.prompt_date = experiment_date(experiment_dir) if experiment_dir else ANY_DAY
    return tokenizer


def load_model(
    name: str, dtype: torch.dtype, device_map: dict[str, Any] | None = None, load_in_4bit: bool = False
) -> PreTrainedModel:
    """A causal language model from safetensors, in eval mode.

    A checkpoint that is quantised (FP8, int4) is loaded by transformers' quantiser: its layers stay as they are stored,
    or are laid out in `dtype` where the machine cannot multiply them (see `check_machine`).

    Args:
        name: a local folder or hub id, see `model_name`.
        dtype: of the weights, or of those that are not quantised.
        device_map: module -> device, as `layer_device_map` gives it; None for the default device.
        load_in_4bit: quantise the layers' weights, see `four_bit`; embedding and head stay as they are.

    Raises:
        UserError: it cannot be loaded, is an adapter, or has a bias on its output layer or one that is quantised.
    """
    # 1. what it is, and whether this machine can load it
    config = load_model_config(name)
    check_machine(name, config)
    own = model_name(name)
    if Path(own.id).is_dir():
        own = ModelName(str(Path(own.id).resolve()))  # an adapter remembers it and must find it from anywhere
    # 2. load it
    own_bits = {"quantization_config": four_bit(dtype)} if load_in_4bit else {}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            own.id,
            **own.pin,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **own_bits,
        )
    except torch.OutOfMemoryError:  # before the others: it is a RuntimeError
        raise UserError(f"model {name!r} does not fit into the GPU's free memory; name more or other devices") from None
    except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
        method = "4 bits by bitsandbytes" if load_in_4bit else method_of(config)
        raise cannot_load_quantised(name, method, error) if method else _cannot_load("model", name, error) from error
    # 3. refuse what is not whole: transformers fills missing weights with random numbers
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"model {name!r}: its files lack {len(missing)} weights, the first {missing[0]}; fetch it again"
        )
    if method_of(config) and not getattr(model, "is_quantized", False):
        model = model.to(dtype)  # FP8 weights are laid out in bf16, whatever was asked for
    check_head(name, model)
    return model.eval()


def refuse_quantised_student(name: str, load_in_4bit: bool, sharded: bool) -> None:
    """Refuse what adapters cannot be trained on, or not together.

    Raises:
        UserError: the checkpoint is quantised: an adapter belongs to the weights that it will be added to; or 4-bit
            blocks are to be sharded.
    """
    if method := method_of(load_model_config(name)):
        raise UserError(
            f"student {name!r} is quantised ({method}), and an adapter is trained for the weights that it is added to; "
            "name the model without quantisation, with --load_in_4bit where memory is short"
        )
    if load_in_4bit and sharded:
        raise UserError("--load_in_4bit keeps the whole student on each GPU; launch without FSDP, or leave it out")


def skeleton(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model on the meta device, without weights; plain ones, whatever its checkpoint has."""
    with torch.device("meta"):  # from_config writes into what it is given
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype or config.dtype)


def meta_model(name: str) -> PreTrainedModel:
    """The model without its weights: shapes on the meta device."""
    return skeleton(load_model_config(name))


def loading_skeleton(name: str, dtype: torch.dtype, load_in_4bit: bool = False) -> PreTrainedModel:
    """The model without its weights, with the layers that `load_model` would make of it.

    Raises:
        UserError: it cannot be had, or its quantiser cannot work here.
    """
    config = load_model_config(name)
    model, method = skeleton(config, dtype), method_of(config)
    if method or load_in_4bit:
        try:
            add_quantiser(model, config, four_bit(dtype) if load_in_4bit else None)
        except (ValueError, RuntimeError, ImportError) as error:
            raise cannot_load_quantised(name, method or "4 bits by bitsandbytes", error) from error
    return model


def model_bytes(name: str, dtype: torch.dtype) -> float:
    """What a model's weights take once they are loaded."""
    return sum(parameter_bytes(loading_skeleton(name, dtype), dtype).values())


def weight_files(folder: Path) -> list[Path]:
    """The files that a model folder's weights are in, or were to be in: those of its index, else one."""
    index = folder / "model.safetensors.index.json"
    names = read_json(index)["weight_map"].values() if index.is_file() else ["model.safetensors"]
    return [folder / name for name in sorted(set(names))]


def model_fingerprint(name: str) -> str:
    """A short hash that tells one model from another: a hub commit, or sampled bytes of a local folder's files.

    A folder's JSON and template files are hashed whole, its weights by their size and 64 blocks spread over them.
    """
    folder = Path(name)
    if not folder.is_dir():
        load_model_config(name)  # refuses an adapter, and what cannot be had
        own = model_name(name)
        if not (commit := extract_commit_hash(cached_file(own.id, "config.json", revision=own.revision), None)):
            raise UserError(f"model {name!r}: its commit cannot be told; download it into a folder and name that")
        return f"{own.id}@{commit}"
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        # a tokenizer or a template that is changed makes another model of it
        if path.suffix in (".json", ".jinja"):
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            # 64 blocks of 64 KiB in equal steps: 4 MiB of a file of any size
            digest.update(f"{path.name}{size}".encode())
            with path.open("rb") as file:
                for block in range(64):
                    file.seek(block * size // 64)
                    digest.update(file.read(64 * 1024))
    return digest.hexdigest()[:16]


SERVED = "served by "  # how the fingerprint of a model begins whose weights are a server's affair


def served_fingerprint(name: str, kind: str) -> str:
    """What tells one model behind a server from another: the server's name for it, and the server's kind."""
    return f"{SERVED}{kind}: {name}"


def logit_map(model: nn.Module) -> LogitMap:
    """What the model does to its logits after the output layer: Cohere multiplies, Granite divides, Gemma caps them."""
    config = causal_lm(model).config
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return LogitMap(float(scale), getattr(config, "final_logit_softcapping", None))


def count_parameters(model: nn.Module, trainable: bool = False) -> int:
    return sum(elements(p) for p in model.parameters() if p.requires_grad or not trainable)


def compile_layers(model: nn.Module) -> None:
    """Compile each layer by itself: one kernel set serves them all, where the whole backbone would take minutes."""
    for layer in causal_lm(model).get_decoder().layers:
        layer.compile()


@dataclass(frozen=True)
class _Modules:
    """The modules of a model that are placed as a whole, in the order in which they run, and the bytes of each."""

    first: list[str]  # the embedding
    layers: list[str]
    last: list[str]  # norm and head
    weight: dict[str, float]

    @property
    def order(self) -> list[str]:
        return [*self.first, *self.layers, *self.last]


def _modules(model: PreTrainedModel, dtype: torch.dtype) -> _Modules:
    # 1. names: "model.embed_tokens" is first, then "model.layers.0" ..., "model.norm" and "lm_head" are last
    decoder_name = next(name for name, module in model.named_modules() if module is model.get_decoder())
    head_name = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    layers = [f"{decoder_name}.layers.{i}" for i in range(len(model.get_decoder().layers))]
    others = [f"{decoder_name}.{name}" for name, _ in model.get_decoder().named_children() if name != "layers"]
    first = [name for name in others if "embed" in name]
    last = [name for name in others if name not in first] + [head_name]
    # 2. what each weighs; the dot keeps "model.layers.1" from taking what is of "model.layers.10"
    weight = dict.fromkeys([*first, *layers, *last], 0.0)
    for parameter, size in parameter_bytes(model, dtype).items():
        module = max((name for name in weight if parameter.startswith(f"{name}.")), key=len)
        weight[module] += size
    if getattr(model.config, "tie_word_embeddings", False):
        weight[head_name] = 0  # it is the embedding's matrix, counted there
    return _Modules(first, layers, last, weight)


def _balanced(modules: _Modules, devices: Sequence[int]) -> dict[str, int]:
    """About the same number of bytes on each GPU.

    accelerate's own planner fills the first GPU before it takes the next: a 61 GB teacher would sit on two of six.
    """
    total = sum(modules.weight.values())
    placed: dict[str, int] = {}
    position, spent, on_this = 0, 0.0, 0.0
    for index, name in enumerate(modules.order):
        # go on to the next GPU once this one has its share, but leave a layer for each of those that follow
        share = total * (position + 1) / len(devices)
        layers_left = sum(1 for other in modules.order[index:] if other in modules.layers)
        # it goes where its middle lies; shares add up from the first GPU on
        full = spent + modules.weight[name] / 2 > share
        must = layers_left <= len(devices) - 1 - position  # one layer for each GPU that follows, and none to spare
        # embedding, norm and head stay with the layer beside them
        if position < len(devices) - 1 and name in modules.layers and (full or must) and on_this:
            position, on_this = position + 1, 0.0
        placed[name] = devices[position]
        on_this += modules.weight[name]
        spent += modules.weight[name]
    return placed


def _streamed(modules: _Modules, devices: Sequence[int], budget: float) -> dict[str, int | str]:
    """Each GPU as full as its budget allows; the layers that are left over stay in CPU memory.

    Embedding and head are always on a GPU: the loss reads the head's weight, and inputs go where the embedding is.
    accelerate runs the others on a GPU of its choice, so that each keeps room for one layer that comes and goes.

    Raises:
        UserError: there is no room for these.
    """
    # 1. room on every GPU beside one layer that passes through
    passing = max(modules.weight[name] for name in modules.layers)
    room = dict.fromkeys(devices, budget - passing)
    # 2. embedding on the first, norm and head on the last
    placed: dict[str, int | str] = dict.fromkeys(modules.first, devices[0]) | dict.fromkeys(modules.last, devices[-1])
    for name, device in placed.items():
        room[device] -= modules.weight[name]
    for device, left in room.items():
        if left < 0:
            raise UserError(
                f"GPU {device} would hold {(budget - left) / 1e9:.1f} GB, its budget is {budget / 1e9:.1f} GB, with no "
                "layer but the one that passes through; raise gpu_memory_gb, or name more devices"
            )
    # 3. layers in their order, a GPU after the other; what is left when the last is full streams
    position = 0
    for name in modules.layers:
        # no going back to a GPU that was too full: layers stay in their order
        while position < len(devices) and room[devices[position]] < modules.weight[name]:
            position += 1
        if position == len(devices):
            placed[name] = "cpu"
        else:
            placed[name] = devices[position]
            room[devices[position]] -= modules.weight[name]
    return placed


def layer_device_map(
    model: PreTrainedModel, devices: Sequence[int], dtype: torch.dtype, budget_gb: float, cpu_offload: bool = False
) -> dict[str, int | str]:
    """Spread a model's layers over GPUs so that each holds about the same number of bytes.

    Args:
        model: may be on the meta device; only its shapes are read.
        devices: GPU numbers, in the order of the layers.
        dtype: of the weights as loaded.
        budget_gb: what each GPU may hold, 1e9 bytes; leave room for activations.
        cpu_offload: where the budgets are too small, leave layers in CPU memory; they pass through a GPU as they run.

    Returns:
        Module name -> GPU or "cpu", for `from_pretrained(device_map=...)`.

    Raises:
        UserError: a GPU would hold more than its budget, or there are fewer layers than GPUs.
    """
    modules = _modules(model, dtype)
    if len(modules.layers) < len(devices):
        raise UserError(f"{len(modules.layers)} layers cannot be spread over {len(devices)} GPUs; name fewer devices")
    # 1. an even spread
    placed = _balanced(modules, devices)
    held = dict.fromkeys(devices, 0.0)
    for name, device in placed.items():
        held[device] += modules.weight[name]
    # 2. where it does not fit: full GPUs and the rest in CPU memory, or an error
    for device, amount in held.items():
        if amount <= budget_gb * 1e9:
            continue
        if cpu_offload:
            return _streamed(modules, devices, budget_gb * 1e9)
        raise UserError(
            f"GPU {device} would hold {amount / 1e9:.1f} GB of weights, its budget is {budget_gb:.1f} GB; "
            "name more devices"
        )
    return placed


def check_devices(name: str, devices: Sequence[int]) -> None:
    """Refuse GPUs that are not there.

    Raises:
        UserError: the model is to go on one of them.
    """
    if devices and not torch.cuda.is_available():
        raise UserError(
            f"{name!r} is to go on GPUs {list(devices)}, but this machine has none; take teacher_devices and "
            "student_devices out of the profile, or run configs/embedded.yaml"
        )
    absent = [device for device in devices if device >= torch.cuda.device_count()]
    if absent:
        raise UserError(f"GPU {absent[0]} is named but this machine has {torch.cuda.device_count()}; set other devices")


def place(
    name: str,
    devices: Sequence[int],
    dtype: torch.dtype,
    budget_gb: float,
    cpu_offload: bool = False,
    load_in_4bit: bool = False,
) -> dict[str, Any] | None:
    """The device map of a model by name: None on a machine without a GPU, its first GPU where no devices are named.

    `cpu_offload` and `budget_gb` as in `layer_device_map`, `load_in_4bit` as in `load_model`.

    Raises:
        UserError: a named GPU is not there, the model does not fit, or its weights cannot pass through a GPU.
    """
    check_devices(name, devices)
    if not torch.cuda.is_available():
        return None
    devices = list(devices) or [0]
    if len(devices) == 1 and not cpu_offload:
        return {"": devices[0]}  # the whole model
    # without weights: the sizes of what would be loaded are enough to plan with
    model = loading_skeleton(name, dtype, load_in_4bit)
    placed = layer_device_map(model, devices, dtype, budget_gb, cpu_offload)
    streamed = [module for module, device in placed.items() if device == "cpu"]
    if streamed and getattr(model, "quantization_method", None) == "bitsandbytes":
        raise UserError(
            f"model {name!r}: the 4-bit weights of bitsandbytes cannot be kept in CPU memory, and they are more than "
            f"{len(devices)} GPUs of {budget_gb:.1f} GB hold; name more devices"
        )
    if streamed:
        logger.info("%s: %d layers stay in CPU memory and pass through a GPU as they run", name, len(streamed))
    return placed


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one conversation: the prompt as a model's own template renders it, and the response with its end."""

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    sample_index: int = 0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


# "<think>\n" or "[THINK]" at the end of a prompt, or nothing
OPENED_THOUGHT = re.compile(rf"(?:{OPENS}\s*)?\Z", re.IGNORECASE)
ANSWER = "answer-goes-here"  # stands for any answer where a template is asked what it writes around one
FIRST_WORDS = (ANSWER, "42", "`", "数")  # beginnings of answers; a tokenizer may join a blank before to some of them

# "<think>\n\n</think>\n\n", "[THINK][/THINK]": a thought that is closed before it began
CLOSED_THOUGHT = re.compile(r"\s*(?:<([\w:]+)>\s*</\1>|\[(\w+)\]\s*\[/\2\])\s*")


DIRECTIVES = "aAbBcdeFGHIjmMpSuUVwWxXyYzZ"  # of strftime: "%d %b %Y" is "01 Jan 2025"


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template. One that asks for the day gets a macro of that name before it, which says the experiment's.

    transformers lets no function of ours into a template, so that the macro writes each directive's value itself.
    """
    template = tokenizer.get_chat_template()
    if "strftime_now" not in template:
        return template
    day = getattr(tokenizer, "prompt_date", None) or datetime.date.today()
    filters = ""
    for letter in DIRECTIVES:
        for directive in (f"%{letter}", f"%-{letter}"):  # "%-d" is "1"
            filters += f" | replace({directive!r}, {day.strftime(directive)!r})"
    # the macro's body on 1 January 2025: {{ format | replace('%a', 'Wed') | ... | replace('%-d', '1') | ... }}
    return "{%- macro strftime_now(format) -%}{{ format" + filters + " }}{%- endmacro -%}" + template


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **settings: Any) -> str:
    """The chat template's text for these messages. A date that it asks for is the experiment's, see `load_tokenizer`.

    Raises:
        UserError: the template refuses the messages, as some do a system message.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=_template_of(tokenizer), tokenize=False, **settings
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r}: its chat template refuses messages of {roles}: {error}; take the "
            "system messages out of your prompts, or another model"
        ) from None


def _refused(tokenizer: PreTrainedTokenizerBase, why: str) -> UserError:
    return UserError(
        f"tokenizer {tokenizer.name_or_path!r}: its chat template {why}; take an instruct model of the family, or "
        "mend its chat_template.jinja"
    )


@dataclass(frozen=True)
class Turn:
    """What a chat template writes around an assistant's answer.

    prompt: all text before it. What stands between the generation prompt and the answer (a channel header, a closed
        think block) is in it.
    gap: blanks between the answer and the end of the turn, which the model has to say.
    end: the token that ends the turn.
    before: all text before the answer where the conversation is over; `prompt`, but for a closed think block.
    after: all text behind it there.
    """

    prompt: str
    gap: str
    end: str
    before: str
    after: str


def answer_turn(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> Turn:
    """The text around an answer to these messages, not thought about before.

    It is read off the conversation as the template renders it once it is over, and off the generation prompt; the two
    must agree, or the model would be trained on one prompt and asked with another.

    Raises:
        UserError: the template refuses the messages, leaves an answer out, ends it with no special token, or opens a
            thought in the generation prompt that the finished conversation does not have.
    """
    # 1. the template is asked twice: for a generation prompt, and for the finished conversation with a marker in it
    asked = render_chat(tokenizer, messages, add_generation_prompt=True, enable_thinking=False)
    finished = render_chat(tokenizer, [*messages, {"role": "assistant", "content": ANSWER}], enable_thinking=False)
    # the last one: a question may hold the marker's text too
    before, found, after = finished.rpartition(ANSWER)
    if not found:
        raise _refused(tokenizer, "does not write what the assistant said")
    # 2. the prompt: the longer of the two, if the other is its beginning
    if before.startswith(asked):
        # "<|start|>assistant" is asked with, "<|start|>assistant<|channel|>final<|message|>" is answered
        prompt = before
    elif asked.startswith(before) and CLOSED_THOUGHT.fullmatch(asked[len(before) :]):
        prompt = asked  # a hybrid model asked not to think: its finished conversation need not show the empty thought
    else:
        common = len(_common_start(asked, before))
        raise _refused(
            tokenizer,
            f"asks for an answer with {asked[common:][-60:]!r} where a finished conversation has "
            f"{before[common:][-60:]!r}, so that an answer would be read inside what it opens",
        )
    # 3. what ends the turn
    gap, end = _end_of_turn(tokenizer, after)
    return Turn(prompt, gap, end, before, after)


def _common_start(one: Sequence[Any], other: Sequence[Any]) -> Sequence[Any]:
    """The longest beginning that both have."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, after: str) -> tuple[str, str]:
    """The blanks and the token that a template writes behind an answer."""
    words = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    gap = after[: len(after) - len(after.lstrip())]  # "\n<|im_end|>\n" -> "\n"
    ends = [word for word in words if after.startswith(word, len(gap))]
    if not ends:
        raise _refused(tokenizer, "ends an answer with no special token")
    return gap, max(ends, key=len)  # of "<end>" and "<end>s", which may both fit, the longer


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], enable_thinking: bool = False
) -> str:
    """The prompt as the model reads it, up to where its answer begins, or its thought where it is asked to think.

    Raises:
        UserError: the template refuses the messages, or cannot be answered without a thought; see `answer_turn`.
    """
    if enable_thinking:
        return render_chat(tokenizer, messages, add_generation_prompt=True, enable_thinking=True)
    return answer_turn(tokenizer, messages).prompt


def opened_thought(prompt: str) -> str:
    """What a prompt opens for the model to think in, "<think>\\n" at its end; empty where it opens nothing.

    It is stored before the answer, which says by itself then that it begins with a thought.
    """
    return OPENED_THOUGHT.search(prompt)[0]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of prompts: those that stay what they are whatever the answer begins with.

    Many tokenizers join a blank at the end of a prompt to the answer's first word ("[/INST] Four" is "[/INST]",
    "▁Four"). Such a blank is the answer's: a prompt that ended with it would be one that the model has never read.
    """
    prompts = []
    for text in texts:
        # only what follows the last control token can be joined to the answer
        cut = max((text.rfind(word) for word in _control_words(tokenizer)), default=-1)
        # "...<|im_start|>assistant\n" is cut before "<|im_start|>"; a text without control tokens is all tail
        head, tail = text[: max(cut, 0)], text[max(cut, 0) :]
        # what the tail's ids are before any beginning of an answer: "[/INST] " -> [/INST], without the blank's "▁"
        begun = tokenizer([tail + word for word in FIRST_WORDS], add_special_tokens=False)["input_ids"]
        stable = functools.reduce(_common_start, begun)
        # the template has written the tokens that begin a text: none are added
        start = tokenizer(head, add_special_tokens=False)["input_ids"] if head else []
        prompts.append([*start, *stable])
    return prompts


def _control_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn, read off the chat template.

    Raises:
        UserError: the template puts no special token behind an answer.
    """
    return tokenizer.convert_tokens_to_ids(answer_turn(tokenizer, [{"role": "user", "content": "hello"}]).end)


def ending_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy whose `eos_token` is the end of turn, for those who stop at that (a base model's is the end of a text);
    an equal one where the chat template would then read otherwise."""
    # a template may write `eos_token` itself: then another one would change what is read
    ending = copy.deepcopy(tokenizer)
    hello = [{"role": "user", "content": "hello"}]
    turn = answer_turn(tokenizer, hello)
    ending.eos_token = turn.end
    return ending if answer_turn(ending, hello) == turn else copy.deepcopy(tokenizer)


def encode_row(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], end_id: int, own_answer: bool = False
) -> EncodedRow:
    """One clean row (`id`, `messages` ending with the assistant's) -> token ids.

    Prompt ids and response ids together are what the model reads where its own template renders the conversation, up to
    and with the end of the turn.

    Args:
        own_answer: the student gave it, in an on-policy round. What it sampled is read, `response_ids`, where the row
            has them: its text may be spelt with other tokens. One that was cut off (`finish_reason` is "length") goes
            up to its cut: it said no end, which would teach to stop in the middle of a sentence.

    Raises:
        UserError: the template cannot be answered, see `answer_turn`.
    """
    # 1. the prompt, without what may yet be joined to the answer
    turn = answer_turn(tokenizer, row["messages"][:-1])
    [start] = prompt_ids(tokenizer, [turn.prompt])
    # 2. the student's own answer: the ids that it sampled
    is_cut = own_answer and row.get("finish_reason") == "length"
    if own_answer and "response_ids" in row:
        response = (*row["response_ids"], *([] if is_cut else [end_id]))
        return EncodedRow(row["id"], tuple(start), response, row.get("sample_index", 0))
    # 3. any other: its text as the template renders it, and the end
    text = _as_rendered(tokenizer, turn, row["messages"])
    text, end = (text, []) if is_cut else (text + turn.gap, [end_id])
    # a control token that is spelt in the answer is text: encoded alone, as letters
    if any(word in text for word in _control_words(tokenizer)):
        response = response_ids(tokenizer, text)
    else:
        # encoded in its turn, where it may have other ids than by itself; the end is put back below by its id
        whole = tokenizer(turn.prompt + text + ("" if is_cut else turn.end), add_special_tokens=False)["input_ids"]
        whole = whole[: len(whole) - len(end)]
        start = _common_start(start, whole)  # an answer that begins with a line break may take the prompt's along
        response = whole[len(start) :]
    return EncodedRow(row["id"], tuple(start), (*response, *end), row.get("sample_index", 0))


def _as_rendered(tokenizer: PreTrainedTokenizerBase, turn: Turn, messages: list[dict[str, str]]) -> str:
    """The answer without those blanks at its ends that the template drops.

    What else a template would do to an answer (many cut it at `</think>`, also where that is spelt in code) is not
    done: text stays text.
    """
    answer = messages[-1]["content"]
    if answer == answer.strip():
        return answer
    # " 4\n" where the template trims -> "4"
    rendered = render_chat(tokenizer, messages, enable_thinking=False)
    said = rendered.removeprefix(turn.before).removesuffix(turn.after)
    return said if said.strip() == answer.strip() else answer


def response_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text inside a turn, without special tokens: `<|im_end|>` written out in it is text, not an end.

    It is read behind a line break, which is then taken off: some tokenizers put a blank before a text that begins.
    """
    line = tokenizer("\n", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = tokenizer(f"\n{text}", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if ids[: len(line)] == line:
        return ids[len(line) :]
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def shared_vocabulary(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_logits: int,
    teacher_logits: int,
    student_rows: Sequence[EncodedRow],
    teacher_rows: Sequence[EncodedRow],
) -> int:
    """The number of logit columns the two models share; what lies beyond is padding and is cut.

    Args:
        student_logits: columns of the student's output layer; `teacher_logits` likewise.
        student_rows: the data as the student's tokenizer encodes it; `teacher_rows` the same rows by the teacher's.

    Raises:
        UserError: the tokenizers differ, in their vocabularies or on a row, or a model has fewer logits than tokens.
    """
    # 1. the same tokens under the same ids
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        raise UserError(
            f"student and teacher need one vocabulary: {student_tokenizer.name_or_path!r} has {len(ours)} tokens, "
            f"{teacher_tokenizer.name_or_path!r} has {len(theirs)}, and "
            f"{len(set(ours.items()) ^ set(theirs.items()))} entries differ; choose models of one family"
        )
    # 2. and the same ids for every answer: merges may differ where vocabularies are alike
    for student_row, teacher_row in zip(student_rows, teacher_rows, strict=True):
        if student_row.response_ids != teacher_row.response_ids:
            raise UserError(
                f"row {student_row.id}: the tokenizers encode its answer differently, {len(student_row.response_ids)} "
                f"and {len(teacher_row.response_ids)} tokens; choose models of one family"
            )
    # 3. a logit for every token; ids may have gaps, so their number would not do
    size = max(ours.values()) + 1
    for name, logits in (("student", student_logits), ("teacher", teacher_logits)):
        if logits < size:
            raise UserError(f"the {name} has {logits} logits for a vocabulary of {size} tokens; wrong tokenizer?")
    return size


def collate(rows: Sequence[EncodedRow], pad_id: int) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, each `[rows, longest]`; labels are response tokens."""
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for index, row in enumerate(rows):
        ids = torch.tensor(row.prompt_ids + row.response_ids)
        input_ids[index, : len(ids)] = ids
        attention_mask[index, : len(ids)] = 1
        # not shifted: the label of a position is its own token, and `response_hidden` looks one further
        labels[index, len(row.prompt_ids) : len(ids)] = ids[len(row.prompt_ids) :]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The language model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_weight(model: nn.Module, vocab_size: int | None = None) -> Tensor:
    """The output matrix, cut to the shared vocabulary `[vocab_size, H]` or whole; gathered where ranks share it."""
    weight = causal_lm(model).get_output_embeddings().weight
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight)[:vocab_size]


def head_device(model: nn.Module) -> torch.device:
    """Where the output matrix is: on the last GPU of a model that is spread over several."""
    return causal_lm(model).get_output_embeddings().weight.device


def response_hidden(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Final hidden states at the positions that predict response tokens, and those tokens.

    The state at position i predicts token i + 1, so the first response token is predicted by the last of the prompt.

    Args:
        model: a causal language model, or a PEFT model around one.
        batch: what `collate` or `packing.pack` returns.

    Returns:
        `[N, H]` and `[N]`, row after row, N the number of response tokens in the batch.
    """
    lm = causal_lm(model)
    first, last = lm.get_input_embeddings().weight.device, head_device(model)
    # where answers are is found on the CPU, and everything sent before the work: nothing is fetched or waited for after
    # [B * L], the token after each position; behind the last there is none
    following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    places = (following != IGNORED).nonzero()[:, 0]  # [N], positions that predict a response token
    labels, places = send(following[places], last), send(places, last)
    inputs = {n: send(batch[n], first) for n in ("input_ids", "attention_mask", "position_ids") if n in batch}
    if "layout" in batch:
        inputs["layout"] = batch["layout"]
    hidden_BLH = lm.get_decoder()(**inputs, use_cache=False).last_hidden_state
    device = hidden_BLH.device
    # of a model that is spread over GPUs the states may come out on another than the head's
    return hidden_BLH.flatten(0, 1).index_select(0, places.to(device)), labels.to(device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the CPU to a GPU without waiting for what the GPU still has to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory it would wait all the same
    return tensor.to(device)


def describe_size(model: nn.Module) -> str:
    config = causal_lm(model).config
    method = method_of(config)
    # packed weights and their scales are not what people call a model's parameters
    count = count_parameters(skeleton(config) if method else model)
    layers = getattr(config, "num_hidden_layers", "?")
    return f"{count / 1e6:,.1f} M parameters, {layers} layers" + (f", quantised ({method})" if method else "")
