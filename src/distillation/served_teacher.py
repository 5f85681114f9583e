"""A teacher behind a server: the k tokens that it finds most probable at every position of stored answers.

A conversation goes out as token ids, so that no second tokenisation can shift anything. What comes back has an entry
for each token: that token's log-probability given those before it, and the k most probable tokens in its place.

    vLLM    POST /v1/completions {prompt: ids, prompt_logprobs: k}
            choices[0].prompt_logprobs = [null, {id: {logprob, rank, decoded_token}, ...}, ...]: k entries, and one more
            where the token itself is not among them
    SGLang  POST /generate {input_ids: ids, return_logprob, logprob_start_len: start, top_logprobs_num: k}
            meta_info.input_token_logprobs = [[null, id, text], [logprob, id, text], ...], of the tokens from start on
            meta_info.input_top_logprobs = [null, [[logprob, id, text], ...], ...]

https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html, vllm/logprobs.py
https://docs.sglang.io/basic_usage/sampling_params.html, srt/managers/scheduler_output_processor_mixin.py
"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import TypedDict  # pydantic's own requirement: it takes typing's from Python 3.12 on only

from src.distillation.base import EncodedRow
from src.distillation.openai_engine import (
    REFUSED,
    Failure,
    Server,
    ask_all,
    one_line,
    open_client,
    raise_failure,
    read_body,
    response_to,
)
from src.utils.common import UserError

KINDS = ("vllm", "sglang")  # the servers that give a prompt's log-probabilities
ROUNDING = 1e-3  # in a log-probability, or a sum of probabilities, that a server has computed in bf16 or fp32
# Nothing of the sampling takes part in a prompt's log-probabilities; at these values it could not if it did.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
# "Requested prompt logprobs of 64, which is greater than max allowed: 20"
TOO_MANY = re.compile(r"logprobs of \d+, which is greater than max allowed", re.IGNORECASE)
# "This model's maximum context length is 512 tokens", "is longer than the model's context length"
TOO_LONG = re.compile(r"context.?length|too long|max_model_len", re.IGNORECASE)


class _VllmEntry(TypedDict):
    logprob: float


class _VllmChoice(TypedDict):
    prompt_logprobs: list[dict[int, _VllmEntry] | None]


class _VllmReply(TypedDict):
    choices: Annotated[list[_VllmChoice], Field(min_length=1)]


class _SglangLists(TypedDict):
    input_token_logprobs: list[tuple[float | None, int, Any]]
    input_top_logprobs: list[list[tuple[float, int, Any]] | None]


class _SglangReply(TypedDict):
    meta_info: _SglangLists


class _Model(TypedDict):
    id: str


class _Models(TypedDict):
    data: list[_Model]


VLLM_REPLY, SGLANG_REPLY, MODELS = TypeAdapter(_VllmReply), TypeAdapter(_SglangReply), TypeAdapter(_Models)


class Position(NamedTuple):
    """One token of an answer: its id, its log-probability, and `(id, log-probability)` of the most probable ones."""

    token: int
    log_p: float
    top: list[tuple[int, float]]


class Told(NamedTuple):
    """What a server told of N response tokens: ids and log-probabilities of the top k, the most probable first, and the
    log-probability of the token itself."""

    ids_NK: Tensor
    log_p_NK: Tensor
    label_log_p_N: Tensor


class _Wrong(Exception):
    """A reply without error that is not what was asked for; the text says how."""


def _misshapen(error: ValidationError) -> str:
    """The first place where a reply has another shape: "choices.0.prompt_logprobs: Input should be a valid list"."""
    # pydantic's places are tuples: ("choices", 0, "prompt_logprobs")
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the reply'}: {first['msg']}"


def question(server: Server, row: EncodedRow, k: int) -> tuple[str, dict[str, Any]]:
    """The URL and the body that ask for the log-probabilities of a row."""
    # the tokens that the teacher's tokenizer gave here
    ids = [*row.prompt_ids, *row.response_ids]
    base_url = server.base_url.rstrip("/")
    if server.kind == "vllm":
        # it generates one token at least
        wanted = {"prompt_logprobs": k, "max_tokens": 1, "add_special_tokens": False}
        return f"{base_url}/completions", {"model": server.model, "prompt": ids, **SAMPLING, **wanted}
    body = {
        "input_ids": ids,
        "sampling_params": SAMPLING | {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": len(row.prompt_ids) - 1,  # the first entry has no log-probability
        "top_logprobs_num": k,
    }
    return f"{base_url.removesuffix('/v1')}/generate", body  # SGLang's own interface lies beside the OpenAI one


def read_vllm(said: Any, row: EncodedRow) -> list[Position]:
    """The response positions of vLLM's reply. Raises `_Wrong`, or pydantic's ValidationError for another shape."""
    # entry i is about token i given those before it; the first is null
    entries = VLLM_REPLY.validate_python(said)["choices"][0]["prompt_logprobs"]
    if len(entries) != len(row):
        raise _Wrong(f"{len(entries)} positions for {len(row)} tokens")
    found = []
    start = len(row.prompt_ids)
    for index, (token, entry) in enumerate(zip(row.response_ids, entries[start:], strict=True)):
        # the token itself is always in its entry, among the k or as one more: else it is another tokenizer's
        if not entry or token not in entry:
            raise _Wrong(f"response position {index} does not have token {token}, which was sent")
        top = [(other, values["logprob"]) for other, values in entry.items()]
        found.append(Position(token, entry[token]["logprob"], top))
    return found


def read_sglang(said: Any, row: EncodedRow) -> list[Position]:
    """The response positions of SGLang's reply. Raises as `read_vllm`."""
    lists = SGLANG_REPLY.validate_python(said)["meta_info"]
    # from the prompt's last token on, which has no log-probability: response token i is at i + 1
    own, tops = lists["input_token_logprobs"], lists["input_top_logprobs"]
    wanted = len(row.response_ids) + 1  # with the last token of the prompt
    if len(own) != wanted or len(tops) != wanted:
        raise _Wrong(f"{len(own)} and {len(tops)} positions for {wanted} tokens")
    found = []
    for index, token in enumerate(row.response_ids):
        log_p, sent, _ = own[index + 1]
        if sent not in (token, 0):  # the last id of its vocabulary comes back as 0
            raise _Wrong(f"response position {index} has token {sent}, sent was {token}")
        if log_p is None:
            raise _Wrong(f"response position {index} has no log-probability")
        # [log-probability, id, text] -> (id, log-probability)
        top = [(other, value) for value, other, _ in tops[index + 1] or ()]
        found.append(Position(token, log_p, top))
    return found


