"""A merged profile -> what each stage will do, in the words of this package."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from src.distillation.kd_config import KDConfig
from src.distillation.teacher_cache import CacheTeacherConfig
from src.planning.answering import Answering
from src.planning.caching import Caching
from src.planning.hardware import Hardware
from src.planning.rows import EVALUATED, Rows
from src.planning.shapes import Shapes, read_shapes
from src.planning.stages import Generation, evaluation_of, generation_of
from src.planning.training import Training
from src.utils.common import UserError
from src.utils.config import build_config, stage_values

# "Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", "...-AWQ", "...-GPTQ-Int4": how a copy says that it is one
QUANTISED = re.compile(r"(fp8|int8|w8a8)|(awq|gptq|int4|w4a16|nf4|4bit)", re.IGNORECASE)
FOUR_BITS_AND_SCALES = 0.55  # bytes: 4 bits, a scale and a zero point for every 128 weights, embeddings as they were


@dataclass(frozen=True)
class Setup:
    """Everything that is planned. `notes`: what differs from what the profile says."""

    profile: Mapping[str, Any]
    hardware: Hardware
    teacher: Shapes
    student: Shapes
    rows: Rows
    notes: list[str] = field(default_factory=list)

    def section(self, name: str) -> dict[str, Any]:
        return dict(self.profile.get(name) or {})

    def devices(self, wanted: Sequence[int] | None, what: str) -> tuple[int, ...]:
        """The GPUs that a setting names, as far as they are there; the first where it names none."""
        if self.hardware.is_cpu:
            if wanted:
                self.notes.append(f"{what} names GPUs {list(wanted)}; there are none, so the processor is planned")
            return ()
        there = tuple(device for device in wanted or (0,) if device < self.hardware.count)
        if wanted and len(there) < len(wanted):
            there = there or tuple(range(self.hardware.count))
            self.notes.append(f"{what} names {len(wanted)} GPUs, of which {len(there)} are planned: {list(there)}")
        return there


def open_setup(profile: dict[str, Any], hardware: Hardware, rows: Rows) -> Setup:
    """Read the models' shapes.

    Raises:
        UserError: a model is not named, or its configuration cannot be had.
    """
    names = {}
    for role, key in (("teacher", "teacher_model_name_or_path"), ("student", "model_name_or_path")):
        names[role] = profile.get(key)
        if not names[role]:
            raise UserError(f"{key} is not set; a plan wants a profile that names both models")
    return Setup(profile, hardware, read_shapes(names["teacher"]), read_shapes(names["student"]), rows)


def typed(setup: Setup, section: str, config_class: type, later: Sequence[str] = ()) -> tuple[Any, dict[str, Any]]:
    """The section's config as its stage reads it, and those of the settings in `later` that the class does not have."""
    fields = {f.name for f in dataclasses.fields(config_class)}
    values = stage_values(config_class, setup.profile, section)
    apart = {key: values.pop(key) for key in later if key in values and key not in fields}
    if "bf16" in fields and not setup.hardware.is_cpu:
        values.setdefault("bf16", True)  # its default asks the machine that plans
    config = build_config(config_class, values, where=section)
    return config, apart | {key: getattr(config, key) for key in later if key in fields}


def trainings(setup: Setup) -> list[Training]:
    """The control and the distilled student."""
    config, apart = typed(setup, "run_improved_kd", KDConfig, ("load_in_4bit",))
    launch = setup.profile.get("launch") or {}
    # a process a GPU: more than are planned for cannot be
    processes = 1 if setup.hardware.is_cpu else min(launch.get("processes") or 1, setup.hardware.count)
    online = config.teacher_signal == "online"
    work = Training(
        arm="kd",
        student=setup.student,
        teacher=setup.teacher,
        config=config,
        devices=setup.devices(config.student_devices, "run_improved_kd.student_devices"),
        teacher_devices=setup.devices(config.teacher_devices, "run_improved_kd.teacher_devices")
        if online and config.teacher_devices
        else (),
        processes=processes,
        sharded=processes > 1 and launch.get("accelerate") == "fsdp2",
        four_bit=bool(apart.get("load_in_4bit")),
    )
    if config.on_policy:
        setup.notes.append("the answers and caches of on-policy rounds are not in the plan")
    # the same in all but alpha, as the pipeline starts it
    control = dataclasses.replace(work, arm="sft", config=dataclasses.replace(config, alpha=0.0))
    return [control, work]


def caching(setup: Setup) -> Caching | None:
    """None where the teacher is asked online."""
    if setup.section("run_improved_kd").get("teacher_signal") == "online":
        return None
    config, apart = typed(setup, "cache_teacher", CacheTeacherConfig, ("cpu_offload",))
    wanted, key = config.teacher_devices, "cache_teacher.teacher_devices"
    if config.engine == "openai":
        setup.notes.append(
            "cache_teacher asks a server for its top k; it is planned as if the stage read the weights itself"
        )
        serve = config.started_server
        if serve and serve.devices:  # as in `_answering`
            wanted, key = serve.devices, "serve.devices"
    devices = setup.devices(wanted, key)
    return Caching(setup.teacher, config, devices, bool(apart.get("cpu_offload")) and not setup.hardware.is_cpu)


