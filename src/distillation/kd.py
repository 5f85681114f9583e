"""LoRA distillation of one student: from clean teacher answers to an adapter and its held-out numbers.

from src.distillation.kd import run_kd_pipeline
results = run_kd_pipeline("configs/embedded.yaml")
"""

import contextlib
import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments, set_seed

from src.distillation.base import (
    LORA_TARGETS,
    add_lora,
    compute_dtype,
    count_parameters,
    describe_size,
    load_model,
    load_tokenizer,
    model_fingerprint,
    place,
    shared_vocabulary,
)
from src.distillation.batching import TrainingData, load_training_data
from src.distillation.heldout import gap_recovered, score_heldout, summarise, summarise_teacher
from src.distillation.losses import DIVERGENCES
from src.distillation.runs import (
    RunRecorder,
    claim_folder,
    cut_metrics,
    find_runs,
    new_run_folder,
    newest_complete_checkpoint,
    training_facts,
)
from src.distillation.trainer import KDTrainer
from src.utils.common import (
    Progress,
    UserError,
    atomic_path,
    logger,
    provenance,
    read_json,
    require_disk,
    write_json,
    write_text,
)
from src.utils.config import build_config, read_profile, setting

SECTION = "run_improved_kd"

# Settings that cannot change what is learned; all others make a run's fingerprint.
NOT_IN_FINGERPRINT = {
    "output_dir", "experiment_dir", "resume", "overwrite", "resume_from_checkpoint", "logging_dir", "run_name",
    "report_to", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "save_total_limit", "local_rank",
    "teacher_devices", "student_devices", "gpu_memory_gb", "use_cpu", "project", "debug", "push_to_hub", "hub_token",
    "logging_strategy", "logging_steps", "logging_first_step", "eval_strategy", "eval_steps", "save_strategy",
    "save_steps", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "model_name_or_path", "teacher_model_name_or_path", "gradient_accumulation_steps", "per_device_eval_batch_size",
}  # fmt: skip


