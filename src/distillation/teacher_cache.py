"""A teacher's beliefs on disk: written in one pass over the clean rows, read by every training run after it.

`hidden` keeps the final hidden state of every response position and the output matrix once. Logits, and with them every
divergence at every temperature, follow exactly; a token costs 2 x width bytes, where its bf16 logits would cost 2 x
vocabulary. `topk` keeps the K most probable tokens, their log-probabilities at T = 1 and, for a list of temperatures,
the sum that says how much of the softened distribution lies outside them.

A teacher behind a server (`engine: openai`) can have its top k asked for; its weights are then not needed here. It says
nothing of hidden states, and nothing at other temperatures: the softened rest cannot be computed from the top k. So
such a cache is for a teacher's softmax at T = 1, which is what training asks of it where `temperature` is 1, or where
`teacher_temperature` is 1 and the student alone is softened. Rows that measure keep the top k too, and with it the
log-probability of every token of theirs: what is measured on them is a bound, see `losses.bounded_stats`.

    index.json           what it was made of, where each row is, and the hashes of the files below
    head.safetensors     the output matrix; not of a served teacher, nor of a round's own answers
    shard_00000.safetensors ...    [tokens, width] or [tokens, K], the rows' response positions end to end
    tokenizer/           the teacher's tokenizer, so that training needs nothing else of the teacher
"""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from src.distillation.base import (
    SERVED,
    EncodedRow,
    compute_dtype,
    encode_row,
    end_of_turn_id,
    load_model,
    load_tokenizer,
    model_fingerprint,
    model_name,
    place,
    served_fingerprint,
)
from src.distillation.batching import TrainingData, clean_files, consecutive, is_validation, read_clean
from src.distillation.engines import ServerSettings, refuse_second_server, server_kind, started
from src.distillation.gpu import memory_of, tokens_that_fit
from src.distillation.losses import IDENTITY, LogitMap, Stated, TopK, chunk_tokens, product
from src.distillation.openai_engine import Server
from src.distillation.packing import check_packing
from src.distillation.served_teacher import KINDS, ask_rows, check_served
from src.distillation.serving import Serve, answering, read_serve, teacher_server, with_open_port
from src.distillation.teacher import Reader, Rows, model_reader
from src.utils.common import (
    Progress,
    UserError,
    append_jsonl,
    atomic_path,
    finish_stage,
    logger,
    provenance,
    read_json,
    read_jsonl,
    repair_jsonl_tail,
    require_disk,
    sha256_file,
    sha256_text,
    stage_state,
    start_stage,
    write_json,
)
from src.utils.config import setting
from src.utils.stages import hold

# of index.json; `read_index` refuses every other
FORMAT = 2
SAMPLED = 256  # positions of a file of hidden states on which the share outside the top k is measured
# where the teacher is and how its passes are cut: two caches that differ in these alone are the same cache
NOT_IN_FINGERPRINT = (
    "teacher_model_name_or_path",
    "experiment_dir",
    "overwrite",
    "teacher_devices",
    "gpu_memory_gb",
    "tokens_per_batch",
    "cpu_offload",
    "engine",
    "served_model_name",
    *(field.name for field in fields(ServerSettings)),
)
CPU_TOKENS = 4096  # in one pass on a CPU
MOST_TOKENS = 32_768  # in one pass on a GPU that has memory for more: nothing is gained
MADE_BY = "run scripts/cache_teacher.py"
HEAD = "head.safetensors"
WRITTEN = "written.jsonl"  # until the cache is complete: each file that is, with its hash
NOTICED = 3.0  # seconds from which on hashing is worth a line


