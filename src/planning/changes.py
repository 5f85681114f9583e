"""Where a stage does not fit: the nearest change with which it does, found by planning it again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from src.distillation.teacher_cache import MOST_TOKENS
from src.planning.answering import Answered, Answering, answered_stage, plan_answering
from src.planning.caching import Caching, plan_caching
from src.planning.hardware import Hardware
from src.planning.result import Change, StagePlan
from src.planning.rows import Rows
from src.planning.setup import FOUR_BITS_AND_SCALES
from src.planning.training import Training, plan_training

SMALLER = "smaller passes, the same rows a step"
MOST_GPUS = 64  # of the same kind that are tried


@dataclass(frozen=True)
class Option:
    """A change that may help: in words, as settings, and what is planned with it."""

    words: str
    settings: dict[str, Any]
    work: Any
    hardware: Hardware


@dataclass(frozen=True)
class Edit:
    """A change of a training run, which goes with others."""

    words: str
    settings: dict[str, Any]
    apply: Callable[[Training], Training]


def _configured(**values: Any) -> Callable[[Training], Training]:
    return lambda work: replace(work, config=replace(work.config, **values))


def training_edits(work: Training, hardware: Hardware) -> list[Edit]:
    """From what costs nothing but time to what makes another run of it."""
    config, count, section = work.config, hardware.count, "run_improved_kd"
    # in this order they are tried, and the first that fits is named
    every, edits = tuple(range(count)), []
    for tokens in halves(config.tokens_per_batch, config.max_length):
        named = {f"{section}.tokens_per_batch": tokens}
        edits.append(Edit(SMALLER, named, _configured(tokens_per_batch=tokens)))
    if not config.gradient_checkpointing:
        named = {f"{section}.gradient_checkpointing": True}
        edits.append(Edit("gradient checkpointing", named, _configured(gradient_checkpointing=True)))
    if config.teacher_signal == "online":
        cached = _configured(teacher_signal="hidden")
        named = {f"{section}.teacher_signal": "hidden"}
        edits.append(
            Edit("the teacher's cache instead of the teacher", named, lambda w: replace(cached(w), teacher_devices=()))
        )
    if work.processes == 1 and len(work.devices) < count:
        named = {f"{section}.student_devices": list(every)}
        edits.append(Edit(f"the student over all {count} GPUs", named, lambda w: replace(w, devices=every)))
    if count > 1 and not work.sharded:
        named = {"launch": {"processes": count, "accelerate": "fsdp2"}, f"{section}.student_devices": []}
        edits.append(
            Edit(
                f"the student sharded over {count} processes",
                named,
                lambda w: replace(w, processes=count, sharded=True, devices=()),
            )
        )
    if not work.four_bit and not hardware.is_cpu:
        # quantised weights are not sharded: as many whole students as before
        own = {"four_bit": True, "sharded": False, "processes": work.processes, "devices": work.devices}
        named = {f"{section}.load_in_4bit": True}
        edits.append(Edit("the student's frozen weights in 4 bits", named, lambda w: replace(w, **own)))
    return edits


def halves(tokens: int | None, least: int) -> list[int]:
    """Ever smaller passes, down to one of the longest row alone.

    >>> halves(4096, 1024), halves(1024, 1024)
    ([2048, 1024], [])
    """
    found, tokens = [], tokens or MOST_TOKENS
    while tokens > least:
        tokens = max(tokens // 2, least)
        found.append(tokens)
    return found


def training_options(work: Training, hardware: Hardware) -> Iterator[Option]:
    """Each edit by itself, then one on top of the other, then more GPUs."""
    edits = training_edits(work, hardware)
    for edit in edits:
        yield Option(edit.words, edit.settings, edit.apply(work), hardware)
    changed, words, settings = work, [], {}
    for edit in edits:
        changed = edit.apply(changed)
        words.append(edit.words)
        settings = settings | edit.settings
        # smaller passes were tried by themselves, each of them; here they only go along
        if edit.words != SMALLER and len(words) > 1:
            # dict.fromkeys: all halvings are the same words, said once
            yield Option("; ".join(dict.fromkeys(words)), settings, changed, hardware)
    for larger, every in more_gpus(hardware, work.student.layers):
        yield Option(_so_many(larger), {"gpus": f"{larger.count}x{larger.device.memory_gb:g}"},
                     replace(work, devices=every, processes=1, sharded=False), larger)  # fmt: skip


def caching_options(work: Caching, hardware: Hardware) -> Iterator[Option]:
    section, every, small = "cache_teacher", tuple(range(hardware.count)), work
    for tokens in halves(work.config.tokens_per_batch, work.config.max_length):
        # the smallest of them goes along with streaming below
        small = replace(work, config=replace(work.config, tokens_per_batch=tokens))
        yield Option("smaller passes", {f"{section}.tokens_per_batch": tokens}, small, hardware)
    if len(work.devices) < hardware.count:
        settings = {f"{section}.teacher_devices": list(every)}
        yield Option(f"the teacher over all {len(every)} GPUs", settings, replace(work, devices=every), hardware)
    if not hardware.is_cpu:
        budget = round(0.7 * hardware.device.memory_gb, 1)
        config = replace(small.config, gpu_memory_gb=budget)
        yield Option(
            "layers that stay in the machine's memory and visit the GPU",
            {f"{section}.{name}": value for name, value in (("cpu_offload", True), ("gpu_memory_gb", budget),
             ("teacher_devices", [0]), ("tokens_per_batch", config.tokens_per_batch))},
            replace(small, config=config, offloaded=True, devices=every[:1]),
            hardware,
        )  # fmt: skip
    for larger, more in more_gpus(hardware, work.teacher.layers):
        yield Option(_so_many(larger), {f"{section}.teacher_devices": list(more)}, replace(work, devices=more), larger)


def answering_options(work: Answering, hardware: Hardware, section: str) -> Iterator[Option]:
    """From what only takes longer to another copy of the model; `section` is the profile's."""
    # 0.85: room beside the weights for keys, values and activations
    every, budget = tuple(range(hardware.count)), round(0.85 * hardware.device.memory_gb, 1)
    rows = work.rows
    while not work.served and rows > 1:
        rows //= 2
        yield Option("fewer rows together", {f"{section}.batch_size": rows}, replace(work, rows=rows), hardware)
    # one row at a time from here on; 0, as many as fit, stays 0
    derived = replace(work, rows=min(work.rows, 1), parallel=None, budget_gb=budget)
    if work.served:
        sizes = {f"{work.serve_key}.{name}": None for name in ("tensor_parallel", "data_parallel")}
        settings = sizes | {work.budget_key: budget}
        yield Option("tensor x data parallelism by what the GPUs hold", settings, derived, hardware)
    wide = replace(derived, devices=every)
    if len(work.devices) < hardware.count:
        settings = {work.devices_key: list(every), work.budget_key: budget}
        yield Option(f"the model over all {len(every)} GPUs", settings, wide, hardware)
    if not hardware.is_cpu:
        # bytes a weight
        for words, size in (("FP8", 1.0), ("4 bits", FOUR_BITS_AND_SCALES)):
            if size < work.weight_bytes:
                copy = replace(wide, served=True, weight_bytes=size)
                yield Option(f"a copy in {words} behind a server, named as serve.model", {}, copy, hardware)
    for larger, more in more_gpus(hardware, work.model.layers):
        yield Option(_so_many(larger), {work.devices_key: list(more)}, replace(derived, devices=more), larger)


