"""A trained student as an ordinary model folder: its adapter merged, written, loaded again and checked.

One model is in memory at a time: the one that is written, the student with its adapter beside it, the one that is read
back.
"""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
import yaml
from huggingface_hub.repocard import metadata_load
from peft import PeftModel
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from src.distillation.base import (
    EncodedRow,
    causal_lm,
    count_parameters,
    encode_row,
    end_of_turn_id,
    load_model,
    load_tokenizer,
    meta_model,
    prompt_text,
)
from src.distillation.lora import merge_adapter
from src.distillation.sft import Sampling, end_token_ids
from src.utils.common import Progress, UserError, logger, require_disk, write_json

CHECK_ROWS, CHECK_TOKENS = 4, 64  # held-out rows that are read to check, and answer tokens of each
# The same weights may be rounded to their other neighbour where fp32 sums are in another order, and those sums differ
# themselves: an error of the size of the rounding of an fp32 export, which makes sqrt(2) of the two together.
ALLOWED = 1.5
SHARD = "5GB"  # of one weight file
CONVERTER = "convert_hf_to_gguf.py"
CONVERTER_FORMATS = {torch.bfloat16: "bf16", torch.float32: "f32"}  # its words for --outtype
HELLO = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Student:
    """What is exported: a base model (folder or hub id) and the folder of the adapter trained on it.

    dtype: of the written weights.
    device_map: module -> device, see `base.place`; None for the CPU.
    """

    base: str
    adapter: str
    dtype: torch.dtype
    device_map: dict[str, Any] | None = None


@dataclass(frozen=True)
class Check:
    """Root mean squares of differences of logits, at the first answer tokens of held-out rows, all computed in fp32.

    error: the written folder against the student with its adapter beside it.
    rounding: the same of a merge formed by the formula and rounded once: the error that cannot be avoided.
    effect: the student without its adapter against the one with it.
    agreement: share of tokens at which folder and adapter find the same token most likely.
    """

    rows: int
    tokens: int
    error: float
    rounding: float
    effect: float
    agreement: float

    @property
    def passed(self) -> bool:
        return self.error <= ALLOWED * self.rounding  # false for NaN

    @property
    def tells(self) -> bool:
        """Whether half of the adapter, as with its scale forgotten, would have failed."""
        return self.effect / 2 > ALLOWED * self.rounding

    def sentence(self) -> str:
        return (
            f"logits differ from the adapter's by {self.error:.2g} (root mean square over {self.tokens} answer tokens "
            f"of {self.rows} held-out rows), rounding the weights once makes {self.rounding:.2g}, the adapter itself "
            f"{self.effect:.2g}; the most likely token is the same at {self.agreement:.2%}"
        )


def require_room(base: str, dtype: torch.dtype, folder: Path, files: int) -> None:
    """Refuse to begin where the disk has no room for so many files of all weights."""
    # counted on the meta device: nothing is loaded
    weights = count_parameters(meta_model(base)) * dtype.itemsize
    require_disk(folder, files * weights + 50e6, "the exported model")  # + the tokenizer


