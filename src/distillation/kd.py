"""LoRA distillation of one student: from clean teacher answers to an adapter and its held-out numbers.

from src.distillation.kd import run_kd_pipeline
results = run_kd_pipeline("configs/embedded.yaml")
"""

import contextlib
import copy
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed

from src.distillation.base import (
    causal_lm,
    compile_layers,
    count_parameters,
    describe_size,
    end_of_turn_id,
    ending_tokenizer,
    load_model,
    load_tokenizer,
    model_fingerprint,
    place,
    refuse_adapter,
    shared_vocabulary,
)
from src.distillation.batching import TrainingData, load_training_data, micro_batches, waste
from src.distillation.heldout import gap_recovered, summarise, summarise_teacher
from src.distillation.kd_config import NOT_IN_FINGERPRINT, SECTION, KDConfig
from src.distillation.lora import add_lora
from src.distillation.losses import compiler_works
from src.distillation.packing import check_packing
from src.distillation.runs import (
    RunRecorder,
    claim_folder,
    cut_metrics,
    find_runs,
    new_run_folder,
    newest_complete_checkpoint,
    training_facts,
)
from src.distillation.sft import end_token_ids
from src.distillation.teacher_cache import cached_tokenizer, open_cache, read_index
from src.distillation.teacher_signal import TeacherSignal, online_signal
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
from src.utils.config import build_config, read_profile
from src.utils.stages import hold, locked

Tokenizers = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]  # the student's and the teacher's


def _sharding() -> str:
    """`fsdp` or `deepspeed` where `accelerate launch` says so, else empty."""
    return next((k for k in ("fsdp", "deepspeed") if os.environ.get(f"ACCELERATE_USE_{k.upper()}") == "true"), "")


def _fingerprint(config: KDConfig, data: TrainingData, teacher: str, tokenizers: Tokenizers) -> dict[str, Any]:
    settings = {name: value for name, value in config.to_dict().items() if name not in NOT_IN_FINGERPRINT}
    settings["rows_per_step"] = config.rows_per_step
    settings["student"] = model_fingerprint(config.model_name_or_path)
    settings["teacher"] = teacher
    if sharding := _sharding():  # whose checkpoints no other launch can read
        settings["sharding"] = sharding
    dates = [tokenizer.prompt_date for tokenizer in tokenizers if hasattr(tokenizer, "prompt_date")]
    if dates:  # only where a chat template asks for the day
        settings["prompt_date"] = dates[0].isoformat()
    return json.loads(json.dumps(settings | data.hashes))


