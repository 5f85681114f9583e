"""A plan of one training run."""

import functools
import math
from dataclasses import dataclass, replace

from src.distillation.gpu import FILLED, PROBED
from src.distillation.kd_config import KDConfig
from src.planning import flops, utilisation
from src.planning.hardware import Hardware
from src.planning.memory import (
    GB,
    Share,
    Step,
    attention_kind,
    grouped,
    reading_memory,
    spread,
    together,
    training_memory,
    weights_problem,
)
from src.planning.result import Memory, StagePlan
from src.planning.rows import Rows
from src.planning.shapes import Shapes, lora_weights
from src.planning.timing import added, computing, hours, starting
from src.planning.trace import Pass

CPU_TOKENS = 2048  # in one pass on a processor, as kd.CPU_TOKENS


@functools.lru_cache(maxsize=8)
def adapters_of(model: str, rank: int, targets: tuple[str, ...]) -> tuple[int, int]:
    """See `shapes.lora_weights`."""
    return lora_weights(model, rank, list(targets))


@dataclass(frozen=True)
class Training:
    """One run.

    devices: GPUs the student is spread over in a single process.
    teacher_devices: those of a resident teacher; none: on the student's.
    processes: each with a student, or with `sharded` a part of one.
    """

    arm: str
    student: Shapes
    teacher: Shapes
    config: KDConfig
    devices: tuple[int, ...]
    teacher_devices: tuple[int, ...]
    processes: int = 1
    sharded: bool = False
    four_bit: bool = False


def _train_rows(rows: Rows, fraction: float) -> tuple[int, int]:
    """Rows to train on and rows set aside, of those that are expected."""
    # on average: by the hash of its id each row is one or the other
    aside = round(rows.train * fraction)
    return rows.train - aside, aside


def traced_pass(work: Training, rows: Rows, hardware: Hardware) -> Pass:
    config = work.config
    length = max(2, round(min(rows.tokens, config.max_length)))
    liger = bool(config.liger) and not hardware.is_cpu
    return Pass(
        work.student.name, config.dtype, length, attention_kind(hardware, length), config.lora_r,
        tuple(config.lora_target_modules), config.gradient_checkpointing, liger,
    )  # fmt: skip


def step_of(work: Training, rows: Rows, hardware: Hardware) -> Step:
    config, online = work.config, work.config.teacher_signal == "online"
    # on the student's GPUs; with GPUs of its own it is planned beside them (`_resident`)
    resident = online and not work.teacher_devices
    return Step(
        student=work.student,
        teacher=work.teacher,
        traced=traced_pass(work, rows, hardware),
        answer_share=rows.answer_tokens / rows.tokens,
        adapters=adapters_of(work.student.name, config.lora_r, tuple(config.lora_target_modules))[0],
        teacher_head=not resident,
        beliefs=config.alpha > 0 and config.teacher_signal != "topk",
        resident=resident,
        optimiser_bytes=0 if config.optim == "sgd" else 8,  # AdamW: two fp32 moments
        compiled=config.compile_loss is not False,
        four_bit=work.four_bit,
        ranks_sharing=work.processes if work.sharded else 1,
    )


def step_tokens(work: Training, rows: Rows) -> float:
    """Tokens of a step that one process reads."""
    return work.config.rows_per_step * min(rows.tokens, work.config.max_length) / work.processes


def pass_tokens(work: Training, rows: Rows, hardware: Hardware, step: Step, shares: tuple[Share, ...]) -> float:
    """Tokens of the largest pass: as set, or as the engine will measure that the fullest GPU has memory for."""
    config = work.config
    most, longest = step_tokens(work, rows), config.max_length
    # padded, or as many rows as batch_size says; the longest row is a pass by itself in any case
    if not config.packing or config.tokens_per_batch == 0:
        return max(longest, min(most, config.per_device_train_batch_size * min(rows.tokens, longest)))
    if config.tokens_per_batch is not None:
        return max(longest, min(most, config.tokens_per_batch))
    if hardware.is_cpu:
        return max(longest, min(most, CPU_TOKENS))
    # the fullest GPU decides, and no pass is longer than the step
    return max(longest, min(most, min(_filling(step, share, hardware) for share in shares)))


def _filling(step: Step, share: Share, hardware: Hardware) -> float:
    """Tokens with which a pass fills its share of what is free, see `gpu.tokens_that_fit`."""
    small, large = (training_memory(step, share, tokens, hardware) for tokens in PROBED)
    # what grows with the tokens; the rest is there whatever they are
    passing = [memory.activations + memory.loss for memory in (small, large)]
    # not there yet when the engine measures, so it keeps room for them
    reserved = small.gradients + small.optimiser
    free = hardware.device.memory_gb - (small.peak - passing[0] - reserved)
    per_token = (passing[1] - passing[0]) / (PROBED[1] - PROBED[0])
    without_any = passing[0] - per_token * PROBED[0]
    return (FILLED * free - reserved - without_any) / per_token


