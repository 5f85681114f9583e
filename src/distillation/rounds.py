"""On-policy rounds: the student answers prompts, the teacher reads its answers, training goes on with both.

A run is cut into `on_policy_rounds` parts. Before the first step of each the student, with its adapter so far, answers
prompts of the training rows by an engine of stage 1, and the teacher's states of these answers are cached by the code
of `cache_teacher`. A round's end is a checkpoint and its beginning a resume, so that nothing else needs the GPUs
meanwhile, and a killed round goes on as a killed run does. With alpha = 1 and lambda the share of own answers this is
GKD (Agarwal et al. 2024, algorithm 1), sampled a round at a time.

A round's folder in the run's, `rounds/round_01/`, has the formats of an experiment:

    sft/sft_train_data.jsonl        the student's answers as they came; a killed round goes on with those it lacks
    sft/sft_train_data_clean.jsonl  what is learned from; `finish_reason` is `stop`, or `length` where one was cut off
    teacher_cache/                  what the teacher believes of them; not of a resident teacher
    round.json                      what was answered and how; written last
    begun.json                      while it is worked on: a round with round.json and without this is complete

Steps must not be learnt from other answers than those before them: round.json has the hash of what is learned from. The
cache follows from it and the teacher, so that one that is damaged is made again.
"""

import contextlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import release_memory

from src.distillation.base import EncodedRow, encode_row, model_bytes, model_fingerprint, place
from src.distillation.batching import (
    Pair,
    StepOrder,
    Tokenizers,
    TrainingData,
    clean_files,
    read_clean,
    shared_end_of_turn,
)
from src.distillation.engines import EngineSettings, Generate, make_engine, opened, stage_serve, started
from src.distillation.kd_config import SECTION, KDConfig
from src.distillation.serving import Serve, adapter_name, answering, students_server, with_open_port
from src.distillation.sft import Request, Sampling, make_request
from src.distillation.teacher import Reader
from src.distillation.teacher_cache import CacheTeacherConfig, is_served, make_cache, open_cache, read_index
from src.distillation.training import OwnRows
from src.utils.common import (
    Progress,
    UserError,
    append_jsonl,
    logger,
    read_json,
    read_jsonl,
    repair_jsonl_tail,
    require_disk,
    sha256_file,
    sha256_text,
    write_json,
    write_jsonl,
)
from src.utils.stages import clear, hold

COMPLETE = "round.json"
BEGUN = "begun.json"  # of a round that is worked on: its fingerprint, and the seconds that it took so far
STUDENT = "student"  # what a server calls the adapter that answers
LEARNT_FROM = ("stop", "length")  # an answer that a server refused, or ended in a way of its own, says nothing
# of a token in an answer's JSON: in its text, and as the id that was sampled, such as "151643, "
TEXT_BYTES, ID_BYTES = 4, 8
AROUND_BYTES = 2000  # of an answer's other fields
LOOK = 1.0  # seconds between two looks of the ranks that wait; a collective call would time out after minutes


@dataclass(frozen=True)
class Round:
    """A part of a run's steps, which begins with answers of the student as it is then.

    number: from 1.
    first_step, end: it takes the steps first_step, ..., end - 1, counted from 0.
    """

    number: int
    first_step: int
    end: int

    def folder(self, run: Path) -> Path:
        return run / "rounds" / f"round_{self.number:02d}"


@dataclass(frozen=True)
class Prompts:
    """What a student can be asked, a dataset row (`id, system, prompt`) for each training row whose prompt leaves room
    for the longest answer within max_length; and how."""

    rows: list[dict[str, str]]
    sampling: Sampling


