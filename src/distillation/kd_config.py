"""The settings of one training run."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import TrainingArguments

from src.distillation.base import LORA_TARGETS, compute_dtype
from src.distillation.losses import DIVERGENCES
from src.utils.common import UserError
from src.utils.config import setting

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


# The objective, the batches, the measures and the resuming are our own, so these would be stored as if they had taken
# effect, or (save_only_model, ignore_data_skip) let a run that goes on end as another.
WITHOUT_EFFECT = (
    "auto_find_batch_size", "average_tokens_across_devices", "batch_eval_metrics", "bf16_full_eval",
    "dataloader_drop_last", "dataloader_num_workers", "eval_accumulation_steps", "eval_do_concat_batches",
    "eval_use_gather_object", "fp16_full_eval", "greater_is_better", "ignore_data_skip",
    "label_names", "label_smoothing_factor", "length_column_name", "liger_kernel_config", "load_best_model_at_end",
    "metric_for_best_model", "per_device_eval_batch_size", "prediction_loss_only", "resume_from_checkpoint",
    "save_only_model", "train_sampling_strategy", "use_liger_kernel",
)  # fmt: skip


@dataclass
class KDConfig(TrainingArguments):
    """One training run. The defaults are the reference recipe; everything of TrainingArguments is a setting too."""

    model_name_or_path: str = setting("", "folder or hub id of the student", "student_name_or_path")
    teacher_model_name_or_path: str = setting("", "folder or hub id of the teacher", "teacher_model")
    experiment_dir: str = setting(
        "outputs/experiment/default", "its folder sft/ holds the clean rows; runs go beside it"
    )
    temperature: float = setting(2.5, "KD softmax temperature T of teacher and student", "kd_temperature")
    teacher_temperature: float | None = setting(
        None, "softmax temperature of the teacher alone, such as the one its answers were sampled at (default: T)"
    )
    alpha: float = setting(0.8, "weight of the divergence; 0 is plain SFT, the control", "kd_alpha", "kd_ratio")
    divergence: Literal[DIVERGENCES] = setting("forward_kl", "what is distilled")  # type: ignore[valid-type]
    beta: float = setting(0.5, "the teacher's weight in the mixture of jsd, from 1e-6 to 1 - 1e-6")
    teacher_signal: Literal["hidden", "topk", "online"] = setting(
        "hidden", "the teacher's beliefs: hidden or topk from scripts/cache_teacher.py, online from a resident teacher"
    )
    max_length: int = setting(1024, "longest row in tokens, prompt and answer; longer rows are dropped and counted")
    packing: bool = setting(True, "lay a micro-batch's rows end to end; --no_packing pads them to the longest")
    tokens_per_batch: int = setting(0, "most tokens in one packed forward pass, which then decides how many a step "
                                       "takes instead of batch_size; 0: batch_size decides")  # fmt: skip
    compile_loss: bool | None = setting(None, "compiled loss kernel (default: where there is a compiler)")
    compile_layers: bool = setting(False, "compile the student's layers: slow first steps, faster ones after")
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
    per_device_train_batch_size: int = setting(1, "rows in one forward pass; packed ones are shared out by tokens, "
                                               "so that this is their mean", "batch_size")  # fmt: skip
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
        unused = [name for name in WITHOUT_EFFECT if getattr(self, name) != getattr(TrainingArguments, name)]
        if unused:
            raise UserError(f"{unused[0]} of transformers' TrainingArguments has no meaning here; leave it out")
        for good, message in (
            (0 < self.temperature < math.inf, f"temperature must be above 0, got {self.temperature}"),
            (
                self.teacher_temperature is None or 0 < self.teacher_temperature < math.inf,
                f"teacher_temperature must be above 0, got {self.teacher_temperature}",
            ),
            (0 <= self.alpha <= 1, f"alpha must be between 0 and 1, got {self.alpha}"),
            # nearer to either end fp32 rounds the mixture to one of its parts, and the loss may be infinite
            (
                self.divergence != "jsd" or 1e-6 <= self.beta <= 1 - 1e-6,
                f"beta must be at least 1e-6 and at most 1 - 1e-6, got {self.beta}",
            ),
            (0 <= self.validation_fraction < 0.5, "validation_fraction must be at least 0 and below 0.5"),
            (self.per_device_train_batch_size >= 1, "batch_size must be at least 1"),
            (self.gradient_accumulation_steps >= 1, "gradient_accumulation_steps must be at least 1"),
            (self.lora_r >= 1, "lora_r must be at least 1"),
            (0 < self.learning_rate < math.inf, f"learning_rate must be above 0, got {self.learning_rate}"),
            (self.max_length >= 2, "max_length must be at least 2"),
            (self.packing or not self.tokens_per_batch, "tokens_per_batch counts packed tokens; leave packing on"),
            (not self.torch_compile, "torch_compile does not reach the layers here; pass --compile_layers"),
            (
                self.lr_scheduler_type not in ("reduce_lr_on_plateau", "greedy"),
                "lr_scheduler_type must follow from the step alone, or a resumed run would not end as another",
            ),
            (self.max_steps > 0 or self.max_steps == -1, "max_steps must be above 0, or -1 for whole epochs"),
            (
                self.teacher_signal != "topk" or self.divergence == "forward_kl" or self.alpha == 0,
                f"a top-k cache knows forward_kl only; {self.divergence} needs --teacher_signal hidden or online",
            ),
            (self.save_total_limit is None or self.save_total_limit >= 2, "save_total_limit must be at least 2"),
        ):
            if not good:
                raise UserError(message)