def plan_training(work: Training, rows: Rows, hardware: Hardware) -> StagePlan:
    config = work.config
    # 1. a step, and how long its passes are
    step = step_of(work, rows, hardware)
    spread_over = work.devices if work.processes == 1 else ()
    shares = spread(work.student, spread_over)
    tokens = pass_tokens(work, rows, hardware, step, shares)
    # 2. what each GPU holds: its share of the student, or a student each
    named = []
    for share in shares:
        memory = training_memory(step, share, tokens, hardware)
        # processes have a GPU each, from the first on, and all hold the same
        places = range(work.processes) if work.processes > 1 else [share.device]
        named += [(place, memory) for place in places]
    if config.teacher_signal == "online" and work.teacher_devices:
        named = _beside(named, _resident(work, step, tokens, hardware))
    # 3. operations, seconds, disk
    work_flops, read = training_flops(work, rows, step)
    seconds = added(
        computing(work_flops, hardware, utilisation.TRAINING, utilisation.CPU_TRAINING, work.processes),
        starting(work.student.weights * config.dtype.itemsize + (work.teacher.weights * 2 if step.resident else 0)),
    )
    checkpoints = config.kept_checkpoints(steps_of(work, rows))
    return StagePlan(
        stage=f"run_improved_kd ({work.arm})",
        how=_how_trained(work, tokens, rows),
        uses=grouped(named, hardware),
        # as kd._add_adapters asks for: an adapter and two moments each, one more while it is written, the final model
        disk_gb=4 * step.adapters * (3 * checkpoints + 4) / GB,
        tokens=read,
        flops=work_flops,
        hours=hours(*seconds),
        problems=weights_problem(shares, config.gpu_memory_gb, config.dtype.itemsize, hardware),
    )


def _resident(work: Training, step: Step, tokens: float, hardware: Hardware) -> list[tuple[int, Memory]]:
    """An online teacher on GPUs of its own: it reads what the student reads."""
    reading = replace(step.traced, model=work.teacher.name, rank=0, targets=(), checkpointing=False)
    named = []
    for share in spread(work.teacher, work.teacher_devices):
        memory = reading_memory(work.teacher, share, reading, tokens, 0, hardware)
        # under `teacher`, as where it shares the student's GPU
        named.append((share.device, replace(memory, weights=0.0, teacher=memory.weights)))
    return named


def _beside(students: list[tuple[int, Memory]], teachers: list[tuple[int, Memory]]) -> list[tuple[int, Memory]]:
    """What each GPU holds of both, in the order of their numbers."""
    held = dict(students)
    for device, memory in teachers:
        held[device] = together(held[device], memory) if device in held else memory
    return sorted(held.items())


def steps_of(work: Training, rows: Rows) -> int:
    config = work.config
    train, _ = _train_rows(rows, config.validation_fraction)
    if config.max_steps > 0:
        return config.max_steps
    # rows beyond the last whole step sit an epoch out (`StepOrder`)
    return math.ceil(train // config.rows_per_step * config.num_train_epochs)


def training_flops(work: Training, rows: Rows, step: Step) -> tuple[float, float]:
    """Operations of the whole run with its measurements, and the tokens it reads."""
    config, student = work.config, work.student
    length, answer = min(rows.tokens, config.max_length), rows.answer_tokens
    adapters, first = adapters_of(student.name, config.lora_r, tuple(config.lora_target_modules))
    teacher = work.teacher if step.beliefs else None
    # 1. rows that are trained on, and rows that are only read
    steps = steps_of(work, rows)
    trained = steps * config.rows_per_step
    _, aside = _train_rows(rows, config.validation_fraction)
    # of the validation rows, every eval_steps steps
    scorings = math.ceil(steps / config.eval_steps) if config.eval_steps else 0
    measured = scorings * aside + 2 * rows.evaluation  # at the end before and after, on the held-out rows
    # 2. operations of a row of each kind
    a_row = [round(length)]
    total = trained * (
        flops.body_training(student, a_row, adapters, first, config.gradient_checkpointing)
        + flops.loss(student, teacher, round(answer), student.vocab)
    ) + measured * (
        flops.body_forward(student, a_row, adapters)
        + flops.head(student, round(answer))
        + flops.head(replace(work.teacher, vocab=student.vocab), round(answer))
    )
    if config.teacher_signal == "online":
        asked = measured + (trained if config.alpha > 0 else 0)
        total += asked * flops.body_forward(work.teacher, a_row)
    return total, (trained + measured) * length


def _how_trained(work: Training, tokens: float, rows: Rows) -> str:
    config = work.config
    passes = math.ceil(step_tokens(work, rows) / tokens)
    said = [f"{steps_of(work, rows)} steps of {config.rows_per_step} rows"]
    if work.processes > 1:
        said.append(f"{work.processes} processes, {'FSDP2' if work.sharded else 'a student each'}")
    elif len(work.devices) > 1:
        said.append(f"student over {len(work.devices)} GPUs, one at work at a time")
    said.append(f"passes of {tokens:,.0f} tokens at most, about {passes} a step each")
    if config.gradient_checkpointing:
        said.append("checkpointing")
    if work.four_bit:
        said.append("student in 4 bits")
    signal = f"teacher {config.teacher_signal}"
    # the control asks the teacher only for the held-out KL
    said.append(f"{signal}, to measure alone" if config.alpha == 0 else signal)
    return ", ".join(said)
