"""LoRA distillation of one student: from clean teacher answers to an adapter and its held-out numbers.

from src.distillation.kd import run_kd_pipeline
results = run_kd_pipeline("configs/embedded.yaml")
"""

import contextlib
import copy
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

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
    model_name,
    place,
    refuse_adapter,
    refuse_quantised_student,
    shared_vocabulary,
)
from src.distillation.batching import (
    Cutting,
    StepOrder,
    Tokenizers,
    TrainingData,
    clean_hashes,
    load_training_data,
    waste,
)
from src.distillation.gpu import use_liger
from src.distillation.heldout import gap_recovered, summarise, summarise_teacher, what_acceptance_is
from src.distillation.kd_config import SECTION, KDConfig
from src.distillation.lora import add_lora
from src.distillation.losses import compiler_works
from src.distillation.packing import ATTENTION, check_packing
from src.distillation.rounds import (
    Prompts,
    Round,
    check_rounds,
    open_round,
    plan_round,
    read_prompts,
    rounds_cost,
    rounds_of,
)
from src.distillation.run_card import model_card, teachers_own
from src.distillation.run_folder import (
    claim_folder,
    cut_metrics,
    find_runs,
    new_run_folder,
    newest_complete_checkpoint,
    training_facts,
)
from src.distillation.sft import end_token_ids
from src.distillation.starting import begin_from, find_start
from src.distillation.teacher import Reader, model_reader
from src.distillation.teacher_cache import cached_tokenizer, is_teacher, open_cache, read_index
from src.distillation.tracking import check_tracker, log_heldout, tracked
from src.distillation.training import (
    STATE,
    OwnRows,
    Run,
    asked_cutting,
    load_adapter,
    load_state,
    make_learning_rate,
    make_optimizer,
    measured_tokens,
    probe_gradients,
    save_adapter,
    score,
    train,
)
from src.utils.common import (
    Progress,
    UserError,
    atomic_path,
    logger,
    provenance,
    read_json,
    require_disk,
    sha256_file,
    write_json,
    write_jsonl,
    write_text,
)
from src.utils.config import build_config, read_profile
from src.utils.stages import hold, locked

CPU_TOKENS = 2048  # in one pass on a CPU, whose products gain nothing from more
STEPS_THAT_PAY = 200  # compiling the layers takes half a minute, a step with AMX is 0.2 to 0.4 s shorter then