def more_gpus(hardware: Hardware, layers: int) -> Iterator[tuple[Hardware, tuple[int, ...]]]:
    """More GPUs of the kind and their numbers, a layer for each; on a processor there is nothing of the kind."""
    count = hardware.count
    while count:
        # 2, 3, ... 8, then whole machines: 16, 24, ...
        count += 1 if count < 8 else 8
        if count > min(MOST_GPUS, layers):
            return
        yield replace(hardware, count=count), tuple(range(count))


def _so_many(hardware: Hardware) -> str:
    return f"{hardware.count} GPUs of {hardware.device.memory_gb:g} GB"


def _nearest(options: Iterator[Option], plan: Callable[[Option], StagePlan]) -> Change | None:
    for option in options:
        found = plan(option)
        if found.fits:
            return Change(option.words, option.settings, found.peak_gb, found.hours)
    return None


def training_change(work: Training, rows: Rows, hardware: Hardware) -> Change | None:
    """The first option with which it fits."""
    return _nearest(training_options(work, hardware), lambda option: plan_training(option.work, rows, option.hardware))


def caching_change(work: Caching, rows: Rows, hardware: Hardware) -> Change | None:
    """The first option with which it fits."""
    return _nearest(caching_options(work, hardware), lambda option: plan_caching(option.work, rows, option.hardware))


def answering_change(work: Answering, rows: Rows, hardware: Hardware, section: str) -> Change | None:
    """The first option with which it fits; see `answering_options`."""

    def plan(option: Option) -> StagePlan:
        found = plan_answering(option.work, rows, option.hardware)
        return answered_stage(section, [("", found)], rows, work.answers, option.hardware)

    return _nearest(answering_options(work, hardware, section), plan)


def fits(found: Answered, hardware: Hardware) -> bool:
    """Whether answers of one model can be had so."""
    return not found.problems and all(memory.peak <= hardware.device.memory_gb for _, memory in found.named)
