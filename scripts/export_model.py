"""After training: the student as an ordinary model folder, which any engine loads without knowing of adapters.

    python scripts/export_model.py --config configs/embedded.yaml
    python scripts/export_model.py --config configs/embedded.yaml --model_path RUN/final_model --dtype float32
    python scripts/export_model.py --config configs/embedded.yaml --gguf --llama_cpp ../llama.cpp

Writes merged weights, tokenizer, generation_config.json and a model card. The folder is loaded again and its logits
are compared with the adapter's before it gets its name: a folder that is there is complete. Safe to kill and run again.
"""

import glob
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# a script's own folder is on the path, the repository is not: its modules are imported from here on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from src.distillation.base import end_of_turn_id, load_tokenizer, model_fingerprint, place
from src.distillation.export import (
    Check,
    Student,
    base_licence,
    check_export,
    find_converter,
    is_hybrid,
    require_room,
    write_gguf,
    write_merged,
)
from src.distillation.sft import Sampling
from src.distillation.starting import WEIGHTS
from src.evaluation.answers import PRESETS
from src.evaluation.arms import distilled_adapter, run_of_model
from src.evaluation.verdict import headline_setting
from src.report.card import CardFacts, Evaluation, find_evaluation, model_card, vllm_command
from src.report.data_records import DataRecords, data_records
from src.utils.common import (
    UserError,
    atomic_path,
    finish_stage,
    logger,
    provenance,
    read_json,
    read_jsonl,
    run_cli,
    sha256_file,
    stage_state,
    write_text,
)
from src.utils.config import load_config, setting
from src.utils.stages import hold

MARKER = "export.json"


@dataclass
class ExportModelConfig:
    data_dir: str = setting("data/processed", "its manifest.json names data sets and licences")
    experiment_dir: str = setting("outputs/experiment/default", "runs are beside it, held-out rows in its sft/")
    evaluation_dir: str = setting("outputs/evaluation", "evaluations are looked for in it and below")
    model_path: str | None = setting(None, "RUN/final_model (default: the newest finished distilled run)")
    base: str | None = setting(None, "the student before training (default: from the run's kd_config.json)")
    output_dir: str | None = setting(None, "the model folder (default: outputs/export/ and the run's name)")
    dtype: Literal["bfloat16", "float32"] = setting("bfloat16", "of the written weights")
    gguf: bool = setting(False, "a GGUF file beside them, by llama.cpp's converter")
    llama_cpp: str = setting("", "gguf: a checkout of llama.cpp, or its convert_hf_to_gguf.py")
    student_devices: list[int] = setting([], "GPUs the model is spread over (default: the first; a CPU without any)")
    gpu_memory_gb: float = setting(36.0, "weights one GPU may hold, 1e9 bytes")
    overwrite: bool = setting(False, "replace another export")


@dataclass(frozen=True)
class Origin:
    """Where the export comes from: the run, the student, and what is recorded of both."""

    run: Path
    student: Student
    evaluation: Evaluation | None
    records: DataRecords
    hashes: dict[str, str]


def find_origin(config: ExportModelConfig) -> Origin:
    """Resolve run, base and evaluation.

    Raises:
        UserError: there is no such run, it is not finished or of another experiment, or the base is not its student.
    """
    # 1. the run, which must be finished and of this experiment
    adapter = distilled_adapter(config.model_path, config.experiment_dir)
    run, settings = adapter.parent, run_of_model(str(adapter))
    if not (run / "kd_results.json").is_file() or "fingerprint" not in settings:
        raise UserError(f"{run}: no finished run (kd_config.json, kd_results.json); let run_improved_kd.py finish it")
    experiment = Path(config.experiment_dir).name
    if settings["experiment"] != experiment:
        raise UserError(f"{run} is a run of {settings['experiment']}, not of {experiment}; name its profile")
    # 2. the student before training; --base may name a copy of it, which must have the same fingerprint
    base = config.base or settings["model_name_or_path"]
    fingerprint = model_fingerprint(base)
    if fingerprint != settings["fingerprint"]["student"]:
        raise UserError(f"{base} is not the model that {run} was trained on; name that with --base")
    # 3. what is recorded of it, for the card; all of it is hashed, so that a new evaluation makes another export
    evaluation = find_evaluation(Path(config.evaluation_dir), run)
    hashes = {"base model": fingerprint} | adapter_hashes(adapter, settings)
    records = data_records(settings["fingerprint"], Path(config.data_dir), Path(config.experiment_dir) / "sft")
    for name, why in records.missing.items():
        logger.warning("%s is not on the card: %s", name, why)
    for path in (run / "kd_config.json", *records.paths, *([evaluation.path] if evaluation else [])):
        hashes[path.name] = sha256_file(path)
    # 4. where it is loaded; "bfloat16" -> torch.bfloat16
    dtype = getattr(torch, config.dtype)
    devices = place(base, config.student_devices, dtype, config.gpu_memory_gb)
    return Origin(run, Student(base, str(adapter), dtype, devices), evaluation, records, hashes)


def adapter_hashes(adapter: Path, settings: dict[str, Any]) -> dict[str, str]:
    """File name -> sha256 of the adapter, which must be the one that the run's numbers were measured of.

    Raises:
        UserError: its weights are gone or others than those measured, or its rank or alpha are not those of the run.
    """
    if not (adapter / WEIGHTS).is_file():
        raise UserError(f"{adapter}: no {WEIGHTS} there; bring the run's own file back, or train again")
    hashes = {name: sha256_file(adapter / name) for name in (WEIGHTS, "adapter_config.json")}
    measured = read_json(adapter.parent / "kd_results.json").get("adapter_sha256")  # older runs did not record it
    if measured is not None and hashes[WEIGHTS] != measured:
        raise UserError(
            f"{adapter}: {WEIGHTS} was changed after it was measured (kd_results.json has another "
            "sha256); bring the run's own file back, or train again"
        )
    found = read_json(adapter / "adapter_config.json")
    for ours, theirs in (("r", "lora_r"), ("lora_alpha", "lora_alpha")):  # the update is scaled by alpha / r
        if found.get(ours) != settings[theirs]:
            raise UserError(
                f"{adapter}: adapter_config.json has {ours} = {found.get(ours)!r}, the run {settings[theirs]!r}; "
                "bring the run's own file back"
            )
    return hashes


