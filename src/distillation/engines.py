"""The engines behind one call: `with opened(engine, sampling) as generate`, then `generate(requests, done)`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

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
    opened_thought,
    place,
    prompt_ids,
    prompt_text,
)
from src.distillation.openai_engine import Server
from src.distillation.sft import Request, Sampling
from src.utils.common import UserError, logger

# vLLM 0.32 on a CPU dies of a prompt that is split between two batches if its request has a seed
CPU_BATCHED_TOKENS = 16_384

Done = frozenset[tuple[str, int]]
Generate = Callable[[Sequence[Request], Done], Iterator[list[dict[str, Any]]]]


@dataclass(frozen=True)
class Engine:
    """What answers, and on what.

    name: `transformers`, `vllm` or `openai`.
    model: folder or hub id of the teacher. The openai engine wants it for its tokenizer alone, and may do without.
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


def rows_that_fit(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], sampling: Sampling
) -> int:
    """The batch size of the transformers engine for these requests, from the memory of its devices or the machine."""
    if torch.cuda.is_available():
        memory = sum(torch.cuda.get_device_properties(i).total_memory for i in (engine.devices or (0,)))
    else:
        memory = psutil.virtual_memory().total
    texts = [prompt_text(tokenizer, request.messages, engine.enable_thinking) for request in requests]
    longest = max(map(len, prompt_ids(tokenizer, texts))) + sampling.max_new_tokens
    dtype = compute_dtype()
    weights = count_parameters(meta_model(engine.model)) * dtype.itemsize
    return sft.fitting_batch_size(load_model_config(engine.model).get_text_config(), weights, memory, longest, dtype)


def end_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that end the teacher's answers, without its weights."""
    try:
        own = GenerationConfig.from_pretrained(model).eos_token_id
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
def opened(engine: Engine, sampling: Sampling) -> Iterator[Generate]:
    """Load or start the engine; yields `generate(requests, done)`, which yields the rows (see `sft.answer_row`) that
    `done` lacks, in parts that can be stored together. Every engine gets every sampling field in full.

    Raises:
        UserError: the engine or the teacher cannot be had.
    """
    if engine.name == "openai":
        assert engine.server is not None
        tokenizer, ends = served_teacher(engine)

        def answer(requests: Sequence[Request], done: Done) -> Iterator[list[dict[str, Any]]]:
            missing = [r for r in requests if (r.id, r.sample_index) not in done]
            thinking = engine.enable_thinking
            return openai_engine.generate_from_server(
                engine.server, missing, sampling, thinking, ends, tokenizer, len(requests)
            )

        yield answer
        return

    tokenizer = load_tokenizer(engine.model, engine.experiment_dir)
    if engine.name == "transformers":
        dtype = compute_dtype()
        device_map = place(engine.model, engine.devices, dtype, engine.gpu_memory_gb)
        model = load_model(engine.model, dtype, device_map)
        logger.info("%s in %s", engine.model, str(dtype).removeprefix("torch."))

        def answer(requests: Sequence[Request], done: Done) -> Iterator[list[dict[str, Any]]]:
            rows = engine.batch_size or rows_that_fit(engine, tokenizer, requests, sampling)
            stored = frozenset(r for r in requests if (r.id, r.sample_index) in done)
            return sft.generate(model, tokenizer, requests, sampling, rows, stored, engine.enable_thinking)

        yield answer
        return

    check_devices(engine.model, engine.devices)
    arguments, groups = vllm_plan(engine)
    with vllm_engine.opened(arguments, groups, sampling, end_ids(engine.model, tokenizer)) as answer_prompts:

        def answer(requests: Sequence[Request], done: Done) -> Iterator[list[dict[str, Any]]]:
            missing = [r for r in requests if (r.id, r.sample_index) not in done]
            texts = [prompt_text(tokenizer, r.messages, engine.enable_thinking) for r in missing]
            thoughts = {(r.id, r.sample_index): opened_thought(t) for r, t in zip(missing, texts, strict=True)}
            for rows in answer_prompts(missing, prompt_ids(tokenizer, texts)):
                for row in rows:
                    row["response"] = thoughts[row["id"], row["sample_index"]] + row["response"]
                yield rows

        yield answer