@dataclass
class KDConfig(TrainingArguments):
    """One training run. The defaults are the reference recipe; everything of TrainingArguments is a setting too."""

    model_name_or_path: str = setting("", "folder or hub id of the student", "student_name_or_path")
    teacher_model_name_or_path: str = setting("", "folder or hub id of the teacher", "teacher_model")
    experiment_dir: str = setting(
        "outputs/experiment/default", "its folder sft/ holds the clean rows; runs go beside it"
    )
    temperature: float = setting(2.5, "KD softmax temperature T of teacher and student", "kd_temperature")
    alpha: float = setting(0.8, "weight of the divergence; 0 is plain SFT, the control", "kd_alpha", "kd_ratio")
    divergence: Literal[DIVERGENCES] = setting("forward_kl", "what is distilled")  # type: ignore[valid-type]
    beta: float = setting(0.5, "the teacher's weight in the mixture of jsd, strictly inside (0, 1)")
    teacher_signal: Literal["online"] = setting("online", "where the teacher's distribution comes from")
    max_length: int = setting(1024, "longest row in tokens, prompt and answer; longer rows are dropped and counted")
    validation_fraction: float = setting(0.05, "share of the training rows set aside, chosen by the hash of their id")
    lora_r: int = setting(64, "rank of the adapters")
    lora_alpha: int = setting(128, "LoRA scale: the update is multiplied by lora_alpha / lora_r")
    lora_dropout: float = setting(0.0, "dropout before the adapters")
    lora_target_modules: list[str] = setting(list(LORA_TARGETS), "projections that get an adapter")
    teacher_devices: list[int] = setting([], "GPUs the teacher is spread over (one process)")
    student_devices: list[int] = setting([], "GPUs the student is spread over (one process)")
    gpu_memory_gb: float = setting(36.0, "weights one GPU may hold, 1e9 bytes")
    resume: bool = setting(
        True, "go on with the newest unfinished run of the same settings; --no_resume starts another"
    )
    overwrite: bool = setting(False, "train again although a finished run of the same settings, or the folder, exists")

    output_dir: str | None = setting(None, "the run's folder (default: gpu_optimized_kd_<time> or sft_control_<time>)")
    per_device_train_batch_size: int = setting(1, "rows in one forward pass", "batch_size")
    gradient_accumulation_steps: int = setting(32, "forward passes in one optimisation step of a single process; "
                                               "with more ranks each takes its share")  # fmt: skip
    num_train_epochs: float = setting(1.0, "passes over the rows; max_steps wins if it is set", "epochs")
    max_steps: int = setting(-1, "optimisation steps; -1 leaves it to epochs")
    learning_rate: float = setting(2e-5, "peak learning rate of AdamW")
    lr_scheduler_type: str = setting("cosine", "learning rate schedule after the warm-up")
    warmup_steps: float = setting(20, "steps of linear warm-up")
    weight_decay: float = setting(0.01, "decoupled weight decay")
    bf16: bool | None = setting(None, "bf16 autocast (default: where the processor multiplies bf16)")
    logging_steps: float = setting(1, "steps between two rows of metrics.jsonl")
    eval_strategy: str = setting("steps", "when the validation rows are scored")
    eval_steps: float | None = setting(25, "steps between two scorings of the validation rows")
    save_steps: float = setting(25, "steps between two checkpoints")
    save_total_limit: int | None = setting(2, "checkpoints kept; 2 at least, so that one of them is complete")
    logging_nan_inf_filter: bool = setting(False, "off: a loss that is not a number must be seen")
    remove_unused_columns: bool = setting(False, "off: the collator wants whole rows")
    ddp_find_unused_parameters: bool | None = setting(False, "every adapter takes part in every step")
    report_to: str | None = setting("none", "experiment trackers of transformers, such as wandb")

    def __post_init__(self) -> None:
        self._check()
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and compute_dtype("cpu" if self.use_cpu else None) is torch.bfloat16
        self.disable_tqdm = True  # RunRecorder shows the progress
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        self.rows_per_step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        run_folder, self.output_dir = self.output_dir, self.output_dir or "outputs/unnamed"
        super().__post_init__()
        self.output_dir = run_folder
        # Trainer would wrap a student on one GPU in DataParallel where others are visible
        self._n_gpu = min(self.n_gpu, 1)

    def _check(self) -> None:
        for good, message in (
            (0 < self.temperature < math.inf, f"temperature must be above 0, got {self.temperature}"),
            (0 <= self.alpha <= 1, f"alpha must be between 0 and 1, got {self.alpha}"),
            (self.divergence != "jsd" or 0 < self.beta < 1, f"beta must be strictly inside (0, 1), got {self.beta}"),
            (0 <= self.validation_fraction < 0.5, "validation_fraction must be at least 0 and below 0.5"),
            (self.per_device_train_batch_size >= 1, "batch_size must be at least 1"),
            (self.gradient_accumulation_steps >= 1, "gradient_accumulation_steps must be at least 1"),
            (self.lora_r >= 1, "lora_r must be at least 1"),
            (0 < self.learning_rate < math.inf, f"learning_rate must be above 0, got {self.learning_rate}"),
            (self.max_length >= 2, "max_length must be at least 2"),
            (self.max_steps > 0 or self.max_steps == -1, "max_steps must be above 0, or -1 for whole epochs"),
            (self.save_total_limit is None or self.save_total_limit >= 2, "save_total_limit must be at least 2"),
        ):
            if not good:
                raise UserError(message)


# --- one run ---------------------------------------------------------------------------------------------------------


def _fingerprint(config: KDConfig, data: TrainingData) -> dict[str, Any]:
    settings = {name: value for name, value in config.to_dict().items() if name not in NOT_IN_FINGERPRINT}
    settings["rows_per_step"] = config.rows_per_step
    settings["student"] = model_fingerprint(config.model_name_or_path)
    settings["teacher"] = model_fingerprint(config.teacher_model_name_or_path)
    return json.loads(json.dumps(settings | data.hashes))


