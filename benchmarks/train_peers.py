"""The other ways to take a step in `train_step.py`: TRL's GKDTrainer, and a loop as one writes it in plain torch."""

from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.train_job import encoded
from src.distillation.base import collate, load_model
from src.distillation.kd import KDConfig
from src.distillation.lora import add_lora
from src.distillation.losses import plain_kd_loss
from src.utils.config import build_config


def models(config: KDConfig) -> tuple[Any, Any]:
    names = config.model_name_or_path, config.teacher_model_name_or_path
    student, teacher = (load_model(name, config.dtype).to(harness.device()) for name in names)
    return student, teacher.requires_grad_(False)


def trl_gkd(name: str, job: dict[str, Any], folder: Path) -> list[float]:
    """At T = 1 whatever it is told: `temperature` is of its answers, its loss does not read it."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config = build_config(KDConfig, job["profile"])
    tokenizer, pairs, rows = encoded(job, folder)
    student, teacher = models(config)
    # its collator takes these ids, and from the mask where the answer begins; without `messages` it finds no prompt
    data = [
        {"input_ids": [*pair.prompt_ids, *pair.response_ids], "messages": row["messages"],
         "completion_mask": [0] * len(pair.prompt_ids) + [1] * len(pair.response_ids)}
        for pair, row in zip(pairs, rows, strict=True)
    ]  # fmt: skip
    # what both sides set alike
    keep = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type",
            "warmup_steps", "weight_decay", "seed", "max_length", "bf16")  # fmt: skip
    arguments = GKDConfig(
        # lmbda 0: no answers of the student's own; beta 0: the forward KL
        output_dir=str(folder / name), lmbda=0.0, beta=0.0, gradient_checkpointing=name == "trl_gkd_default",
        num_train_epochs=job["epochs"], max_grad_norm=job["max_grad_norm"], use_cpu=not torch.cuda.is_available(),
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        **{field: getattr(config, field) for field in keep},
    )  # fmt: skip
    lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                      target_modules=config.lora_target_modules, task_type="CAUSAL_LM")  # fmt: skip
    trainer = GKDTrainer(student, teacher, arguments, train_dataset=Dataset.from_list(data),
                         processing_class=tokenizer, peft_config=lora)  # fmt: skip
    trainer.train()
    # logging_steps = 1: a row a step
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def trl_sft(name: str, job: dict[str, Any], folder: Path) -> list[float]:
    """Plain SFT as many people run it: TRL's trainer with Liger's kernels, among them its fused cross-entropy."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    config = build_config(KDConfig, job["profile"])
    tokenizer, pairs, _ = encoded(job, folder)
    data = [
        {"input_ids": [*pair.prompt_ids, *pair.response_ids],
         "completion_mask": [0] * len(pair.prompt_ids) + [1] * len(pair.response_ids)}
        for pair in pairs
    ]  # fmt: skip
    keep = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type",
            "warmup_steps", "weight_decay", "seed", "max_length", "bf16")  # fmt: skip
    arguments = SFTConfig(
        output_dir=str(folder / name), gradient_checkpointing=False, use_liger_kernel=True, completion_only_loss=True,
        num_train_epochs=job["epochs"], max_grad_norm=job["max_grad_norm"], use_cpu=not torch.cuda.is_available(),
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        **{field: getattr(config, field) for field in keep},
    )  # fmt: skip
    lora = LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
                      target_modules=config.lora_target_modules, task_type="CAUSAL_LM")  # fmt: skip
    student = load_model(config.model_name_or_path, config.dtype)
    trainer = SFTTrainer(student, arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
                         peft_config=lora)  # fmt: skip
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def summed_loss(model: Any, teacher: Any, rows: list[Any], tokenizer: Any, temperature: float, alpha: float) -> Any:
    """Full logits of both models on one padded batch; the objective summed over its response tokens."""
    # tokens that exist: the stored matrix may be padded beyond them
    batch, size = collate(rows, tokenizer.pad_token_id), max(tokenizer.get_vocab().values()) + 1
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    # position i predicts token i + 1
    labels = batch.pop("labels")[:, 1:]
    mask = labels != -100
    # [N, size] of the response tokens; with alpha = 0 nobody asks the teacher
    with torch.no_grad():
        theirs = teacher(**batch, use_cache=False).logits[:, :-1, :size][mask] if alpha else None
    logits = model(**batch, use_cache=False).logits[:, :-1, :size][mask]
    return plain_kd_loss(logits, theirs, labels[mask], temperature=temperature, alpha=alpha).loss


def plain_torch(name: str, job: dict[str, Any], folder: Path) -> list[float]:
    from transformers import get_scheduler, set_seed

    config = build_config(KDConfig, job["profile"])
    tokenizer, pairs, _ = encoded(job, folder)
    set_seed(config.seed)
    student, teacher = models(config)
    # not fused: an adapter as peft runs it
    model = add_lora(student, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules,
                     fused=False)  # fmt: skip
    # the adapters; `add_lora` has frozen the rest
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
    steps = job["epochs"] * len(pairs) // config.rows_per_step
    schedule = get_scheduler(config.lr_scheduler_type, optimizer, int(config.warmup_steps), steps)
    model.train()
    losses = []
    for epoch in range(job["epochs"]):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(epoch)).tolist()
        for rows in (order[i : i + config.rows_per_step] for i in range(0, len(order), config.rows_per_step)):
            step = [pairs[i] for i in rows]
            # one divisor for all passes of the step, as in our trainer
            tokens, losses = sum(len(pair.response_ids) for pair in step), [*losses, 0.0]
            # the profile's rows a pass, padded to the longest of them
            for start in range(0, len(step), config.per_device_train_batch_size):
                micro = step[start : start + config.per_device_train_batch_size]
                with torch.autocast(harness.device(), enabled=bool(config.bf16), dtype=torch.bfloat16):
                    loss = summed_loss(
                        model, teacher, micro, tokenizer, config.temperature, config.alpha
                    ) / tokens  # fmt: skip
                loss.backward()
                losses[-1] += loss.item()
            torch.nn.utils.clip_grad_norm_(parameters, job["max_grad_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return losses
