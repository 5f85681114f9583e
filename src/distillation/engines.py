"""The engines behind one call: `with opened(engine) as generate`, then `generate(requests, done)`."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from src.distillation import openai_engine, sft
from src.distillation.base import (
    check_devices,
    compute_dtype,
    load_model,
    load_model_config,
    load_tokenizer,
    model_bytes,
    model_name,
    place,
    prompt_ids,
    prompt_text,
)
from src.distillation.lora import merge_adapter
from src.distillation.openai_engine import Server
from src.distillation.server import running
from src.distillation.serving import (
    PlannedServer,
    Serve,
    arms_server,
    read_serve,
    students_server,
    teacher_server,
)
from src.distillation.sft import Request
from src.utils.common import UserError, logger
from src.utils.config import setting

ENGINES = ("transformers", "openai")
ELSEWHERE = "http://localhost:8000/v1"  # where vLLM answers if nobody says otherwise

Done = frozenset[Request]


class Generate(Protocol):
    """What an engine answers with; see `opened`."""

    def __call__(self, requests: Sequence[Request], done: Done, refused: int = 0) -> Iterator[list[dict[str, Any]]]: ...


@dataclass(kw_only=True)
class ServerSettings:
    """The settings of every stage that asks a server."""

    serve: str = setting(
        "", "the server that the stage starts and stops: JSON or a mapping such as {command: vllm}; keys: command, "
        "model, devices, gpu_memory_gb, tensor_parallel, data_parallel, port, arguments"
    )  # fmt: skip
    base_url: str = setting(ELSEWHERE, "openai: a server that runs already")
    server: Literal["vllm", "sglang", "llama_cpp", "transformers", "plain"] = setting(
        "vllm", "openai: the server's kind, which decides how top_k and thinking are said; `plain` knows neither"
    )
    api_key_variable: str = setting("OPENAI_API_KEY", "openai: environment variable with the key, if one is needed")
    concurrency: int = setting(32, "openai: requests under way at most")
    request_timeout: float = setting(600.0, "openai: seconds for one answer")
    tries: int = setting(8, "openai: times one request is sent before the run stops")


@dataclass
class EngineSettings(ServerSettings):
    """The settings of every stage that has answers made."""

    engine: str = setting(
        "", "transformers (in this process) or openai (a server); default: openai with `serve`, else transformers"
    )
    batch_size: int = setting(32, "transformers: rows in one forward pass; 0 takes as many as the memory holds")
    teacher_devices: list[int] = setting([], "GPUs the teacher is spread over (serve: and replicated on)")
    gpu_memory_gb: float = setting(36.0, "weights one GPU may hold, 1e9 bytes")
    max_refused: float = setting(
        0.02, "openai: share of the answers that the server may refuse (content, length) and the run goes on without"
    )


@dataclass(frozen=True)
class Engine:
    """What answers, and on what.

    name: `transformers` or `openai`.
    model: folder or hub id. The openai engine wants it for its tokenizer alone, and may do without.
    adapter: folder of a LoRA adapter on it; not for the openai engine, whose server knows arms by their names.
    batch_size: rows in one forward pass of the transformers engine; 0 for `rows_that_fit`.
    devices: GPUs; none on a machine without.
    gpu_memory_gb: weights one GPU may hold, 1e9 bytes.
    enable_thinking: asked of hybrid models by their template.
    experiment_dir: whose date a template reads that asks for one.
    keep_ids: the answers come with the token ids that were sampled, where the engine or the server tells them.
    """

    name: str
    model: str
    batch_size: int = 32
    devices: tuple[int, ...] = ()
    gpu_memory_gb: float = 36.0
    enable_thinking: bool = False
    server: Server | None = None
    experiment_dir: str = ""
    adapter: str = ""
    keep_ids: bool = False


def engine_name(settings: EngineSettings) -> str:
    """What answers: as said; else the server that `serve` starts, or transformers.

    Raises:
        UserError: no such engine, or another one than `serve` wants.
    """
    said = settings.engine
    if said == "vllm":
        raise UserError(
            "engine vllm is a server now, which the stage starts: say serve: {command: vllm} in the profile "
            """(--serve '{"command": "vllm"}') and no engine"""
        )
    if said and said not in ENGINES:
        raise UserError(f"engine {said!r}: there are transformers and openai, and `serve` starts vLLM or SGLang")
    # no server to start: transformers here, or a server that runs already
    if not settings.serve.strip():
        return said or "transformers"
    if said == "transformers":
        raise UserError(
            "engine transformers answers in this process, serve starts a server; keep one: --serve '' leaves the "
            "profile's server out"
        )
    return "openai"


def stage_serve(settings: EngineSettings) -> Serve | None:
    """The server that a stage starts, with the stage's own `gpu_memory_gb` where it says none; None for no server.

    Raises:
        UserError: `serve` is not what it must be, or something is said beside it that contradicts it.
    """
    engine_name(settings)
    serve = read_serve(settings.serve)
    if serve is not None:
        refuse_second_server(settings)
    # the server's own budget stands over the stage's
    if serve is None or serve.gpu_memory_gb:
        return serve
    return dataclasses.replace(serve, gpu_memory_gb=settings.gpu_memory_gb)


def refuse_second_server(settings: ServerSettings) -> None:
    """Raise a UserError where a stage that starts a server is told of another that runs."""
    if settings.base_url != ELSEWHERE:
        raise UserError(
            f"serve starts a server of its own, base_url {settings.base_url} names another; keep one: --serve '' "
            "leaves the profile's server out"
        )


def server_kind(settings: ServerSettings, serve: Serve | None) -> str:
    """The kind of server that answers, one of `openai_engine.SERVERS`."""
    # of a whole command line nobody knows what it starts, so the setting says it
    return settings.server if serve is None or serve.program == "other" else serve.program


def make_engine(settings: EngineSettings, model: str, devices: Sequence[int], serve: Serve | None = None,
                served_name: str = "", base_url: str = "", **more: Any) -> Engine:  # fmt: skip
    """The engine that the settings name, for one model.

    Args:
        serve: the server that the stage starts for it, with its port.
        served_name: the server's name for it, where it is not `model`.
        base_url: of its server, where that is not the settings'.
        more: further fields of `Engine`.

    Raises:
        UserError: a setting is out of range.
    """
    if settings.batch_size < 0 or min(settings.concurrency, settings.tries) < 1:
        raise UserError("concurrency and tries must be at least 1, batch_size at least 0 (from memory)")
    # a server that is started answers on this machine, at the port it was given
    own_url = settings.base_url if serve is None else serve.base_url
    server = Server(
        base_url or own_url, served_name or model, server_kind(settings, serve), settings.api_key_variable,
        settings.concurrency, settings.request_timeout, settings.tries, settings.max_refused,
    )  # fmt: skip
    name = engine_name(settings)
    return Engine(name, model, settings.batch_size, tuple(devices), settings.gpu_memory_gb, server=server, **more)


def planned_servers(
    settings: EngineSettings,
    teacher: str = "",
    base: str = "",
    adapters: Mapping[str, str] | None = None,
    student_devices: Sequence[int] = (),
    rank: int | None = None,
) -> list[PlannedServer]:
    """The servers that a stage with these settings would start, one after the other, for a dry run.

    Args:
        teacher, base: models; empty for none. Only the evaluation has a `base`, with its adapters and devices.
        adapters: arm -> folder, which need not be there yet if `rank` is given.

    Raises:
        UserError: as `serving.serve_command`.
    """
    serve, planned = stage_serve(settings), []
    if serve is None:
        return planned
    # a command line that is run as it stands serves every arm that it names
    if base and serve.program == "other":
        places = {"base": base, "teacher": teacher} | dict(adapters or {})
        return [arms_server(serve, places, sorted({*settings.teacher_devices, *student_devices}))]
    # the order in which the evaluation asks: the students, then the teacher
    if base:
        planned.append(students_server(serve, base, adapters or {}, student_devices, rank))
    if teacher:
        planned.append(teacher_server(serve, teacher, settings.teacher_devices))
    return planned


@contextmanager
def started(planned: PlannedServer | None, log: Path) -> Iterator[None]:
    """Run a planned server until the block ends; None is a server that runs elsewhere, or none at all.

    Raises:
        UserError: the client or the GPUs are not there, or the server does not come up (see `server.running`).
    """
    if planned is None:
        yield
        return
    # in order of what it costs to find out
    openai_engine.require_client()  # before the minutes that a server takes to come up
    check_devices(planned.answers_for, planned.devices)
    with running(planned.words, planned.base_url, log, planned.environment):
        yield


def rows_that_fit(engine: Engine, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request]) -> int:
    """The batch size of the transformers engine for these requests, from the memory of its devices or the machine."""
    if torch.cuda.is_available():
        # what the cards have, not what is free: a run that goes on must cut the same batches (`sft.fitting_batch_size`)
        memory = sum(torch.cuda.get_device_properties(i).total_memory for i in (engine.devices or (0,)))
    else:
        memory = psutil.virtual_memory().total
    texts = [prompt_text(tokenizer, request.messages, engine.enable_thinking) for request in requests]
    # of a batch of the longest rows
    longest = max(map(len, prompt_ids(tokenizer, texts))) + requests[0].sampling.max_new_tokens
    dtype = compute_dtype()
    weights = model_bytes(engine.model, dtype)
    return sft.fitting_batch_size(load_model_config(engine.model).get_text_config(), weights, memory, longest, dtype)


def end_ids(model: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that end the teacher's answers, without its weights."""
    named = model_name(model)
    try:
        # as `generate` would have it, without loading the model
        own = GenerationConfig.from_pretrained(named.id, **named.pin).eos_token_id
    except OSError:  # it has no generation_config.json
        own = load_model_config(model).eos_token_id
    return sft.end_token_ids(tokenizer, own)


