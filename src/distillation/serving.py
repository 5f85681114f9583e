"""What a profile's `serve` says: the server's settings, its command line and environment, and where it answers.

Nothing is started here (server.py does that), so that a dry run can print what would be. The flags are those of vLLM
0.32 (https://docs.vllm.ai/en/latest/cli/serve) and SGLang 0.5 (https://docs.sglang.io/docs/advanced_features).
"""

import dataclasses
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from src.distillation.base import (
    compute_dtype,
    config_folder,
    count_parameters,
    load_model_config,
    meta_model,
    model_name,
    refuse_adapter,
)
from src.distillation.server import parallel_sizes, split_command
from src.utils.common import UserError, parse_json, read_json
from src.utils.config import nearest

HOST = "127.0.0.1"  # a server without a key is for this machine alone
# vLLM 0.32 on a CPU dies of a prompt that is split between two batches if its request has a seed
CPU_BATCHED_TOKENS = 16_384
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the sizes that vLLM makes room for
ADAPTED = ("sft", "kd")  # the arms that are adapters
ARM = re.compile(r"\{(base|sft|kd|teacher)\}")  # "sft={sft}" in a command line

# what each key of `serve` must be
EXPECTED = {
    "command": "vllm, sglang, the path of one of them, or a whole command line",
    "model": "a folder or hub id",
    "devices": "a list of GPU numbers, each once",
    "gpu_memory_gb": "a number above 0",
    "tensor_parallel": "a whole number from 1",
    "data_parallel": "a whole number from 1",
    "port": "a port from 1 to 65535, or 0 for a free one",
    "arguments": "a mapping of further flags",
}
# flags that are said otherwise, and how
SAID_ELSEWHERE = {
    "port": "say serve: {port: ...}",
    "model": "say serve: {model: ...}",
    "model-path": "say serve: {model: ...}",
    "host": "it is asked on this machine",
    "tp": "say serve: {tensor_parallel: ...}",
    "dp": "say serve: {data_parallel: ...}",
    "tensor-parallel-size": "say serve: {tensor_parallel: ...}",
    "tp-size": "say serve: {tensor_parallel: ...}",
    "data-parallel-size": "say serve: {data_parallel: ...}",
    "dp-size": "say serve: {data_parallel: ...}",
    "lora-modules": "the arms are the modules",
    "lora-paths": "the arms are the modules",
    "served-model-name": "it is asked by the model's name",
    "revision": "say it behind the model's name: owner/name@REVISION",
    "tokenizer-revision": "say it behind the model's name: owner/name@REVISION",
    "api-key": "no key belongs into a profile; export VLLM_API_KEY and say api_key_variable: VLLM_API_KEY",
}
# flags that change what is answered: an answer made with others is another answer
ANSWERING = ("quantization", "dtype", "kv-cache-dtype", "chat-template")

Program = Literal["vllm", "sglang", "other"]


@dataclass(frozen=True)
class Serve:
    """A server that a stage starts.

    command: `vllm`, `sglang` or the path of one of these programs, whose flags are derived; or a whole command line,
        run as it is but for {teacher}, {base}, {sft}, {kd} and {port} in it.
    model: what answers in the teacher's place, such as an FP8 checkpoint of it; empty for the teacher itself.
    devices: GPUs; none for the stage's teacher_devices or student_devices.
    gpu_memory_gb: weights one GPU may hold, 1e9 bytes; None for the stage's.
    tensor_parallel, data_parallel: None for what `parallel_sizes` makes of the model and the GPUs.
    port: 0 for a free one.
    arguments: further flags by their names, over the derived ones; None takes one away.
    """

    command: str = "vllm"
    model: str = ""
    devices: tuple[int, ...] = ()
    gpu_memory_gb: float | None = None
    tensor_parallel: int | None = None
    data_parallel: int | None = None
    port: int = 8000
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        """What is started; `other` for a whole command line."""
        words = split_command(self.command)
        name = Path(words[0]).name if len(words) == 1 else ""
        return name if name in ("vllm", "sglang") else "other"

    @property
    def base_url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"