@dataclass
class CacheTeacherConfig(ServerSettings):
    """How the teacher's beliefs are kept."""

    teacher_model_name_or_path: str = setting(
        "", "folder or hub id of the teacher; openai: of its tokenizer, no weights are read", "teacher_model"
    )
    experiment_dir: str = setting("outputs/experiment/default", "its folder sft/ holds the clean rows")
    signal: Literal["hidden", "topk"] = setting("hidden", "what is kept of each response position")
    top_k: int = setting(64, "tokens kept by topk, and those outside which the softened share is reported")
    temperatures: list[float] = setting([1.0, 1.5, 2.0, 2.5, 4.0], "for which topk can be trained on")
    validation_fraction: float = setting(0.05, "as in training: of these rows topk keeps what measuring needs")
    max_length: int = setting(1024, "longer rows (prompt and answer, tokens) are left out, as in training")
    bf16: bool | None = setting(None, "compute and keep bf16 (default: where the processor multiplies it), else fp32")
    packing: bool = setting(True, "read several rows in one pass without padding")
    tokens_per_batch: int | None = setting(
        None, "tokens in one forward pass; a longer row is one by itself (default: what the device has memory for)"
    )
    tokens_per_shard: int = setting(65536, "response tokens in one file, the unit in which a killed run goes on")
    teacher_devices: list[int] = setting([], "GPUs the teacher is spread over")
    gpu_memory_gb: float = setting(36.0, "weights one GPU may hold, 1e9 bytes")
    cpu_offload: bool = setting(
        False, "keep layers beyond gpu_memory_gb in CPU memory; they pass through a GPU as they run"
    )
    engine: Literal["transformers", "openai"] = setting(
        "transformers", "where the teacher is: its weights here, or `openai`, behind a vLLM or SGLang server"
    )
    served_model_name: str = setting("", "openai: the server's name for the teacher, if it is another")
    overwrite: bool = setting(False, "make it again")

    def __post_init__(self) -> None:
        for name in ("top_k", "tokens_per_batch", "tokens_per_shard", "max_length", "concurrency", "tries"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1")
        if self.bf16 is None:
            self.bf16 = compute_dtype() is torch.bfloat16
        if any(temperature <= 0 for temperature in self.temperatures):
            raise UserError("temperatures must be above 0")
        if self.engine == "openai":
            self._check_served()

    @property
    def started_server(self) -> Serve | None:
        """The server that this stage starts; `serve` is for all stages, this one asks it with engine `openai` alone."""
        serve = read_serve(self.serve) if self.engine == "openai" else None
        if serve is None:
            return None
        refuse_second_server(self)
        # the profile's own arguments stand over it
        asked = {"max-logprobs": self.top_k} if serve.program == "vllm" else {}  # it gives 20 otherwise, and no more
        return replace(
            serve,
            gpu_memory_gb=serve.gpu_memory_gb or self.gpu_memory_gb,
            arguments=asked | dict(serve.arguments),
        )

    def _check_served(self) -> None:
        """Raise a UserError for what a server cannot give."""
        kind = server_kind(self, self.started_server)
        if kind not in KINDS:
            raise UserError(f"server {kind} gives no log-probabilities of a prompt; {' and '.join(KINDS)} do")
        if self.signal != "topk":
            raise UserError("a server gives no hidden states; pass --signal topk, or --engine transformers")
        if self.temperatures != [1.0]:
            raise UserError(
                "a server knows its teacher at T = 1 alone: pass --temperatures 1 and train with temperature (or "
                "teacher_temperature) 1, or keep hidden states, exact at every T, with --engine transformers"
            )


def _key(row: EncodedRow) -> str:
    return f"{row.id}/{row.sample_index}"  # "gsm8k-17/0", the key in index.json


def _token_hash(row: EncodedRow) -> str:
    return sha256_text(f"{row.prompt_ids}{row.response_ids}")[:16]


def _template_hashes(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    # by id: a tokenizer gives its vocabulary in any order
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    hashes = {"tokenizer": sha256_text(str(vocabulary))[:16], "template": sha256_text(tokenizer.chat_template)[:16]}
    if hasattr(tokenizer, "prompt_date"):  # the template asks for the day
        hashes["prompt_date"] = tokenizer.prompt_date.isoformat()
    return hashes


# What a file keeps of its rows; `stated` is the top k in fp32 and the log-probability of each token, to measure with.
SHARD_KINDS = ("hidden", "stated", "topk")


class _Shard(NamedTuple):
    file: str
    kind: str  # one of SHARD_KINDS
    rows: list[EncodedRow]


def kept_kind(config: CacheTeacherConfig, measures: bool) -> str:
    """What is kept of a row, one of `SHARD_KINDS`."""
    if config.signal == "topk" and not measures:
        return "topk"
    return "stated" if config.engine == "openai" else "hidden"


def kept_bytes(config: CacheTeacherConfig, kind: str, width: int) -> int:
    """Bytes that a file of a kind has for each response position; `width` is that of a hidden state."""
    if kind == "hidden":
        return (2 if config.bf16 else 4) * width
    if kind == "stated":  # int32 id and fp32 log-probability of each kept token, and the label's
        return 8 * config.top_k + 4
    # int32 id and fp16 log-probability of each kept token, an fp32 sum for each temperature
    return 6 * config.top_k + 4 * len(config.temperatures)


def _shards(rows: Rows, kind_of: Callable[[EncodedRow], str], tokens_per_shard: int) -> list[_Shard]:
    """Rows in the order of their length, cut into files; those of each kind in files of their own."""
    # rows of about one length share a pass, which pads little where rows are not packed; the key settles ties
    ordered = sorted(rows, key=lambda row: (len(row), _key(row)))
    shards: list[_Shard] = []
    # files are numbered on through the kinds: hidden 00000 to 00002, topk 00003, ...
    for kind in SHARD_KINDS:
        own = [row for row in ordered if kind_of(row) == kind]
        for group in consecutive(own, tokens_per_shard, lambda row: len(row.response_ids)):
            shards.append(_Shard(f"shard_{len(shards):05d}.safetensors", kind, group))
    return shards


@torch.no_grad()
def _top_k(
    hidden_NG: Tensor, reader: Reader, k: int, temperatures: Sequence[float]
) -> tuple[dict[str, Tensor], Tensor]:
    """The top k of each position, and the share outside it at each temperature, summed over positions."""
    parts: dict[str, list[Tensor]] = {"ids": [], "log_p": [], "log_sums": []}
    # a sum over all positions of a file
    outside = torch.zeros(len(temperatures), dtype=torch.float64)
    device = reader.head().device
    head_VG = reader.head_on(device)
    # [C, V] logits of a chunk at a time: those of all positions do not fit
    for states in hidden_NG.split(chunk_tokens(reader.vocab_size, device=device)):
        # a GPU's head may have up to 127 columns beyond the last token (`losses.shared_head`)
        logits = product(states.to(device), head_VG.T)[:, : reader.vocab_size]
        log_p = torch.log_softmax(reader.logit_map(logits), -1)
        kept, ids = log_p.topk(k)
        # log sum_j p_j^(1/T), [C, temperatures]: what a softmax at T of these log-probabilities is normalised by
        sums = torch.stack([(log_p / t).logsumexp(-1) for t in temperatures], -1)
        for index, t in enumerate(temperatures):
            # kept / t - sum is the log-probability at T of a kept token
            outside[index] += (1 - (kept / t - sums[:, index, None]).exp().sum(-1)).sum().item()
        # int32 and fp16: the disk is asked for as many bytes (`kept_bytes`)
        for name, tensor in (("ids", ids.int()), ("log_p", kept.half()), ("log_sums", sums)):
            parts[name].append(tensor.cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}, outside


@dataclass(frozen=True)
class _Source:
    """Where a cache comes from.

    tensors: of the rows of a file, what its kind keeps; `outside` and `looked_at` tell the share outside the top k.
    head: the output matrix, where the teacher's weights are here.
    """

    tensors: Callable[[_Shard], dict[str, Tensor]]
    vocab_size: int
    logit_map: LogitMap = IDENTITY
    head: Callable[[], Tensor] | None = None


def _write_shard(path: Path, shard: _Shard, source: _Source) -> None:
    tensors = source.tensors(shard)
    # a file is there whole or not at all, so that a killed run knows what it lacks
    with atomic_path(path) as made:
        save_file(tensors, made)


def _from_weights(shard: _Shard, reader: Reader, config: CacheTeacherConfig) -> dict[str, Tensor]:
    # kept for the files that follow, which would run out of memory as well; a run that goes on begins anew
    hidden, config.tokens_per_batch = _read_within_memory(reader, shard.rows, config.tokens_per_batch)
    # the share outside the top k is printed for either kind; for hidden states a sample of positions tells it
    looked_at = hidden if shard.kind == "topk" else hidden[:: max(1, len(hidden) // SAMPLED)]
    tensors, outside = _top_k(looked_at, reader, config.top_k, config.temperatures)
    kept = tensors if shard.kind == "topk" else {"hidden": hidden}
    return kept | {"outside": outside, "looked_at": torch.tensor(len(looked_at))}


def _from_server(shard: _Shard, server: Server, top_k: int, vocab_size: int) -> dict[str, Tensor]:
    told = ask_rows(server, shard.rows, top_k, vocab_size)
    count = len(told.ids_NK)
    # at T = 1, the only temperature that a server knows
    outside = (1 - told.log_p_NK.double().exp().sum(-1)).sum()
    # [None]: [temperatures], as `_top_k` gives it, with one temperature
    facts = {"ids": told.ids_NK, "outside": outside[None], "looked_at": torch.tensor(count)}
    if shard.kind == "stated":
        return facts | {"log_p": told.log_p_NK, "label_log_p": told.label_log_p_N}
    return facts | {"log_p": told.log_p_NK.half(), "log_sums": torch.zeros(count, 1)}  # log 1: all of it, at T = 1


def _read_within_memory(reader: Reader, rows: Rows, tokens: int) -> tuple[Tensor, int]:
    """The hidden states of some rows, in passes of `tokens`, and the tokens of a pass for which memory was enough:
    where it runs out they are halved.

    Raises:
        UserError: not even one row fits.
    """
    while True:
        try:
            # on the CPU pass by pass: the states of a whole file need not fit beside the model
            return torch.cat([reader.hidden(batch).cpu() for batch in consecutive(rows, tokens, len)]), tokens
        except torch.OutOfMemoryError as error:
            if tokens <= max(map(len, rows)):
                raise UserError("out of GPU memory with one row; lower --max_length, or name more devices") from error
        # outside the except block, whose traceback would hold the tensors of the pass that failed
        tokens //= 2
        logger.warning("out of GPU memory; passes of %d tokens (--tokens_per_batch %d begins there)", tokens, tokens)
        torch.cuda.empty_cache()


def _read_rows(
    config: CacheTeacherConfig, tokenizer: PreTrainedTokenizerBase, own_answers: bool
) -> tuple[list[EncodedRow], set[str], dict]:
    """The clean rows that fit, the keys of those that measure (validation, held out), and the hashes of their files."""
    folder, end_id = Path(config.experiment_dir) / "sft", end_of_turn_id(tokenizer)
    rows, measuring, hashes = [], set(), {}
    files = clean_files(folder)
    if own_answers:  # a round's answers are for training alone
        del files["eval"]  # else it would be missed
    for split, path in files.items():
        hashes[path.name] = sha256_file(path) if path.is_file() else None
        for row in read_clean(path, own_answers):
            rows.append(encode_row(tokenizer, row, end_id, own_answers))
            # by the id alone, as training chooses them: all answers to a prompt fall on the same side
            if split == "eval" or is_validation(row["id"], config.validation_fraction):
                measuring.add(_key(rows[-1]))
    if len({_key(row) for row in rows}) < len(rows):  # `read_clean` has looked at each file by itself
        raise UserError(f"{folder}: two clean rows share an id and a sample_index, one in each split; remove one")
    # an answer that was cut before it said anything has no position
    return [row for row in rows if len(row) <= config.max_length and row.response_ids], measuring, hashes


def make_cache(config: CacheTeacherConfig, own_answers: bool = False) -> dict[str, Any]:
    """Write `experiment_dir`/teacher_cache; killed and called again, it goes on with the first missing file.

    Args:
        own_answers: `experiment_dir` is the folder of an on-policy round: a student's own answers, to train on alone.
            The cache is the round's own, so one of other rows, or not as it was written, is made again; it keeps no
            head, training reads that of the run's cache.

    Returns:
        The content of index.json.

    Raises:
        UserError: something the user must put right; the text says what and how.
    """
    name, folder = config.teacher_model_name_or_path, Path(config.experiment_dir) / "teacher_cache"
    if not name:
        raise UserError("teacher_model_name_or_path is not set; name a profile with --config, or pass the flag")
    with hold(folder, "cache_teacher"):
        return _make_cache(config, name, folder, own_answers)


def _make_cache(config: CacheTeacherConfig, name: str, folder: Path, own_answers: bool) -> dict[str, Any]:
    """`make_cache` in a folder that is held."""
    # 1. what it is to be made of; is it there?
    tokenizer = load_tokenizer(name, config.experiment_dir)
    rows, measuring, hashes = _read_rows(config, tokenizer, own_answers)
    marker, index_path = folder / "stage.json", folder / "index.json"
    made_of = _made_of(config, tokenizer, hashes, marker)
    # nobody says --overwrite to a round; its cache follows from its answers and is made again where it does not fit
    overwrite = config.overwrite or (own_answers and not _can_be_kept(folder, made_of))
    state = stage_state(marker, made_of, overwrite, [index_path])
    if state == "done":
        logger.info("%s is complete; nothing to do", folder)
        return read_json(index_path)
    # files of another cache, which would pass for written ones of this
    if state == "fresh":
        for left_over in [*folder.glob("*.safetensors"), *folder.glob(WRITTEN)]:
            left_over.unlink()
    written = _written_before(folder)

    # 2. the teacher, and the files that do not depend on the rows
    shards = _shards(rows, lambda row: kept_kind(config, _key(row) in measuring), config.tokens_per_shard)
    # training reads the matrix from the run's own cache, which has the same teacher
    with _opened(config, folder, shards, tokenizer, keeps_head=not own_answers) as source:
        start_stage(marker, made_of)  # only now: a teacher that cannot be had leaves no mark
        tokenizer.save_pretrained(folder / "tokenizer")
        if source.head is not None:
            with atomic_path(folder / HEAD) as made:
                save_file({"head": source.head()}, made)

        # 3. the rows, a file at a time
        speed = _write_missing(folder, shards, written, source)

    # 4. the index, which makes it complete
    index = made_of | _index(config, folder, shards, written, source) | {"tokens_per_second": speed}
    write_json(index_path, index)
    # the marker has the hash of the index, the index those of all files: an edit of either is noticed (`_files_fault`)
    finish_stage(marker, made_of, index_sha256=sha256_file(index_path))
    (folder / WRITTEN).unlink(missing_ok=True)
    return index


def _can_be_kept(folder: Path, made_of: dict[str, Any]) -> bool:
    """Whether a cache is of this, as far as it is there, and is as it was written; says so where it is not."""
    marker, index_path = folder / "stage.json", folder / "index.json"
    if not marker.is_file() and not index_path.is_file():  # nothing there yet
        return True
    stored = read_json(marker) if marker.is_file() else {}
    fault = None
    # through JSON and back, as it was stored: a tuple is a list there
    if stored.get("fingerprint") != json.loads(json.dumps(made_of)):
        fault = f"{folder}: made of other rows or settings"
    # of an unfinished one every file is hashed when it is gone on with (`_written_before`)
    elif stored["finished"]:
        fault = _files_fault(folder, read_json(index_path)) if index_path.is_file() else f"{index_path}: missing"
    if fault:
        logger.warning("%s; the cache is made again", fault)
    return fault is None


def _served_name(config: CacheTeacherConfig) -> str:
    """The server's name for what answers: as said, or the stand-in that `serve` names, or the teacher itself."""
    serve = config.started_server
    return config.served_model_name or (serve.model if serve else "") or config.teacher_model_name_or_path


def _made_of(
    config: CacheTeacherConfig, tokenizer: PreTrainedTokenizerBase, hashes: dict[str, str | None], marker: Path
) -> dict[str, Any]:
    """What tells this cache from every other."""
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_IN_FINGERPRINT}
    if config.engine == "openai":
        teacher = served_fingerprint(_served_name(config), server_kind(config, config.started_server))
        settings |= {"bf16": None, "packing": None}  # the server's affair
        # of a server that runs already nobody here knows the flags
        flags = answering(config.started_server) if config.started_server else {}
        if flags:  # with another quantisation it believes another thing
            settings["server_arguments"] = flags
    else:
        teacher = model_fingerprint(config.teacher_model_name_or_path)
    made_of = {"format": FORMAT, "teacher": teacher, **_template_hashes(tokenizer), "data": hashes, **settings}
    if marker.is_file():  # caches of the version before counted this among what they are made of
        stored = read_json(marker).get("fingerprint", {})
        made_of |= {name: stored[name] for name in ("tokens_per_batch",) if name in stored}
    return made_of


def _index(
    config: CacheTeacherConfig, folder: Path, shards: list[_Shard], written: dict[str, dict[str, Any]], source: _Source
) -> dict[str, Any]:
    """What index.json says beside what the cache was made of."""
    # read off the files, those of earlier sessions too
    summed = sum(_tensor(folder / shard.file, "outside") for shard in shards)
    positions = sum(_tensor(folder / shard.file, "looked_at") for shard in shards)
    # [temperatures]: mean over the positions that were looked at
    outside = summed / positions
    # in the order of the files, whichever session wrote them
    written = {shard.file: written[shard.file] for shard in shards}
    tokens = sum(len(row.response_ids) for shard in shards for row in shard.rows)
    return {
        "teacher_model_name_or_path": config.teacher_model_name_or_path,
        "logit_map": list(source.logit_map),
        "vocab_size": source.vocab_size,
        "tokens": tokens,
        "bytes_per_token": sum(facts["bytes"] for facts in written.values()) / tokens,
        # {"1.0": 0.04, "2.5": 0.8}
        "share_outside_top_k": dict(zip(map(str, config.temperatures), outside.tolist(), strict=True)),
        "shards": written,
        "head": None if source.head is None else _written(folder / HEAD),
        "rows": _places(shards),
        "provenance": provenance(),
    }


@contextlib.contextmanager
def _opened(
    config: CacheTeacherConfig,
    folder: Path,
    shards: list[_Shard],
    tokenizer: PreTrainedTokenizerBase,
    keeps_head: bool,
) -> Iterator[_Source]:
    """The teacher, loaded here or behind its server, once the disk is known to have room for what it will say."""
    # tokens that exist; output layers are often padded beyond them
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    if config.engine == "transformers":
        reader = _open_teacher(config, folder, shards, tokenizer, vocab_size, keeps_head)
        yield _Source(
            lambda shard: _from_weights(shard, reader, config),
            vocab_size,
            reader.logit_map,
            (lambda: reader.head()[:vocab_size].cpu().contiguous()) if keeps_head else None,
        )
        return
    if config.top_k >= vocab_size:
        raise UserError(f"top_k = {config.top_k} leaves nothing of {vocab_size} tokens; lower --top_k")
    require_disk(folder, 1.1 * _all_bytes(config, shards), "the teacher cache")
    with _running(config, folder) as server:
        check_served(server)
        yield _Source(lambda shard: _from_server(shard, server, config.top_k, vocab_size), vocab_size)


@contextlib.contextmanager
def _running(config: CacheTeacherConfig, folder: Path) -> Iterator[Server]:
    """The teacher's server, started here if the settings say how."""
    serve, planned = config.started_server, None
    if serve is not None:
        serve = with_open_port(serve)
        planned = teacher_server(serve, config.teacher_model_name_or_path, config.teacher_devices)
    with started(planned, folder / "server.log"):
        # a refused row would be a hole in the cache, so none may be: max_refused 0
        yield Server(
            serve.base_url if serve else config.base_url, _served_name(config), server_kind(config, serve),
            config.api_key_variable, config.concurrency, config.request_timeout, config.tries, max_refused=0.0,
        )  # fmt: skip


def _open_teacher(
    config: CacheTeacherConfig,
    folder: Path,
    shards: list[_Shard],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    keeps_head: bool,
) -> Reader:
    """The teacher's weights, loaded here."""
    name = config.teacher_model_name_or_path
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    device_map = place(name, config.teacher_devices, dtype, config.gpu_memory_gb, config.cpu_offload)
    model = load_model(name, dtype, device_map)
    width = model.get_output_embeddings().weight.shape[1]
    head = vocab_size * width * dtype.itemsize if keeps_head else 0
    require_disk(folder, 1.1 * (_all_bytes(config, shards, width) + head), "the teacher cache")
    rows = [row for shard in shards for row in shard.rows]
    if config.packing:
        # a model that carries a state from row to row would spoil the cache without an error
        check_packing(model, rows, tokenizer.pad_token_id)
    reader = model_reader(model, tokenizer.pad_token_id, config.packing).cut(vocab_size)
    if config.tokens_per_batch is None:
        # not in the fingerprint: where the rows are cut into passes rounds differently at most
        config.tokens_per_batch = _measured_tokens(model, reader, rows)
        logger.info("passes of %d tokens", config.tokens_per_batch)
    return reader


def _all_bytes(config: CacheTeacherConfig, shards: Iterable[_Shard], width: int = 0) -> int:
    """What the files of the rows will have, but for their headers; `width` as in `kept_bytes`."""
    needed = 0
    for shard in shards:
        needed += kept_bytes(config, shard.kind, width) * sum(len(row.response_ids) for row in shard.rows)
    return needed


def _measured_tokens(model: PreTrainedModel, reader: Reader, rows: Rows) -> int:
    memory = memory_of(model)
    if memory is None:
        return CPU_TOKENS
    lengths = [len(row) for row in rows]
    fits = tokens_that_fit(lengths, lambda chosen: reader.hidden([rows[index] for index in chosen]), memory)
    return min(fits or CPU_TOKENS, MOST_TOKENS)


def _write_missing(
    folder: Path, shards: list[_Shard], written: dict[str, dict[str, Any]], source: _Source
) -> float | None:
    """Write the files that are not in `written` and enter them there; tokens a second, if there were any to write."""
    seconds, passed = 0.0, 0
    with Progress(sum(len(shard.rows) for shard in shards), "teacher cache") as progress:
        for shard in shards:
            if shard.file in written:
                progress.skip(len(shard.rows))  # of an earlier session; not of this one's speed
                continue
            started = time.monotonic()
            _write_shard(folder / shard.file, shard, source)
            written[shard.file] = _written(folder / shard.file)
            # after the file itself: a kill between the two costs that file, never a wrong entry
            append_jsonl(folder / WRITTEN, [{"file": shard.file, **written[shard.file]}])
            seconds += time.monotonic() - started
            passed += sum(map(len, shard.rows))
            progress.advance(len(shard.rows), tokens_per_second=f"{passed / seconds:.0f}")
    return passed / seconds if seconds else None


def _places(shards: Iterable[_Shard]) -> dict[str, list[Any]]:
    """Row -> file, first position, number of positions, hash of its tokens."""
    places = {}
    for shard in shards:
        start = 0
        for row in shard.rows:
            places[_key(row)] = [shard.file, start, len(row.response_ids), _token_hash(row)]
            start += len(row.response_ids)  # rows lie end to end: [row 0's positions | row 1's | ...]
    return places


def _tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); delete it and {MADE_BY} again") from None


def _written(path: Path) -> dict[str, Any]:
    """What index.json says of a file: by this it is known again."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _written_before(folder: Path) -> dict[str, dict[str, Any]]:
    """The files that an unfinished run has written, as far as they still are what it wrote."""
    path = folder / WRITTEN
    repair_jsonl_tail(path)  # a kill may have torn its last line
    found = {}
    # an empty list is no fault here, `read_jsonl` would call it one
    for row in read_jsonl(path, ("file", "bytes", "sha256")) if path.is_file() and path.stat().st_size else ():
        facts = {"bytes": row["bytes"], "sha256": row["sha256"]}
        if (folder / row["file"]).is_file() and _written(folder / row["file"]) == facts:
            found[row["file"]] = facts
        else:
            logger.warning("%s is not as it was written; it is made again", folder / row["file"])
    return found


def _check_files(folder: Path, index: dict[str, Any]) -> None:
    """Refuse a cache that is not as it was written.

    Raises:
        UserError: a file is missing, or has another size or other bytes than when it was written.
    """
    if fault := _files_fault(folder, index):
        raise UserError(f"{fault}; {MADE_BY} --overwrite")


def _files_fault(folder: Path, index: dict[str, Any]) -> str | None:
    """Hash every file that will be trusted: a shard of zeros would train without a word. What is wrong, or None."""
    marker = folder / "stage.json"
    # the index first, by the marker's hash: what it says of the other files is believed from here on
    known = read_json(marker).get("index_sha256") if marker.is_file() else None
    if known != sha256_file(folder / "index.json"):
        return f"{folder / 'index.json'}: not as it was written, its hash is another"
    files = index["shards"] | ({HEAD: index["head"]} if index["head"] else {})
    for name, facts in files.items():  # what costs nothing first
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            return f"{path}: missing or not as it was written"
    started = time.monotonic()
    for name, facts in files.items():
        if sha256_file(folder / name) != facts["sha256"]:
            return f"{folder / name}: not as it was written, its hash is another"
    seconds = time.monotonic() - started
    if seconds > NOTICED:
        size = sum(facts["bytes"] for facts in files.values())
        logger.info("%s: %.1f GB are as they were written, hashed in %.0f s", folder, size / 1e9, seconds)
    return None


def cached_tokenizer(folder: Path, index: dict[str, Any], experiment_dir: str | Path = "") -> PreTrainedTokenizerBase:
    """The teacher's tokenizer out of its cache, known to be the one that the cache was made with.

    Args:
        folder: the cache.
        index: from `read_index`.
        experiment_dir: see `load_tokenizer`.

    Raises:
        UserError: it cannot be loaded, or its vocabulary, its chat template or the day that this reads is another.
    """
    path = folder / "tokenizer"
    try:
        tokenizer = load_tokenizer(str(path), experiment_dir)
    except UserError as error:
        raise UserError(f"{path}: {error}; {MADE_BY} --overwrite") from None
    found = _template_hashes(tokenizer)
    # `prompt_date` is in neither where the template asks for no day
    for name in ("tokenizer", "template", "prompt_date"):
        if found.get(name) != index.get(name):
            raise UserError(f"{path}: not as it was written, its {name} is another; {MADE_BY} --overwrite")
    return tokenizer


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a finished cache.

    Raises:
        UserError: there is none, or it is unfinished or of another format.
    """
    if not (folder / "index.json").is_file():
        raise UserError(f"{folder}: no finished teacher cache; {MADE_BY}, or train with --teacher_signal online")
    index = read_json(folder / "index.json")
    if index.get("format") != FORMAT:
        raise UserError(f"{folder}: format {index.get('format')}, this version reads {FORMAT}; {MADE_BY} --overwrite")
    return index


def open_cache(folder: Path, signal: str, temperature: float, data: TrainingData) -> Reader:
    """A finished cache as a reader of the rows that it was made of, every row of a run verified.

    Args:
        folder: the cache.
        signal: `hidden` or `topk`, what training rows are to give.
        temperature: the teacher's; a top-k cache knows the softened rest for its own temperatures only, and one that a
            server was asked for has T = 1 alone.
        data: the rows to train on and those that only measure, as the teacher's template renders them.

    Raises:
        UserError: the cache was made of something else, lacks a row, or a file is not as it was written.
    """
    index = read_index(folder)
    # reads nothing but the index, so it comes before the hashing of gigabytes
    _check_index(folder, index, signal, temperature, data)
    _check_files(folder, index)

    # each file is opened once
    @functools.cache
    def shard(file: str) -> Any:
        return safe_open(folder / file, "pt")  # memory-mapped: only what is asked for is read

    def read(rows: Rows, tensor: str) -> Tensor:
        parts = []
        for row in rows:
            file, start, count, _ = index["rows"][_key(row)]
            parts.append(shard(file).get_slice(tensor)[start : start + count])
        return torch.cat(parts)

    def topk(rows: Rows) -> TopK:
        # [N, temperatures] -> [N]: the column of this run's temperature
        log_sums = read(rows, "log_sums")[:, index["temperatures"].index(temperature)]
        return TopK(read(rows, "ids").long(), read(rows, "log_p"), log_sums)

    def stated(rows: Rows) -> Stated:
        label_log_p = read(rows, "label_log_p")
        top = TopK(read(rows, "ids").long(), read(rows, "log_p"), torch.zeros(len(label_log_p)))  # log 1: at T = 1
        return Stated(top, label_log_p)

    served = is_served(index)
    if signal == "topk":
        # with another fraction, a row that this run trains on may lie in a file for measuring, and the other way round
        measured = "label_log_p" if served else "hidden"
        for pairs, tensor in ((data.train, "log_sums"), (data.validation + data.heldout, measured)):
            files = {index["rows"][_key(pair.teacher)][0] for pair in pairs}
            if not all(tensor in list(shard(file).keys()) for file in files):
                raise UserError(
                    f"{folder} was made with another validation_fraction; {MADE_BY} --overwrite with this run's"
                )
    return Reader(
        hidden=lambda rows: read(rows, "hidden"),
        head=lambda: _tensor(folder / HEAD, "head"),
        logit_map=LogitMap(*index["logit_map"]),
        vocab_size=index["vocab_size"],
        topk=topk if signal == "topk" else None,
        stated=stated if served else None,
    )


def is_served(index: dict[str, Any]) -> bool:
    """Whether the cache was made by asking a server, and so without hidden states."""
    return index["teacher"].startswith(SERVED)


def is_teacher(name: str, index: dict[str, Any]) -> bool:
    """Whether `name`, a folder or hub id, is the teacher that a cache was made of; of a served one its tokenizer's."""
    if name in (index["teacher_model_name_or_path"], index["teacher"]):  # the latter is id@commit, or a folder's hash
        # a folder keeps its name when its weights are replaced, so its bytes are asked
        return not Path(name).is_dir() or is_served(index) or model_fingerprint(name) == index["teacher"]
    can_be_told = Path(name).is_dir() or model_name(name).revision is not None  # the same by another name
    return can_be_told and not is_served(index) and model_fingerprint(name) == index["teacher"]


def _check_index(folder: Path, index: dict[str, Any], signal: str, temperature: float, data: TrainingData) -> None:
    """Refuse a cache that is of other data, of another kind, or lacks a row.

    Raises:
        UserError: names the first difference.
    """
    remedy = f"{MADE_BY} --overwrite"
    known = {"signal": index["signal"], **index["data"]}
    # file by file, so that the message names the one that differs
    for name, wanted in {"signal": signal, **data.hashes}.items():
        if known.get(name) != wanted:
            raise UserError(f"{folder} was made with {name} = {known.get(name)}, this run has {wanted}; {remedy}")
    if signal == "topk" and temperature not in index["temperatures"]:
        temperatures = ", ".join(f"{t:g}" for t in index["temperatures"])
        if is_served(index):
            remedy = "train with --temperature 1 or --teacher_temperature 1; a server knows its teacher at no other T"
        else:
            remedy += " --temperatures ..."
        raise UserError(f"{folder} keeps the top k for T = {temperatures}, not {temperature:g}; {remedy}")
    for pair in data.all():
        row = pair.teacher
        place = index["rows"].get(_key(row))
        if place is None or place[3] != _token_hash(row):
            why = "is not in it" if place is None else "has other tokens there (data, tokenizer or template changed)"
            raise UserError(f"{folder}: row {_key(row)} {why}; {remedy}")