def told(positions: Sequence[Position], k: int, vocab_size: int) -> Told:
    """The top k of each position as tensors.

    Raises:
        _Wrong: it has fewer, an id that the tokenizer does not know, or numbers that are no log-probabilities.
    """
    ids, log_p = [], []
    for index, position in enumerate(positions):
        # vLLM gives k + 1 where the token itself is not among them: the last of these goes
        top = sorted(dict(position.top).items(), key=lambda item: -item[1])[:k]
        if len(top) < k:
            raise _Wrong(f"response position {index} has {len(top)} tokens, asked for were top_k = {k}")
        ids.append([token for token, _ in top])
        log_p.append([value for _, value in top])
    found = Told(
        torch.tensor(ids, dtype=torch.int32),
        torch.tensor(log_p, dtype=torch.float32),
        torch.tensor([position.log_p for position in positions], dtype=torch.float32),
    )
    labels = torch.tensor([position.token for position in positions], dtype=torch.int32)
    # tensors of a whole row at once; the first position that is wrong is named
    for wrong_N, what in _faults(found, labels, vocab_size):
        if wrong_N.any():
            raise _Wrong(f"response position {int(wrong_N.nonzero()[0])}: {what}")
    return found


def _faults(found: Told, labels_N: Tensor, vocab_size: int) -> list[tuple[Tensor, str]]:
    """Conditions `[N]` of which none may hold, and what each means."""
    ids, log_p, label_log_p = found
    sums = log_p.double().exp().sum(-1)
    # [N, K]: where among the kept tokens the one that was sent is, in one place or none
    is_label = ids == labels_N[:, None]
    among = is_label.any(-1)
    # its log-probability there; 0 where it is not among them, which `among` rules out
    of_label = torch.where(is_label, log_p, 0.0).sum(-1)
    return [
        (((ids < 0) | (ids >= vocab_size)).any(-1), f"a token id beyond the {vocab_size} of the tokenizer"),
        # NaN compares as False, so every other condition would let it pass
        (~(log_p.isfinite().all(-1) & label_log_p.isfinite()), "a log-probability that is no number"),
        ((log_p > ROUNDING).any(-1) | (label_log_p > ROUNDING), "a log-probability above 0"),
        (sums > 1 + ROUNDING, "probabilities that add up to more than 1"),
        (among & ((of_label - label_log_p).abs() > ROUNDING), "two log-probabilities of the token that was sent"),
        (
            ~among & (label_log_p > log_p[:, -1] + ROUNDING),
            "the token that was sent belongs to the top k, which lacks it",
        ),
    ]