def served_teacher(engine: Engine) -> tuple[PreTrainedTokenizerBase | None, list[int]]:
    """The tokenizer of a teacher behind a server, None where it cannot be had, and the ids that end its answers.

    Raises:
        UserError: it cannot be had, and the server needs those ids.
    """
    # it is told the end tokens with every request (`extra_body`), so the tokenizer must be there
    if engine.server.kind == "transformers":
        tokenizer = load_tokenizer(engine.model)
        return tokenizer, end_ids(engine.model, tokenizer)
    if not engine.model:  # known by the server's name alone
        return None, []
    try:
        tokenizer = load_tokenizer(engine.model)
    except UserError as error:
        logger.info("%s; without it only the server can count tokens", error)
        return None, []
    # such a server ends answers by its own settings
    if engine.server.kind not in openai_engine.TAKES_END_IDS:
        return tokenizer, []
    try:
        return tokenizer, end_ids(engine.model, tokenizer)
    except UserError as error:
        logger.info("%s; the server's own idea of an answer's end is taken", error)
        return tokenizer, []


@contextmanager
def opened(engine: Engine) -> Iterator[Generate]:
    """Load the engine; yields `generate(requests, done, refused)`, which yields the rows (see `sft.answer_row`) of the
    requests that `done` lacks, in parts that can be stored together. `refused` says of how many of `done` a server has
    refused the answer. Every engine gets every sampling field in full.

    Raises:
        UserError: the model or the adapter cannot be had.
    """
    if engine.name == "openai":
        yield from _by_server(engine)
    else:
        yield from _by_transformers(engine, load_tokenizer(engine.model, engine.experiment_dir))


