"""Teacher answers from any OpenAI-compatible server: bounded concurrency that gives way, retries, nothing lost.

The client's own retries are off. They cover 429, 5xx and cut connections, but not a body that is not JSON; they hide a
429, which is what the concurrency adapts to; and they hold a place while they wait.
"""

import asyncio
import heapq
import itertools
import json
import os
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from src.distillation.sft import Request, Sampling, answer_row
from src.utils.common import UserError, logger

ENGINE = "openai"
SERVERS = ("vllm", "sglang", "llama_cpp", "transformers", "plain")
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between two tries


@dataclass(frozen=True)
class Server:
    """Where the answers come from and how hard to ask.

    kind: one of `SERVERS`; which sampling fields the server knows beyond OpenAI's own, see `extra_body`.
    model: the name the server knows the teacher by.
    key_variable: the environment variable that holds the key; a server without keys needs none.
    concurrency: requests under way at most. A 429 halves it, successes let it grow again.
    timeout: seconds without an answer after which a request is given up and sent again.
    tries: of one request before the run stops.
    """

    base_url: str
    model: str
    kind: str = "vllm"
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 32
    timeout: float = 600.0
    tries: int = 8


def extra_body(kind: str, sampling: Sampling, enable_thinking: bool, ends: Sequence[int] = ()) -> dict[str, Any]:
    """The fields that OpenAI's own interface lacks, all stated: a server's or model's defaults never take part.

    Args:
        ends: token ids that end an answer; `transformers serve` wants them beside its other settings.

    Raises:
        UserError: the server cannot do what is asked.
    """
    thinking = {"chat_template_kwargs": {"enable_thinking": enable_thinking}}
    if kind == "plain":
        if sampling.top_k:
            raise UserError("a plain OpenAI interface has no top_k; set --top_k 0, or name the server's kind")
        return {}
    if kind == "transformers":
        settings = {
            "do_sample": sampling.temperature > 0, "top_k": sampling.top_k, "num_beams": 1,
            "max_new_tokens": sampling.max_new_tokens, "eos_token_id": list(ends),
        }  # fmt: skip
        return {"generation_config": json.dumps(settings)} | thinking
    penalty = "repeat_penalty" if kind == "llama_cpp" else "repetition_penalty"
    return {"top_k": sampling.top_k or -1, "min_p": 0.0, penalty: 1.0} | thinking


class _Again(Exception):
    """A try that failed and may be repeated; `slow_down` where the server has more to do than it can."""

    def __init__(self, reason: str, slow_down: bool = False, retry_after: str | None = None) -> None:
        super().__init__(reason)
        self.slow_down, self.retry_after = slow_down, retry_after


def wait_before(attempt: int, retry_after: str | None) -> float:
    """Seconds before try number `attempt` + 1: doubling, with jitter, but at least what the server asks for."""
    asked = float(retry_after) if retry_after and retry_after.replace(".", "", 1).isdigit() else 0.0
    return max(min(asked, LONGEST_WAIT), random.uniform(0.5, 1) * min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT))


async def _ask(client: Any, server: Server, request: Request, sampling: Sampling, body: dict[str, Any]) -> dict:
    """One try. Raises `_Again`, or a UserError where another try would end the same way."""
    import openai

    key = os.environ.get(server.key_variable)
    try:
        async with asyncio.timeout(server.timeout):  # of the whole answer: a read time-out is reset by every byte
            reply = await client.chat.completions.with_raw_response.create(
                model=server.model, messages=request.messages, temperature=sampling.temperature, top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens, frequency_penalty=0, presence_penalty=0, n=1,
                seed=request.seed & 0x7FFFFFFF, extra_body=body,
            )  # fmt: skip
        answer = json.loads(reply.http_response.content)
        choice, tokens = answer["choices"][0], answer["usage"]["completion_tokens"]
        text, reason = choice["message"]["content"] or "", choice["finish_reason"]
        if not (isinstance(text, str) and isinstance(reason, str) and isinstance(tokens, int)):
            raise TypeError("content, finish_reason or completion_tokens")
    except (TimeoutError, openai.APITimeoutError):
        raise _Again(f"no answer within {server.timeout:g} s", slow_down=True) from None
    except openai.APIConnectionError as error:
        raise _Again(f"connection: {error.__cause__ or error}") from None
    except openai.AuthenticationError:
        raise UserError(f"{server.base_url} refuses the key in {server.key_variable}; set it to one it takes") from None
    except openai.APIStatusError as error:
        words = " ".join((error.message.replace(key, "***") if key else error.message).split())[:300]
        if error.status_code in (408, 409, 429) or error.status_code >= 500:
            busy = error.status_code in (429, 503)
            raise _Again(words, busy, error.response.headers.get("retry-after")) from None
        raise UserError(f"{server.base_url} refuses row {request.id}: {words}") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _Again(f"not a chat completion: {type(error).__name__} {error}"[:200]) from None
    return answer_row(request, sampling, ENGINE, text, reason, tokens)


