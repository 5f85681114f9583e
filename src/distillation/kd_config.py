"""The settings of one training run: all there are, and which of them make it the run that it is."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from src.distillation.base import LORA_TARGETS, compute_dtype
from src.distillation.losses import DIVERGENCES
from src.distillation.sft import Sampling
from src.utils.common import UserError
from src.utils.config import setting

SECTION = "run_improved_kd"
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")  # functions of the step alone
SIGNALS = ("hidden", "topk", "online")
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd")

CHOICES = {
    "divergence": DIVERGENCES,
    "teacher_signal": SIGNALS,
    "lr_scheduler_type": SCHEDULES,
    "optim": OPTIMIZERS,
}
# how the rows of a step are cut into passes
CUT = ("packing", "tokens_per_batch", "per_device_train_batch_size", "gradient_accumulation_steps")
ADDED_LATER = ("load_in_4bit", "teacher_top_k", "teacher_top_p")  # at its default each is left out of a run's identity
# settings of on-policy rounds that make a run; idle where there are none
ON_POLICY = (
    "on_policy_rounds", "on_policy_fraction", "on_policy_temperature", "on_policy_top_p", "on_policy_top_k",
    "on_policy_max_new_tokens",
)  # fmt: skip


@dataclass
class Conduct:
    """Settings that cannot change what is learned: where things lie, how the work is cut, what is written down.

    A run goes on, and keeps its control, when one of them changes; but for dropout, whose draws go by the pass.
    """

    # models and folders
    model_name_or_path: str = setting("", "folder or hub id of the student", "student_name_or_path")
    teacher_model_name_or_path: str = setting("", "folder or hub id of the teacher", "teacher_model")
    init_from: str | None = setting(
        None,
        "begin from the adapter of a run (its folder, or final_model) instead of a fresh one; optimiser and "
        "schedule begin anew; the adapter is read again whenever the run is gone on with or asked for, so keep it",
    )
    experiment_dir: str = setting(
        "outputs/experiment/default", "its folder sft/ holds the clean rows; runs go beside it"
    )
    output_dir: str | None = setting(None, "the run's folder (default: gpu_optimized_kd_<time> or sft_control_<time>)")
    resume: bool = setting(
        True, "go on with the newest unfinished run of the same settings; --no_resume starts another"
    )
    overwrite: bool = setting(False, "train again although a finished run of the same settings, or the folder, exists")

    # rows and steps; batch_size x gradient_accumulation_steps rows make a step, whatever its passes are
    per_device_train_batch_size: int = setting(
        1,
        "times gradient_accumulation_steps: rows of a step; rows of one pass where tokens_per_batch is 0",
        "batch_size",
    )
    gradient_accumulation_steps: int = setting(32, "times batch_size: rows of a step, over all processes")

    # how it is computed
    packing: bool = setting(True, "lay the rows of a pass end to end; --no_packing pads them to the longest")
    tokens_per_batch: int | None = setting(
        None, "most tokens in one packed forward pass (default: what the device has memory for; 0: as batch_size says)"
    )
    gradient_checkpointing: bool = setting(
        False, "compute activations again in the backward pass instead of keeping them"
    )
    compile_loss: bool | None = setting(None, "compiled loss kernel (default: where there is a compiler)")
    compile_layers: bool | None = setting(
        None, "compile the student's layers (default: on a CPU with AMX, in runs long enough to win it back)"
    )
    liger: bool | None = setting(None, "Liger's kernels for norms, RoPE and SwiGLU (default: on a GPU that has them)")
    use_cpu: bool = setting(False, "leave GPUs alone")
    teacher_devices: list[int] = setting(
        [], "GPUs the teacher is spread over: online (one process), or to read the answers of a round"
    )
    student_devices: list[int] = setting([], "GPUs the student is spread over (one process)")
    gpu_memory_gb: float = setting(36.0, "weights one GPU may hold, 1e9 bytes")
    cpu_offload: bool = setting(
        False, "keep the teacher's layers beyond gpu_memory_gb in CPU memory; they pass through a GPU as they run"
    )
    on_policy_batch_size: int = setting(32, "rows in one forward pass of the student that answers for a round")
    on_policy_serve: str = setting(
        "", "the server that a round starts for its answers and stops: {command: vllm} or sglang, as `serve` elsewhere"
    )

    # what is written down
    logging_steps: int = setting(
        1, "steps between two rows of metrics.jsonl; checkpoints and validations bring one along"
    )
    eval_steps: int = setting(25, "steps between two scorings of the validation rows; 0: never")
    save_steps: int = setting(25, "steps between two checkpoints; 0: never")
    save_total_limit: int = setting(2, "checkpoints kept, 2 at least, so that one of them is complete; 0: all")
    report_to: str = setting(
        "none",
        "experiment tracker: tensorboard, trackio, wandb, mlflow, or another that accelerate knows and that is here",
    )


@dataclass
class KDConfig(Conduct):
    """One training run. The defaults are the reference recipe; names are those of transformers' TrainingArguments
    where they exist there. The settings below make a run the run that it is."""

    # the objective
    temperature: float = setting(2.5, "KD softmax temperature T of teacher and student", "kd_temperature")
    teacher_temperature: float | None = setting(
        None, "softmax temperature of the teacher alone, such as the one its answers were sampled at (default: T)"
    )
    teacher_top_k: int = setting(
        0, "keep the teacher's k most probable tokens, such as its answers were sampled with; 0: all"
    )
    teacher_top_p: float = setting(
        1.0, "keep the teacher's most probable tokens up to this mass, after teacher_top_k; 1: all"
    )
    alpha: float = setting(0.8, "weight of the divergence; 0 is plain SFT, the control", "kd_alpha", "kd_ratio")
    divergence: Literal[DIVERGENCES] = setting("forward_kl", "what is distilled")  # type: ignore[valid-type]
    beta: float = setting(0.5, "the teacher's weight in the mixture of jsd, from 1e-6 to 1 - 1e-6")
    teacher_signal: Literal[SIGNALS] = setting(  # type: ignore[valid-type]
        "hidden", "the teacher's beliefs: hidden or topk from scripts/cache_teacher.py, online from a resident teacher"
    )

    # rounds of the student's own answers: with alpha = 1 GKD (Agarwal et al. 2024, algorithm 1), lambda = the fraction
    on_policy_rounds: int = setting(
        0, "parts of the run, before each of which the student answers prompts of the training rows; 0: none"
    )
    on_policy_fraction: float = setting(0.5, "share of a step's rows that are the student's own answers; 0: none")
    on_policy_temperature: float = setting(1.0, "sampling temperature of the student's answers; 0 is greedy")
    on_policy_top_p: float = setting(1.0, "nucleus of the student's answers; 1 is off")
    on_policy_top_k: int = setting(0, "candidates a token of the student's answers; 0 is off")
    on_policy_max_new_tokens: int = setting(
        768, "longest answer of the student, end of turn included; a prompt that leaves it no room is not asked"
    )

    # rows and steps; batch_size x gradient_accumulation_steps rows make a step, whatever its passes are
    max_length: int = setting(1024, "longest row in tokens, prompt and answer; longer rows are dropped and counted")
    validation_fraction: float = setting(0.05, "share of the training rows set aside, chosen by the hash of their id")
    num_train_epochs: float = setting(1.0, "passes over the rows; max_steps wins if it is set", "epochs")
    max_steps: int = setting(-1, "optimisation steps; -1 leaves it to epochs")
    seed: int = setting(42, "of the adapters, dropout and, with data_seed, the order of the rows")
    data_seed: int | None = setting(None, "of the order of the rows (default: seed)")

    # the optimiser
    learning_rate: float = setting(2e-5, "peak learning rate")
    lr_scheduler_type: Literal[SCHEDULES] = setting("cosine", "after the warm-up; constant has none")  # type: ignore[valid-type]
    warmup_steps: int = setting(20, "steps of linear warm-up")
    weight_decay: float = setting(0.01, "decoupled weight decay")
    max_grad_norm: float = setting(1.0, "the gradient is scaled down to this norm; 0: never")
    optim: Literal[OPTIMIZERS] = setting("adamw_torch_fused", "the optimiser")  # type: ignore[valid-type]
    adam_beta1: float = setting(0.9, "AdamW's decay of the mean of gradients")
    adam_beta2: float = setting(0.999, "AdamW's decay of the mean of squared gradients")
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon")

    # the adapters
    lora_r: int = setting(64, "rank of the adapters")
    lora_alpha: int = setting(128, "LoRA scale: the update is multiplied by lora_alpha / lora_r")
    lora_dropout: float = setting(0.0, "dropout before the adapters")
    lora_target_modules: list[str] = setting(list(LORA_TARGETS), "projections that get an adapter")

    # how it is computed
    load_in_4bit: bool = setting(
        False, "the frozen student in 4 bits (NF4, bitsandbytes); its adapter goes on the model in bf16 afterwards"
    )
    bf16: bool | None = setting(None, "bf16 autocast (default: where the processor multiplies bf16)")

    def __post_init__(self) -> None:
        # what is left to the machine is settled here, before anything is stored
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        if self.bf16 is None:
            self.bf16 = compute_dtype("cpu" if self.use_cpu else None) is torch.bfloat16
        self.data_seed = self.seed if self.data_seed is None else self.data_seed
        self._check()

    @property
    def rows_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and the products; adapters, optimiser and sums are fp32."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def arm(self) -> str:
        return "kd" if self.alpha > 0 else "sft"

    @property
    def on_policy(self) -> bool:
        """Whether the student learns from answers of its own too; with alpha = 0 they would teach nothing."""
        return self.on_policy_rounds > 0 and self.on_policy_fraction > 0 and self.alpha > 0

    @property
    def own_rows_per_step(self) -> int:
        """Rows of a step that are the student's own answers."""
        # one at least: a share above 0 is never rounded away
        return max(1, round(self.on_policy_fraction * self.rows_per_step)) if self.on_policy else 0

    def identity(self) -> dict[str, Any]:
        """What makes it this run and no other: every setting that can change what is learned."""
        conduct = {field.name for field in dataclasses.fields(Conduct)}
        # a pass draws its own dropout, so how the rows are cut into passes is part of the run
        if self.lora_dropout:
            conduct -= set(CUT)
        for field in dataclasses.fields(self):  # runs from before there was the choice are the same runs
            if field.name in ADDED_LATER and getattr(self, field.name) == field.default:
                conduct.add(field.name)
        if not self.on_policy:
            conduct |= set(ON_POLICY)
        # the product stands for its two factors, which are conduct
        settings = dataclasses.asdict(self) | {"rows_per_step": self.rows_per_step}
        return {name: value for name, value in settings.items() if name not in conduct}

    def _check(self) -> None:
        for name, known in CHOICES.items():  # a caller in Python has passed no parser
            value = getattr(self, name)
            _need(value in known, f"{name}: invalid choice: {value!r} (choose from {', '.join(known)})")
        _need(0 < self.temperature < math.inf, f"temperature must be above 0, got {self.temperature}")
        self._check_teachers_own()
        _need(0 <= self.alpha <= 1, f"alpha must be between 0 and 1, got {self.alpha}")
        # nearer to either end fp32 rounds the mixture to one of its parts, and the loss may be infinite
        beta_fits = self.divergence != "jsd" or 1e-6 <= self.beta <= 1 - 1e-6
        _need(beta_fits, f"beta must be at least 1e-6 and at most 1 - 1e-6, got {self.beta}")
        # with alpha 0 the signal only measures
        topk_fits = self.teacher_signal != "topk" or self.divergence == "forward_kl" or self.alpha == 0
        _need(
            topk_fits, f"a top-k cache knows forward_kl only; {self.divergence} needs --teacher_signal hidden or online"
        )
        self._check_on_policy()
        _need(0 <= self.validation_fraction < 0.5, "validation_fraction must be at least 0 and below 0.5")
        _need(self.per_device_train_batch_size >= 1, "batch_size must be at least 1")
        for name in ("gradient_accumulation_steps", "lora_r", "logging_steps"):
            _need(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "eval_steps", "save_steps"):
            _need(0 <= getattr(self, name) < math.inf, f"{name} must not be below 0")
        _need(0 < self.learning_rate < math.inf, f"learning_rate must be above 0, got {self.learning_rate}")
        _need(0 <= self.lora_dropout < 1, "lora_dropout must be at least 0 and below 1")
        _need(self.max_length >= 2, "max_length must be at least 2")
        _need(self.max_steps > 0 or self.max_steps == -1, "max_steps must be above 0, or -1 for whole epochs")
        _need(0 < self.num_train_epochs < math.inf, "epochs must be above 0")
        tokens = self.tokens_per_batch
        _need(tokens is None or tokens >= 0, "tokens_per_batch must not be below 0")
        _need(self.packing or not tokens, "tokens_per_batch counts packed tokens; leave packing on")
        _need(
            self.save_total_limit == 0 or self.save_total_limit >= 2, "save_total_limit must be at least 2, or 0: all"
        )

    def _check_on_policy(self) -> None:
        _need(self.on_policy_rounds >= 0, "on_policy_rounds must not be below 0")
        fraction = self.on_policy_fraction
        _need(0 <= fraction <= 1, f"on_policy_fraction must be between 0 and 1, got {fraction}")
        _need(self.on_policy_batch_size >= 1, "on_policy_batch_size must be at least 1")
        try:
            self.own_sampling(self.on_policy_max_new_tokens)
        except UserError as error:
            raise UserError(f"on_policy_{error}") from None

    def kept_checkpoints(self, steps: int) -> int:
        """Most checkpoints that lie in the folder of a run of so many steps, but for one that is being written."""
        if self.save_total_limit:
            return self.save_total_limit
        made = math.ceil(steps / self.save_steps) if self.save_steps else 0
        return made + (self.on_policy_rounds if self.on_policy else 0)  # a round ends with one

    def own_sampling(self, max_new_tokens: int) -> Sampling:
        """How the student's own answers are drawn."""
        return Sampling(self.on_policy_temperature, self.on_policy_top_p, self.on_policy_top_k, max_new_tokens)

    def _check_teachers_own(self) -> None:
        """Temperature and filters of the teacher's softmax alone."""
        own, k, mass = self.teacher_temperature, self.teacher_top_k, self.teacher_top_p
        _need(own is None or 0 < own < math.inf, f"teacher_temperature must be above 0, got {own}")
        _need(k >= 0, f"teacher_top_k must be 0 (all) or more, got {k}")
        _need(0 < mass <= 1, f"teacher_top_p must be above 0 and at most 1, got {mass}")
        if self.alpha == 0 or (k == 0 and mass == 1):
            return
        _need(
            self.divergence != "reverse_kl",
            "reverse_kl is infinite where teacher_top_k or teacher_top_p leave the teacher a probability of 0; take "
            "--divergence forward_kl or jsd, or leave both out",
        )
        _need(
            self.teacher_signal != "topk",
            "teacher_top_k and teacher_top_p cut the teacher's whole distribution, which a top-k cache does not have; "
            "take --teacher_signal hidden or online, or leave both out",
        )


def _need(good: bool, message: str) -> None:
    if not good:
        raise UserError(message)
