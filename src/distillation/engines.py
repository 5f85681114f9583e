"""The engines behind one call: `with opened(engine) as generate`, then `generate(requests, done)`."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from src.distillation import openai_engine, sft, vllm_engine
from src.distillation.base import (
    check_devices,
    compute_dtype,
    count_parameters,
    load_model,
    load_model_config,
    load_tokenizer,
    meta_model,
    model_bytes,
    model_name,
    opened_thought,
    place,
    prompt_ids,
    prompt_text,
)
from src.distillation.lora import merge_adapter
from src.distillation.openai_engine import Server
from src.distillation.sft import Request
from src.utils.common import UserError, logger, read_json
from src.utils.config import setting

# vLLM 0.32 on a CPU dies of a prompt that is split between two batches if its request has a seed
CPU_BATCHED_TOKENS = 16_384
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the sizes that vLLM makes room for

Done = frozenset[Request]
Generate = Callable[[Sequence[Request], Done], Iterator[list[dict[str, Any]]]]


@dataclass
class EngineSettings:
    """The settings of every stage that has answers made."""

    engine: Literal["transformers", "vllm", "openai"] = setting("transformers", "what generates; `openai` is a server")
    batch_size: int = setting(32, "transformers: rows in one forward pass; 0 takes as many as the memory holds")
    teacher_devices: list[int] = setting([], "GPUs the teacher is spread over (vllm: and replicated on)")
    gpu_memory_gb: float = setting(36.0, "weights one GPU may hold, 1e9 bytes")
    vllm_arguments: str = setting("{}", "vllm: further arguments of vllm.LLM, JSON or a mapping")
    base_url: str = setting("http://localhost:8000/v1", "openai: the server")
    server: Literal["vllm", "sglang", "llama_cpp", "transformers", "plain"] = setting(
        "vllm", "openai: the server's kind, which decides how top_k and thinking are said; `plain` knows neither"
    )
    server_command: str = setting("", "openai: the command that starts the server; the stage stops it again")
    api_key_variable: str = setting("OPENAI_API_KEY", "openai: environment variable with the key, if one is needed")
    concurrency: int = setting(32, "openai: requests under way at most")
    request_timeout: float = setting(600.0, "openai: seconds for one answer")
    tries: int = setting(8, "openai: times one request is sent before the run stops")
    max_refused: float = setting(
        0.02, "openai: share of the answers that the server may refuse (content, length) and the run goes on without"
    )


@dataclass(frozen=True)
class Engine:
    """What answers, and on what.

    name: `transformers`, `vllm` or `openai`.
    model: folder or hub id. The openai engine wants it for its tokenizer alone, and may do without.
    adapter: folder of a LoRA adapter on it; not for the openai engine, whose server knows arms by their names.
    batch_size: rows in one forward pass of the transformers engine; 0 for `rows_that_fit`.
    devices: GPUs; none on a machine without.
    gpu_memory_gb: weights one GPU may hold, 1e9 bytes.
    enable_thinking: asked of hybrid models by their template.
    vllm_arguments: further arguments of `vllm.LLM`, over the derived ones.
    experiment_dir: whose date a template reads that asks for one.
    """

    name: str
    model: str
    batch_size: int = 32
    devices: tuple[int, ...] = ()
    gpu_memory_gb: float = 36.0
    enable_thinking: bool = False
    vllm_arguments: dict[str, Any] = field(default_factory=dict)
    server: Server | None = None
    experiment_dir: str = ""
    adapter: str = ""


def make_engine(settings: EngineSettings, model: str, devices: Sequence[int], served_name: str = "",
                base_url: str = "", **more: Any) -> Engine:  # fmt: skip
    """The engine that the settings name, for one model.

    Args:
        served_name: the server's name for it, where it is not `model`.
        base_url: of its server, where that is not the settings'.
        more: further fields of `Engine`.

    Raises:
        UserError: a setting is out of range, or vllm_arguments are no JSON object.
    """
    if settings.batch_size < 0 or min(settings.concurrency, settings.tries) < 1:
        raise UserError("concurrency and tries must be at least 1, batch_size at least 0 (from memory)")
    if settings.server_command and settings.engine != "openai":
        raise UserError(f"server_command starts a server, which engine {settings.engine} does not ask; say openai")
    try:
        arguments = json.loads(settings.vllm_arguments)
    except json.JSONDecodeError as error:
        raise UserError(f"vllm_arguments is not JSON ({error.msg}): {settings.vllm_arguments}") from None
    if not isinstance(arguments, dict):
        raise UserError(f"vllm_arguments must be a JSON object, found {settings.vllm_arguments}")
    server = Server(
        base_url or settings.base_url, served_name or model, settings.server, settings.api_key_variable,
        settings.concurrency, settings.request_timeout, settings.tries, settings.max_refused,
    )  # fmt: skip
    return Engine(
        settings.engine, model, settings.batch_size, tuple(devices), settings.gpu_memory_gb,
        vllm_arguments=arguments, server=server, **more,
    )  # fmt: skip


def rows_that_fit(engine: Engine, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request]) -> int:
    """The batch size of the transformers engine for these requests, from the memory of its devices or the machine."""
    if torch.cuda.is_available():
        memory = sum(torch.cuda.get_device_properties(i).total_memory for i in (engine.devices or (0,)))
    else:
        memory = psutil.virtual_memory().total
    texts = [prompt_text(tokenizer, request.messages, engine.enable_thinking) for request in requests]
    longest = max(map(len, prompt_ids(tokenizer, texts))) + requests[0].sampling.max_new_tokens
    dtype = compute_dtype()
    weights = model_bytes(engine.model, dtype)
    return sft.fitting_batch_size(load_model_config(engine.model).get_text_config(), weights, memory, longest, dtype)


def end_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that end the teacher's answers, without its weights."""
    named = model_name(model)
    try:
        own = GenerationConfig.from_pretrained(named.id, **named.pin).eos_token_id
    except OSError:  # it has no generation_config.json
        own = load_model_config(model).eos_token_id
    return sft.end_token_ids(tokenizer, own)