def run_kd_pipeline(config: KDConfig | dict[str, Any] | str | Path) -> dict[str, Any]:
    """One training run, from clean rows to `final_model/`; with alpha = 0 it is the SFT control.

    With `on_policy_rounds` the student learns from answers of its own too, see rounds.py.

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
    # 1. which run is it?
    config = read_config(config)
    accelerator = _open_accelerator(config)
    tokenizers, fingerprint = identify(config)

    # 2. its folder
    with _own_folder(config, fingerprint, accelerator) as folder:
        paths = {"run_dir": str(folder), "final_model": str(folder / "final_model")}
        if (folder / "kd_results.json").is_file():
            logger.info("%s is finished; nothing to do (--overwrite trains again)", folder)
            return read_json(folder / "kd_results.json") | paths

        # 3. rows, training, measures
        check_rounds(config)
        data = load_training_data(
            Path(config.experiment_dir) / "sft",
            tokenizers.student,
            tokenizers.teacher,
            config.max_length,
            config.validation_fraction,
            config.rows_per_step,
        )
        schedule = _schedule(config, data)
        # last: a folder without it has not begun, and a setting that was refused above may be put right
        if accelerator.is_main_process:
            _write_kd_config(folder, config, fingerprint, data)
        return _run(config, accelerator, data, tokenizers, folder, schedule) | paths


def read_config(config: KDConfig | dict[str, Any] | str | Path) -> KDConfig:
    """A config of the caller's own.

    Raises:
        UserError: an unknown setting, a value out of range, or a model that is not named or is an adapter.
    """
    if isinstance(config, str | Path):
        config = build_config(KDConfig, read_profile(config, SECTION, KDConfig), where=str(config))
    elif isinstance(config, dict):
        config = build_config(KDConfig, config)
    # a caller's own object stays as it was
    config = copy.deepcopy(config)
    for name in ("model_name_or_path", "teacher_model_name_or_path"):
        if not getattr(config, name):
            raise UserError(f"{name} is not set; name a profile with --config, or pass --{name}")
        refuse_adapter(getattr(config, name))
    refuse_quantised_student(config.model_name_or_path, config.load_in_4bit, _sharded())
    return config


def _sharded() -> bool:
    """Whether `accelerate launch` says FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def _open_accelerator(config: KDConfig) -> Accelerator:
    """The processes of this run.

    Raises:
        UserError: the settings do not go with their number.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError(
            "DeepSpeed divides the loss in a way of its own; launch with configs/accelerate/fsdp2.yaml, "
            "which shards the same"
        )
    check_tracker(config.report_to)
    accelerator = Accelerator(
        cpu=config.use_cpu,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # else its variable would scale gradients
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=str(Path(config.experiment_dir).parent),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)],  # every adapter takes part
    )
    # what ranks share out alike: rows, which cut by tokens may be a pass each, or gradient_accumulation_steps passes
    ranks = accelerator.num_processes
    by_tokens = config.packing and config.tokens_per_batch != 0
    name = "rows of a step" if by_tokens else "gradient_accumulation_steps"
    shared_out = config.rows_per_step if by_tokens else config.gradient_accumulation_steps
    if shared_out % ranks:
        raise UserError(
            f"{name} = {shared_out} does not divide among {ranks} processes; a step always takes "
            f"{config.rows_per_step} rows (batch_size x gradient_accumulation_steps), so choose a divisor"
        )
    resident = config.teacher_devices if config.teacher_signal == "online" else []
    if ranks > 1 and (resident or config.student_devices):
        raise UserError(
            "student_devices, and teacher_devices with an online teacher, are for one process; with several pass "
            "--student_devices (and --teacher_devices) with nothing behind it"
        )
    return accelerator


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
    if not is_teacher(name, index):
        raise UserError(
            f"{folder} is of the teacher {index['teacher_model_name_or_path']!r}, this run names {name!r}; "
            "run scripts/cache_teacher.py --overwrite"
        )
    return cached_tokenizer(folder, index, config.experiment_dir), index["teacher"]


def _kept(config: KDConfig) -> dict[str, Any]:
    """What a cached signal keeps of the teacher: another cache of the same teacher teaches another thing."""
    index = read_index(Path(config.experiment_dir) / "teacher_cache")
    return {name: index[name] for name in (("bf16", "top_k") if config.teacher_signal == "topk" else ("bf16",))}


def identify(config: KDConfig) -> tuple[Tokenizers, dict[str, Any]]:
    """Both tokenizers, and the fingerprint of the run that these settings are; nothing is encoded or loaded for it.

    Raises:
        UserError: rows, cache or a model's files are not there, the cache is another teacher's, or `init_from` is not
            for this student.
    """
    hashes = clean_hashes(Path(config.experiment_dir) / "sft")
    teacher_tokenizer, teacher = _teacher_tokenizer(config)
    tokenizers = Tokenizers(load_tokenizer(config.model_name_or_path, config.experiment_dir), teacher_tokenizer)
    return tokenizers, _fingerprint(config, hashes, teacher, tokenizers)


def _fingerprint(config: KDConfig, hashes: dict[str, str], teacher: str, tokenizers: Tokenizers) -> dict[str, Any]:
    """What tells this run from every other: settings, models, rows."""
    settings = config.identity() | {"student": model_fingerprint(config.model_name_or_path), "teacher": teacher}
    if start := find_start(config):
        # by its bytes, wherever it lies
        settings["init_from"] = start.sha256
    if config.teacher_signal != "online":
        settings["teacher_cache"] = _kept(config)
    if _sharded():  # sums over shards are in another order
        settings["sharding"] = "fsdp"
    dates = [t.prompt_date for t in (tokenizers.student, tokenizers.teacher) if hasattr(t, "prompt_date")]
    if dates:  # only where a chat template asks for the day
        settings["prompt_date"] = dates[0].isoformat()
    # through JSON, so that it equals what is read from a file: tuples become lists
    return json.loads(json.dumps(settings | hashes))


def _find_folder(config: KDConfig, fingerprint: dict[str, Any]) -> Path:
    """The run's folder: named by the user, the one to go on with, a finished one of the same settings, or a new one."""
    # a folder that is named is checked by `claim_folder`, under its lock
    if config.output_dir:
        return Path(config.output_dir)
    root = Path(config.experiment_dir).parent
    prefix = "gpu_optimized_kd" if config.arm == "kd" else "sft_control"
    finished, unfinished = find_runs(root, prefix, fingerprint)
    if finished and not config.overwrite:
        return finished
    if unfinished and config.resume and not config.overwrite:
        return unfinished
    return new_run_folder(root, prefix)


