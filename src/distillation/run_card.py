"""README.md of a run's final_model: what the adapter was made from, and how."""

from pathlib import Path

from src.distillation.base import ModelName, model_name
from src.distillation.kd_config import KDConfig

MODEL_CARD = """---
library_name: peft
{base_model}tags: [knowledge-distillation, lora]
---
# {experiment}: {arm}

LoRA adapter of {student}, rank {rank}, trained on {rows} answers of {teacher} in {steps} steps of {rows_per_step}
rows{bits}{rounds}{start}. It ends a turn with `{end}`: stop there (`generation_config.json` says so too).
Objective: {alpha} x T^2 x {divergence}(teacher, student) at T = {temperature}{own}, plus {ce} x cross-entropy; seed
{seed}.

Every setting is in `kd_config.json` of the run, every measured number in `kd_results.json`.
"""


def _cited(model: ModelName) -> str:
    return f"`{model.id}`" + (f" (revision `{model.revision}`)" if model.revision else "")


def model_card(config: KDConfig, rows: int, steps: int, end: str, began: str | None = None) -> str:
    """`began`: the sha256 of the adapter that `init_from` named when the run began."""
    student = model_name(config.model_name_or_path)
    # each of these is a part of a sentence, or nothing
    start = ""
    if config.init_from:  # the run's name, without the way to it
        run = Path(config.init_from.rstrip("/").removesuffix("/final_model")).name
        start = f", from the adapter of `{run}` on (sha256 {(began or '')[:16]})"
    # a hub id, or nothing: the hub refuses a card that names a path
    base_model = "" if Path(student.id).exists() else f"base_model: {student.id}\n"
    bits = ", with the student's weights in 4 bits (NF4); it is added to them in bf16" if config.load_in_4bit else ""
    rounds = ""
    if config.on_policy:
        rounds = (
            f"; up to {config.own_rows_per_step} of them are answers of its own, made in {config.on_policy_rounds} "
            "rounds, which the divergence alone is taken on"
        )
    return MODEL_CARD.format(
        base_model=base_model,
        student=_cited(student),
        teacher=_cited(model_name(config.teacher_model_name_or_path)),
        bits=bits,
        rounds=rounds,
        start=start,
        rows=rows,
        experiment=Path(config.experiment_dir).name,
        arm="kd" if config.alpha > 0 else "sft control",
        steps=steps,
        rows_per_step=config.rows_per_step,
        alpha=config.alpha,
        divergence=config.divergence,
        temperature=config.temperature,
        ce=round(1 - config.alpha, 6),  # 1 - 0.8 is 0.19999999999999996
        rank=config.lora_r,
        seed=config.seed,
        end=end,
        own=teachers_own(config),
    )


def teachers_own(config: KDConfig) -> str:
    """How the teacher's softmax differs from the student's: " (the teacher at 0.2, top_k 20, top_p 0.9)"."""
    # what is left at its default is not said
    cut = [f"top_k {config.teacher_top_k}"] if config.teacher_top_k else []
    cut += [f"top_p {config.teacher_top_p:g}"] if config.teacher_top_p < 1 else []
    if config.teacher_temperature is None and not cut:
        return ""
    return f" (the teacher at {', '.join([f'{config.teacher_temperature or config.temperature:g}', *cut])})"