def served_teacher(engine: Engine) -> tuple[PreTrainedTokenizerBase | None, list[int]]:
    """The tokenizer of a teacher behind a server, None where it cannot be had, and the ids that end its answers.

    Raises:
        UserError: it cannot be had, and the server needs those ids.
    """
    if engine.server.kind == "transformers":
        tokenizer = load_tokenizer(engine.model)
        return tokenizer, end_ids(engine.model, tokenizer)
    if not engine.model:
        return None, []
    try:
        return load_tokenizer(engine.model), []
    except UserError as error:
        logger.info("%s; without it only the server can count tokens", error)
        return None, []


def vllm_plan(engine: Engine) -> tuple[dict[str, Any], list[list[int]]]:
    """Arguments of `vllm.LLM`, and the GPUs of each replica."""
    config, dtype = load_model_config(engine.model).get_text_config(), compute_dtype()
    arguments = {"model": engine.model, "dtype": str(dtype).removeprefix("torch."), "max_model_len": -1, "seed": 0,
                 "generation_config": "vllm"}  # fmt: skip
    if engine.adapter:
        rank = read_json(Path(engine.adapter) / "adapter_config.json")["r"]
        if rank > LORA_RANKS[-1]:
            raise UserError(f"{engine.adapter}: vLLM takes adapters up to rank {LORA_RANKS[-1]}, this has {rank}")
        arguments |= {"enable_lora": True, "max_lora_rank": min(size for size in LORA_RANKS if size >= rank)}
    groups: list[list[int]] = [list(engine.devices)]
    if not engine.devices:
        arguments["max_num_batched_tokens"] = CPU_BATCHED_TOKENS
    else:
        weight_gb = count_parameters(meta_model(engine.model)) * dtype.itemsize / 1e9
        heads = config.num_attention_heads
        tensor, pipeline, data = vllm_engine.parallel_sizes(
            heads, getattr(config, "num_key_value_heads", None) or heads, config.num_hidden_layers,
            len(engine.devices), weight_gb, engine.gpu_memory_gb,
        )  # fmt: skip
        size = tensor * pipeline
        groups = [list(engine.devices[start : start + size]) for start in range(0, len(engine.devices), size)]
        arguments |= {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
        logger.info("vLLM: tensor parallel %d x pipeline %d x data %d", tensor, pipeline, data)
    return arguments | engine.vllm_arguments, groups


@contextmanager
def opened(engine: Engine) -> Iterator[Generate]:
    """Load or start the engine; yields `generate(requests, done)`, which yields the rows (see `sft.answer_row`) of the
    requests that `done` lacks, in parts that can be stored together. Every engine gets every sampling field in full.

    Raises:
        UserError: the engine, the model or the adapter cannot be had.
    """
    if engine.name == "openai":
        yield from _by_server(engine)
        return
    tokenizer = load_tokenizer(engine.model, engine.experiment_dir)
    if engine.name == "transformers":
        yield from _by_transformers(engine, tokenizer)
        return
    check_devices(engine.model, engine.devices)
    arguments, groups = vllm_plan(engine)
    with vllm_engine.opened(arguments, groups, end_ids(engine.model, tokenizer), engine.adapter) as answer_prompts:

        def answer(requests: Sequence[Request], done: Done) -> Iterator[list[dict[str, Any]]]:
            missing = [request for request in requests if request not in done]
            texts = [prompt_text(tokenizer, r.messages, engine.enable_thinking) for r in missing]
            thoughts = {(r.id, r.sample_index): opened_thought(t) for r, t in zip(missing, texts, strict=True)}
            for rows in answer_prompts(missing, prompt_ids(tokenizer, texts)):
                for row in rows:
                    row["response"] = thoughts[row["id"], row["sample_index"]] + row["response"]
                yield rows

        yield answer


def _by_server(engine: Engine) -> Iterator[Generate]:
    assert engine.server is not None
    tokenizer, ends = served_teacher(engine)

    def answer(requests: Sequence[Request], done: Done) -> Iterator[list[dict[str, Any]]]:
        missing = [request for request in requests if request not in done]
        thinking = engine.enable_thinking
        return openai_engine.generate_from_server(engine.server, missing, thinking, ends, tokenizer, len(requests))

    yield answer


def _by_transformers(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> Iterator[Generate]:
    dtype = compute_dtype()
    device_map = place(engine.model, engine.devices, dtype, engine.gpu_memory_gb)
    model = load_model(engine.model, dtype, device_map)
    if engine.adapter:  # merged, as it would be served: no product of the adapter beside every one of the model
        model = merge_adapter(model, engine.adapter)
    logger.info("%s in %s", engine.adapter or engine.model, str(dtype).removeprefix("torch."))

    def answer(requests: Sequence[Request], done: Done) -> Iterator[list[dict[str, Any]]]:
        rows = engine.batch_size or rows_that_fit(engine, tokenizer, requests)
        return sft.generate(model, tokenizer, requests, rows, done, engine.enable_thinking)

    yield answer