@contextlib.contextmanager
def _own_folder(config: KDConfig, fingerprint: dict[str, Any], accelerator: Accelerator) -> Iterator[Path]:
    """The run's folder, kept from other processes as long as this one trains in it. One rank picks it for all.

    Raises:
        UserError: another process trains in it, or it belongs to another run.
    """
    # left in the opposite order: forget an unbegun run, free the lock, remove a folder that is empty then
    with contextlib.ExitStack() as held:
        chosen: list[Path | None] = [None]
        if accelerator.is_main_process:
            root = Path(config.experiment_dir).parent
            root.mkdir(parents=True, exist_ok=True)
            # two that start together must not both find no run: the folder is this run's before the other looks
            with locked(root / ".choosing.lock"):
                folder = _find_folder(config, fingerprint)
                held.callback(_remove_if_empty, folder)
                held.enter_context(hold(folder, SECTION))
                if config.output_dir:
                    claim_folder(folder, fingerprint, config.resume, config.overwrite)
                held.callback(_forget_unbegun, folder)
                if not (folder / "kd_config.json").is_file():
                    write_json(folder / "kd_config.json", {"fingerprint": fingerprint})  # the rest once rows are read
            chosen = [folder]
        [folder] = broadcast_object_list(chosen)  # in place; the other ranks gave None
        yield folder


def _forget_unbegun(folder: Path) -> None:
    """Remove what says only which run it was to be: its rows were refused."""
    path = folder / "kd_config.json"
    if path.is_file() and read_json(path).keys() == {"fingerprint"}:
        path.unlink()


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it holds something, if only another process's lock
        folder.rmdir()


