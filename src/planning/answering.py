"""Plans of answers, by transformers or by a server; and of merging a student to answer with."""

import math
from dataclasses import dataclass

from src.distillation.server import parallel_sizes
from src.distillation.sft import MAX_BATCH
from src.planning import flops, utilisation
from src.planning.hardware import Hardware
from src.planning.memory import (
    GB,
    Share,
    answering_memory,
    grouped,
    merging_memory,
    over,
    served_memory,
    spread,
    weights_problem,
)
from src.planning.result import Memory, StagePlan
from src.planning.rows import Rows
from src.planning.shapes import Shapes
from src.planning.timing import added, computing, hours, longer, starting
from src.planning.trace import Pass
from src.utils.common import UserError

MOST_SEQUENCES = 256  # answered at the same time by one replica: vLLM's max_num_seqs on most GPUs
TOKEN_BYTES = 8  # of a token in the JSON of an answer, with what stands around it


@dataclass(frozen=True)
class Answering:
    """Answers of one model.

    served: by a server with tensor x pipeline x data parallelism, else by transformers with layers over the devices.
    rows: transformers: in one batch; 0 for as many as fit.
    weight_bytes: of a served copy's weights.
    parallel: tensor, pipeline, data; None where it is to be derived.
    devices_key, budget_key: the settings of the profile that say `devices` and `budget_gb`.
    serve_key: the one that says how the server is started.
    """

    what: str
    model: Shapes
    answers: int
    new_tokens: int
    devices: tuple[int, ...]
    budget_gb: float
    served: bool = False
    rows: int = 32
    weight_bytes: float = 2.0
    parallel: tuple[int, int, int] | None = None
    devices_key: str = ""
    budget_key: str = ""
    serve_key: str = "serve"


@dataclass(frozen=True)
class Answered:
    """What plans of answering have in common, before they become a stage."""

    what: str
    how: str
    named: tuple[tuple[int, Memory], ...]
    tokens: float
    flops: float
    seconds: tuple[float, float]
    problems: tuple[str, ...] = ()


def plan_answering(work: Answering, rows: Rows, hardware: Hardware) -> Answered:
    if work.served and not hardware.is_cpu:
        return _by_server(work, rows, hardware)
    return _by_transformers(work, rows, hardware)


def _answering_flops(work: Answering, rows: Rows) -> tuple[float, float]:
    """Operations of reading the prompts, and of decoding the answers."""
    prompt, answer = round(rows.prompt_tokens), max(1, round(rows.answer_tokens))
    reading = work.answers * flops.body_forward(work.model, [prompt])
    return reading, flops.decoding(work.model, work.answers, prompt, answer)


def _by_transformers(work: Answering, rows: Rows, hardware: Hardware) -> Answered:
    shares = spread(work.model, work.devices)
    dtype, prompt = hardware.device.dtype, max(2, round(rows.prompt_tokens))
    # generation reads with the model's own attention, which keeps nothing without gradients
    traced = Pass(work.model.name, dtype, prompt, "varlen")
    # 1. rows together, and what each device holds then
    batch = work.rows or _batch_that_fits(work, shares, traced, hardware)
    batch = min(batch, work.answers)
    named = tuple((s.device, answering_memory(work.model, s, traced, batch, work.new_tokens, hardware)) for s in shares)
    # 2. seconds: reading is bound by products; decoding too on a processor, on a GPU by memory and launches
    reading, decoding = _answering_flops(work, rows)
    if hardware.is_cpu:
        seconds = added(
            computing(reading, hardware, utilisation.READING, utilisation.CPU_READING),
            computing(decoding, hardware, utilisation.READING, utilisation.CPU_DECODING),
        )
    else:
        seconds = added(
            computing(reading, hardware, utilisation.READING, utilisation.CPU_READING),
            _decoding_seconds(work, rows, batch, hardware),
        )
    seconds = added(seconds, starting(work.model.weights * dtype.itemsize))
    how = f"by transformers, {batch} rows together, {over(work.devices, hardware)}"
    problems = weights_problem(shares, work.budget_gb, dtype.itemsize, hardware)
    tokens = work.answers * rows.tokens
    return Answered(work.what, how, named, tokens, reading + decoding, seconds, problems)