def _choose_folder(config: KDConfig, fingerprint: dict[str, Any]) -> Path:
    """The run's folder: named by the user, the one to go on with, a finished one of the same settings, or a new one."""
    if config.output_dir:
        return claim_folder(Path(config.output_dir), fingerprint, config.resume, config.overwrite)
    root = Path(config.experiment_dir).parent
    prefix = "gpu_optimized_kd" if config.alpha > 0 else "sft_control"
    finished, unfinished = find_runs(root, prefix, fingerprint)
    if finished and not config.overwrite:
        return finished
    if unfinished and config.resume and not config.overwrite:
        return unfinished
    return new_run_folder(root, prefix)


def _write_kd_config(folder: Path, config: KDConfig, fingerprint: dict[str, Any], data: TrainingData) -> None:
    everything = config.to_dict()
    names = {"per_device_train_batch_size": "batch_size", "num_train_epochs": "epochs"}
    own = [name for name in KDConfig.__annotations__ if name not in ("resume", "overwrite")]
    write_json(
        folder / "kd_config.json",
        {
            "experiment": Path(config.experiment_dir).name,
            "arm": "kd" if config.alpha > 0 else "sft",
            **{names.get(name, name): everything[name] for name in own},
            "seed": config.seed,
            "rows_per_step": config.rows_per_step,
            "rows": {"train": len(data.train), "validation": len(data.validation), "heldout": len(data.heldout),
                     "dropped_too_long": data.dropped},
            "hashes": data.hashes,
            "training_arguments": {name: value for name, value in everything.items() if name not in own},
            "fingerprint": fingerprint,
            "provenance": provenance(),
        },
    )  # fmt: skip


def _train(trainer: KDTrainer, folder: Path) -> None:
    """Train to the end, from the newest complete checkpoint if there is one."""
    from peft import load_peft_weights, set_peft_model_state_dict

    checkpoint = newest_complete_checkpoint(folder)
    state = read_json(checkpoint / "trainer_state.json") if checkpoint else {"global_step": 0, "max_steps": None}
    if trainer.is_world_process_zero():
        cut_metrics(folder / "metrics.jsonl", state["global_step"])
    if state["global_step"] == state["max_steps"]:
        logger.info("%s: the last step is in %s; writing the model", folder, checkpoint.name)
        set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint)))
        return
    if checkpoint:
        logger.info("%s: going on from step %d", folder, state["global_step"])
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{folder}: out of GPU memory; lower --batch_size or --max_length, or name more devices"
        ) from error


MODEL_CARD = """---
library_name: peft
base_model: {student}
tags: [knowledge-distillation, lora]
---
# {experiment}: {arm}

LoRA adapter of `{student}`, rank {rank}, trained on {rows} answers of `{teacher}` in {steps} steps of {rows_per_step}
rows.
Objective: {alpha} x T^2 x {divergence}(teacher, student) at T = {temperature}, plus {ce} x cross-entropy; seed {seed}.

Every setting is in `kd_config.json` of the run, every measured number in `kd_results.json`.
"""


def _save_final(trainer: KDTrainer, folder: Path, tokenizer: Any, rows: int) -> None:
    config = trainer.args
    with atomic_path(folder / "final_model") as made:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(made)
        tokenizer.save_pretrained(made)
        card = MODEL_CARD.format(
            student=config.model_name_or_path, teacher=config.teacher_model_name_or_path, rows=rows,
            experiment=Path(config.experiment_dir).name, arm="kd" if config.alpha > 0 else "sft control",
            steps=trainer.state.global_step or config.max_steps, rows_per_step=config.rows_per_step, alpha=config.alpha,
            divergence=config.divergence, temperature=config.temperature, ce=round(1 - config.alpha, 6),
            rank=config.lora_r, seed=config.seed,
        )  # fmt: skip
        write_text(made / "README.md", card)