def _write_kd_config(folder: Path, config: KDConfig, fingerprint: dict[str, Any], data: TrainingData) -> None:
    """Every setting and everything the run was made of; once, by the process that began it."""
    if read_json(folder / "kd_config.json").keys() != {"fingerprint"}:
        return
    # two settings stand in kd_config.json under other names
    names = {"per_device_train_batch_size": "batch_size", "num_train_epochs": "epochs"}
    settings = {names.get(name, name): value for name, value in dataclasses.asdict(config).items()}
    # how this call came to the folder is nothing of the run
    del settings["resume"], settings["overwrite"]
    rows = {"train": len(data.train), "validation": len(data.validation), "heldout": len(data.heldout)}
    write_json(
        folder / "kd_config.json",
        {
            "experiment": Path(config.experiment_dir).name,
            "arm": config.arm,
            **settings,
            "output_dir": str(folder),
            "rows_per_step": config.rows_per_step,
            "rows": rows | {"dropped_too_long": data.dropped},
            "hashes": data.hashes,
            "fingerprint": fingerprint,
            "provenance": provenance(),
        },
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """Steps that are taken in one go, by one loaded student: all of a run's, or a round's.

    checkpoint: where it begins; None for the first step.
    end: the steps that are taken once it is over, out of `steps`.
    cache: the teacher's; None for a resident teacher.
    own: the student's own answers, in a round.
    is_first: of this process, which then says what it does.
    """

    checkpoint: Path | None
    end: int
    steps: int
    cache: Reader | None
    own: OwnRows | None
    is_first: bool


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """How many steps a run has, the rounds that they are cut into, and what is asked in these."""

    steps: int
    rounds: list[Round]
    prompts: Prompts | None


def _schedule(config: KDConfig, data: TrainingData) -> _Schedule:
    """The run's steps and rounds, before anything of it is written.

    Raises:
        UserError: there are fewer steps than rounds, or too few prompts leave room for an answer.
    """
    order = StepOrder(len(data.train), config.rows_per_step, config.data_seed)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(order.steps_per_epoch * config.num_train_epochs)
    # a few hundred rows are a few steps: 400 at 32 a step are 11, and the default warms up for 20
    if config.warmup_steps >= steps and config.lr_scheduler_type != "constant":
        logger.warning(
            "warmup_steps = %d of %d steps: the learning rate never reaches %g; lower --warmup_steps, or train longer",
            config.warmup_steps,
            steps,
            config.learning_rate,
        )
    rounds = rounds_of(config, steps)
    return _Schedule(steps, rounds, read_prompts(config, data) if rounds else None)


def _run(
    config: KDConfig,
    accelerator: Accelerator,
    data: TrainingData,
    tokenizers: Tokenizers,
    folder: Path,
    schedule: _Schedule,
) -> dict[str, Any]:
    """Train in `folder`, save the model, measure it once; what kd_results.json then holds."""
    results: dict[str, Any] = {}
    for part in _parts(config, accelerator, data, tokenizers, folder, schedule):
        # a part but the last gives nothing
        results = _run_part(config, accelerator, data, tokenizers, folder, part)
        accelerator.free_memory()  # for the engine that answers next, and for the teacher
    return results


def _parts(
    config: KDConfig,
    accelerator: Accelerator,
    data: TrainingData,
    tokenizers: Tokenizers,
    folder: Path,
    schedule: _Schedule,
) -> Iterator[Part]:
    """What is left of the run: all of it at once, or a round after the other, each answered when its turn comes."""
    # 1. the teacher's beliefs of its own answers
    steps, cache = schedule.steps, None
    if config.teacher_signal != "online":
        temperature = config.teacher_temperature or config.temperature
        cache = open_cache(Path(config.experiment_dir) / "teacher_cache", config.teacher_signal, temperature, data)
    # 2. a part after the other, each from the newest checkpoint, which the part before has left
    end, is_first = 0, True
    while end < steps:
        checkpoint = newest_complete_checkpoint(folder)
        taken = read_json(checkpoint / STATE)["step"] if checkpoint else 0
        if (folder / "final_model").is_dir():
            taken = steps  # there is nothing to train, only the held-out rows are to be read
        end, own = steps, None
        following = [part for part in schedule.rounds if taken < part.end]
        if following:
            # the first round that is not over; a checkpoint may lie within it
            part, adapter = following[0], checkpoint
            if adapter is None and (start := find_start(config)):  # else the student before training answers
                adapter = start.folder
            plan = plan_round(config, part, schedule.prompts, data, folder, adapter, taken)
            own, end = open_round(config, accelerator, tokenizers, plan), part.end
        yield Part(checkpoint, end, steps, cache, own, is_first)
        is_first = False


def _run_part(
    config: KDConfig, accelerator: Accelerator, data: TrainingData, tokenizers: Tokenizers, folder: Path, part: Part
) -> dict[str, Any]:
    """Train a part in `folder`; after the last one save the model and measure it, what kd_results.json then holds."""
    # 1. load
    run = _prepare(config, accelerator, data, tokenizers, folder, part)
    if accelerator.is_main_process:
        path = folder / "kd_config.json"
        write_json(path, read_json(path) | {"took_effect": run.took_effect})
    # 2. train; where final_model is there, a kill came between it and the measures
    with tracked(run, folder):
        if not (folder / "final_model").is_dir():
            train(run, folder)
            if run.step < run.steps:
                accelerator.wait_for_everyone()  # the checkpoint is marked complete by one of them
                return {}
            _save_final(run, folder, tokenizers.student)
        # 3. measure, and write what makes the run finished, last
        results = {
            "experiment": Path(config.experiment_dir).name,
            "arm": config.arm,
            **_heldout(run, folder),
            **training_facts(folder),
            **({"rounds": rounds_cost(folder)} if config.on_policy else {}),
            "trainable_parameters": count_parameters(run.model, trainable=True),
            "total_parameters": count_parameters(run.model),
            # an export merges whatever lies in final_model by then: the numbers above are of these very weights
            "adapter_sha256": sha256_file(folder / "final_model" / "adapter_model.safetensors"),
        }
        log_heldout(run, results)
        if accelerator.is_main_process:
            write_json(folder / "kd_results.json", results)
    return results


@dataclasses.dataclass(frozen=True)
class Models:
    """The student, the teacher as a reader, and the vocabulary that they share."""

    student: PreTrainedModel
    teacher: Reader
    vocab_size: int
    pad_id: int


def _prepare(
    config: KDConfig, accelerator: Accelerator, data: TrainingData, tokenizers: Tokenizers, folder: Path, part: Part
) -> Run:
    """Load both models, say what follows from the settings, and go to where the run was left."""
    # 1. the models and the adapters
    set_seed(config.seed)  # A of the adapters is drawn from it
    models = _load_models(config, accelerator, data, tokenizers, part)
    model = _add_adapters(config, models.student, folder, part.steps)
    rounds = config.on_policy_rounds if config.on_policy else 1  # each compiles them again
    layers_compiled = _layers_compiled(config, accelerator, part.steps // rounds)
    if layers_compiled:
        compile_layers(model)

    # 2. where it was left: adapters before the model is wrapped, the rest after
    final, checkpoint = folder / "final_model", part.checkpoint
    _fill_adapters(config, model, final if final.is_dir() else checkpoint)
    # both are where they belong: a model may be spread over GPUs
    wrapped, optimizer = accelerator.prepare(model, make_optimizer(config, model), device_placement=[False, False])
    compiled = config.compile_loss is not False and compiler_works(accelerator.device.type, config.divergence)
    run = Run(
        config,
        accelerator,
        data,
        model,
        wrapped,
        optimizer,
        make_learning_rate(config, part.steps),
        student=model_reader(model, models.pad_id, config.packing).cut(models.vocab_size),
        teacher=models.teacher.cut(models.vocab_size),
        pad_id=models.pad_id,
        compiled=compiled,
        took_effect={"compile_loss": compiled},
        order=StepOrder(len(data.train), config.rows_per_step, config.data_seed),
        cutting=_cutting(config, accelerator, checkpoint),
        steps=part.steps,
        end=part.end,
        own=part.own,
    )

    # 3. what only trying tells, said before the work; then on from the checkpoint
    _try_out(run, layers_compiled)
    if part.is_first:
        _say_sizes(run, count_parameters(model, trainable=True))
        if config.on_policy:
            _say_rounds(run)
    if not final.is_dir():
        _go_on(run, folder, checkpoint)
    return run


def _try_out(run: Run, layers_compiled: bool) -> None:
    """Decide what only trying tells."""
    config = run.config
    beside = config.teacher_signal == "online" or config.on_policy  # the teacher is in this process, now or in a round
    alone = not (beside and config.teacher_devices)
    liger = use_liger(causal_lm(run.model), config.liger, lambda: probe_gradients(run), alone)
    # after Liger, whose kernels take other memory; not where a checkpoint has said it already
    if run.cutting.tokens == 0 and config.packing and config.tokens_per_batch is None:
        run.cutting = dataclasses.replace(run.cutting, tokens=measured_tokens(run))
    set_seed(config.seed)  # whatever was tried before, training draws the same
    run.took_effect |= {"compile_layers": layers_compiled, "liger": liger, "tokens_per_batch": run.cutting.tokens}


def _fill_adapters(config: KDConfig, model: PeftModel, left: Path | None) -> None:
    """With the weights of where the run was left; at its beginning with those of `init_from`, or as they are."""
    if left:
        load_adapter(model, left)
    elif start := find_start(config):
        begin_from(model, start)
        logger.info("beginning from the adapter %s", start.folder)


def _go_on(run: Run, folder: Path, checkpoint: Path | None) -> None:
    """From a checkpoint, or from the start; metrics.jsonl forgets what came after."""
    if checkpoint:
        load_state(run, checkpoint)
        if run.step == run.steps:
            logger.info("%s: the last step is in %s; writing the model", folder, checkpoint.name)
        else:
            logger.info("%s: going on from step %d", folder, run.step)
    if run.accelerator.is_main_process:
        cut_metrics(folder / "metrics.jsonl", run.step)


def _load_models(
    config: KDConfig, accelerator: Accelerator, data: TrainingData, tokenizers: Tokenizers, part: Part
) -> Models:
    student, pad_id = _load_student(config, accelerator), tokenizers.student.pad_token_id
    teacher = part.cache or _load_teacher(config, accelerator, data, pad_id)
    # a round's rows too: the tokenizers must agree on what the student said
    pairs = data.all() + (part.own.all() if part.own else [])
    vocab_size = shared_vocabulary(
        tokenizers.student,
        tokenizers.teacher,
        student.get_output_embeddings().weight.shape[0],
        teacher.vocab_size,
        [pair.student for pair in pairs],
        [pair.teacher for pair in pairs],
    )
    if config.packing:
        check_packing(student, [pair.student for pair in data.train], pad_id)
        student.set_attn_implementation(ATTENTION)  # for good: checkpointing reads it in the backward pass too
    return Models(student, teacher, vocab_size, pad_id)


def _add_adapters(config: KDConfig, student: PreTrainedModel, folder: Path, steps: int) -> PeftModel:
    model = add_lora(
        student,
        config.lora_r,
        config.lora_alpha,
        config.lora_dropout,
        config.lora_target_modules,
        revision=model_name(config.model_name_or_path).revision,
    )
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    checkpoints = config.kept_checkpoints(steps)
    # an adapter and the optimiser's two moments each, one checkpoint more while it is written, and the final model
    need = 4 * count_parameters(model, trainable=True) * (3 * checkpoints + 4)
    there = 0  # of a run that goes on; what rounds have left takes room beside it
    for written in (*folder.glob("checkpoint-*"), folder / "final_model"):
        there += sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    require_disk(folder, max(0, need - there), "the run's checkpoints")
    return model


def _cutting(config: KDConfig, accelerator: Accelerator, checkpoint: Path | None) -> Cutting:
    """How steps are cut; 0 tokens of packed rows where that is to be measured first.

    A run that was killed keeps its passes, so that its sums stay in the order that they had.
    """
    # 1. as the checkpoint was cut, if the same was asked for
    ranks = accelerator.num_processes
    if checkpoint:
        state = read_json(checkpoint / STATE)
        if state["asked"] == asked_cutting(config) and state["cutting"]["ranks"] == ranks:
            return Cutting(**state["cutting"])
    # 2. as asked, or as a CPU likes it; on a GPU it is measured later
    tokens = config.tokens_per_batch
    if tokens is None:
        tokens = CPU_TOKENS if accelerator.device.type == "cpu" else 0
    return Cutting(tokens if config.packing else 0, config.gradient_accumulation_steps, ranks, config.packing)


def _layers_compiled(config: KDConfig, accelerator: Accelerator, steps: int) -> bool:
    """As the config says, or where it has been measured to pay: a CPU whose products are so fast that all that is
    between them shows, in a run that wins back the half minute that it takes."""
    if config.compile_layers is not None:
        return config.compile_layers
    amx = accelerator.device.type == "cpu" and config.bf16 and torch.cpu._is_amx_tile_supported()
    pays = amx and steps >= STEPS_THAT_PAY and compiler_works("cpu")
    if amx:
        logger.info(
            "AMX and %d steps: layers are %scompiled (from %d steps on)", steps, "" if pays else "not ", STEPS_THAT_PAY
        )
    return pays


def _load_student(config: KDConfig, accelerator: Accelerator) -> PreTrainedModel:
    name, devices, dtype = config.model_name_or_path, config.student_devices, config.dtype
    if devices:
        device_map = place(name, devices, dtype, config.gpu_memory_gb, load_in_4bit=config.load_in_4bit)
    else:  # 4-bit blocks are made where they will be read; plain weights, loaded to the CPU, may yet be sharded
        device_map = {"": accelerator.device} if config.load_in_4bit else None
    student = load_model(name, dtype, device_map, config.load_in_4bit)
    if not devices and not _sharded():  # FSDP takes its shards to the device
        student.to(accelerator.device)
    logger.info("student %s: %s", name, describe_size(student))
    return student


def _load_teacher(config: KDConfig, accelerator: Accelerator, data: TrainingData, pad_id: int) -> Reader:
    """The resident teacher."""
    name, devices, dtype = config.teacher_model_name_or_path, config.teacher_devices, config.dtype
    teacher = load_model(
        name, dtype, place(name, devices, dtype, config.gpu_memory_gb, config.cpu_offload) if devices else None
    )
    teacher.requires_grad_(False)
    if not devices:
        teacher.to(accelerator.device)  # one a rank
    logger.info("teacher %s: %s", name, describe_size(teacher))
    if config.packing:
        check_packing(teacher, [pair.teacher for pair in data.train], pad_id)
    return model_reader(teacher, pad_id, config.packing)


def _say_sizes(run: Run, trainable: int) -> None:
    """Print what follows from the settings, before the work starts."""
    config, data = run.config, run.data
    rows = [pair.student for pair in data.train]
    passes, padding, shared = waste(rows, run.order, run.cutting)
    # sums over all rows, times this, are a step's on average
    share = config.rows_per_step / len(data.train)
    logger.info(
        "rows: %d to train on, %d validation, %d held out, %d dropped as longer than %d tokens",
        len(data.train),
        len(data.validation),
        len(data.heldout),
        data.dropped,
        config.max_length,
    )
    most = f" of {run.cutting.tokens} tokens at most" if run.cutting.tokens else ""
    logger.info(
        "a step: %d rows in %.1f passes%s over %d processes, about %d tokens, %d of them answers, and %.1f %% of them "
        "are beginnings that rows share, run once; %.1f %% of what is run is padding",
        config.rows_per_step,
        passes,
        most,
        run.accelerator.num_processes,
        sum(map(len, rows)) * share,
        sum(len(row.response_ids) for row in rows) * share,
        100 * shared,
        100 * padding,
    )
    reason = f"max_steps wins over {config.num_train_epochs:g} epochs" if config.max_steps > 0 else "from epochs"
    logger.info("%d steps (%s), %.2f epochs", run.steps, reason, run.steps / run.order.steps_per_epoch)
    signals = {"online": "model", "hidden": "cached hidden states", "topk": "cached top k"}
    logger.info(
        "loss: %g x %g^2 x %s%s + %g x CE over %d shared tokens, the teacher's %s; %s trainable parameters; "
        "products in %s%s",
        config.alpha,
        config.temperature,
        config.divergence,
        teachers_own(config),
        1 - config.alpha,
        run.student.vocab_size,
        signals[config.teacher_signal],
        f"{trainable:,}",
        "bf16 autocast" if config.bf16 else "fp32",
        ", compiled loss" if run.compiled else "",
    )


def _say_rounds(run: Run) -> None:
    config = run.config
    logger.info(
        "on-policy: %d rounds of about %d steps; %d rows of a step are the student's own answers, drawn at T = %g, "
        "top_p %g, top_k %d",
        config.on_policy_rounds,
        round(run.steps / config.on_policy_rounds),
        config.own_rows_per_step,
        config.on_policy_temperature,
        config.on_policy_top_p,
        config.on_policy_top_k,
    )


def _save_final(run: Run, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    # the main process alone writes; all call `save_adapter`, which gathers what ranks share
    with contextlib.ExitStack() as stack:
        main = run.accelerator.is_main_process
        made = stack.enter_context(atomic_path(folder / "final_model")) if main else folder
        save_adapter(run, made)
        if not main:
            return
        # a base model's own settings stop at the end of a text only: engines must hear of the end of turn it has learnt
        ends = end_token_ids(tokenizer, causal_lm(run.model).generation_config.eos_token_id)
        ending_tokenizer(tokenizer).save_pretrained(made)
        GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(made)
        steps, end = training_facts(folder)["steps"], tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer))
        began = read_json(folder / "kd_config.json")["fingerprint"].get("init_from")
        write_text(made / "README.md", model_card(run.config, len(run.data.train), steps, end, began))


def _heldout(run: Run, folder: Path) -> dict[str, Any]:
    """Before, after and teacher on the held-out rows, which are read here for the first time and only here.

    `before` is the student without any adapter, also where the run began from one (`init_from`): the gap recovered is
    that of both runs together.

    Writes heldout.jsonl, the sums of every row. `kl_is` and `expected_acceptance_is` say whether these are exact.
    """
    # one loaded student, its adapter off and on
    arms = {"before": run.model.disable_adapter, "after": contextlib.nullcontext}
    with Progress(len(run.data.heldout), "held-out rows") as progress:
        # every rank scores all rows, inside the wrapped forward: a sharded model needs them all
        rows = score(run, run.data.heldout, arms, progress)
    if run.accelerator.is_main_process:
        write_jsonl(folder / "heldout.jsonl", rows)
    # the rows have the teacher's own sums too, the same in either arm
    by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    before, after = summarise(by_arm["before"]), summarise(by_arm["after"])
    teacher = summarise_teacher(by_arm["after"])
    kl_is = rows[0]["kl_is"]
    return {
        "kl_is": kl_is,
        "expected_acceptance_is": what_acceptance_is(kl_is),
        "before": before,
        "after": after,
        "teacher": teacher,
        "gap_recovered": gap_recovered(before, after, teacher),
        "heldout_rows": len(run.data.heldout),
        "heldout_tokens": sum(row["num_tokens"] for row in by_arm["after"]),
    }
