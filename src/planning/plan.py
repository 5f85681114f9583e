"""Will it fit, and how long will it take: every stage of a profile, before anything is loaded, fetched or paid for."""

from dataclasses import replace
from typing import Any

from src.distillation.base import config_folder
from src.planning import utilisation
from src.planning.answering import Merging, answered_stage, plan_answering, plan_merging
from src.planning.caching import plan_caching
from src.planning.changes import answering_change, caching_change, fits, training_change
from src.planning.hardware import Hardware, parse_gpus, this_machine
from src.planning.result import Change, ModelSize, Plan, StagePlan
from src.planning.rows import read_rows
from src.planning.setup import Setup, caching, evaluation, generation, open_setup, read_serve, trainings
from src.planning.shapes import Shapes
from src.planning.training import adapters_of, plan_training
from src.utils.common import ROOT, UserError

EVERY_ROW = "rows are planned as if every answer were kept and no two prompts began alike; both are less in truth"
WITHOUT_LIGER = (
    "norms and SwiGLU as transformers has them; with --liger true (package liger-kernel) a token keeps a quarter less"
)
ON_A_PROCESSOR = (
    "bytes that are alive: glibc may keep as much again that was freed (MALLOC_MMAP_THRESHOLD_=131072 gives it back)"
)


def make_plan(profile: dict[str, Any], gpus: str | Hardware | None = None, prompt_tokens: float | None = None,
              answer_tokens: float | None = None) -> Plan:  # fmt: skip
    """The plan of a merged profile (`src.utils.config.read_merged`).

    Args:
        gpus: "8x40" (how many x GB each), "1xH100", what `hardware.detect` found, or None for the profile's own `gpus`;
            where that says nothing either, this machine without a GPU.
        prompt_tokens: mean length to plan with instead of what is counted or assumed; `answer_tokens` likewise.

    Raises:
        UserError: a model's configuration cannot be had, or a setting is wrong.
    """
    # 1. models, GPUs and rows
    setup = open_setup(profile, _hardware(profile, gpus), read_rows(profile, prompt_tokens, answer_tokens))
    # 2. every stage, in the order of the pipeline; with the nearest change where one does not fit
    stages = [
        _generation(setup),
        *_caching(setup),
        *_trainings(setup),
        _evaluation(setup),
        _merging(setup),
    ]
    rows, size = setup.rows, setup.hardware.device.dtype.itemsize
    # 3. what they were planned with, in words
    models = tuple(
        ModelSize(role, shapes.name, _shown(shapes), shapes.weights, _active(shapes), shapes.weights * size / 1e9)
        for role, shapes in (("teacher", setup.teacher), ("student", setup.student))
    )
    said = (
        f"{rows.train:,} to train on, {rows.evaluation:,} to evaluate; a row has about {rows.prompt_tokens:.0f} tokens "
        f"of prompt and {rows.answer_tokens:.0f} of answer ({rows.source})"
    )
    notes = [*dict.fromkeys(setup.notes), EVERY_ROW]
    notes += [ON_A_PROCESSOR] if setup.hardware.is_cpu else [WITHOUT_LIGER, utilisation.SAID]
    return Plan(str(setup.hardware), models, said, tuple(stages), tuple(notes))


def _shown(shapes: Shapes) -> str:
    """Where its configuration was read, from the repository's root where it is one of ours."""
    return config_folder(shapes.name).removeprefix(f"{ROOT}/")


def _active(shapes: Shapes) -> int:
    """Weights that a token is multiplied with, embedding and head as they are counted for the whole model."""
    return shapes.weights - shapes.layer_weights + shapes.active_weights


def _hardware(profile: dict[str, Any], gpus: str | Hardware | None) -> Hardware:
    if isinstance(gpus, Hardware):
        return gpus
    wanted = gpus or profile.get("gpus")
    if wanted:
        return parse_gpus(str(wanted))
    sections = [section for section in profile.values() if isinstance(section, dict)]
    # without a size nothing can be said of GPUs, and a plan for the processor would be of another run
    named = [section.get(key) for section in sections for key in ("teacher_devices", "student_devices")]
    # and those of the servers, one for all stages or a stage's own
    named += [(read_serve(said.get("serve"), "serve") or {}).get("devices") for said in (profile, *sections)]
    if any(named):
        raise UserError("the profile names GPUs, but not of what size; pass --gpus 8x40 (how many x GB each)")
    return this_machine()


def _generation(setup: Setup) -> StagePlan:
    work = generation(setup)
    found = plan_answering(work, setup.rows, setup.hardware)
    stage = answered_stage("generate_sft_data", [("teacher", found)], setup.rows, work.answers, setup.hardware)
    if stage.fits:
        return stage
    change = answering_change(work, setup.rows, setup.hardware, "generate_sft_data")
    return _with(stage, change)


def _caching(setup: Setup) -> list[StagePlan]:
    work = caching(setup)
    if work is None:
        return []
    stage = plan_caching(work, setup.rows, setup.hardware)
    return [stage if stage.fits else _with(stage, caching_change(work, setup.rows, setup.hardware))]


def _trainings(setup: Setup) -> list[StagePlan]:
    stages = []
    for work in trainings(setup):
        stage = plan_training(work, setup.rows, setup.hardware)
        if not stage.fits:
            stage = _with(stage, training_change(work, setup.rows, setup.hardware))
        stages.append(stage)
    return stages


def _evaluation(setup: Setup) -> StagePlan:
    arms = evaluation(setup)
    parts = [(role, plan_answering(work, setup.rows, setup.hardware)) for role, work in arms]
    answers = sum(work.answers for _, work in arms)
    stage = answered_stage("evaluate_distillation", parts, setup.rows, answers, setup.hardware)
    changed: set[str] = set()
    for (role, work), (_, found) in zip(arms, parts, strict=True):
        if role not in changed and not fits(found, setup.hardware):  # the students are alike
            changed.add(role)
            change = answering_change(work, setup.rows, setup.hardware, "evaluate_distillation")
            stage = _with(stage, change and replace(change, of=role))
    return stage


def _with(stage: StagePlan, change: Change | None) -> StagePlan:
    return stage if change is None else replace(stage, changes=(*stage.changes, change))


def _merging(setup: Setup) -> StagePlan:
    config = trainings(setup)[-1].config
    adapters, _ = adapters_of(setup.student.name, config.lora_r, tuple(config.lora_target_modules))
    return plan_merging(Merging(setup.student, adapters, config.lora_r), setup.hardware)