def _heldout(trainer: KDTrainer, data: TrainingData) -> dict[str, Any]:
    """Before, after and teacher on the held-out rows, which are read here for the first time and only here."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    arms = {"before": model.disable_adapter, "after": contextlib.nullcontext}
    rows: list[dict[str, Any]] = []
    with Progress(len(data.heldout), "held-out rows") as progress, trainer.accelerator.autocast():
        for part in score_heldout(
            model, trainer.teacher, [p.student for p in data.heldout], [p.teacher for p in data.heldout],
            trainer.vocab_size, trainer.pad_id, 8, arms,
        ):  # fmt: skip
            rows += part
            progress.advance(len(part) // len(arms))
    before, after = (summarise([row for row in rows if row["arm"] == arm]) for arm in arms)
    teacher = summarise_teacher([row for row in rows if row["arm"] == "after"])
    return {
        "before": before,
        "after": after,
        "teacher": teacher,
        "gap_recovered": gap_recovered(before, after, teacher),
        "heldout_rows": len(data.heldout),
        "heldout_tokens": sum(row["num_tokens"] for row in rows if row["arm"] == "after"),
    }


def run_kd_pipeline(config: KDConfig | dict[str, Any] | str | Path) -> dict[str, Any]:
    """One training run, from clean rows to `final_model/`; with alpha = 0 it is the SFT control.

    Reads `experiment_dir`/sft/sft_{train,eval}_data_clean.jsonl. A finished run with the same fingerprint is returned
    as it is, an unfinished one is gone on with from its newest complete checkpoint.

    Args:
        config: a KDConfig, a mapping of its settings (names or aliases), or the path of a profile.

    Returns:
        What kd_results.json holds, and the paths `run_dir` and `final_model`.

    Raises:
        UserError: something the user must put right; the text says what and how.
    """
    if isinstance(config, str | Path):
        config = build_config(KDConfig, read_profile(config, SECTION, KDConfig), where=str(config))
    elif isinstance(config, dict):
        config = build_config(KDConfig, config)
    config = copy.deepcopy(config)
    for field in ("model_name_or_path", "teacher_model_name_or_path"):
        if not getattr(config, field):
            raise UserError(f"{field} is not set; name a profile with --config, or pass --{field}")
    if config.gradient_accumulation_steps % config.world_size:
        raise UserError(
            f"gradient_accumulation_steps = {config.gradient_accumulation_steps} does not divide among "
            f"{config.world_size} processes; a step always takes {config.rows_per_step} rows, so choose a divisor"
        )
    if config.world_size > 1 and (config.teacher_devices or config.student_devices):
        raise UserError("teacher_devices and student_devices are for one process; with several leave them empty")
    config.gradient_accumulation_steps //= config.world_size

    student_tokenizer = load_tokenizer(config.model_name_or_path)
    teacher_tokenizer = load_tokenizer(config.teacher_model_name_or_path)
    data = load_training_data(
        Path(config.experiment_dir) / "sft", student_tokenizer, teacher_tokenizer,
        config.max_length, config.validation_fraction, config.rows_per_step,
    )  # fmt: skip
    fingerprint = _fingerprint(config, data)
    chosen: list[Path | None] = [None]
    if config.process_index == 0:
        chosen = [_choose_folder(config, fingerprint)]
        if not (chosen[0] / "kd_config.json").is_file():
            _write_kd_config(chosen[0], config, fingerprint, data)
    [folder] = broadcast_object_list(chosen)
    results_path = folder / "kd_results.json"
    paths = {"run_dir": str(folder), "final_model": str(folder / "final_model")}
    if results_path.is_file():
        logger.info("%s is finished; nothing to do (--overwrite trains again)", folder)
        return read_json(results_path) | paths
    config.output_dir = str(folder)

    dtype = torch.bfloat16 if config.bf16 else torch.float32
    set_seed(config.seed)
    student_map, teacher_map = (
        place(name, devices, dtype, config.gpu_memory_gb) if devices else None  # else Trainer's device, one a rank
        for name, devices in (
            (config.model_name_or_path, config.student_devices),
            (config.teacher_model_name_or_path, config.teacher_devices),
        )
    )
    student = load_model(config.model_name_or_path, dtype, student_map)
    teacher = load_model(config.teacher_model_name_or_path, dtype, teacher_map).requires_grad_(False)
    if teacher_map is None:
        teacher.to(config.device)
    pairs = data.train + data.validation + data.heldout
    vocab_size = shared_vocabulary(
        student_tokenizer, teacher_tokenizer,
        student.get_output_embeddings().weight.shape[0], teacher.get_output_embeddings().weight.shape[0],
        [pair.student for pair in pairs], [pair.teacher for pair in pairs],
    )  # fmt: skip
    logger.info("teacher %s: %s", config.teacher_model_name_or_path, describe_size(teacher))
    logger.info("student %s: %s", config.model_name_or_path, describe_size(student))
    model = add_lora(student, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules)
    if config.activation_checkpointing:
        model.enable_input_require_grads()
    trainable = count_parameters(model, trainable=True)
    require_disk(folder, trainable * 4 * (3 * (config.save_total_limit or 2) + 4), "the run's checkpoints")
    _say_sizes(config, data, trainable, vocab_size)

    trainer = KDTrainer(
        model=model, args=config, train_dataset=data.train, teacher=teacher, vocab_size=vocab_size,
        eval_dataset=data.validation, pad_id=student_tokenizer.pad_token_id, callbacks=[RunRecorder(folder)],
    )  # fmt: skip
    if (folder / "final_model").is_dir():
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder / "final_model")))
    else:
        _train(trainer, folder)
        if trainer.is_world_process_zero():
            _save_final(trainer, folder, student_tokenizer, len(data.train))
    heldout = _heldout(trainer, data)
    results = {
        "experiment": Path(config.experiment_dir).name,
        "arm": "kd" if config.alpha > 0 else "sft",
        **heldout,
        **training_facts(folder),
        "trainable_parameters": trainable,
        "total_parameters": count_parameters(model),
    }
    if trainer.is_world_process_zero():
        write_json(results_path, results)
    return results | paths


def _say_sizes(config: KDConfig, data: TrainingData, trainable: int, vocab_size: int) -> None:
    """Print what follows from the settings, before the work starts."""
    tokens = sum(len(pair.student) for pair in data.train)
    answers = sum(len(pair.student.response_ids) for pair in data.train)
    steps_per_epoch = len(data.train) // config.rows_per_step
    steps = config.max_steps if config.max_steps > 0 else int(steps_per_epoch * config.num_train_epochs)
    share = config.rows_per_step / len(data.train)
    logger.info(
        "rows: %d to train on, %d validation, %d held out, %d dropped as longer than %d tokens",
        len(data.train), len(data.validation), len(data.heldout), data.dropped, config.max_length,
    )  # fmt: skip
    logger.info(
        "a step: %d rows = %d x %d x %d (batch x accumulation x processes), about %d tokens, %d of them answers",
        config.rows_per_step, config.per_device_train_batch_size, config.gradient_accumulation_steps, config.world_size,
        tokens * share, answers * share,
    )  # fmt: skip
    reason = f"max_steps wins over {config.num_train_epochs:g} epochs" if config.max_steps > 0 else "from epochs"
    logger.info("%d steps (%s), %.2f epochs", steps, reason, steps / steps_per_epoch)
    logger.info(
        "loss: %g x %g^2 x %s + %g x CE over %d shared tokens; %s trainable parameters; products in %s",
        config.alpha, config.temperature, config.divergence, 1 - config.alpha, vocab_size, f"{trainable:,}",
        "bf16 autocast" if config.bf16 else "fp32",
    )  # fmt: skip