def rounds_of(config: KDConfig, steps: int) -> list[Round]:
    """The rounds of a run, none where it has no answers of the student's own.

    Raises:
        UserError: there are more of them than steps.
    """
    count = config.on_policy_rounds if config.on_policy else 0
    if count > steps:
        raise UserError(
            f"on_policy_rounds = {count}, but the run has {steps} steps, and a round takes one at least; lower "
            "--on_policy_rounds, or raise --max_steps"
        )
    # 10 steps in 3 rounds: 0 to 2, 3 to 5, 6 to 9
    return [Round(r + 1, r * steps // count, (r + 1) * steps // count) for r in range(count)]


def check_rounds(config: KDConfig) -> None:
    """Refuse what no round can be made with, before anything is done.

    Raises:
        UserError: says what, and the way out.
    """
    if not config.on_policy:
        return
    if config.use_cpu and torch.cuda.is_available():
        raise UserError(
            "use_cpu is for training alone, a round's answers and cache would take a GPU; hide them all with "
            "CUDA_VISIBLE_DEVICES='' instead"
        )
    serve = own_serve(config)
    if serve is not None and serve.program == "other":
        raise UserError(
            "on_policy_serve starts vllm or sglang, which answer as the adapter of the moment; a whole command line "
            "cannot name it: say command: vllm and put its flags into arguments"
        )
    if serve is not None and serve.model:
        raise UserError("on_policy_serve answers as the student and its adapter; take model out of it")
    if config.load_in_4bit:
        logger.warning(
            "own answers: the student that learns is in 4 bits, the one that answers is its bf16 model with the "
            "adapter, of which nothing is measured here"
        )
    # a resident teacher reads the answers in the step itself: no cache, no second place for it
    if config.teacher_signal != "online":
        _check_teacher(config)


def _check_teacher(config: KDConfig) -> None:
    """Refuse a teacher that cannot read a round's answers, before the student has given any.

    Raises:
        UserError: it is a server's, another than the cache's, or its GPUs are not there or do not hold it.
    """
    folder = Path(config.experiment_dir) / "teacher_cache"
    index = read_index(folder)
    if is_served(index):
        raise UserError(
            f"{folder} was asked of a server, and rounds read the student's answers with the teacher's weights; make "
            "the cache with --engine transformers, or leave on_policy_rounds out"
        )
    if model_fingerprint(config.teacher_model_name_or_path) != index["teacher"]:
        raise UserError(
            f"{folder} is of another teacher than {config.teacher_model_name_or_path!r} is now, and rounds ask both; "
            "run scripts/cache_teacher.py --overwrite"
        )
    _check_place(config, torch.bfloat16 if index["bf16"] else torch.float32)


def _check_place(config: KDConfig, dtype: torch.dtype) -> None:
    """Refuse GPUs that are not there or do not hold the teacher.

    Raises:
        UserError: says which, and the settings that give it room.
    """
    name = config.teacher_model_name_or_path
    try:
        placed = place(name, config.teacher_devices, dtype, config.gpu_memory_gb, config.cpu_offload)
    except UserError as error:
        raise UserError(f"on-policy rounds, where the teacher reads the student's answers: {error}") from None
    # no GPU, or layers over several: `place` itself has then asked for the room
    if placed is None or set(placed) != {""}:
        return
    [device] = placed.values()  # all of it on one GPU, whatever gpu_memory_gb says
    room, needed = torch.cuda.get_device_properties(device).total_memory, model_bytes(name, dtype)
    if needed > room:
        raise UserError(
            f"on-policy rounds: the teacher, which reads the student's answers, has {needed / 1e9:.1f} GB of weights, "
            f"GPU {device} has {room / 1e9:.1f} GB; spread it with --teacher_devices 0 1 ..., or pass --cpu_offload"
        )


def own_serve(config: KDConfig) -> Serve | None:
    """The server that answers as the student, if there is to be one."""
    return stage_serve(_engine_settings(config))


def _engine_settings(config: KDConfig) -> EngineSettings:
    return EngineSettings(
        serve=config.on_policy_serve, batch_size=config.on_policy_batch_size, gpu_memory_gb=config.gpu_memory_gb
    )


def read_prompts(config: KDConfig, data: TrainingData) -> Prompts:
    """What the student will be asked.

    Raises:
        UserError: a training row is a longer conversation, which is named; or too few prompts leave room.
    """
    path = clean_files(Path(config.experiment_dir) / "sft")["train"]
    # what each row asks: its messages without the answer, which is the last
    messages = {(row["id"], row.get("sample_index", 0)): row["messages"][:-1] for row in read_clean(path)}
    # room: tokens that a prompt may have
    room, rows = config.max_length - config.on_policy_max_new_tokens, []
    for pair in data.train:
        asked = messages[pair.student.id, pair.student.sample_index]
        roles = [message["role"] for message in asked]
        if roles not in (["user"], ["system", "user"]):
            raise UserError(
                f"{path}: row {pair.student.id} asks with messages of {', '.join(roles)}; on-policy rounds ask single "
                "turns, of a user after a system message or none: take such rows out, or leave on_policy_rounds out"
            )
        # their templates may differ, and both must fit the longest answer
        if max(len(pair.student.prompt_ids), len(pair.teacher.prompt_ids)) > room:
            continue
        system = asked[0]["content"] if len(asked) == 2 else ""
        rows.append({"id": pair.student.id, "system": system, "prompt": asked[-1]["content"]})
    _check_prompts(config, len(rows), len(data.train))
    return Prompts(rows, config.own_sampling(config.on_policy_max_new_tokens))


def _check_prompts(config: KDConfig, asked: int, there: int) -> None:
    """Say how many prompts are not asked.

    Raises:
        UserError: not even one step's are.
    """
    most = config.on_policy_max_new_tokens
    # `StepOrder` takes whole steps: of fewer prompts it makes none
    if asked < config.own_rows_per_step:
        raise UserError(
            f"{asked} of {there} training prompts leave room for an answer of {most} tokens within max_length = "
            f"{config.max_length}, and the student is asked {config.own_rows_per_step} a step; lower "
            "--on_policy_max_new_tokens, or raise --max_length"
        )
    if asked < there:
        logger.info(
            "own answers: %d of %d training prompts are not asked, they leave no room for %d tokens within %d",
            there - asked,
            there,
            most,
            config.max_length,
        )


def requests_of(config: KDConfig, part: Round, prompts: Prompts) -> list[Request]:
    """The requests of a round, `own_rows_per_step` for each of its steps, one step after the other.

    The order of the prompts goes by the step of the run, so that a round walks on where the one before ended.
    """
    seed = int(sha256_text(f"on-policy/{config.data_seed}")[:7], 16)  # not the order of the teacher's rows
    # as the teacher's rows are ordered: a permutation an epoch, a function of (seed, epoch)
    order = StepOrder(len(prompts.rows), config.own_rows_per_step, seed)
    asked: Counter[str] = Counter()  # prompt -> times it is asked in this round
    requests = []
    for step in range(part.first_step, part.end):
        for index in order.rows_of(step):
            row = prompts.rows[index]
            salt = f"round {part.number}"  # a prompt that comes again in a later round is answered with another seed
            # (id, sample_index) is an answer's key, so a prompt that is asked twice in a round gets 0 and 1
            requests.append(make_request(row, asked[row["id"]], config.seed, prompts.sampling, salt))
            asked[row["id"]] += 1
    return requests


@dataclass(frozen=True)
class RoundPlan:
    """A round as it is to be made.

    folder: its own, in the run's.
    requests: `own_rows_per_step` for each of its steps.
    adapter: of the student that answers; None for the student before training.
    has_begun: steps of it are taken already, so that its answers must be those that they were learnt from.
    fingerprint: what tells its folder from another's.
    """

    part: Round
    folder: Path
    requests: list[Request]
    adapter: Path | None
    has_begun: bool
    fingerprint: dict[str, Any]


def plan_round(
    config: KDConfig, part: Round, prompts: Prompts, data: TrainingData, run: Path, adapter: Path | None, taken: int
) -> RoundPlan:
    """What is to be asked for a round of the run in the folder `run`, of which `taken` steps are taken."""
    requests = requests_of(config, part, prompts)
    fingerprint = _fingerprint(config, part, requests, data, adapter)
    return RoundPlan(part, part.folder(run), requests, adapter, taken > part.first_step, fingerprint)


def open_round(config: KDConfig, accelerator: Accelerator, tokenizers: Tokenizers, plan: RoundPlan) -> OwnRows:
    """The student's own answers for a round, made where they are not there yet, as is what is damaged of the cache.

    Every rank calls it: the first answers and caches, the others wait until the round is complete. Where the first
    fails the launcher ends the others.

    Raises:
        UserError: something the user must put right; the text says what and how.
    """
    part, folder = plan.part, plan.folder
    # 1. the first rank marks the folder as worked on, and makes what is missing of the round
    if accelerator.is_main_process:
        _begin(plan)
    accelerator.wait_for_everyone()  # nobody takes a folder that has just been cleared for a finished one
    # each of the two locks also clears its own folder of what killed writers left half-written
    if accelerator.is_main_process:
        with hold(folder, SECTION), hold(folder / "sft", SECTION):
            _make(config, tokenizers, plan)
    # 2. the others wait for what the first leaves behind: round.json written, begun.json gone
    while (folder / BEGUN).is_file() or not (folder / COMPLETE).is_file():
        time.sleep(LOOK)
    # 3. every rank reads the same files
    pairs = {_key(pair.student): pair for pair in read_own_pairs(folder, tokenizers, config.max_length)}
    teacher = None
    if config.teacher_signal != "online":
        teacher = _open_own_cache(config, folder, list(pairs.values()))
    # 4. the requests were `own_rows_per_step` a step; a step has fewer pairs where answers cannot be learned from
    by_step: list[list[Pair]] = [[] for _ in range(part.end - part.first_step)]
    for index, request in enumerate(plan.requests):
        if pair := pairs.get(_key(request)):
            by_step[index // config.own_rows_per_step].append(pair)
    return OwnRows(part.number, part.first_step, by_step, teacher)


def _key(row: EncodedRow | Request) -> tuple[str, int]:
    return row.id, row.sample_index


def _fingerprint(
    config: KDConfig, part: Round, requests: Sequence[Request], data: TrainingData, adapter: Path | None
) -> dict[str, Any]:
    """What tells a round's folder from another's; what the run's own fingerprint says is not said again."""
    serve = own_serve(config)
    # prompts, seeds and sampling of all answers, as one hash
    asked = json.dumps([asdict(request) for request in requests], sort_keys=True)
    return {
        "round": part.number,
        "first_step": part.first_step + 1,
        "last_step": part.end,
        "requests": sha256_text(asked),
        "rows": data.hashes["sft_train_data_clean.jsonl"],
        # another checkpoint is another student, whose answers are others
        "adapter": sha256_file(adapter / "adapter_model.safetensors") if adapter else None,
        "engine": serve.program if serve else "transformers",
        "server_arguments": answering(serve) if serve else {},
    }


# What a begun round must have in common with its answers: by what and how they were made is of the past.
FOR_GOOD = ("round", "first_step", "last_step", "requests", "rows")


def _begin(plan: RoundPlan) -> None:
    """Mark the round as worked on; a folder that cannot be gone on with is cleared first.

    Raises:
        UserError: steps were learnt from its answers, and these are not there any more as they were.
    """
    folder = plan.folder
    complete, begun = folder / COMPLETE, folder / BEGUN
    # what is wrong with the answers is no error by itself: it depends on whether steps have learnt from them
    fault = _fault_of_answers(plan)
    if plan.has_begun and fault:
        raise UserError(
            f"{folder}: steps of this round are taken, and {fault}; put the folder back as it was, or train again with "
            "--overwrite"
        )
    if not plan.has_begun:
        # nothing was learnt from it yet, so answers of another adapter or other settings can go
        for path in (complete, begun):
            if not path.is_file():
                continue
            made_with = read_json(path).get("fingerprint") or {}
            # answers of other batches are rounded otherwise, no more; rounds of the version before counted it
            if {name: value for name, value in made_with.items() if name != "batch_size"} != plan.fingerprint:
                logger.info("%s: made with another adapter or other settings; it is made again", folder)
                clear(folder, last=path.name)  # the file that gives it away goes last: a kill in between is seen again
        # asked again: the folder may just have been cleared
        if complete.is_file() and fault:
            logger.warning("%s: %s; the round is made again", folder, fault)
            clear(folder, last=COMPLETE)
    if not begun.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(begun, {"fingerprint": plan.fingerprint, "answering_seconds": 0.0, "caching_seconds": 0.0})


def _fault_of_answers(plan: RoundPlan) -> str | None:
    """Why the folder's answers are not, or cannot be told to be, those of this round that round.json speaks of."""
    path, clean = plan.folder / COMPLETE, clean_files(plan.folder / "sft")["train"]
    if not path.is_file():
        return f"{COMPLETE}, which tells its answers from others, is gone"
    stored = read_json(path)
    # the adapter is not among them: a round of which steps are taken goes on with a later checkpoint
    if any(stored["fingerprint"].get(name) != plan.fingerprint[name] for name in FOR_GOOD):
        return f"{COMPLETE} is of another round"
    if not clean.is_file():
        return f"sft/{clean.name}, which is learned from, is gone"
    if sha256_file(clean) != stored.get("clean_sha256"):
        return f"sft/{clean.name}, which is learned from, is not as it was written"
    return None


def _make(config: KDConfig, tokenizers: Tokenizers, plan: RoundPlan) -> None:
    """Answer, cache, and say in round.json what came of it; goes on where a killed one was.

    Of a round that was complete only the cache is looked at, and made again where it is missing or damaged.
    """
    folder, clean = plan.folder, clean_files(plan.folder / "sft")["train"]
    was_complete = (folder / COMPLETE).is_file()
    date = Path(config.experiment_dir) / "prompt_date.json"
    if date.is_file():  # a template that asks for the day reads the experiment's in the round too
        shutil.copy(date, folder / date.name)

    # 1. the student answers
    if not was_complete:
        _answer(config, plan)
        release_memory()  # the student's, for the teacher
        size = max(tokenizers.student.get_vocab().values()) + 1  # tokens that exist; logits may be padded beyond
        _write_clean(folder, plan.requests, read_jsonl(folder / "sft" / "sft_train_data.jsonl"), size)
        # asked before the teacher is loaded for nothing
        if not read_own_pairs(folder, tokenizers, config.max_length):
            raise UserError(
                f"{folder}: none of {len(plan.requests)} answers can be learned from; read them in "
                "sft/sft_train_data.jsonl, and raise --on_policy_max_new_tokens or --max_length"
            )

    # 2. the teacher reads the answers
    if config.teacher_signal != "online":
        since = time.monotonic()
        try:
            # a finished cache that is as it was written is only hashed
            make_cache(_cache_config(config, folder), own_answers=True)
        finally:
            _count(folder, "caching_seconds", since)
        release_memory()  # the teacher's, for training

    # 3. what came of it, which makes the round complete
    if not was_complete:
        answers = read_jsonl(folder / "sft" / "sft_train_data.jsonl")
        facts = round_facts(plan.part, plan.requests, answers, read_own_pairs(folder, tokenizers, config.max_length))
        facts |= {"seed": config.seed}  # of which each answer's is made
        # what `_fault_of_answers` asks for when steps were taken
        facts |= {"clean_sha256": sha256_file(clean)}
        facts |= read_json(folder / BEGUN)  # the fingerprint and the seconds
        write_json(folder / COMPLETE, facts)
        _say_round(facts, answers)
    # last: from here on the other ranks take the round for complete
    (folder / BEGUN).unlink()


def _count(folder: Path, name: str, since: float) -> float:
    """Add the seconds since `since` to begun.json, where those of all sessions add up; the time now."""
    now, facts = time.monotonic(), read_json(folder / BEGUN)
    write_json(folder / BEGUN, facts | {name: facts[name] + now - since})
    return now


def _say_round(facts: dict[str, Any], answers: Sequence[dict[str, Any]]) -> None:
    logger.info(
        "round %d: %d answers in %.0f s, %d ended, %d cut off, %d empty, %.0f tokens each; %.0f s until the teacher "
        "had read them",
        facts["round"],
        len(answers),
        facts["answering_seconds"],
        facts["ended"],
        facts["truncated"],
        facts["empty"],
        facts["mean_length"],
        facts["caching_seconds"],
    )
    # an untrained student may end at once or never; the run goes on, but somebody should look
    bad = sum(row["finish_reason"] == "length" or not row["response"].strip() for row in answers)
    if bad > len(answers) / 2:
        logger.warning(
            "round %d: %d of %d answers are empty or cut off, and little can be learned from such; read some in its "
            "sft/sft_train_data.jsonl, and raise --on_policy_max_new_tokens or lower --on_policy_temperature",
            facts["round"],
            bad,
            len(answers),
        )


def _answer(config: KDConfig, plan: RoundPlan) -> None:
    """Append the answers that the folder lacks."""
    folder, requests = plan.folder, plan.requests
    target = folder / "sft" / "sft_train_data.jsonl"
    repair_jsonl_tail(target)
    stored = read_jsonl(target) if target.is_file() and target.stat().st_size else []
    # answers are stored as they come, so they are known by their key and not by their place
    there = {(row["id"], row["sample_index"]) for row in stored}
    done = frozenset(request for request in requests if _key(request) in there)
    if len(done) == len(requests):
        return
    answer = requests[0].sampling.max_new_tokens * (TEXT_BYTES + ID_BYTES) + AROUND_BYTES
    require_disk(folder, 2 * len(requests) * answer, "the student's answers")  # as they came, and to learn from
    since = time.monotonic()
    # those of earlier sessions count in what a server may refuse (`EngineSettings.max_refused`)
    refused = sum(row["finish_reason"] == "refused" for row in stored)
    with (
        _student(config, plan) as generate,
        Progress(len(requests), f"own answers ({folder.name})") as progress,
    ):
        progress.skip(len(done))
        for rows in generate(requests, done, refused):
            append_jsonl(target, rows)
            # after every part: the seconds up to a kill count too
            since = _count(folder, "answering_seconds", since)
            progress.advance(len(rows))
    _count(folder, "answering_seconds", since)


@contextlib.contextmanager
def _student(config: KDConfig, plan: RoundPlan) -> Iterator[Generate]:
    """The student with its adapter, loaded here or behind a server that is started for it."""
    model, adapter, serve = config.model_name_or_path, str(plan.adapter or ""), own_serve(config)
    planned, served_name = None, ""
    if serve is not None:
        serve = with_open_port(serve)
        adapters = {STUDENT: adapter} if adapter else {}
        planned = students_server(serve, model, adapters, config.student_devices)
        served_name = adapter_name(serve.program, model, STUDENT) if adapter else ""
        adapter = ""  # the server has it
    engine = make_engine(
        _engine_settings(config), model, config.student_devices, serve, served_name,
        adapter=adapter, experiment_dir=config.experiment_dir, keep_ids=True,
    )  # fmt: skip
    # the server first: the engine asks it
    with started(planned, plan.folder / "server.log"), opened(engine) as generate:
        yield generate


def _write_clean(folder: Path, requests: list[Request], answers: list[dict[str, Any]], vocab_size: int) -> None:
    """The answers as conversations, in the order of the requests.

    Their `response_ids` are what the student sampled, where the engine told it: from an early student some hold a word
    that its tokenizer would cut in another way, and the teacher is to judge what was sampled. An answer with a token
    that only the padding of the student's logits has is learned from as text: the teacher may have no such row.
    """
    # stored as they came; learned from in the order of the requests, whatever engine answered
    by_key = {(row["id"], row["sample_index"]): row for row in answers}
    rows = []
    for request in requests:
        answer = by_key.get(_key(request))
        # refused, or not there at all
        if answer is None or answer["finish_reason"] not in LEARNT_FROM:
            continue
        ids = answer.get("token_ids")
        if ids is not None and max(ids, default=0) >= vocab_size:
            ids = None
        text = answer["response"]
        if answer["finish_reason"] == "length":
            text = text.rstrip("\ufffd")  # what is decoded of a character of which the cut has left a part
        row = {
            "id": request.id,
            "sample_index": request.sample_index,
            "messages": [*request.messages, {"role": "assistant", "content": text}],
            "finish_reason": answer["finish_reason"],
        }
        rows.append(row if ids is None else row | {"response_ids": ids})
    write_jsonl(clean_files(folder / "sft")["train"], rows)


def read_own_pairs(folder: Path, tokenizers: Tokenizers, max_length: int) -> list[Pair]:
    """A round's rows as both models read them, without those that are too long, were cut before they said a thing, or
    have other tokens for the teacher than for the student."""
    end = shared_end_of_turn(tokenizers.student, tokenizers.teacher)
    path = clean_files(folder / "sft")["train"]
    # no row at all is possible here, `read_clean` calls it a mistake
    rows = read_clean(path, own_answers=True) if path.stat().st_size else []
    pairs = []
    for row in rows:
        student = encode_row(tokenizers.student, row, end, own_answer=True)
        teacher = encode_row(tokenizers.teacher, row, end, own_answer=True)
        # read as text, an answer that begins with a line break may join another prompt's end in another way
        is_alike = student.response_ids == teacher.response_ids
        if student.response_ids and is_alike and max(len(student), len(teacher)) <= max_length:
            pairs.append(Pair(student, teacher, own=True))  # `own`: the divergence alone, no cross-entropy
    return pairs


def _cache_config(config: KDConfig, folder: Path) -> CacheTeacherConfig:
    """How the teacher reads a round's answers: as it has read the run's own rows."""
    index = read_index(Path(config.experiment_dir) / "teacher_cache")
    return CacheTeacherConfig(
        teacher_model_name_or_path=config.teacher_model_name_or_path,
        experiment_dir=str(folder),
        signal=config.teacher_signal,
        top_k=index["top_k"],
        temperatures=index["temperatures"],
        validation_fraction=config.validation_fraction,
        max_length=config.max_length,
        bf16=index["bf16"],
        packing=index["packing"],
        teacher_devices=config.teacher_devices,
        gpu_memory_gb=config.gpu_memory_gb,
        cpu_offload=config.cpu_offload,
    )


def _open_own_cache(config: KDConfig, folder: Path, pairs: list[Pair]) -> Reader:
    path = clean_files(folder / "sft")["train"]
    # all of them to train on: no validation, no held-out rows, none dropped
    own = TrainingData(pairs, [], [], {path.name: sha256_file(path)}, 0)
    # as the run's own cache is opened
    temperature = config.teacher_temperature or config.temperature
    return open_cache(folder / "teacher_cache", config.teacher_signal, temperature, own)


def round_facts(
    part: Round, requests: Sequence[Request], answers: Sequence[dict[str, Any]], pairs: Sequence[Pair]
) -> dict[str, Any]:
    """What round.json says of the answers.

    rows, tokens: what is learned from; `tokens_read` with the prompts, as the teacher reads them.
    ended, truncated, empty: of all answers; an empty one may be either.
    encoded_otherwise: rows that have another number of tokens than were sampled: their ids were not told, or not all of
        them are tokens, so that the text is what is learned from.
    left_out: answers that are not learned from: too long, refused by a server, cut before they said a thing, or read as
        other tokens by the teacher.
    """
    reasons = Counter(row["finish_reason"] for row in answers)
    sampled = {(row["id"], row["sample_index"]): row["num_tokens"] for row in answers}
    tokens = sum(len(pair.student.response_ids) for pair in pairs)
    # (pair, tokens that were sampled for it; None where nobody counted)
    counted = [(pair, sampled[_key(pair.student)]) for pair in pairs]
    return {
        "round": part.number,
        "first_step": part.first_step + 1,
        "last_step": part.end,
        "rows": len(pairs),
        "tokens": tokens,
        "tokens_read": sum(len(pair.teacher) for pair in pairs),
        # of all answers, those that are left out too
        "sampled_tokens": sum(count or 0 for count in sampled.values()),
        "ended": reasons["stop"],
        "truncated": reasons["length"],
        "empty": sum(not row["response"].strip() for row in answers),
        "mean_length": tokens / len(pairs),
        "encoded_otherwise": sum(
            count is not None and len(pair.student.response_ids) != count for pair, count in counted
        ),
        "left_out": len(requests) - len(pairs),
        "sampling": asdict(requests[0].sampling),
    }


def rounds_cost(run: Path) -> dict[str, Any]:
    """What kd_results.json says of all rounds of the run in the folder `run`, as far as they are there."""
    names = ("rows", "tokens", "answering_seconds", "caching_seconds")
    made = [read_json(path) for path in sorted(run.glob(f"rounds/*/{COMPLETE}"))]
    return {"made": len(made)} | {name: sum(facts[name] for facts in made) for name in names}