def _batch_that_fits(work: Answering, shares: tuple[Share, ...], traced: Pass, hardware: Hardware) -> int:
    """The largest power of two whose peak is within 80 % of the memory, as `sft.fitting_batch_size` aims at."""
    # 256, 128, ... 1
    rows = MAX_BATCH
    while rows > 1:
        most = max(answering_memory(work.model, s, traced, rows, work.new_tokens, hardware).peak for s in shares)
        if most <= 0.8 * hardware.device.memory_gb:
            return rows
        rows //= 2
    return 1


def _decoding_seconds(work: Answering, rows: Rows, batch: int, hardware: Hardware) -> tuple[float, float]:
    """Steps of batches, each as long as its longest answer; rows that have ended leave, so half are there on average.

    The layers take turns whatever GPU they are on.
    """
    # (best, worst) in pairs, here and below
    batches, launch, share = math.ceil(work.answers / batch), utilisation.LAUNCH_SECONDS, utilisation.DECODING
    steps = min(work.new_tokens, 1.5 * rows.answer_tokens), work.new_tokens  # the longest of a batch, or the limit
    # bf16, 2 bytes a weight: all weights once a step, and of every row still there the keys and values so far
    step_bytes = 2 * flops.read_weights(work.model, batch / 2)
    step_bytes += batch / 2 * (rows.prompt_tokens + rows.answer_tokens / 2) * work.model.kv_bytes(hardware.device.dtype)
    reading = step_bytes / GB / hardware.device.bandwidth_gb_s
    # bytes / bandwidth, and each layer's kernels started from Python
    low = batches * steps[0] * (reading / share.high + work.model.layers * launch.low)
    return low, batches * steps[1] * (reading / share.low + work.model.layers * launch.high)


def sizes_of(work: Answering) -> tuple[int, int, int]:
    """Tensor, pipeline and data parallelism: as set, or derived.

    Raises:
        UserError: the weights do not fit on the GPUs together.
    """
    if work.parallel:
        return work.parallel
    model, gpus = work.model, max(1, len(work.devices))
    weights = model.weights * work.weight_bytes / GB
    return parallel_sizes(model.heads, model.kv_heads, model.layers, gpus, weights, work.budget_gb)


