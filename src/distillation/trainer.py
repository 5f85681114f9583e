"""KDTrainer: transformers' Trainer with the distillation objective on the backbone's hidden states."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from src.distillation.base import causal_lm, head_weight, logit_map, response_hidden
from src.distillation.batching import Pair, StepBatches, collate_pairs
from src.distillation.heldout import Arm, score_heldout, summarise
from src.distillation.losses import LossSums, TopK, kd_loss
from src.distillation.packing import ATTENTION
from src.distillation.runs import peak_memory_mb
from src.distillation.teacher_signal import TeacherSignal
from src.utils.common import Progress

GPU_RNG = "gpu_rng_{}.safetensors"  # in a checkpoint, one a rank


def call_inside(model: nn.Module, inner: nn.Module, function: Callable[[], Any]) -> Any:
    """Run `function` as the forward of a wrapped model, so that DDP and FSDP see their forward and sync gradients.

    What it needs it brings along: arguments of the forward would be cast to bf16 by FSDP's mixed precision.
    """
    had_own = "forward" in inner.__dict__
    original = inner.forward

    def restore() -> None:
        if had_own:
            inner.forward = original
        else:
            inner.__dict__.pop("forward", None)

    def forward() -> Any:
        restore()
        return function()

    inner.forward = forward
    try:
        return model()
    finally:
        restore()


class _SetEpoch(TrainerCallback):
    """Tells the batches which epoch it is; accelerate forgets to on a resumed one."""

    def __init__(self, trainer: "KDTrainer") -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.batches.set_epoch(int(state.epoch + 1e-6))


class KDTrainer(Trainer):
    """Trainer with the distillation objective on the backbone's hidden states.

    Args:
        teacher: its signal; with alpha = 0 it only scores the validation rows.
        vocab_size: the shared vocabulary.
        parts: micro-batches of one optimisation step, over all ranks.
        compiled: run the loss as one compiled kernel.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole optimisation step

    def __init__(self, *, teacher: TeacherSignal, vocab_size: int, pad_id: int, parts: int, compiled: bool,
                 **keywords: Any) -> None:  # fmt: skip
        packing = keywords["args"].packing
        super().__init__(data_collator=lambda pairs: collate_pairs(pairs, pad_id, packing), **keywords)
        self.teacher, self.vocab_size, self.pad_id, self.compiled = teacher, vocab_size, pad_id, compiled
        lengths = [len(pair.student) for pair in self.train_dataset]
        self.batches = StepBatches(lengths, self.args.rows_per_step, parts, self.args.data_seed, packing)
        inner = self.accelerator.unwrap_model(self.model)
        self.logit_map = logit_map(inner)
        if packing:
            causal_lm(inner).set_attn_implementation(ATTENTION)  # for good: checkpointing reads it in the backward too
        self.remove_callback(PrinterCallback)
        self.add_callback(_SetEpoch(self))
        self._start_window()

    def _start_window(self) -> None:
        self._sums = torch.zeros(2)  # kd and ce of the steps since the last log, each a mean over its step's tokens
        self._steps = 0
        self._tokens = 0
        self._window = time.monotonic()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast()  # accelerate autocasts model.forward only, and the backbone is called inside

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if torch.cuda.is_available():  # Trainer keeps the first GPU's alone
            states = {str(i): state for i, state in enumerate(torch.cuda.get_rng_state_all())}
            save_file(states, f"{output_dir}/{GPU_RNG.format(self.args.process_index)}")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        path = Path(checkpoint or "") / GPU_RNG.format(self.args.process_index)
        if checkpoint and torch.cuda.is_available() and path.is_file():
            states = load_file(path)
            torch.cuda.set_rng_state_all([states[str(i)] for i in range(torch.cuda.device_count())])

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def _loss_sums(self, batch: dict[str, Any]) -> LossSums:
        inner = self.accelerator.unwrap_model(self.model)
        hidden, labels = response_hidden(inner, batch)
        beliefs = head = None
        if self.args.alpha > 0 and self.teacher.topk is not None:
            beliefs = TopK(*(tensor.to(hidden.device) for tensor in self.teacher.topk(batch["teacher_rows"])))
        elif self.args.alpha > 0:
            beliefs = self.teacher.hidden(batch["teacher_rows"]).to(hidden.device)
            head = self.teacher.head_on(hidden.device)
        return kd_loss(
            hidden, head_weight(inner, self.vocab_size).to(hidden.device), beliefs, head, labels,
            temperature=self.args.temperature, alpha=self.args.alpha, kind=self.args.divergence, beta=self.args.beta,
            student_map=self.logit_map, teacher_map=self.teacher.logit_map, compiled=self.compiled,
            teacher_temperature=self.args.teacher_temperature,
        )  # fmt: skip

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
                     num_items_in_batch: Tensor | int | None = None) -> Tensor:  # fmt: skip
        sums = call_inside(model, self.accelerator.unwrap_model(model), lambda: self._loss_sums(inputs))
        # DDP averages gradients over ranks, so each rank divides by its share of the step's tokens
        tokens = torch.as_tensor(num_items_in_batch).clamp(min=1).to(sums.loss.device) / self.accelerator.num_processes
        self._sums = self._sums.to(sums.loss.device) + torch.stack([sums.kd, sums.ce]) / tokens
        self._tokens += sum(len(row) for row in inputs["rows"])
        self._steps += self.accelerator.sync_gradients
        return (sums.loss / tokens).to(self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            ranks = self.accelerator.num_processes
            sums = self.accelerator.reduce(self._sums.to(self.args.device)) / (ranks * max(self._steps, 1))
            tokens = self.accelerator.reduce(torch.tensor(self._tokens, device=self.args.device)).item()
            logs["kd_loss"], logs["ce_loss"] = sums.tolist()
            logs["tokens"] = tokens
            logs["tokens_per_second"] = tokens / (time.monotonic() - self._window)
            logs["peak_memory_mb"] = peak_memory_mb()
            self._start_window()
        super().log(logs, start_time)

    def score(
        self, pairs: Sequence[Pair], arms: dict[str, Arm], progress: Progress | None = None
    ) -> list[dict[str, Any]]:
        """`score_heldout` of these rows, in the precision of training and inside the wrapped model's forward."""
        inner = self.accelerator.unwrap_model(self.model)
        rows: list[dict[str, Any]] = []

        def inside() -> None:
            with self.autocast_smart_context_manager():
                for part in score_heldout(
                    inner, self.teacher, [pair.student for pair in pairs], [pair.teacher for pair in pairs],
                    self.vocab_size, self.pad_id, 8, arms, self.args.packing,
                ):  # fmt: skip
                    rows.extend(part)
                    if progress:
                        progress.advance(len(part) // len(arms))

        call_inside(self.model_wrapped, inner, inside)
        return rows

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the validation rows: KL to the teacher, NLL and top-1 agreement at T = 1."""
        started = time.monotonic()
        rows = self.score(self.eval_dataset, {"student": contextlib.nullcontext}) if self.eval_dataset else []
        metrics = {f"validation_{name}": value for name, value in summarise(rows).items()} if rows else {}
        self.log(metrics)
        self._window += time.monotonic() - started  # training speed does not count this pause
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