def _by_server(engine: Engine) -> Iterator[Generate]:
    assert engine.server is not None
    tokenizer, ends = served_teacher(engine)

    def answer(requests: Sequence[Request], done: Done, refused: int = 0) -> Iterator[list[dict[str, Any]]]:
        # each request goes out by itself: no batch that would have to be asked again whole, as transformers' has
        missing = [request for request in requests if request not in done]
        return openai_engine.generate_from_server(
            engine.server, missing, engine.enable_thinking, ends, tokenizer, len(requests), refused, engine.keep_ids
        )

    yield answer


def _by_transformers(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> Iterator[Generate]:
    dtype = compute_dtype()
    device_map = place(engine.model, engine.devices, dtype, engine.gpu_memory_gb)
    model = load_model(engine.model, dtype, device_map)
    if engine.adapter:  # merged, as it would be served: no product of the adapter beside every one of the model
        model = merge_adapter(model, engine.adapter)
    logger.info("%s in %s", engine.adapter or engine.model, str(dtype).removeprefix("torch."))

    def answer(requests: Sequence[Request], done: Done, refused: int = 0) -> Iterator[list[dict[str, Any]]]:
        # from all requests, answered ones too, so that a run that goes on cuts the batches that it had
        rows = engine.batch_size or rows_that_fit(engine, tokenizer, requests)
        return sft.generate(model, tokenizer, requests, rows, done, engine.enable_thinking, engine.keep_ids)

    yield answer