def _micro_batches(config: KDConfig, data: TrainingData) -> int:
    """Forward passes of one step, over all ranks: as batch_size says, or as few as the token budget allows."""
    if not config.tokens_per_batch:
        return config.rows_per_step // config.per_device_train_batch_size
    lengths = [len(pair.student) for pair in data.train]
    epochs = config.num_train_epochs
    if config.max_steps > 0:
        epochs = config.max_steps / (len(lengths) // config.rows_per_step)
    return micro_batches(lengths, config.rows_per_step, config.world_size, config.tokens_per_batch,
                         math.ceil(epochs), config.data_seed)  # fmt: skip


def _find_folder(config: KDConfig, fingerprint: dict[str, Any]) -> Path:
    """The run's folder: named by the user, the one to go on with, a finished one of the same settings, or a new one."""
    if config.output_dir:
        return Path(config.output_dir)
    root = Path(config.experiment_dir).parent
    prefix = "gpu_optimized_kd" if config.alpha > 0 else "sft_control"
    finished, unfinished = find_runs(root, prefix, fingerprint)
    if finished and not config.overwrite:
        return finished
    if unfinished and config.resume and not config.overwrite:
        return unfinished
    return new_run_folder(root, prefix)


@contextlib.contextmanager
def _own_folder(config: KDConfig, fingerprint: dict[str, Any], data: TrainingData) -> Iterator[Path]:
    """The run's folder, kept from other processes as long as this one trains in it. One rank picks it for all.

    Raises:
        UserError: another process trains in it, or it belongs to another run.
    """
    with contextlib.ExitStack() as held:
        chosen: list[Path | None] = [None]
        if config.process_index == 0:
            root = Path(config.experiment_dir).parent
            root.mkdir(parents=True, exist_ok=True)
            # two that start together must not both find no run: the folder is this run's before the other looks
            with locked(root / ".choosing.lock"):
                folder = _find_folder(config, fingerprint)
                held.enter_context(hold(folder, SECTION))
                if config.output_dir:
                    claim_folder(folder, fingerprint, config.resume, config.overwrite)
                if not (folder / "kd_config.json").is_file():
                    _write_kd_config(folder, config, fingerprint, data)
            chosen = [folder]
        [folder] = broadcast_object_list(chosen)
        yield folder


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


def _load_adapter(trainer: KDTrainer, folder: Path) -> None:
    """Take the adapter of a run whose training is over."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(trainer.model, load_peft_weights(str(folder)))
    if _sharding():  # only training would have sharded the model and taken it to the GPUs
        trainer.model.to(trainer.args.device)


def _train(trainer: KDTrainer, folder: Path) -> None:
    """Train to the end, from the newest complete checkpoint if there is one."""
    checkpoint = newest_complete_checkpoint(folder)
    state = read_json(checkpoint / "trainer_state.json") if checkpoint else {"global_step": 0, "max_steps": None}
    if trainer.is_world_process_zero():
        cut_metrics(folder / "metrics.jsonl", state["global_step"])
    if state["global_step"] == state["max_steps"]:
        logger.info("%s: the last step is in %s; writing the model", folder, checkpoint.name)
        _load_adapter(trainer, checkpoint)
        return
    if checkpoint:
        logger.info("%s: going on from step %d", folder, state["global_step"])
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{folder}: out of GPU memory; halve --batch_size and double --gradient_accumulation_steps, lower "
            "--tokens_per_batch or --max_length, pass --gradient_checkpointing, or name more devices"
        ) from error


MODEL_CARD = """---
library_name: peft
{base_model}tags: [knowledge-distillation, lora]
---
# {experiment}: {arm}

LoRA adapter of `{student}`, rank {rank}, trained on {rows} answers of `{teacher}` in {steps} steps of {rows_per_step}
rows. It ends a turn with `{end}`: stop there (`generation_config.json` says so too).
Objective: {alpha} x T^2 x {divergence}(teacher, student) at T = {temperature}{own}, plus {ce} x cross-entropy; seed
{seed}.

Every setting is in `kd_config.json` of the run, every measured number in `kd_results.json`.
"""


def _model_card(config: KDConfig, rows: int, steps: int, end: str) -> str:
    student = config.model_name_or_path
    # a hub id, or nothing: the hub refuses a card that names a path
    base_model = "" if Path(student).exists() else f"base_model: {student}\n"
    own = "" if config.teacher_temperature is None else f" (the teacher at {config.teacher_temperature})"
    return MODEL_CARD.format(
        base_model=base_model, student=student, teacher=config.teacher_model_name_or_path, rows=rows,
        experiment=Path(config.experiment_dir).name, arm="kd" if config.alpha > 0 else "sft control",
        steps=steps, rows_per_step=config.rows_per_step, alpha=config.alpha, divergence=config.divergence,
        temperature=config.temperature, ce=round(1 - config.alpha, 6), rank=config.lora_r, seed=config.seed, end=end,
        own=own,
    )  # fmt: skip


def _save_final(trainer: KDTrainer, folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    weights = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None  # on every rank
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    ends = end_token_ids(tokenizer, causal_lm(model).generation_config.eos_token_id)
    with atomic_path(folder / "final_model") as made:
        model.save_pretrained(made, state_dict=weights)
        # a base model's own settings stop at the end of a text only: engines must hear of the end of turn it has learnt
        ending = ending_tokenizer(tokenizer)
        ending.save_pretrained(made)
        GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(made)
        steps, end = training_facts(folder)["steps"], tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
        write_text(made / "README.md", _model_card(trainer.args, rows, steps, end))


def _heldout(trainer: KDTrainer, data: TrainingData) -> dict[str, Any]:
    """Before, after and teacher on the held-out rows, which are read here for the first time and only here."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    arms = {"before": model.disable_adapter, "after": contextlib.nullcontext}
    with Progress(len(data.heldout), "held-out rows") as progress:
        rows = trainer.score(data.heldout, arms, progress)
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


def _read_config(config: KDConfig | dict[str, Any] | str | Path) -> KDConfig:
    """A config of the caller's own, checked against the processes it runs in."""
    if isinstance(config, str | Path):
        config = build_config(KDConfig, read_profile(config, SECTION, KDConfig), where=str(config))
    elif isinstance(config, dict):
        config = build_config(KDConfig, config)
    config = copy.deepcopy(config)
    for field in ("model_name_or_path", "teacher_model_name_or_path"):
        if not getattr(config, field):
            raise UserError(f"{field} is not set; name a profile with --config, or pass --{field}")
        refuse_adapter(getattr(config, field))
    if config.gradient_accumulation_steps % config.world_size:
        raise UserError(
            f"gradient_accumulation_steps = {config.gradient_accumulation_steps} does not divide among "
            f"{config.world_size} processes; a step always takes {config.rows_per_step} rows, so choose a divisor"
        )
    resident = config.teacher_devices if config.teacher_signal == "online" else []
    if config.world_size > 1 and (resident or config.student_devices):
        raise UserError(
            "student_devices, and teacher_devices with an online teacher, are for one process; with several pass "
            "--student_devices (and --teacher_devices) with nothing behind it"
        )
    return config


def _teacher_tokenizer(config: KDConfig) -> tuple[PreTrainedTokenizerBase, str]:
    """The teacher's tokenizer and fingerprint; with a cached signal the cache's own, and nothing else of the teacher.

    Raises:
        UserError: the cache is of another teacher.
    """
    name = config.teacher_model_name_or_path
    if config.teacher_signal == "online":
        return load_tokenizer(name, config.experiment_dir), model_fingerprint(name)
    folder = Path(config.experiment_dir) / "teacher_cache"
    index = read_index(folder)
    same = model_fingerprint(name) == index["teacher"] if Path(name).is_dir() else (
        name == index["teacher_model_name_or_path"])  # fmt: skip
    if not same:
        raise UserError(f"{folder} is of the teacher {index['teacher_model_name_or_path']!r}, this run names {name!r}; "
                        "run scripts/cache_teacher.py --overwrite")  # fmt: skip
    return cached_tokenizer(folder, index, config.experiment_dir), index["teacher"]


def _open_teacher(
    config: KDConfig, data: TrainingData, vocabulary: int, pad_id: int, dtype: torch.dtype
) -> TeacherSignal:
    """The teacher's signal: of its cache, or of the model itself, loaded here."""
    if config.teacher_signal != "online":
        train, measured = data.train, data.validation + data.heldout
        return open_cache(
            Path(config.experiment_dir) / "teacher_cache", config.teacher_signal, data.hashes,
            [pair.teacher for pair in train], [pair.teacher for pair in measured], vocabulary,
            config.teacher_temperature or config.temperature,
        )  # fmt: skip
    name, devices = config.teacher_model_name_or_path, config.teacher_devices
    teacher = load_model(name, dtype, place(name, devices, dtype, config.gpu_memory_gb) if devices else None)
    teacher.requires_grad_(False)
    if not devices:
        teacher.to(config.device)  # Trainer's device, one a rank
    logger.info("teacher %s: %s", name, describe_size(teacher))
    if config.packing:
        check_packing(teacher, [pair.teacher for pair in data.train], pad_id)
    return online_signal(teacher, pad_id, config.packing)


def _make_trainer(config: KDConfig, data: TrainingData, tokenizers: Tokenizers, folder: Path) -> KDTrainer:
    """Load both models and say what follows from the settings."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    set_seed(config.seed)
    name, devices = config.model_name_or_path, config.student_devices
    student = load_model(name, dtype, place(name, devices, dtype, config.gpu_memory_gb) if devices else None)
    if len(devices) == 1:  # from_pretrained keeps no map of a single GPU, and Trainer would take the model to the first
        student.hf_device_map = dict.fromkeys(("model", "lm_head"), devices[0])
    elif not devices and not _sharding():
        student.to(config.device)  # the packing is checked where it will run
    logger.info("student %s: %s", name, describe_size(student))
    pad_id, own_logits = tokenizers[0].pad_token_id, student.get_output_embeddings().weight.shape[0]
    teacher = _open_teacher(config, data, max(tokenizers[1].get_vocab().values()) + 1, pad_id, dtype)
    pairs = data.train + data.validation + data.heldout
    vocab_size = shared_vocabulary(
        *tokenizers,
        own_logits,
        len(teacher.head_VG),
        [pair.student for pair in pairs],
        [pair.teacher for pair in pairs],
    )
    if config.packing:
        check_packing(student, [pair.student for pair in data.train], pad_id)
    model = add_lora(student, config.lora_r, config.lora_alpha, config.lora_dropout, config.lora_target_modules)
    if config.activation_checkpointing or config.gradient_checkpointing:
        model.enable_input_require_grads()
    trainable = count_parameters(model, trainable=True)
    require_disk(folder, trainable * 4 * (3 * (config.save_total_limit or 2) + 4), "the run's checkpoints")
    compiled = config.compile_loss is not False and compiler_works(config.device.type)
    if config.compile_layers:
        compile_layers(model)
    trainer = KDTrainer(
        model=model, args=config, train_dataset=data.train, teacher=teacher.cut(vocab_size), vocab_size=vocab_size,
        eval_dataset=data.validation, pad_id=pad_id, parts=config.gradient_accumulation_steps * config.world_size,
        compiled=compiled, callbacks=[RunRecorder(folder)],
    )  # fmt: skip
    _say_sizes(config, data, trainer, trainable)
    return trainer


def run_kd_pipeline(config: KDConfig | dict[str, Any] | str | Path) -> dict[str, Any]:
    """One training run, from clean rows to `final_model/`; with alpha = 0 it is the SFT control.

    Reads sft/sft_{train,eval}_data_clean.jsonl of `experiment_dir` and, for a cached signal, its teacher_cache/. A
    finished run with the same fingerprint is returned as it is, an unfinished one is gone on with from its newest
    complete checkpoint.

    Args:
        config: a KDConfig, a mapping of its settings (names or aliases), or the path of a profile.

    Returns:
        What kd_results.json holds, and the paths `run_dir` and `final_model`.

    Raises:
        UserError: something the user must put right; the text says what and how.
    """
    config = _read_config(config)
    teacher_tokenizer, teacher_fingerprint = _teacher_tokenizer(config)
    tokenizers = load_tokenizer(config.model_name_or_path, config.experiment_dir), teacher_tokenizer
    data = load_training_data(
        Path(config.experiment_dir) / "sft", *tokenizers, config.max_length, config.validation_fraction,
        config.rows_per_step,
    )  # fmt: skip
    fingerprint = _fingerprint(config, data, teacher_fingerprint, tokenizers)
    config.gradient_accumulation_steps = _micro_batches(config, data) // config.world_size
    with _own_folder(config, fingerprint, data) as folder:
        paths = {"run_dir": str(folder), "final_model": str(folder / "final_model")}
        results_path = folder / "kd_results.json"
        if results_path.is_file():
            logger.info("%s is finished; nothing to do (--overwrite trains again)", folder)
            return read_json(results_path) | paths
        config.output_dir = str(folder)
        return _run(config, data, tokenizers, folder) | paths


def _run(config: KDConfig, data: TrainingData, tokenizers: Tokenizers, folder: Path) -> dict[str, Any]:
    """Train in `folder`, save the model, measure it once; what kd_results.json then holds."""
    trainer = _make_trainer(config, data, tokenizers, folder)
    if (folder / "final_model").is_dir():
        _load_adapter(trainer, folder / "final_model")
    else:
        _train(trainer, folder)
        _save_final(trainer, folder, tokenizers[0], len(data.train))
    heldout = _heldout(trainer, data)
    results = {
        "experiment": Path(config.experiment_dir).name,
        "arm": "kd" if config.alpha > 0 else "sft",
        **heldout,
        **training_facts(folder),
        "trainable_parameters": count_parameters(trainer.model, trainable=True),
        "total_parameters": count_parameters(trainer.model),
    }
    if trainer.is_world_process_zero():
        write_json(folder / "kd_results.json", results)
    return results


def _say_sizes(config: KDConfig, data: TrainingData, trainer: KDTrainer, trainable: int) -> None:
    """Print what follows from the settings, before the work starts."""
    rows = [pair.student for pair in data.train]
    padding, shared = waste(rows, trainer.batches)
    steps_per_epoch = len(data.train) // config.rows_per_step
    steps = config.max_steps if config.max_steps > 0 else int(steps_per_epoch * config.num_train_epochs)
    share = config.rows_per_step / len(data.train)
    logger.info(
        "rows: %d to train on, %d validation, %d held out, %d dropped as longer than %d tokens",
        len(data.train), len(data.validation), len(data.heldout), data.dropped, config.max_length,
    )  # fmt: skip
    logger.info(
        "a step: %d rows in %d x %d passes (accumulation x processes), about %d tokens, %d of them answers, and "
        "%.1f %% of them are beginnings that rows share, run once; %.1f %% of what is run is padding",
        config.rows_per_step, config.gradient_accumulation_steps, config.world_size, sum(map(len, rows)) * share,
        sum(len(row.response_ids) for row in rows) * share, 100 * shared, 100 * padding,
    )  # fmt: skip
    reason = f"max_steps wins over {config.num_train_epochs:g} epochs" if config.max_steps > 0 else "from epochs"
    logger.info("%d steps (%s), %.2f epochs", steps, reason, steps / steps_per_epoch)
    logger.info(
        "loss: %g x %g^2 x %s%s + %g x CE over %d shared tokens, the teacher's %s; %s trainable parameters; "
        "products in %s%s",
        config.alpha, config.temperature, config.divergence,
        f" (teacher at {config.teacher_temperature:g})" if config.teacher_temperature else "",
        1 - config.alpha, trainer.vocab_size,
        {"online": "model", "hidden": "cached hidden states", "topk": "cached top k"}[config.teacher_signal],
        f"{trainable:,}", "bf16 autocast" if config.bf16 else "fp32", ", compiled loss" if trainer.compiled else "",
    )  # fmt: skip