def read_serve(said: Any, where: str) -> dict[str, Any] | None:
    """What is said of a server, as a mapping or as JSON of one; None where nothing is.

    Raises:
        UserError: it is no mapping; names `where` it stands.
    """
    if said is None or said == "":
        return None
    try:
        said = json.loads(said) if isinstance(said, str) else said
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg}): {said}") from None
    if not isinstance(said, dict):
        raise UserError(f"{where} must be a mapping such as {{command: vllm}}, found {said!r}")
    return said


def _serve(setup: Setup, config: Generation, name: str) -> dict[str, Any] | None:
    """What a stage's settings say of a server that it starts; None where transformers answers.

    Raises:
        UserError: it is no mapping.
    """
    said = read_serve(config.serve, f"{name}.serve")
    if said is None and config.engine == "openai":
        setup.notes.append(f"{name} asks a server that runs elsewhere; it is planned as if it ran on these GPUs")
    # {}: all defaults
    if said is None and config.engine in ("vllm", "openai"):
        return {}
    return said


def weight_bytes(name: str) -> float:
    """Bytes of a weight of a served model, as its name says.

    >>> weight_bytes("Qwen/Qwen3-30B-A3B-Instruct-2507-FP8"), weight_bytes("Qwen/Qwen3-8B")
    (1.0, 2.0)
    """
    # group 1: one byte a weight; group 2: half a byte
    found = QUANTISED.search(name)
    if not found:
        return 2.0
    return 1.0 if found[1] else FOUR_BITS_AND_SCALES


def _answering(setup: Setup, config: Generation, what: str, model: Shapes, answers: int,
               devices_name: str, name: str) -> Answering:  # fmt: skip
    serve = _serve(setup, config, name)
    # 1. who answers: transformers, the server that the stage starts, or one elsewhere
    served = serve is not None and not setup.hardware.is_cpu
    serve = serve or {}
    # an FP8 or 4-bit copy answers in the teacher's place; students have none
    stands_in = str(serve.get("model", "")) if model is setup.teacher else ""
    # 2. on what: the server's own settings stand over the stage's (`engines.stage_serve`, `serving.teacher_server`)
    serve_key = f"{name}.serve" if "serve" in setup.section(name) else "serve"
    devices_key, wanted = f"{name}.{devices_name}", getattr(config, devices_name)
    budget_key, budget = f"{name}.gpu_memory_gb", config.gpu_memory_gb
    if serve.get("devices"):
        devices_key, wanted = f"{serve_key}.devices", serve["devices"]
    if serve.get("gpu_memory_gb"):
        budget_key, budget = f"{serve_key}.gpu_memory_gb", serve["gpu_memory_gb"]
    devices = setup.devices(wanted, devices_key)
    return Answering(
        what=what,
        model=model,
        answers=answers,
        new_tokens=config.max_new_tokens,
        devices=devices,
        budget_gb=float(budget),
        served=served,
        rows=config.batch_size,
        weight_bytes=weight_bytes(stands_in),
        parallel=_parallel(serve, len(devices)),
        devices_key=devices_key,
        budget_key=budget_key,
        serve_key=serve_key,
    )


def _parallel(serve: Mapping[str, Any], gpus: int) -> tuple[int, int, int] | None:
    """Tensor, pipeline and data parallelism as they are set; None where they are to be derived."""
    tensor, data = serve.get("tensor_parallel"), serve.get("data_parallel")
    if not (tensor or data):
        return None
    # one that is not said follows from the other, as in `serving.sizes`
    tensor, data = tensor or gpus // data, data or gpus // tensor
    # sizes that do not fit on the GPUs at hand are derived anew
    return (tensor, 1, data) if 0 < tensor * data <= gpus else None


def generation(setup: Setup) -> Answering:
    """The teacher's answers to all prompts."""
    config = generation_of(setup.profile)
    answers = setup.rows.all * config.num_samples
    return _answering(setup, config, "teacher", setup.teacher, answers, "teacher_devices", "generate_sft_data")


def evaluation(setup: Setup) -> list[tuple[str, Answering]]:
    """Every arm's answers to the evaluation's prompts, over all temperatures and presets."""
    config = evaluation_of(setup.profile)
    rows = min(setup.rows.evaluation, EVALUATED[config.mode])
    # greedy decoding is one cell, whatever the preset; see evaluation.answers.cells
    cells = sum(len(config.presets) if temperature else 1 for temperature in config.temperatures)
    answers = rows * cells * config.num_samples
    found = []
    for arm in config.arms:
        role, key = ("teacher", "teacher_devices") if arm == "teacher" else ("student", "student_devices")
        model = setup.teacher if role == "teacher" else setup.student
        own = config
        if role == "teacher" and config.teacher_base_url:  # a server that runs elsewhere, whatever serve says
            own = dataclasses.replace(config, serve="", engine="openai")
        found.append((role, _answering(setup, own, arm, model, answers, key, "evaluate_distillation")))
    return found
