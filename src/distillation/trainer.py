"""KDTrainer: transformers' Trainer with the distillation objective on the backbone's hidden states."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from src.distillation.base import head_weight, response_hidden
from src.distillation.batching import StepBatches, collate_pairs
from src.distillation.heldout import score_heldout, summarise
from src.distillation.losses import LossSums, kd_loss
from src.distillation.runs import peak_memory_mb


def call_inside(model: nn.Module, inner: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run `function` as the forward of a wrapped model, so that DDP and FSDP see their forward and sync gradients."""
    had_own = "forward" in inner.__dict__
    original = inner.forward

    def restore() -> None:
        if had_own:
            inner.forward = original
        else:
            inner.__dict__.pop("forward", None)

    def forward(*args: Any) -> Any:
        restore()
        return function(*args)

    inner.forward = forward
    try:
        return model(*arguments)
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
        teacher: the frozen teacher; with alpha = 0 it only scores the validation rows.
        vocab_size: the shared vocabulary.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole optimisation step

    def __init__(self, *, teacher: nn.Module, vocab_size: int, pad_id: int, **keywords: Any) -> None:
        self.pad_id, self.vocab_size = pad_id, vocab_size
        with_teacher = keywords["args"].alpha > 0
        super().__init__(data_collator=lambda pairs: collate_pairs(pairs, pad_id, with_teacher), **keywords)
        self.teacher = teacher
        self._teacher_head: Tensor | None = None
        self.remove_callback(PrinterCallback)
        self.add_callback(_SetEpoch(self))
        self._start_window()

    def _start_window(self) -> None:
        self._sums = torch.zeros(2)  # kd and ce of the steps since the last log, each a mean over its step's tokens
        self._steps = 0
        self._tokens = torch.zeros((), dtype=torch.long)
        self._window = time.monotonic()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast()  # accelerate autocasts model.forward only, and the backbone is called inside

    def get_train_dataloader(self) -> DataLoader:
        lengths = [len(pair.student) for pair in self.train_dataset]
        rows = self.args.per_device_train_batch_size
        self.batches = StepBatches(lengths, self.args.rows_per_step, rows, self.args.data_seed)
        loader = DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def teacher_head(self, device: torch.device) -> Tensor:
        """The teacher's output matrix on the student's last device."""
        if self._teacher_head is None or self._teacher_head.device != device:
            self._teacher_head = head_weight(self.teacher, self.vocab_size).detach().to(device)
        return self._teacher_head

    def _loss_sums(self, batch: dict[str, Tensor]) -> LossSums:
        inner = self.accelerator.unwrap_model(self.model)
        hidden, labels = response_hidden(inner, batch)
        teacher_hidden = teacher_head = None
        if self.args.alpha > 0:
            with torch.no_grad():
                prefix = "teacher_"
                own = {key.removeprefix(prefix): value for key, value in batch.items() if key.startswith(prefix)}
                teacher_hidden, _ = response_hidden(self.teacher, own)
            teacher_hidden, teacher_head = teacher_hidden.to(hidden.device), self.teacher_head(hidden.device)
        return kd_loss(
            hidden, head_weight(inner, self.vocab_size).to(hidden.device), teacher_hidden, teacher_head, labels,
            temperature=self.args.temperature, alpha=self.args.alpha, kind=self.args.divergence, beta=self.args.beta,
        )  # fmt: skip

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
                     num_items_in_batch: Tensor | int | None = None) -> Tensor:  # fmt: skip
        sums = call_inside(model, self.accelerator.unwrap_model(model), self._loss_sums, inputs)
        # DDP averages gradients over ranks, so each rank divides by its share of the step's tokens
        tokens = torch.as_tensor(num_items_in_batch).clamp(min=1).to(sums.loss.device) / self.accelerator.num_processes
        self._sums = self._sums.to(sums.loss.device) + torch.stack([sums.kd, sums.ce]) / tokens
        self._tokens = self._tokens.to(self.args.device) + inputs["attention_mask"].sum()
        self._steps += self.accelerator.sync_gradients
        return (sums.loss / tokens).to(self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            ranks = self.accelerator.num_processes
            sums = self.accelerator.reduce(self._sums.to(self.args.device)) / (ranks * max(self._steps, 1))
            tokens = self.accelerator.reduce(self._tokens).item()
            logs["kd_loss"], logs["ce_loss"] = sums.tolist()
            logs["tokens"] = tokens
            logs["tokens_per_second"] = tokens / (time.monotonic() - self._window)
            logs["peak_memory_mb"] = peak_memory_mb()
            self._start_window()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the validation rows: KL to the teacher, NLL and top-1 agreement at T = 1."""
        started = time.monotonic()
        rows: list[dict[str, Any]] = []
        inner = self.accelerator.unwrap_model(self.model)
        ours_and_theirs = [p.student for p in self.eval_dataset], [p.teacher for p in self.eval_dataset]
        if self.eval_dataset:

            def score(_: None) -> None:
                with self.autocast_smart_context_manager():
                    for part in score_heldout(
                        inner, self.teacher, *ours_and_theirs, self.vocab_size, self.pad_id, 8,
                        {"student": contextlib.nullcontext},
                    ):  # fmt: skip
                        rows.extend(part)

            call_inside(self.model_wrapped, inner, score, None)
        metrics = {f"validation_{name}": value for name, value in summarise(rows).items()} if rows else {}
        self.log(metrics)
        self._window += time.monotonic() - started  # training speed does not count this pause
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