def _by_server(work: Answering, rows: Rows, hardware: Hardware) -> Answered:
    # 1. how the copies are spread, and what is left for keys and values
    problems: tuple[str, ...] = ()
    try:
        tensor, pipeline, replicas = sizes_of(work)
    except UserError as error:  # planned all the same, to show by how much it does not fit
        tensor, pipeline, replicas = 1, max(1, len(work.devices)), 1
        problems = (str(error),)
    memory = served_memory(work.model, work.weight_bytes, tensor * pipeline, hardware)
    token_gb = work.model.kv_bytes(hardware.device.dtype) / GB
    # a head is copied where there are more GPUs than key-value heads
    # tokens in the caches of one copy; each of its GPUs has a part of every token's keys and values
    room = memory.kv_cache * max(1, min(tensor, work.model.kv_heads)) * pipeline / token_gb
    longest = rows.prompt_tokens + work.new_tokens
    if not problems and room < longest:
        problems = (f"the cache has room for {room:,.0f} tokens, one answer may take {longest:,.0f}",)
    # 2. how many answers a copy has at once: as the cache holds, and as vLLM takes
    a_replica = math.ceil(work.answers / replicas)
    together = max(1, min(a_replica, MOST_SEQUENCES, int(room // max(1.0, rows.tokens))))
    # 3. seconds: memory and products at the same time, the longer of the two counts
    reading, decoding = _answering_flops(work, rows)
    seconds = added(
        computing(reading, hardware, utilisation.READING, utilisation.CPU_READING, tensor * replicas),
        longer(
            _serving_seconds(work, rows, a_replica, together, tensor, hardware),
            computing(decoding, hardware, utilisation.TRAINING, utilisation.CPU_TRAINING, tensor * replicas),
        ),
        starting(work.model.weights * work.weight_bytes, utilisation.SERVER_START_SECONDS),
    )
    stages = f" x pipeline {pipeline}" if pipeline > 1 else ""
    how = f"by a server, tensor {tensor}{stages} x data {replicas}, {together} answers at once in each"
    if work.weight_bytes < 2:
        how += f", {8 * work.weight_bytes:.1f} bits a weight"
    # every GPU of a server holds the same
    used = (work.devices or (0,))[: tensor * pipeline * replicas]
    named = tuple((device, memory) for device in used)
    return Answered(work.what, how, named, work.answers * rows.tokens, reading + decoding, seconds, problems)


def _serving_seconds(
    work: Answering, rows: Rows, answers: int, together: int, tensor: int, hardware: Hardware
) -> tuple[float, float]:
    """Of one replica: answers follow each other without waiting for a batch, and the longest one is left at the end."""
    # all tokens, so many at a time; and half of a longest answer, which goes on when the others have ended
    steps = answers * rows.answer_tokens / together + work.new_tokens / 2
    step_bytes = work.weight_bytes * flops.read_weights(work.model, together)
    step_bytes += together * (rows.prompt_tokens + rows.answer_tokens / 2) * work.model.kv_bytes(hardware.device.dtype)
    reading = step_bytes / GB / (hardware.device.bandwidth_gb_s * tensor)
    share, beside = utilisation.DECODING, utilisation.SERVER_SECONDS
    return steps * (reading / share.high + beside.low), steps * (reading / share.low + beside.high)


def answered_stage(
    stage: str, parts: list[tuple[str, Answered]], rows: Rows, answers: int, hardware: Hardware
) -> StagePlan:
    """Answers of one or several models, one after the other, as a stage; `parts` are named by their model."""
    # 1. memory: a group of GPUs for each model
    uses = []
    seen: set[str] = set()
    for name, part in parts:
        if name not in seen:  # the students are alike
            uses += grouped(part.named, hardware, name if len({n for n, _ in parts}) > 1 else "")
        seen.add(name)
    # 2. in words: "base, sft, kd by transformers, 32 rows together, on one GPU; teacher by a server, ..."
    alike: dict[str, list[str]] = {}
    for _, part in parts:
        alike.setdefault(part.how, []).append(part.what)
    said = "; ".join(f"{', '.join(names)} {how}" for how, names in alike.items())
    return StagePlan(
        stage=stage,
        how=said,
        uses=tuple(uses),
        disk_gb=answers * (rows.answer_tokens * TOKEN_BYTES + 2000) / GB,
        tokens=sum(part.tokens for _, part in parts),
        flops=sum(part.flops for _, part in parts),
        hours=hours(*added(*(part.seconds for _, part in parts))),
        problems=tuple(dict.fromkeys(problem for _, part in parts for problem in part.problems)),
    )


@dataclass(frozen=True)
class Merging:
    student: Shapes
    adapters: int
    rank: int


def plan_merging(work: Merging, hardware: Hardware) -> StagePlan:
    """The student with its adapters added in, written in bf16."""
    dtype = hardware.device.dtype
    written = 2 * work.student.weights / GB
    memory = merging_memory(work.student, work.adapters, dtype, hardware)
    loading = utilisation.LOADING
    # read once and written once, both at the rate of a disk
    seconds = added(starting(2 * work.student.weights), (written / loading.high, written / loading.low))
    return StagePlan(
        stage="export_model",
        how=f"merged weights in bf16, {'on the processor' if hardware.is_cpu else 'on one GPU'}",
        uses=grouped([(0, memory)], hardware),
        disk_gb=written,
        tokens=0,
        flops=2 * work.rank * work.student.layer_weights,  # B A of every matrix
        hours=hours(*seconds),
    )