def generate_from_server(
    server: Server,
    requests: Sequence[Request],
    sampling: Sampling,
    enable_thinking: bool = False,
    ends: Sequence[int] = (),
) -> Iterator[list[dict[str, Any]]]:
    """Answer every request; yields rows (see `answer_row`) as they are complete, in any order.

    The server applies the teacher's chat template. `num_tokens` is the server's own count; the seed it is sent is the
    lowest 31 bits of the request's, which every server takes.

    Raises:
        UserError: the client is not installed, the server refuses a request, or `tries` were in vain.
    """
    try:
        import openai
    except ImportError:
        raise UserError("the openai engine needs the package openai; pip install -e '.[openai]'") from None
    body = extra_body(server.kind, sampling, enable_thinking, ends)
    fresh, again = deque(requests), []  # again: a heap of (when, order, attempt, request)
    running: dict[asyncio.Task, tuple[Request, int, float]] = {}
    limit, cut, order = float(server.concurrency), 0.0, itertools.count()
    fatal: list[UserError] = []

    async def turn(client: Any) -> list[dict[str, Any]]:
        """Fill the free places, wait for something to happen, return the rows that are complete; or set `fatal`."""
        nonlocal limit, cut
        now = time.monotonic()
        while len(running) < int(limit) and (fresh or (again and again[0][0] <= now)):
            due = again and again[0][0] <= now
            attempt, request = heapq.heappop(again)[2:] if due else (1, fresh.popleft())
            running[asyncio.create_task(_ask(client, server, request, sampling, body))] = (request, attempt, now)
        pause = again[0][0] - now if again and len(running) < int(limit) else None
        if not running:
            await asyncio.sleep(pause or 0)
            return []
        finished, _ = await asyncio.wait(running, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        rows = []
        for task in finished:
            request, attempt, started = running.pop(task)
            try:
                rows.append(task.result())
                limit = min(limit + 1 / limit, server.concurrency)
            except _Again as failure:
                if attempt == server.tries:
                    words = f"{server.base_url}: no answer to row {request.id} in {attempt} tries, the last: {failure}"
                    fatal.append(UserError(f"{words}; run the same command again later, what was answered is kept"))
                    continue
                if failure.slow_down and started >= cut:  # one cut for all that were under way together
                    limit, cut = max(limit / 2, 1.0), time.monotonic()
                    logger.info("%s: %s; %d requests at a time from now on", server.base_url, failure, int(limit))
                when = time.monotonic() + wait_before(attempt, failure.retry_after)
                heapq.heappush(again, (when, next(order), attempt + 1, request))
            except UserError as error:
                fatal.append(error)
        return rows

    async def close(client: Any) -> None:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await client.close()

    with asyncio.Runner() as runner:
        client = openai.AsyncOpenAI(
            base_url=server.base_url,
            api_key=os.environ.get(server.key_variable) or "none",
            timeout=openai.Timeout(server.timeout, connect=10.0),
            max_retries=0,
        )
        try:
            while fresh or again or running:
                if rows := runner.run(turn(client)):
                    yield rows
                if fatal:
                    raise fatal[0]
        finally:
            runner.run(close(client))
