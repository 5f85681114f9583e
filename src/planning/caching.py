"""A plan of the pass that keeps what the teacher believes."""

import math
from dataclasses import dataclass, replace

from src.distillation.gpu import FILLED, PROBED
from src.distillation.teacher_cache import CPU_TOKENS, MOST_TOKENS, CacheTeacherConfig, kept_bytes, kept_kind
from src.planning import flops, utilisation
from src.planning.hardware import Hardware
from src.planning.memory import GB, Share, attention_kind, grouped, over, reading_memory, spread, weights_problem
from src.planning.result import StagePlan
from src.planning.rows import Rows
from src.planning.shapes import Shapes
from src.planning.timing import added, computing, hours, starting
from src.planning.trace import Pass


@dataclass(frozen=True)
class Caching:
    teacher: Shapes
    config: CacheTeacherConfig
    devices: tuple[int, ...]
    offloaded: bool = False


def caching_tokens(work: Caching, rows: Rows, hardware: Hardware, traced: Pass, shares: tuple[Share, ...]) -> float:
    config = work.config
    if config.tokens_per_batch is not None:
        wanted = config.tokens_per_batch
    elif hardware.is_cpu:
        wanted = CPU_TOKENS
    else:
        wanted = MOST_TOKENS
        for share in shares:
            # as the engine measures it (`gpu.tokens_that_fit`), with planned bytes: two passes give a line
            small, large = (reading_memory(work.teacher, share, traced, t, 0, hardware).activations for t in PROBED)
            per_token = (large - small) / (PROBED[1] - PROBED[0])
            free = hardware.device.memory_gb - hardware.device.overhead_gb - share.weights * traced.dtype.itemsize / GB
            # tokens with FILLED * free = fixed + per_token * tokens, and fixed = small - per_token * PROBED[0]
            wanted = min(wanted, (FILLED * free - small + per_token * PROBED[0]) / per_token)
    # rows of one file are read together, not more
    # a file has so many response tokens; a pass reads the prompts as well
    of_a_file = config.tokens_per_shard * rows.tokens / rows.answer_tokens
    # the longest row is a pass by itself, whatever is wanted
    return max(config.max_length, min(wanted, rows.all * rows.tokens, of_a_file))


def plan_caching(work: Caching, rows: Rows, hardware: Hardware) -> StagePlan:
    config, teacher = work.config, work.teacher
    dtype = hardware.device.dtype
    # 1. a pass, and what it takes on each GPU
    length = max(2, round(min(rows.tokens, config.max_length)))
    traced = Pass(teacher.name, dtype, length, attention_kind(hardware, length))
    shares = spread(teacher, work.devices)
    if work.offloaded:
        # what stays, and a layer that visits
        held = _staying(teacher, config.gpu_memory_gb, dtype.itemsize) + teacher.layer_weights // teacher.layers
        shares = (replace(shares[0], weights=min(teacher.weights, held), layers=teacher.layers, last=True),)
    tokens = caching_tokens(work, rows, hardware, traced, shares)
    answers = rows.all * rows.answer_tokens
    in_file = min(config.tokens_per_shard, answers)
    named = [(s.device, reading_memory(teacher, s, traced, tokens, in_file, hardware)) for s in shares]
    # 2. operations and bytes
    work_flops = rows.all * flops.body_forward(teacher, [length])
    # rows that measure keep more than a top k
    measuring = (rows.evaluation + config.validation_fraction * rows.train) * rows.answer_tokens
    training = answers - measuring
    kept = measuring * kept_bytes(config, kept_kind(config, True), teacher.hidden)
    kept += training * kept_bytes(config, kept_kind(config, False), teacher.hidden)
    if config.engine == "transformers":
        kept += teacher.vocab * teacher.hidden * dtype.itemsize  # the output matrix
    if config.signal == "topk":
        # a top k is taken of logits, hidden states are kept before them
        work_flops += flops.head(teacher, round(training))
    # 3. seconds
    seconds = [computing(work_flops, hardware, utilisation.READING, utilisation.CPU_READING)]
    seconds.append(starting(teacher.weights * dtype.itemsize))
    how = f"{config.signal}, passes of {tokens:,.0f} tokens at most, {over(work.devices, hardware)}"
    if work.offloaded:
        # every pass fetches what does not stay once more
        away = (teacher.weights - _staying(teacher, config.gpu_memory_gb, dtype.itemsize)) * dtype.itemsize / GB
        passes, pcie = math.ceil(rows.all * rows.tokens / tokens), utilisation.STREAMING
        seconds.append((passes * away / pcie.high, passes * away / pcie.low))
        how += f", {away:.1f} GB of weights streamed from the machine's memory each of {passes} passes"
    return StagePlan(
        stage="cache_teacher",
        how=how,
        uses=grouped(named, hardware),
        disk_gb=kept / GB,
        tokens=rows.all * rows.tokens,
        flops=work_flops,
        hours=hours(*added(*seconds)),
        problems=() if work.offloaded else weights_problem(shares, config.gpu_memory_gb, dtype.itemsize, hardware),
    )


def _staying(teacher: Shapes, budget_gb: float, size: int) -> int:
    """Weights that stay on a GPU of a teacher whose other layers visit it: as many as the budget allows, and whatever
    is no layer."""
    return round(min(teacher.weights, max(budget_gb * GB / size, teacher.weights - teacher.layer_weights)))
