"""Where a stage does not fit: the nearest change with which it does, found by planning it again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from src.planning.answering import Answered, Answering, plan_answering
from src.planning.caching import Caching, plan_caching
from src.planning.hardware import Hardware
from src.planning.result import Change, StagePlan
from src.planning.rows import Rows
from src.planning.training import Training, plan_training

Work = TypeVar("Work")
MOST_GPUS = 64  # how many of the same kind are tried at most


@dataclass(frozen=True)
class Option:
    """One change: in words, as settings, and the work with it on the hardware with it."""

    words: str
    settings: dict[str, Any]
    work: Any
    hardware: Hardware


def training_options(work: Training, hardware: Hardware) -> list[Option]:
    """From what costs nothing but time to what changes the run; each is taken on top of those before it."""
    options: list[Option] = []
    name = "run_improved_kd"

    def add(words: str, settings: dict[str, Any], **changes: Any) -> None:
        before = options[-1].work if options else work
        config = replace(before.config, **changes.pop("config", {}))
        said = {f"{name}.{key}" if "." not in key else key: value for key, value in settings.items()}
        options.append(Option(words, said, replace(before, config=config, **changes), hardware))

    small = work.config.max_length
    if work.config.tokens_per_batch != small:
        add("smaller passes, the same rows a step", {"tokens_per_batch": small}, config={"tokens_per_batch": small})
    if not work.config.gradient_checkpointing:
        on = {"gradient_checkpointing": True}
        add("activations computed again in the backward pass", on, config=on)
    if work.config.teacher_signal == "online" and work.config.alpha > 0:
        cached = {"teacher_signal": "hidden"}
        add("the teacher's kept beliefs instead of the teacher", cached, config=cached, teacher_devices=())
    everything = tuple(range(hardware.count))
    if hardware.count > 1 and work.processes == 1 and len(work.devices) < hardware.count:
        add(f"the student over all {hardware.count} GPUs", {"student_devices": list(everything)}, devices=everything)
    if hardware.count > 1 and not work.sharded:
        launch = {"processes": hardware.count, "accelerate": "fsdp2"}
        add("a student sharded over all GPUs", {"launch.processes": hardware.count, "launch.accelerate": "fsdp2"},
            processes=launch["processes"], sharded=True, devices=())  # fmt: skip
    if not work.four_bit and not hardware.is_cpu:
        add("the student's frozen weights in 4 bits", {"load_in_4bit": True}, four_bit=True, sharded=False,
            processes=work.processes, devices=work.devices)  # fmt: skip
    return options


def caching_options(work: Caching, hardware: Hardware) -> list[Option]:
    small, every = work.config.max_length, tuple(range(hardware.count))
    options: list[Option] = []

    def add(words: str, settings: dict[str, Any], changed: Caching) -> None:
        options.append(
            Option(words, {f"cache_teacher.{key}": value for key, value in settings.items()}, changed, hardware)
        )

    changed = replace(work, config=replace(work.config, tokens_per_batch=small))
    add("smaller passes", {"tokens_per_batch": small}, changed)
    if len(work.devices) < hardware.count:
        changed = replace(changed, devices=every)
        add(f"the teacher over all {hardware.count} GPUs", {"teacher_devices": list(every)}, changed)
    if not hardware.is_cpu:
        budget = round(0.8 * hardware.device.memory_gb, 1)
        changed = replace(work, config=replace(work.config, gpu_memory_gb=budget), offloaded=True, devices=every[:1])
        add("layers that stay in the machine's memory and visit the GPU", {"cpu_offload": True,
            "gpu_memory_gb": budget, "teacher_devices": [0]}, changed)  # fmt: skip
    return options


def answering_options(work: Answering, hardware: Hardware, section: str, key: str) -> list[Option]:
    every, budget = tuple(range(hardware.count)), round(0.85 * hardware.device.memory_gb, 1)
    options: list[Option] = []

    def add(words: str, settings: dict[str, Any], changed: Answering) -> None:
        options.append(Option(words, settings, changed, hardware))

    if not work.served and work.rows > 1:
        rows = work.rows
        while rows > 1:
            rows //= 2
            add("fewer rows together", {f"{section}.batch_size": rows}, replace(work, rows=rows))
    if work.served:
        changed = replace(work, parallel=None, budget_gb=budget)
        add("other tensor x data parallelism, by what the GPUs hold", {f"{section}.gpu_memory_gb": budget}, changed)
    smallest = replace(work, rows=min(work.rows, 1), parallel=None, budget_gb=budget)
    if len(work.devices) < hardware.count:
        smallest = replace(smallest, devices=every)
        settings = {f"{section}.{key}": list(every), f"{section}.gpu_memory_gb": budget}
        add(f"the model over all {hardware.count} GPUs", settings, smallest)
    if not hardware.is_cpu:
        for words, size in (("a served copy in FP8", 1.0), ("a served copy in 4 bits", 0.55)):
            if size < work.weight_bytes:
                add(words, {"serve.model": words.removeprefix("a served ")}, replace(
                    smallest, served=True, weight_bytes=size, devices=every, budget_gb=budget))  # fmt: skip
    return options


def more_gpus(work: Work, hardware: Hardware, over: Callable[[Work, tuple[int, ...]], Work]) -> list[Option]:
    """The same on more GPUs of the kind; on a processor there is nothing of the kind."""
    options = []
    count = hardware.count
    while 0 < count < MOST_GPUS:
        count += 1 if count < 8 else 8
        larger = replace(hardware, count=count)
        options.append(
            Option(f"{count} GPUs of {hardware.device.memory_gb:g} GB", {"gpus": count}, over(work, tuple(range(count))), larger)
        )
    return options


def nearest(options: Sequence[Option], plan: Callable[[Option], tuple[bool, float, tuple[float, float]]]) -> Change | None:
    """The first option with which it fits.

    Args:
        plan: an option -> whether it fits, its peak in GB, its hours.
    """
    for option in options:
        fits, peak_gb, needed = plan(option)
        if fits:
            return Change(option.words, option.settings, peak_gb, needed)
    return None


def _facts(stage: StagePlan) -> tuple[bool, float, tuple[float, float]]:
    return stage.fits, stage.peak_gb, stage.hours


def training_change(work: Training, rows: Rows, hardware: Hardware) -> Change | None:
    alone = training_options(work, hardware)
    options = [*_by_themselves(work, alone), *_on_top(alone)]
    options += more_gpus(work, hardware, lambda own, every: replace(own, devices=every, processes=1, sharded=False))
    return nearest(options, lambda option: _facts(plan_training(option.work, rows, option.hardware)))


def _by_themselves(work: Training, options: list[Option]) -> list[Option]:
    """Each of the changes without those before it."""
    found = []
    before = work
    for option in options:
        config = {}
        for name, value in vars(option.work.config).items():
            if getattr(before.config, name) != value:
                config[name] = value
        changes = {}
        for name, value in vars(option.work).items():
            if name != "config" and getattr(before, name) != value:
                changes[name] = value
        found.append(replace(option, work=replace(work, config=replace(work.config, **config), **changes)))
        before = option.work
    return found


def _on_top(options: list[Option]) -> list[Option]:
    """The changes one on top of the other."""
    found = []
    words: list[str] = []
    settings: dict[str, Any] = {}
    for option in options:
        words.append(option.words)
        settings |= option.settings
        found.append(replace(option, words="; ".join(words), settings=dict(settings)))
    return found[1:]


def caching_change(work: Caching, rows: Rows, hardware: Hardware) -> Change | None:
    options = caching_options(work, hardware)
    options += more_gpus(work, hardware, lambda own, every: replace(own, devices=every))
    return nearest(options, lambda option: _facts(plan_caching(option.work, rows, option.hardware)))


def answering_change(work: Answering, rows: Rows, hardware: Hardware, section: str, key: str) -> Change | None:
    options = answering_options(work, hardware, section, key)
    options += more_gpus(work, hardware, lambda own, every: replace(own, devices=every, parallel=None))

    def facts(option: Option) -> tuple[bool, float, tuple[float, float]]:
        found = plan_answering(option.work, rows, option.hardware)
        peak = max(memory.peak for _, memory in found.named)
        fits = not found.problems and peak <= option.hardware.device.memory_gb
        return fits, peak, (found.seconds[0] / 3600, found.seconds[1] / 3600)

    return nearest(options, facts)


def fits(found: Answered, hardware: Hardware) -> bool:
    """Whether answers of one model can be had so."""
    return not found.problems and all(m.peak <= hardware.device.memory_gb for _, m in found.named)