@dataclass(frozen=True)
class PlannedServer:
    """A server as it would be started.

    answers_for: `teacher`, `students`, or `arms` for all of them.
    words: of its command line.
    devices: the GPUs that it sees; none on a machine without.
    """

    answers_for: str
    words: tuple[str, ...]
    devices: tuple[int, ...]
    base_url: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables that it gets beside ours."""
        return server_environment(self.devices)


def _fits(name: str, value: Any) -> bool:
    """Whether a key of `serve` may have this value."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)  # True is an int
    if name == "command":
        return isinstance(value, str) and bool(value.strip())
    if name == "model":
        return isinstance(value, str)
    if name == "devices":
        # [0, 1] stays [0, 1]; of ["0", 1] and [True] something is missing
        numbers = [n for n in value if type(n) is int and n >= 0] if isinstance(value, list) else None
        return numbers == value and len(set(value)) == len(value)
    if name == "gpu_memory_gb":
        return (is_whole or isinstance(value, float)) and value > 0
    if name == "port":
        return is_whole and 0 <= value <= 65535
    if name == "arguments":
        return isinstance(value, dict)
    return is_whole and value >= 1


def read_serve(text: str) -> Serve | None:
    """The setting `serve` of a stage: JSON of a mapping; None where it is empty and no server is started.

    Raises:
        UserError: it is no mapping, has an unknown key (names the nearest), or a value that cannot be.
    """
    if not text.strip():
        return None
    try:
        said = parse_json(text)
    except json.JSONDecodeError:
        said = None
    if not isinstance(said, dict):
        raise UserError(f"""serve must be a mapping such as {{command: vllm}} (--serve '{{"command": "vllm"}}'), """
                        f"got {text}")  # fmt: skip
    known = [one.name for one in dataclasses.fields(Serve)]
    for name in said:
        if name not in known:
            raise UserError(f"serve: unknown key {name!r}{nearest(name, known)}")
    # null leaves a key at its default
    values = {name: value for name, value in said.items() if value is not None}
    for name, value in values.items():
        if not _fits(name, value):
            raise UserError(f"serve: {name} must be {EXPECTED[name]}, got {value!r}")
    values["devices"] = tuple(values.get("devices", ()))
    # under one spelling, so that they can stand over derived flags
    values["arguments"] = {flag_name(name): value for name, value in values.get("arguments", {}).items()}
    serve = Serve(**values)
    _check(serve)
    return serve


def _check(serve: Serve) -> None:
    """Refuse what would have no effect, or is said in another place."""
    if serve.program == "other":
        for name in ("gpu_memory_gb", "tensor_parallel", "data_parallel", "arguments"):
            if getattr(serve, name):
                raise UserError(f"serve: a whole command line says its own flags; put {name} into it, or take it out")
        if not serve.port and "{port}" not in serve.command:
            raise UserError("serve: port 0 takes a free one; write {port} where the command line wants it")
    for name in serve.arguments:
        if name in SAID_ELSEWHERE:
            raise UserError(f"serve: arguments may not hold {name}; {SAID_ELSEWHERE[name]}")


def flag_name(name: str) -> str:
    """A flag's name as it is put behind the two dashes.

    >>> flag_name("max_model_len"), flag_name("--max-model-len")
    ('max-model-len', 'max-model-len')
    """
    return name.removeprefix("--").replace("_", "-")


def with_open_port(serve: Serve) -> Serve:
    """The same with a port that is free now, where its own is 0."""
    if serve.port:
        return serve
    with socket.socket() as probe:
        probe.bind((HOST, 0))  # the kernel chooses
        return dataclasses.replace(serve, port=probe.getsockname()[1])


def answering(serve: Serve) -> dict[str, Any]:
    """The further flags that can change an answer."""
    return {name: serve.arguments[name] for name in ANSWERING if name in serve.arguments}


def adapter_name(kind: str, base: str, arm: str) -> str:
    """The name by which a server knows an adapter: vLLM by its own; SGLang takes the base where that stands alone.

    >>> adapter_name("vllm", "Qwen/Qwen3-8B", "kd"), adapter_name("sglang", "Qwen/Qwen3-8B", "kd")
    ('kd', 'Qwen/Qwen3-8B:kd')
    """
    return f"{base}:{arm}" if kind == "sglang" else arm


def stored_bits(config: PreTrainedConfig) -> int | None:
    """Bits a weight in a quantised checkpoint; None for one that is not quantised, or does not say."""
    said = getattr(config, "quantization_config", None) or {}
    # a dict as config.json has it, or an object that transformers made of it
    said = said if isinstance(said, dict) else said.to_dict()
    if "bits" in said:  # GPTQ, AWQ
        return said["bits"]
    if groups := said.get("config_groups"):  # compressed-tensors: {"group_0": {"weights": {"num_bits": 8}}}
        return max(group["weights"]["num_bits"] for group in groups.values())
    if said.get("load_in_4bit"):  # bitsandbytes
        return 4
    return 8 if said.get("quant_method") == "fp8" or said.get("load_in_8bit") else None