def chosen_sampling(evaluation: Evaluation | None) -> tuple[Sampling | None, str]:
    """The defaults of generation_config.json, and what the card says of them: those of the evaluation's headline."""
    setting = headline_setting(evaluation.results) if evaluation else None
    if setting is None:
        return None, "It has no sampling defaults, for none were evaluated: transformers decodes greedily."
    if setting.temperature == 0:
        return None, (
            "It has no sampling defaults: the evaluation's first sentence is about greedy decoding (temperature 0). "
            "transformers decodes so by itself; a server has defaults of its own, so send it temperature 0."
        )
    sampling = Sampling(setting.temperature, **PRESETS[setting.preset])  # recommended: top_p 0.8, top_k 20
    return sampling, (
        f"Its sampling defaults are those that the evaluation's first sentence is about: temperature "
        f"{sampling.temperature:g}, top-p {sampling.top_p:g}, top-k {sampling.top_k} (0 is off)."
    )


def card_of(config: ExportModelConfig, origin: Origin, check: Check, said: str, name: str) -> str:
    tokenizer = load_tokenizer(origin.student.adapter)
    return model_card(
        CardFacts(
            name,
            read_json(origin.run / "kd_config.json") | {"model_name_or_path": origin.student.base},  # --base wins
            read_json(origin.run / "kd_results.json"),
            origin.records,
            origin.evaluation,
            base_licence(origin.student.base),
            origin.hashes,
            config.dtype,
            check.sentence(),
            tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer)),
            said,
            is_hybrid(tokenizer),
            provenance(),
        )
    )


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> size (bytes) and sha256 of every file in a folder."""
    return {path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(folder.iterdir())}


def broken_file(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    """The first file that is not as it was written, or None. Sizes are compared before anything is read."""
    for name, written in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != written["size"]:
            return name
    # hashing reads every weight, so it comes last
    for name, written in files.items():
        if sha256_file(folder / name) != written["sha256"]:
            return name
    return None


def is_complete(marker: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether this very export is there, every byte of it.

    Raises:
        UserError: another export is there.
    """
    if stage_state(marker, fingerprint, False) != "done":
        return False
    files = read_json(marker)["files"]
    # names alone, in a list
    if not isinstance(files, dict):
        logger.warning("%s: an older version wrote it and kept no hashes; it is made again", marker.parent)
        return False
    logger.info("%s is there; its files are compared with what was written", marker.parent)
    if name := broken_file(marker.parent, files):
        logger.warning("%s is not as it was written; the export is made again", marker.parent / name)
        return False
    return True


def export(config: ExportModelConfig, origin: Origin, target: Path, converter: Path | None) -> None:
    """Write the folder, unless this very export is there."""
    marker = target / MARKER
    if target.is_dir() and any(target.iterdir()) and not marker.is_file():
        raise UserError(f"{target} holds files but no {MARKER}, so it is no export; name another --output_dir")
    fingerprint = origin.hashes | {"dtype": config.dtype, "gguf": config.gguf}
    if not config.overwrite and is_complete(marker, fingerprint):
        logger.info("%s is complete; nothing to do", target)
        return
    require_room(origin.student.base, origin.student.dtype, target.parent, 2 if converter else 1)  # GGUF: all once more
    sampling, said = chosen_sampling(origin.evaluation)
    # before the weights are merged: without these rows nothing could be checked
    heldout = read_jsonl(Path(config.experiment_dir) / "sft" / "sft_eval_data_clean.jsonl")
    with atomic_path(target) as made:
        # 1. weights, tokenizer, settings; 2. read again and compared
        write_merged(origin.student, made, sampling)
        check = check_export(origin.student, made, heldout)
        print(f"checked: {check.sentence()}")
        if not check.tells:
            logger.warning("the adapter does so little that half of it would pass, too; --dtype float32 tells more")
        # 3. the card, which the converter reads as well
        write_text(made / "README.md", card_of(config, origin, check, said, target.name))
        if converter:
            write_gguf(converter, made, target.name, origin.student.dtype)
        made_by = {name: value for name, value in provenance().items() if name != "command"}  # it names local paths
        finish_stage(made / MARKER, fingerprint, files=describe_files(made), check=vars(check), provenance=made_by)


def main() -> None:
    config = load_config(ExportModelConfig, "export_model")
    # a converter that is not there is said before minutes are spent on hashes and weights
    converter = find_converter(config.llama_cpp) if config.gguf else None
    origin = find_origin(config)
    target = Path(config.output_dir or Path("outputs/export") / origin.run.name)
    # the folder is replaced as a whole: the lock stands beside it
    with hold(target.parent, "export_model", target.name, glob.escape(target.name)):
        export(config, origin, target, converter)
    print(f"model folder {target}; its README.md says what it is, and how to ask it:")
    print(f"  {vllm_command(str(target), is_hybrid(load_tokenizer(str(target))))}")
    print(f'  pipeline("text-generation", model={json.dumps(str(target))})(messages, max_new_tokens=256)')
    if converter:
        print(f"  llama-server -m {shlex.quote(str(target / target.name))}.gguf")


if __name__ == "__main__":
    run_cli(main)