def base_licence(name: str) -> dict[str, str]:
    """What the base model's card says of its licence: `license`, `license_name`, `license_link`; empty if nothing."""
    place, revision = name, None
    if not Path(name).is_dir():  # "owner/name@REVISION"
        place, _, revision = name.partition("@")
    path = cached_file(
        place,
        "README.md",
        revision=revision or None,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:  # no card, or a hub that cannot be reached: the exported card says that it is not known
        return {}
    try:
        said = metadata_load(path) or {}
    except (ValueError, yaml.YAMLError) as error:
        logger.warning("%s: its licence cannot be read (%s)", path, " ".join(str(error).split())[:100])
        return {}
    # a card may hold a list, or nothing
    if not isinstance(said.get("license"), str):
        return {}
    fields = ("license", "license_name", "license_link")
    return {field: said[field] for field in fields if isinstance(said.get(field), str)}


def is_hybrid(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks otherwise for an answer with a thought than for one without."""
    return prompt_text(tokenizer, HELLO, enable_thinking=True) != prompt_text(tokenizer, HELLO)


def generation_settings(
    tokenizer: PreTrainedTokenizerBase, own: GenerationConfig, sampling: Sampling | None
) -> GenerationConfig:
    """What engines take over from generation_config.json.

    Args:
        own: the base model's, whose end tokens stay. A base model stops at the end of a text only; the end of the turn
            that the student was trained on is added.
        sampling: the defaults; None for none, where transformers decodes greedily and servers have their own.
    """
    ends = end_token_ids(tokenizer, own.eos_token_id)
    # of the base model's own settings the ids alone are taken over
    settings = {"eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": own.bos_token_id}
    if sampling is not None and sampling.temperature > 0:
        # how long an answer may be is for who asks
        drawn = {name: value for name, value in asdict(sampling).items() if name != "max_new_tokens"}
        settings |= {"do_sample": True, **drawn}
    return GenerationConfig(**settings)


def write_merged(student: Student, folder: Path, sampling: Sampling | None) -> GenerationConfig:
    """Write weights, configuration, tokenizer and generation settings into a folder; returns those settings.

    A base model that is kept in fp32 is rounded when it is loaded, as the evaluation does it, which merges the same.

    Raises:
        UserError: base or adapter cannot be loaded, do not fit on one another, or the base is quantised.
    """
    tokenizer = load_tokenizer(student.adapter)  # of the student as it was trained, with its chat template
    model = load_model(student.base, student.dtype, student.device_map)
    if getattr(model.config, "quantization_config", None) is not None:
        raise UserError(f"{student.base}: its weights are quantised; name the model that it was made from with --base")
    logger.info("merging %s into %s", student.adapter, student.base)
    model = merge_adapter(model, student.adapter)
    settings = generation_settings(tokenizer, model.generation_config, sampling)
    model.generation_config = settings
    model.config.eos_token_id = settings.eos_token_id  # for engines that read config.json alone
    logger.info("writing the merged weights in %s", str(student.dtype).removeprefix("torch."))
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # safetensors lets nobody but the owner read, a server may be another
        path.chmod((folder / "config.json").stat().st_mode)
    return settings


@contextlib.contextmanager
def computed_in_fp32(model: nn.Module) -> Iterator[None]:
    """Within it the model computes in fp32 whatever its weights are kept in, with one layer of them cast at a time.

    In bf16 every product is rounded, which hides what a wrong weight does.
    """
    # parameter -> its weights as they were, while a wider copy stands in for them
    kept: dict[nn.Parameter, Tensor] = {}

    # before and after each layer's forward
    def widen(module: nn.Module, _: Any) -> None:
        for parameter in module.parameters():
            kept[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(module: nn.Module, _: Any, __: Any) -> None:
        for parameter in module.parameters():
            parameter.data = kept.pop(parameter)

    # layer by layer: of Qwen3-8B the widest part is then its embedding, 2.5 GB, where all of it would be 33 GB
    decoder = causal_lm(model).get_decoder()
    # embedding, last norm, rotary embedding
    others = [module for name, module in decoder.named_children() if name != "layers"]
    handles = []
    for module in (*decoder.layers, *others, causal_lm(model).get_output_embeddings()):
        handles += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def answer_logits(model: PreTrainedModel | PeftModel, row: EncodedRow) -> Tensor:
    """Logits that predict the first answer tokens of a row, `[tokens, vocabulary]`, on the CPU."""
    start = len(row.prompt_ids)
    # the prompt, and as much of the answer as is checked
    ids = (row.prompt_ids + row.response_ids)[: start + CHECK_TOKENS]
    device = causal_lm(model).get_input_embeddings().weight.device
    logits_1LV = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
    # position i predicts token i + 1: the last of the prompt predicts the first of the answer
    return logits_1LV[0, start - 1 : -1].float().cpu()


def merge_by_formula(model: PeftModel) -> None:
    """W + scale B A (Hu et al. 2021, equation 3), added up in fp32 and rounded once to the type of W, in place."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            [name] = layer.active_adapters
            weight = layer.base_layer.weight
            # [outputs, r] @ [r, inputs]
            update = layer.lora_B[name].weight.data.float() @ layer.lora_A[name].weight.data.float()
            weight.data = (weight.data.float() + layer.scaling[name] * update).to(weight.dtype)


def _all_logits(model: PreTrainedModel | PeftModel, rows: Sequence[EncodedRow], progress: Progress) -> Tensor:
    """`answer_logits` of all rows, `[tokens, vocabulary]`."""
    found = []
    for row in rows:
        found.append(answer_logits(model, row))
        progress.advance()
    return torch.cat(found)


def _root_mean_square(difference: Tensor) -> float:
    return float(difference.double().pow(2).mean().sqrt())


def check_export(student: Student, folder: Path, messages: Sequence[dict[str, Any]]) -> Check:
    """Load the written folder and compare its logits with those of the student with its adapter beside it.

    Args:
        messages: held-out rows (`id`, `messages`), of which the first are read.

    Raises:
        UserError: the folder is not the student within the rounding of its weights, or ends its turn otherwise.
    """
    tokenizer, messages = load_tokenizer(student.adapter), messages[:CHECK_ROWS]
    rows = [encode_row(tokenizer, row, end_of_turn_id(tokenizer)) for row in messages]
    _check_words(student, folder, messages, rows)
    with Progress(4 * len(rows), "checking", "pass") as progress:
        # 1. the student with its adapter beside it, which is the truth; without it; with it merged as it should be
        base = load_model(student.base, student.dtype, student.device_map)
        adapted = PeftModel.from_pretrained(base, student.adapter).eval()
        with computed_in_fp32(adapted):
            truth_NV = _all_logits(adapted, rows, progress)
            # merged where the adapter is switched off, or it would act twice
            with adapted.disable_adapter():
                without_NV = _all_logits(adapted, rows, progress)
                merge_by_formula(adapted)
                rounded_NV = _all_logits(adapted, rows, progress)
        del base, adapted  # before the next model is loaded

        # 2. what was written
        written = load_model(str(folder), student.dtype, student.device_map)
        with computed_in_fp32(written):
            found_NV = _all_logits(written, rows, progress)
    check = Check(
        rows=len(rows),
        tokens=len(truth_NV),
        error=_root_mean_square(found_NV - truth_NV),
        rounding=_root_mean_square(rounded_NV - truth_NV),
        effect=_root_mean_square(without_NV - truth_NV),
        agreement=float((found_NV.argmax(-1) == truth_NV.argmax(-1)).double().mean()),
    )
    if not check.passed:
        raise UserError(
            f"the merged model is not the student: {check.sentence()}; nothing is kept. Run it again, and if that "
            "does not help serve the adapter itself (vllm serve BASE --enable-lora)"
        )
    return check


def _check_words(student: Student, folder: Path, messages: Sequence[dict[str, Any]], rows: list[EncodedRow]) -> None:
    """Refuse a written tokenizer that reads rows otherwise, or settings that go on after the end of the turn."""
    written = load_tokenizer(str(folder))
    end = end_of_turn_id(written)
    if [encode_row(written, row, end) for row in messages] != rows:
        raise UserError(f"{folder}: the written tokenizer reads held-out rows otherwise than {student.adapter}'s")
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if end not in ends:  # an evaluation would not tell: it passes end tokens of its own
        raise UserError(f"{folder}: generation_config.json stops at {ends}, not at the end of the turn, {end}")


def find_converter(llama_cpp: str) -> Path:
    """llama.cpp's converter, in its folder or named itself.

    Raises:
        UserError: it is not there.
    """
    path = Path(llama_cpp)
    path = path / CONVERTER if path.is_dir() else path  # the folder of a clone, or the script itself
    if not llama_cpp or not path.is_file():
        raise UserError(
            f"--gguf needs {CONVERTER} of llama.cpp, not found in {llama_cpp or 'nothing named'}; "
            "git clone https://github.com/ggml-org/llama.cpp and pass --llama_cpp its folder"
        )
    return path


def write_gguf(converter: Path, folder: Path, name: str, dtype: torch.dtype) -> Path:
    """Convert a written folder to `folder`/`name`.gguf with llama.cpp's own script.

    Raises:
        UserError: it fails (says its last line), or the file ends a turn otherwise or has another chat template.
    """
    target = folder / f"{name}.gguf"
    logger.info("converting to %s", target.name)
    with tempfile.TemporaryDirectory() as place:
        said = Path(place) / "metadata.json"
        write_json(said, {"general.finetune": None})  # else read off the folder's name, which is a temporary one
        command = [sys.executable, str(converter), str(folder), "--outfile", str(target), "--outtype",
                   CONVERTER_FORMATS[dtype], "--model-name", name, "--metadata", str(said)]  # fmt: skip
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode or not target.is_file():
        # of a traceback the last line says most
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"{converter} failed: {last[:200]}; mend that, or export without --gguf")
    # an end of turn that the file does not know would be hidden by clients that pass stop words of their own
    tokenizer = load_tokenizer(str(folder))
    try:
        fields = gguf.GGUFReader(target).fields
    except (ValueError, IndexError) as error:
        raise UserError(f"{converter} wrote no GGUF file ({error}); update llama.cpp") from None
    # what clients of the file alone go by
    for key, wanted in (
        ("tokenizer.ggml.eos_token_id", end_of_turn_id(tokenizer)),
        ("tokenizer.chat_template", tokenizer.chat_template),
    ):
        found = fields[key].contents() if key in fields else None
        if found != wanted:
            raise UserError(
                f"{converter}: its file has {key} = {str(found)[:60]!r}, the student {str(wanted)[:60]!r}; "
                "update llama.cpp, or export without --gguf"
            )
    return target