def serving_dtype(devices: Sequence[int]) -> torch.dtype:
    """The weights' type on those GPUs, also where they are another machine's: bf16, unless the processor lacks it."""
    return torch.bfloat16 if devices and not torch.cuda.is_available() else compute_dtype()


def sizes(serve: Serve, model: str, devices: Sequence[int]) -> tuple[int, int, int]:
    """(tensor, pipeline, data) parallel sizes of a server's model: as said, else from its shape and the GPUs.

    Raises:
        UserError: what is said does not use every GPU, or the weights do not fit.
    """
    tensor, data, gpus = serve.tensor_parallel, serve.data_parallel, len(devices)
    if not devices:
        return tensor or 1, 1, data or 1
    # one that is not said follows from the other: tensor 2 on 6 GPUs makes data 3
    if tensor or data:
        # not all where it does not divide: tensor 4 on 6 GPUs makes 4 x 1
        used = (tensor or gpus // data) * (data or gpus // tensor)
        if used != gpus:
            raise UserError(
                f"serve: tensor_parallel {tensor or 'derived'} x data_parallel {data or 'derived'} do not use "
                f"{gpus} GPUs; make their product {gpus}, or name as many devices"
            )
        return tensor or gpus // data, 1, data or gpus // tensor
    shapes, dtype = config_folder(model), serving_dtype(devices)
    config = load_model_config(shapes)
    text = config.get_text_config()
    # weights x bits / 8 = bytes; on the meta device, where nothing is loaded
    weight_gb = count_parameters(meta_model(shapes)) * (stored_bits(config) or 8 * dtype.itemsize) / 8 / 1e9
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    assert serve.gpu_memory_gb is not None
    return parallel_sizes(heads, kv_heads, text.num_hidden_layers, gpus, weight_gb, serve.gpu_memory_gb)


def room_for_rank(rank: int) -> int:
    """The rank of adapters that vLLM makes room for where they have this one.

    Raises:
        UserError: it is above all of them.
    """
    for size in LORA_RANKS:
        if size >= rank:
            return size
    raise UserError(f"vLLM takes adapters up to rank {LORA_RANKS[-1]}, this has {rank}")


def lora_rank(adapters: Mapping[str, str]) -> int:
    """The largest rank of the adapters in these folders, see `room_for_rank`.

    Raises:
        UserError: it is above all of them.
    """
    ranks = {folder: read_json(Path(folder) / "adapter_config.json")["r"] for folder in adapters.values()}
    folder = max(ranks, key=ranks.get)
    try:
        return room_for_rank(ranks[folder])
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def serve_command(
    serve: Serve, model: str, devices: Sequence[int], adapters: Mapping[str, str] | None = None, rank: int | None = None
) -> list[str]:
    """The words that start a vLLM or SGLang server of a model.

    Args:
        devices: the GPUs it gets, as `server_environment` names them to it; none on a machine without.
        adapters: name -> folder of the LoRA adapters that it answers as, beside the model itself.
        rank: of the adapters, where their folders are not there yet.

    Raises:
        UserError: the model cannot be had, is an adapter or does not fit, or an adapter's rank is too large.
    """
    # 1. what is served, and how it is spread
    refuse_adapter(config_folder(model))  # a server might answer as the adapter's base, in its name
    tensor, pipeline, data = sizes(serve, model, devices)
    [program] = split_command(serve.command)
    dtype = str(serving_dtype(devices)).removeprefix("torch.")
    # 2. flags that both programs know
    flags: dict[str, Any] = {"host": HOST, "port": serve.port}
    named = model_name(model)
    if named.revision:  # it is asked by the whole name: the same id at another revision is another model
        flags |= {"revision": named.revision, "served-model-name": named.full}
        if serve.program == "vllm":  # SGLang has one revision for both
            flags["tokenizer-revision"] = named.revision
    # 3. the words of each program for the same things
    if serve.program == "vllm":
        words, modules = [program, "serve", named.id], "lora-modules"
        flags |= {"tensor-parallel-size": tensor, "data-parallel-size": data, "dtype": dtype}
        flags |= {"max-model-len": "auto", "generation-config": "vllm", "seed": 0}  # no defaults of the model's own
        if pipeline > 1:
            flags["pipeline-parallel-size"] = pipeline
        if not devices:
            flags["max-num-batched-tokens"] = CPU_BATCHED_TOKENS
    else:
        python = Path(program).with_name("python")  # of the environment that SGLang is installed in
        words, modules = [str(python), "-m", "sglang.launch_server", "--model-path", named.id], "lora-paths"
        flags |= {"tp-size": tensor, "dp-size": data, "dtype": dtype, "sampling-defaults": "openai", "random-seed": 0}
        if pipeline > 1:
            flags["pp-size"] = pipeline
    # 4. the arms, and what the profile says over all of it
    if adapters:
        flags |= {"enable-lora": True, "max-lora-rank": rank or lora_rank(adapters)}
        flags[modules] = [f"{name}={folder}" for name, folder in adapters.items()]
    return words + _as_words(flags | dict(serve.arguments), serve.program)


def _as_words(flags: Mapping[str, Any], program: Program) -> list[str]:
    """{"seed": 0, "enable-lora": True, "lora-modules": ["a=b"]} -> --seed 0 --enable-lora --lora-modules a=b"""
    words: list[str] = []
    for name, value in flags.items():
        if value is None or (value is False and program == "sglang"):  # whose switches are off unless said
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def named_arms(serve: Serve) -> set[str]:
    """The arms that a whole command line names: {"base", "kd"} for `x {base} kd={kd}`."""
    return set(ARM.findall(serve.command))


def typed_command(serve: Serve, places: Mapping[str, str]) -> list[str]:
    """The words of a whole command line, with each arm's model or folder where it names the arm.

    Args:
        places: arm -> its model or folder.

    Raises:
        UserError: it names an arm that is not there.
    """
    # 1. every arm that it names must be there
    for arm in sorted(named_arms(serve)):
        if not places.get(arm):
            raise UserError(f"serve: the command line names {{{arm}}}, which there is not here; take it out")
        if model_name(places[arm]).revision:  # no server reads it behind a name, and each has a flag of its own for it
            raise UserError(
                f"serve: a whole command line cannot say {{{arm}}} of {places[arm]}; write the model and its revision "
                "into it, or name the server's program alone"
            )
    # 2. split first, put in afterwards: a folder with a blank in its name stays one word
    words = []
    for word in split_command(serve.command):
        word = word.replace("{port}", str(serve.port))
        words.append(ARM.sub(lambda match: places[match[1]], word))
    return words


def server_environment(devices: Sequence[int]) -> dict[str, str]:
    """What shows a server its GPUs alone; `devices` count among those that are visible here, as they do for torch.

    Raises:
        UserError: one of them is not visible here.
    """
    if not devices:
        return {}
    names = [str(device) for device in devices]
    # "4,6" is visible, device 1 is named: the server gets "6"; names may be UUIDs
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        seen = visible.split(",")
        if max(devices) >= len(seen):
            raise UserError(f"GPU {max(devices)} is named, CUDA_VISIBLE_DEVICES shows {len(seen)}; set other devices")
        names = [seen[device] for device in devices]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names)}


def teacher_server(serve: Serve, teacher: str, devices: Sequence[int]) -> PlannedServer:
    """The server of the teacher, or of what stands in for it."""
    devices, model = serve.devices or tuple(devices), serve.model or teacher
    if serve.program == "other":
        words = typed_command(serve, {"teacher": model})
    else:
        words = serve_command(serve, model, devices)
    return PlannedServer("teacher", tuple(words), devices, serve.base_url)


def students_server(
    serve: Serve, base: str, adapters: Mapping[str, str], devices: Sequence[int], rank: int | None = None
) -> PlannedServer:
    """The server of the student before training, with what training made of it as LoRA modules; see `serve_command`."""
    devices = serve.devices or tuple(devices)
    words = serve_command(serve, base, devices, adapters, rank)
    return PlannedServer("students", tuple(words), devices, serve.base_url)


def arms_server(serve: Serve, places: Mapping[str, str], devices: Sequence[int]) -> PlannedServer:
    """The server that a whole command line starts for every arm of an evaluation."""
    places = dict(places) | ({"teacher": serve.model} if serve.model else {})
    words = typed_command(serve, places)
    return PlannedServer("arms", tuple(words), serve.devices or tuple(devices), serve.base_url)