@dataclass(frozen=True)
class _Asking:
    """`openai_engine.Asking` for log-probabilities."""

    client: Any
    server: Server
    k: int
    vocab_size: int

    async def send(self, row: EncodedRow) -> Any:
        """The HTTP response."""
        import openai

        url, body = question(self.server, row, self.k)
        # as bytes, which `read_body` takes apart
        return (await self.client.post(url, cast_to=openai.HttpxBinaryResponseContent, body=body)).response

    async def ask(self, row: EncodedRow) -> tuple[EncodedRow, Told]:
        """One try. Raises a UserError that names server and row where another would end the same."""
        server = self.server
        response = await response_to(self.send(row), server)
        said = read_body(response.content, response.status_code, lambda body: body, "log-probabilities")
        if isinstance(said, Failure):
            # one refused row ends the run, where an answer would be passed over
            if said.status in REFUSED:
                raise UserError(self.refusal(row, one_line(said.words, server.key)))
            raise_failure(said, response, server, row.id)
        # a reply without an error that is wrong all the same would be wrong at every try
        read = read_vllm if server.kind == "vllm" else read_sglang
        try:
            return row, told(read(said, row), self.k, self.vocab_size)
        except ValidationError as error:
            what = one_line(_misshapen(error))
        except _Wrong as wrong:
            what = str(wrong)
        raise UserError(
            f"{server.base_url}: row {row.id}: {what}; see that it serves {server.model} and is a {server.kind} server "
            "(--server), and that teacher_model_name_or_path has that model's tokenizer"
        )

    def refusal(self, row: EncodedRow, words: str) -> str:
        """The line that a refused row ends the run with: a cache without it would be of other rows."""
        way_out = "see what the server wants"
        # the server's words for what can be mended on its command line
        if TOO_MANY.search(words):
            way_out = f"start the server with --max-logprobs {self.k}, or lower --top_k"
        elif TOO_LONG.search(words):
            flag = "--max-model-len" if self.server.kind == "vllm" else "--context-length"
            way_out = (
                f"it has {len(row)} tokens: start the server with {flag} {len(row) + 1} or more, or leave longer rows "
                "out here and in training with a lower --max_length"
            )
        return f"{self.server.base_url} refuses row {row.id}: {words}; {way_out}"


def check_served(server: Server) -> None:
    """Refuse a server that is not there, or has another model: SGLang would answer for whichever it has.

    Raises:
        UserError: it does not list its models, or the name is not among them.
    """
    import openai

    async def listed() -> bytes:
        async with open_client(server) as client:
            return (await client.get("/models", cast_to=openai.HttpxBinaryResponseContent)).content

    try:
        with asyncio.Runner() as runner:
            # {"data": [{"id": "Qwen/Qwen3-8B"}, ...]}
            names = [model["id"] for model in MODELS.validate_json(runner.run(listed()))["data"]]
    except (openai.OpenAIError, ValidationError) as error:
        why = _misshapen(error) if isinstance(error, ValidationError) else f"{error} {error.__cause__ or ''}"
        raise UserError(
            f"{server.base_url}: does not list its models ({one_line(why, server.key)}); see that the server runs "
            f"there, and that {server.key_variable} holds its key if it wants one"
        ) from None
    if server.model not in names:
        raise UserError(
            f"{server.base_url} serves {one_line(', '.join(names)) or 'nothing'}, not {server.model}; set "
            "served_model_name to the name under which it serves the teacher"
        )


def ask_rows(server: Server, rows: Sequence[EncodedRow], k: int, vocab_size: int) -> Told:
    """What the server tells of the response tokens of some rows, row after row.

    Raises:
        UserError: a reply is not what was asked for, a row is refused, or there is no answer in `server.tries` tries.
    """
    told_of: dict[tuple[str, int], Told] = {}  # (id, sample_index) -> what was told
    with asyncio.Runner() as runner:
        asking = _Asking(open_client(server), server, k, vocab_size)
        # answers come in any order
        for part in ask_all(asking, rows, len(rows), runner):
            told_of |= {(row.id, row.sample_index): found for row, found in part}
    in_order = [told_of[row.id, row.sample_index] for row in rows]
    # [Told of each row] -> one Told: ids of all rows end to end, log-probabilities likewise
    return Told(*(torch.cat(parts) for parts in zip(*in_order, strict=True)))
