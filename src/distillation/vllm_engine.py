"""Teacher answers by vLLM's offline engine: one process a replica, requests sharded over them by row id.

The replicas are whole engines that know nothing of each other. vLLM's own data parallelism couples the ranks of a
mixture-of-experts model (all step together, an idle rank computes dummy batches); between independent prompts that only
costs, and a lost rank would take the others along. Several nodes: `vllm serve` with vLLM's own data parallelism or Ray,
and the openai engine in front of it.
"""

import importlib.util
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from src.distillation.sft import Request, answer_row
from src.utils.common import UserError, logger, sha256_text

ENGINE = "vllm"
HANDED_OVER = 512  # prompts a replica gets at a time: what it may have to generate again after a kill


def parallel_sizes(
    heads: int, kv_heads: int, layers: int, gpus: int, weight_gb: float, budget_gb: float
) -> tuple[int, int, int]:
    """(tensor, pipeline, data) parallel sizes whose product is `gpus`: as many replicas as the memory allows.

    Tensor parallelism must divide the attention heads, and divide the KV heads or be a multiple of them (they are then
    replicated): that is what vLLM demands. Within a replica tensor parallelism goes before pipeline stages. Six GPUs of
    36 GB and 61 GB of weights with 32 heads and 4 KV heads give (2, 1, 3).

    Raises:
        UserError: the weights do not fit on all the GPUs together.
    """
    for share in (n for n in range(1, gpus + 1) if gpus % n == 0):
        fits = [
            (tensor, share // tensor)
            for tensor in range(share, 0, -1)
            if share % tensor == 0
            and heads % tensor == 0
            and (kv_heads % tensor == 0 or tensor % kv_heads == 0)
            and share // tensor <= layers
        ]
        if fits and weight_gb / share <= budget_gb:
            return *fits[0], gpus // share
    raise UserError(
        f"{weight_gb:.1f} GB of weights do not fit on {gpus} GPUs of {budget_gb:.1f} GB each with {heads} heads, "
        f"{kv_heads} KV heads and {layers} layers; name more teacher_devices"
    )


def shard_of(row_id: str, replicas: int) -> int:
    """The replica that answers a row: a function of its id alone."""
    return int(sha256_text(f"replica/{row_id}")[:8], 16) % replicas


def _parameters(request: Request, ends: list[int]) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams, all that shape an answer stated: a model's own defaults never take part."""
    sampling = request.sampling
    return {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1, "min_p": 0.0,
        "max_tokens": sampling.max_new_tokens, "stop_token_ids": ends, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": request.seed,
    }  # fmt: skip


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)  # vLLM's own workers too: they would hold the GPUs


def _replica(devices: list[int], arguments: dict[str, Any], adapter: str, inbox: Any, outbox: Any) -> None:
    """A process: jobs in, answers out, until it is killed."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if devices:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # `devices` count among those, as for torch
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[i] if seen != [""] else str(i) for i in devices)
    from vllm import LLM, SamplingParams

    llm, lora = LLM(**arguments), None
    if adapter:
        from vllm.lora.request import LoRARequest

        lora = LoRARequest("arm", 1, adapter)
    while True:
        numbers, jobs = inbox.get()
        prompts = [{"prompt_token_ids": ids} for ids, _ in jobs]
        parameters = [SamplingParams(**sampling) for _, sampling in jobs]
        results = llm.generate(prompts, parameters, use_tqdm=False, lora_request=lora)
        outputs = [result.outputs[0] for result in results]
        outbox.send((numbers, [(output.text, output.finish_reason, len(output.token_ids)) for output in outputs]))


def _end(process: multiprocessing.process.BaseProcess) -> None:
    """Kill a replica with all of its group: nothing it holds is worth a slow farewell."""
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not made its group yet
            process.kill()
    process.join()


@contextmanager
def opened(
    arguments: dict[str, Any], groups: list[list[int]], ends: list[int], adapter: str = ""
) -> Iterator[Callable[[Sequence[Request], Sequence[list[int]]], Iterator[list[dict[str, Any]]]]]:
    """Start the replicas; yields `answer(requests, prompts)`, which yields rows as they come.

    Args:
        arguments: of `vllm.LLM`.
        groups: the GPUs of each replica; one empty group on a machine without.
        ends: token ids that end an answer.
        adapter: folder of the LoRA adapter that answers; empty for the model itself.

    Raises:
        UserError: vLLM is not installed; (in `answer`, after all that the others answered) a replica ended.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "the vllm engine needs vLLM; run this script with an environment made from requirements-vllm.txt"
        )
    context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    inboxes = [context.Queue() for _ in groups]
    # answers by a pipe each: the lock of a shared queue would stay locked if a replica were killed while it writes
    outboxes, their_ends = zip(*(context.Pipe(duplex=False) for _ in groups), strict=True)
    processes = [
        context.Process(target=_replica, args=(group, arguments, adapter, inbox, end))
        for group, inbox, end in zip(groups, inboxes, their_ends, strict=True)
    ]
    logger.info("vLLM: %d replica(s) on GPUs %s, %s", len(groups), groups, arguments)

    def answer(requests: Sequence[Request], prompts: Sequence[list[int]]) -> Iterator[list[dict[str, Any]]]:
        left: dict[int, set[int]] = {}
        for rank, inbox in enumerate(inboxes):
            own = [i for i, request in enumerate(requests) if shard_of(request.id, len(groups)) == rank]
            left[rank] = set(own)
            for start in range(0, len(own), HANDED_OVER):
                part = own[start : start + HANDED_OVER]
                inbox.put((part, [(prompts[i], _parameters(requests[i], ends)) for i in part]))
        lost: dict[int, str] = {}
        while working := [rank for rank in left if left[rank] and rank not in lost]:
            wait([outboxes[rank] for rank in working], timeout=1)
            for rank in working:
                ended = not processes[rank].is_alive()  # asked first: its last answers may lie in the pipe
                try:
                    found = outboxes[rank].recv() if outboxes[rank].poll() else None
                except EOFError:
                    processes[rank].join(10)
                    ended, found = True, None
                if found:
                    numbers, answers = found
                    left[rank] -= set(numbers)
                    rows = zip(numbers, answers, strict=True)
                    yield [answer_row(requests[i], ENGINE, *answer) for i, answer in rows]
                elif ended:
                    code = processes[rank].exitcode
                    lost[rank] = f"vLLM replica {rank} (GPUs {groups[rank]}) ended with exit code {code}"
                    logger.warning("%s, %d prompts unanswered; the others go on", lost[rank], len(left[rank]))
        if lost:
            raise UserError(
                f"{'; '.join(lost.values())}, its log stands above; run the same command again, what was answered is "
                "kept"
            )

    try:
        for process, end in zip(processes, their_ends, strict=True):
            process.start()
            end.close()  # or a replica's end would not end its pipe
        yield answer
    finally:
        for process in processes:
            if process.pid is not None:
                _end(process)
