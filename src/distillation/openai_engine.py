"""Teacher answers from any OpenAI-compatible server: bounded concurrency that gives way, retries, nothing lost.

The client's own retries are off. They cover 429, 5xx and cut connections, but not a body that is not JSON; they hide a
429, which is what the concurrency adapts to; and they hold a place while they wait.
"""

import asyncio
import gzip
import heapq
import importlib.util
import itertools
import json
import os
import random
import re
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, Protocol, TypeVar

from transformers import PreTrainedTokenizerBase

from src.distillation.base import end_of_turn_id, opened_thought, prompt_text, response_ids
from src.distillation.sft import Request, Sampling, answer_row
from src.utils.answers import CLOSE, END_WORDS, OPENED, THINK_TAG, finish_word, without_code
from src.utils.common import UserError, logger

ENGINE = "openai"
SERVERS = ("vllm", "sglang", "llama_cpp", "transformers", "plain")
TAKES_END_IDS = ("vllm", "sglang")  # kinds that end an answer at any token id they are told
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds between two tries
LONGEST_WORDS = 300  # characters of a server's words that are shown

REFUSED = (400, 413, 422, 451)  # this question, for its content or length or for a setting
AGAIN = (408, 409, 425, 429)  # and everything from 500 on
BUSY = (429, 503, 529)
WAYS_OUT = {
    402: "see to the account",
    404: "set base_url to the server's address and served_model_name to a model it has",
}

# Keys under which servers put the words and the codes of an error, in the order in which they are read
WORD_KEYS = ("error", "errors", "message", "msg", "error_msg", "detail", "metadata", "raw")
CODE_KEYS = ("code", "status", "status_code", "error_code", "type")

# What servers call an error, letters only, and the HTTP status that it amounts to; the first that is found counts:
# "rate_limit_exceeded" is "ratelimitexceeded", in which 429 finds "ratelimit"
FILTERED = (
    "contentfilter|contentpolicy|contentmanagement|filteringpolicy|moderation|inspection|flagged|prohibitedcontent|"
    "safety|sensitive"
)
TOO_LONG = "contextlength|contextwindow|toolong|toolarge|abovemax"
STATUS_OF_WORDS = {
    429: "ratelimit|toomanyrequests|throttl|quota|exhausted",
    503: "overload|unavailable|capacity|busy",
    400: f"{FILTERED}|{TOO_LONG}",
    401: "apikey|authentication|unauthorized|unauthenticated",
    402: "insufficientbalance|paymentrequired",
    403: "permission|forbidden|accessdenied",
    404: "notfound",
    422: "badrequest|invalidrequest|invalidargument|invalidprompt|unprocessable",
    500: "timeout|servererror|internal",
}

Answer = TypeVar("Answer")

THOUGHTS = ("thinking", "redacted_thinking", "reasoning")  # types of a content's parts that are not the answer


@dataclass(frozen=True)
class Server:
    """Where the answers come from and how hard to ask.

    kind: one of `SERVERS`; which sampling fields the server knows beyond OpenAI's own, see `extra_body`.
    model: the name the server knows the teacher by.
    key_variable: the environment variable that holds the key; a server without keys needs none.
    concurrency: requests under way at most. A 429 halves it, successes let it grow again.
    timeout: seconds without an answer after which a request is given up and sent again.
    tries: of one request before the run stops.
    max_refused: share of all answers that the server may refuse before the run stops; one it always may, unless 0.
    """

    base_url: str
    model: str
    kind: str = "vllm"
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 32
    timeout: float = 600.0
    tries: int = 8
    max_refused: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.max_refused <= 1:
            raise UserError(f"max_refused must be a share from 0 (none) to 1 (all), got {self.max_refused}")

    @property
    def key(self) -> str:
        """The key, without the line end that a file may have left on it; empty if there is none.

        Raises:
            UserError: it cannot be sent.
        """
        key = os.environ.get(self.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the key in {self.key_variable} holds characters that no key has; set it again")
        return key

    def refused_at_most(self, answers: int) -> int:
        """How many of so many answers may be refused."""
        # 1e-9: 0.29 * 100 is 28.999999999999996, and 29 are meant
        return max(1, int(self.max_refused * answers + 1e-9)) if self.max_refused else 0


def extra_body(
    kind: str, sampling: Sampling, enable_thinking: bool, ends: Sequence[int] = (), keep_ids: bool = False
) -> dict[str, Any]:
    """The fields that OpenAI's own interface lacks, all stated: a server's or model's defaults never take part.

    Args:
        ends: token ids that end an answer, where they are known; `transformers serve` wants them beside its other
            settings.
        keep_ids: ask for the sampled token ids, which vLLM alone tells.

    Raises:
        UserError: the server cannot do what is asked.
    """
    # asked of the chat template; one that knows no such word passes it over
    thinking = {"chat_template_kwargs": {"enable_thinking": enable_thinking}}
    if kind == "plain":
        if sampling.top_k:
            raise UserError("a plain OpenAI interface has no top_k; set --top_k 0, or name the server's kind")
        return {}
    # it reads a whole generation_config out of one JSON text
    if kind == "transformers":
        settings = {
            "do_sample": sampling.temperature > 0, "top_k": sampling.top_k, "num_beams": 1,
            "max_new_tokens": sampling.max_new_tokens, "eos_token_id": list(ends),
        }  # fmt: skip
        return {"generation_config": json.dumps(settings)} | thinking
    penalty = "repeat_penalty" if kind == "llama_cpp" else "repetition_penalty"
    own_ends = {"stop_token_ids": list(ends)} if ends and kind in TAKES_END_IDS else {}
    ids = {"return_token_ids": True} if keep_ids and kind == "vllm" else {}
    # -1 is their word for no top_k; min_p 0 and penalty 1 change nothing
    return {"top_k": sampling.top_k or -1, "min_p": 0.0, penalty: 1.0} | own_ends | ids | thinking


@dataclass(frozen=True)
class Reply:
    """An answer as a server gave it.

    reason: why it ended, in the server's own word; None where it does not say.
    tokens: the server's own count; None where it has none.
    thought: what the model thought, where the server keeps that apart.
    token_ids: what was sampled, the end of the turn included; None where the server does not say.
    """

    text: str
    reason: str | None
    tokens: int | None
    thought: str = ""
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Failure:
    """A reply that is no answer.

    status: HTTP's, or that which its words amount to; 0 where it is not a chat completion at all.
    words: the server's own, or what was found instead of an answer.
    """

    status: int
    words: str


class _Unreadable(Exception):
    """Not a chat completion; the text says what was found."""


def read_reply(body: bytes, status: int = 200) -> Reply | Failure:
    """What a server's reply to a chat says; see `read_body`."""
    return read_body(body, status, _answer_in, "a chat completion")


def read_body(body: bytes, status: int, answer_in: Callable[[Any], Answer], what: str) -> Answer | Failure:
    """What a server's reply says.

    Args:
        body: as it came.
        status: HTTP's. Below 300 the body decides: many servers put their errors there.
        answer_in: finds the answer in the JSON of a body that holds no error.
        what: was asked for, in words.
    """
    try:
        said = _parsed(body)
        # HTTP says that it is an error: only its words are looked for
        if status >= 300:
            return _failure(said, status)
        error = _error_in(said)
        return answer_in(said) if error is None else _failure(error, status)
    except _Unreadable as found:
        # an error page that is no JSON keeps its status ("<html>" of a gateway with 502)
        return _failure(str(found), status) if status >= 300 else Failure(0, f"not {what}: {found}")
    except RecursionError:
        return Failure(status if status >= 300 else 0, f"not {what}: nested too deeply")


def _parsed(body: bytes) -> Any:
    """The JSON of a body. A byte order mark is none of it; bytes that are no UTF-8 become U+FFFD.

    Raises:
        _Unreadable: it is not JSON.
    """
    try:
        if body.startswith(b"\x1f\x8b"):  # packed, and its header does not say so
            body = gzip.decompress(body)
        try:
            return json.loads(body)  # of bytes: it finds UTF-8, UTF-16 or UTF-32 by itself
        except UnicodeDecodeError:
            return json.loads(body.decode("utf-8-sig", "replace"))
    # no JSON; gzip that ends too early (EOFError), is damaged (zlib.error) or is none (OSError)
    except (ValueError, EOFError, OSError, zlib.error):
        start = body.decode("utf-8", "replace").strip()
    # lines of server-sent events
    if start.startswith(("data:", "event:", ": ")):
        raise _Unreadable(f"a stream, though none was asked for: {start}")
    raise _Unreadable(start or "an empty body")


def _error_in(said: Any) -> Any:
    """The error that a body of status 200 holds in place of an answer, or with it; None where it holds none."""
    if isinstance(said, list) and len(said) == 1:  # as Google wraps it
        said = said[0]
    if not isinstance(said, dict):
        return None
    if _is_error(said.get("error")):
        return said
    # an error may lie in the choice: {"choices": [{"error": {"message": "..."}}]}
    choices = said.get("choices")
    if isinstance(choices, list) and choices:
        choice = choices[0]
        error = choice.get("error") if isinstance(choice, dict) else None
        return error if _is_error(error) else None
    # no choices: is it an error without the word? {"message": "busy"}, {"code": 429}
    tells = _words_in(said) or any(status_of(code) for code in _codes_in(said))
    return said if tells else None


def _is_error(error: Any) -> bool:
    """Whether the field `error` holds one; some servers always send it, empty."""
    return any(error.values()) if isinstance(error, dict) else bool(error)


def _failure(error: Any, status: int) -> Failure:
    """An error's words, and the HTTP status that it amounts to.

    Args:
        error: its text, or JSON in any of the shapes that servers have.
        status: HTTP's. Below 300 the error's own codes decide; where it has none, the server is taken to be busy.
    """
    # 1. what it says, whatever its shape
    codes = _codes_in(error)
    words = list(dict.fromkeys(_words_in(error)))  # several wrappers may repeat them
    text = ": ".join(words) or _shown(error)
    # the outermost code that means a status
    named = next(filter(None, map(status_of, codes)), None)
    spelt = _letters(f"{codes} {words}")
    # codes and words alike: some name the filter in the code, some in the text
    is_filter = re.search(FILTERED, spelt) is not None
    # 2. the status: HTTP's own, but for those that hide another
    if status >= 300:
        text = f"Error code: {status} - {text}"
        if status == 400 and named in BUSY:  # throttled: would be taken for a refusal, and is asked again
            status = named
    elif named is not None:
        status = named
    else:
        # words alone: of this question, or else of a server that has too much to do
        status = 400 if is_filter or re.search(TOO_LONG, spelt) else 503
    # the question is refused and not the key
    if status == 403 and is_filter:
        status = 400
    return Failure(status, text)


def _words_in(error: Any) -> list[str]:
    """The texts of an error, whatever its shape."""
    if isinstance(error, str):
        return [error] if error.strip() else []
    if isinstance(error, dict):
        # {"error": {"message": "busy"}} -> [{"message": "busy"}] -> ["busy"]
        error = [error[key] for key in WORD_KEYS if key in error]
    found = []
    for part in error if isinstance(error, list) else ():
        found += _words_in(part)
    return found


def _codes_in(error: Any) -> list[Any]:
    """The codes of an error, the outer ones first."""
    found, inner = [], []
    if isinstance(error, dict):
        found = [error[key] for key in CODE_KEYS if isinstance(error.get(key), str | int | float)]
        inner = [error[key] for key in WORD_KEYS if key in error]
    elif isinstance(error, list):
        inner = error
    for part in inner:
        found += _codes_in(part)
    return found


def _letters(text: str) -> str:
    """Lower-case letters alone.

    >>> _letters("rate_limit_exceeded"), _letters("BadRequestError")
    ('ratelimitexceeded', 'badrequesterror')
    """
    return re.sub(r"[\W\d_]", "", text.lower())  # all but letters: blanks, "-", "4", "_"


def status_of(code: str | int | float) -> int | None:
    """The HTTP status that an error's code or type amounts to; None where it is not known.

    >>> status_of(429), status_of("429"), status_of("overloaded_error"), status_of("AuthenticationError"), status_of(1)
    (429, 429, 503, 401, None)
    """
    number = re.search(r"(?<!\d)[45]\d\d(?!\d)", str(code))  # "429", "http_429"; not "4290"
    if number:
        return int(number[0])
    spelt = _letters(str(code))
    for status, words in STATUS_OF_WORDS.items():
        if re.search(words, spelt):
            return status
    return None


def _answer_in(said: Any) -> Reply | Failure:
    """The answer in a chat completion; a Failure where the server says that it refused or broke off.

    Raises:
        _Unreadable: it is not a chat completion.
    """
    # 1. the first choice; one was asked for
    choices = said.get("choices") if isinstance(said, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise _Unreadable(f"no choices in {_shown(said)}")
    # 2. why it ended: before the message is looked at, for a refused answer may have none
    message, reason = choice.get("message"), choice.get("finish_reason")
    if not (reason is None or isinstance(reason, str)):
        raise _Unreadable(f"finish_reason is {_shown(reason)}")
    if reason and reason.strip().lower() in ("", "null", "none"):
        reason = None
    refusal = _text_under(message, "refusal")
    if finish_word(reason) == "refused":
        return Failure(400, f"finish_reason {reason} {refusal}")
    if reason and reason.strip().lower() == "error":
        return Failure(500, f"finish_reason {reason} {refusal}")
    if not isinstance(message, dict):
        raise _Unreadable(f"message is {_shown(message)}")
    # 3. what it says
    text = _text_in(message.get("content"))
    if refusal and not text:
        return Failure(400, refusal)
    thought = _text_under(message, "reasoning_content") or _text_under(message, "reasoning")
    return Reply(text, reason, _tokens_in(said.get("usage"), text), thought, _ids_in(choice))


def _text_under(message: Any, key: str) -> str:
    """The text that a message has under a key; empty where it has none."""
    text = message.get(key) if isinstance(message, dict) else None
    return text if isinstance(text, str) else ""


def _text_in(content: Any) -> str:
    """The text of a message: its content, or the texts of its parts but for thoughts; empty where it has none.

    Raises:
        _Unreadable: it is of another type.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    if isinstance(content, list):
        for part in content:
            if isinstance(part, dict):
                part = "" if part.get("type") in THOUGHTS else part.get("text") or ""
            texts.append(part)
    if not isinstance(content, list) or not all(isinstance(text, str) for text in texts):
        raise _Unreadable(f"content is {_shown(content)}")
    return "".join(texts)


def _tokens_in(usage: Any, text: str) -> int | None:
    """The server's count of the answer's tokens; None where it has none, or none that can be."""
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    # True is an int; a text has one token at least
    is_count = isinstance(count, int) and not isinstance(count, bool) and count >= bool(text)
    return count if is_count else None


def _ids_in(choice: dict[str, Any]) -> tuple[int, ...] | None:
    """The sampled token ids of a choice; None where it has none, or none that can be."""
    ids = choice.get("token_ids")
    # `type`, for True is an int too
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        return None
    return tuple(ids)


def _shown(value: Any) -> str:
    """A JSON value as text. `one_line` cuts it, once the key is out of it."""
    return json.dumps(value, ensure_ascii=False)


def _whole(text: str) -> str:
    """The text with U+FFFD for every half of a character (a lone surrogate), so that it can be written as UTF-8."""
    # through UTF-16, where halves are units: "\ud83d\ude00" joins to one character, "a\ud83d" becomes "a\ufffd"
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def one_line(words: str, key: str = "") -> str:
    """A server's words for a message of ours: one line, not too long, without the key."""
    # the key goes before the line is cut, which might leave half of it
    shown = _whole(words.replace(key, "***") if key else words)
    blank = "".join(letter if letter.isprintable() else " " for letter in shown)
    line = " ".join(blank.split())
    return line if len(line) <= LONGEST_WORDS else f"{line[: LONGEST_WORDS - 4]} ..."


@dataclass(frozen=True)
class Teacher:
    """What the teacher's tokenizer tells of its answers; nothing, where the teacher is known by a server's name alone.

    end_words, end_ids: how its end of turn is spelt, and the tokens that it may be.
    opens_thought: whether its template opens a thought in the prompt, where it is asked to think.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    end_words: tuple[str, ...] = ()
    opens_thought: bool = False
    end_ids: frozenset[int] = frozenset()


def known_teacher(tokenizer: PreTrainedTokenizerBase | None, ends: Sequence[int] = ()) -> Teacher:
    """What is known of a teacher by its tokenizer and the token ids that end its answers."""
    if tokenizer is None:
        return Teacher()
    ids = [*ends, tokenizer.eos_token_id]
    thought = ""
    try:
        # what the template opens in a prompt like any other
        thought = opened_thought(prompt_text(tokenizer, [{"role": "user", "content": "hello"}], enable_thinking=True))
        ids.append(end_of_turn_id(tokenizer))
    except UserError as error:  # a template that we could not train on; the server only answers with it
        logger.info("%s; the server's answers are taken as they are", error)
    added = tokenizer.added_tokens_decoder  # id -> control token
    # how each end token is spelt, where it is a control token: {"<|im_end|>", "<|endoftext|>"}
    words = {added[own].content for own in ids if own in added and added[own].content.strip()}
    return Teacher(tokenizer, tuple(sorted(words)), bool(thought), frozenset(ids))


def without_end_words(text: str, own: Sequence[str] = ()) -> str:
    """The text without the words at its end that only end a turn: those of `END_WORDS` and the teacher's own.

    >>> without_end_words("It is 4.</s>"), without_end_words("It is 4. [END] </s>", ["[END]"])
    ('It is 4.', 'It is 4.')
    """
    while True:
        # round after round, for several may stand there: "4. [END] </s>" -> "4. [END]" -> "4."
        rest = END_WORDS.sub("", text)
        for word in own:
            if rest.rstrip().endswith(word):
                rest = rest.rstrip().removesuffix(word).rstrip()
        if rest == text:
            return text
        text = rest


def closes_a_thought(text: str, opens_thought: bool = False) -> bool:
    """Whether the text goes on with a thought that was opened in the prompt: its first tag closes one.

    Args:
        opens_thought: whether the prompt is known to open one. If so, a thought may spell the tag in code as well, or
            leave the code open that hides its end.
    """
    if OPENED.match(text):  # it opens one itself
        return False
    if opens_thought:
        return CLOSE.search(text) is not None
    tag = THINK_TAG.search(without_code(text))
    return tag is not None and CLOSE.fullmatch(tag[0]) is not None


def reply_row(
    request: Request, reply: Reply, teacher: Teacher, enable_thinking: bool = False, keep_ids: bool = False
) -> dict[str, Any]:
    """The stored row of a server's answer: its text as our own decoding would give it, and why it ended.

    `num_tokens` is the server's count. Where it has none the teacher's tokenizer counts (the text, a thought that the
    server keeps apart, and the end of turn); without that it is None. With `keep_ids` the row has the `token_ids` that
    the server tells.
    """
    # 1. the text, without what only ends a turn
    whole = _whole(reply.text)
    text = without_end_words(whole, teacher.end_words)
    reason, tokens, limit = reply.reason, reply.tokens, request.sampling.max_new_tokens
    if not reason and text != whole:  # it said so in its text, if not in its reason
        reason = "stop"
    # 2. why it ended, and how many tokens it has: by the server's count, by ours, or by its word alone
    if tokens is not None:
        word = finish_word(reason, tokens, limit)
    elif teacher.tokenizer is not None:
        tokens = len(response_ids(teacher.tokenizer, _whole(reply.thought) + text))
        word = finish_word(reason, tokens, limit)
        tokens += word == "stop"  # the end of turn, which is not in the text
    else:
        word = finish_word(reason)
    # 3. a thought that the prompt opened begins with the tag that the server's text lacks
    if enable_thinking and not reply.thought and closes_a_thought(text, teacher.opens_thought):
        text = f"<think>\n{text}"
    # 4. what was sampled, without the end of the turn
    ids = reply.token_ids if keep_ids else None
    if ids and word == "stop" and ids[-1] in teacher.end_ids:
        ids = ids[:-1]
    return answer_row(request, ENGINE, text, _whole(word), tokens, ids)


class _Again(Exception):
    """A try that failed and may be repeated; `slow_down` where the server has more to do than it can."""

    def __init__(self, reason: str, slow_down: bool = False, retry_after: str | None = None) -> None:
        super().__init__(reason)
        self.slow_down, self.retry_after = slow_down, retry_after


class _Refused(Exception):
    """The server answers this one question with a refusal, as it would again."""


def seconds_asked_for(retry_after: str | None) -> float:
    """The seconds that a Retry-After header asks for, as a number or an HTTP date; 0 if it says nothing, or the past.

    >>> seconds_asked_for("7"), seconds_asked_for("Wed, 21 Oct 2015 07:28:00 GMT"), seconds_asked_for("soon")
    (7.0, 0.0, 0.0)
    """
    try:
        # "7"; "nan" and "inf" are floats too, and `wait_before` bounds them
        seconds = float(retry_after or 0)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)  # "Wed, 21 Oct 2015 07:28:00 GMT"
        except ValueError:
            return 0.0
        # "-0000" gives a date without a zone
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return seconds if seconds > 0 else 0.0  # 0 for NaN, which is above nothing


def wait_before(attempt: int, retry_after: str | None) -> float:
    """Seconds before try number `attempt` + 1: doubling, with jitter, but at least what the server asks for."""
    # after try 1 0.25 to 0.5 s, then 0.5 to 1, 1 to 2, ... 30 to 60
    # jitter: or all that failed together would come back together
    own = random.uniform(0.5, 1) * min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT)
    return max(min(seconds_asked_for(retry_after), LONGEST_WAIT), own)


async def response_to(call: Awaitable[Any], server: Server) -> Any:
    """The HTTP response of whatever status that a call of the client brings. Raises `_Again` where there is none."""
    import openai

    try:
        async with asyncio.timeout(server.timeout):  # of the whole answer: a read time-out is reset by every byte
            response = await call
    except (TimeoutError, openai.APITimeoutError):
        raise _Again(f"no answer within {server.timeout:g} s", slow_down=True) from None
    except openai.APIConnectionError as error:
        raise _Again(one_line(f"connection: {error.__cause__ or error}", server.key)) from None
    # an answer like any other here, which `read_body` takes apart
    except openai.APIStatusError as error:
        response = error.response
    # 301, 302 and 303 turn a POST into a GET without a body; 307 and 308 keep it
    if response.history and response.request.method != "POST":
        raise UserError(
            f"{server.base_url} redirects to {response.url}, and the question is lost on the way; set base_url to "
            "where it leads"
        )
    return response


def raise_failure(failure: Failure, response: Any, server: Server, row_id: str) -> NoReturn:
    """Raise `_Again` or `_Refused` for a reply that is no answer, or a UserError where every other try would end so."""
    words, status = one_line(failure.words, server.key), failure.status
    # 1. the key is wrong for every question
    if status in (401, 403):
        raise UserError(f"{server.base_url} refuses the key in {server.key_variable}: {words}; set it to one it takes")
    # 2. this question, for good
    if status in REFUSED:
        raise _Refused(words)
    # 3. another try may help
    if status == 0 or status in AGAIN or status >= 500:
        raise _Again(words, status in BUSY, response.headers.get("retry-after"))
    # 4. no try would help any question
    way_out = WAYS_OUT.get(status, "see what the server wants, and that base_url is its address")
    raise UserError(f"{server.base_url} refuses row {row_id}: {words}; {way_out}")


class Asking(Protocol):
    """What all requests of a run have in common: the client, the server, and one try of one request (with an `id`).

    A try gives its answer, or ends as `raise_failure` does.
    """

    client: Any
    server: Server

    async def ask(self, request: Any) -> Any: ...


@dataclass(frozen=True)
class _Asking:
    """`Asking` for answers."""

    client: Any
    server: Server
    teacher: Teacher
    enable_thinking: bool
    ends: Sequence[int]
    keep_ids: bool

    async def send(self, request: Request) -> Any:
        """The HTTP response."""
        server, sampling = self.server, request.sampling
        body = extra_body(server.kind, sampling, self.enable_thinking, self.ends, self.keep_ids)
        # raw: `read_reply` reads the body, whatever it is
        reply = await self.client.chat.completions.with_raw_response.create(
            model=server.model, messages=request.messages, temperature=sampling.temperature,
            top_p=sampling.top_p, max_tokens=sampling.max_new_tokens, frequency_penalty=0, presence_penalty=0,
            # penalties of 0 are said too: what is not sent, a server fills in from the model's own settings
            n=1, seed=request.seed & 0x7FFFFFFF, extra_body=body,
        )  # fmt: skip
        return reply.http_response

    async def ask(self, request: Request) -> dict[str, Any]:
        """The row of one try."""
        response = await response_to(self.send(request), self.server)
        reply = read_reply(response.content, response.status_code)
        if isinstance(reply, Failure):
            raise_failure(reply, response, self.server, request.id)
        return reply_row(request, reply, self.teacher, self.enable_thinking, self.keep_ids)


class _Run:
    """The requests of a run: those that wait, those under way and how many these may be, and what came of them.

    `refused_before` answers of `total` were refused in earlier sessions. Rows of what is refused in this one wait in
    `refused` for the next answer: a server that answers nothing has a wrong setting, and no refusal is worth keeping.
    """

    def __init__(self, asking: Asking, requests: Sequence[Any], total: int, refused_before: int = 0) -> None:
        self.asking, self.server, self.total = asking, asking.server, total
        self.refusals = self.refused_before = refused_before
        self.fresh = deque(requests)
        self.again: list[tuple[float, int, int, Request]] = []  # a heap of (when, order, attempt, request)
        self.running: dict[asyncio.Task, tuple[Request, int, float]] = {}  # task -> request, attempt, when it began
        # limit: places (5.2 are 5); cut: when it was halved last; order: settles equal times in the heap
        self.limit, self.cut, self.order = float(self.server.concurrency), 0.0, itertools.count()
        self.refused: list[dict[str, Any]] = []
        self.fatal: list[UserError] = []

    def is_over(self) -> bool:
        return not (self.fresh or self.again or self.running)

    async def turn(self) -> list[dict[str, Any]]:
        """Fill the free places, wait for something to happen, return the rows that are complete; or set `fatal`."""
        # 1. fill the free places: what is due again first, then what was never asked
        now = time.monotonic()
        while len(self.running) < int(self.limit) and (self.fresh or (self.again and self.again[0][0] <= now)):
            is_due = self.again and self.again[0][0] <= now
            # (when, order, attempt, request) -> (attempt, request)
            attempt, request = heapq.heappop(self.again)[2:] if is_due else (1, self.fresh.popleft())
            self.running[asyncio.create_task(self.asking.ask(request))] = (request, attempt, now)
        # 2. wait: until a try ends, or until one that waits is due, if there is a place for it
        pause = self.again[0][0] - now if self.again and len(self.running) < int(self.limit) else None
        if not self.running:
            await asyncio.sleep(pause or 0)  # nothing is under way, all that is left waits its turn
            return []
        finished, _ = await asyncio.wait(self.running, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        # 3. take what has ended
        rows = []
        for task in finished:
            request, attempt, started = self.running.pop(task)
            try:
                rows.append(task.result())
                # grows by 1 in as many answers as there are places (AIMD, as TCP does)
                self.limit = min(self.limit + 1 / self.limit, self.server.concurrency)
            except _Again as failure:
                self.repeat(request, attempt, started, failure)
            except _Refused as refusal:
                self.pass_over(request, str(refusal))
            except UserError as error:
                self.fatal.append(error)
        # 4. refusals go with an answer: a server that answers nothing leaves no row
        if rows and self.refusals <= self.server.refused_at_most(self.total):
            rows += self.refused
            self.refused = []
        return rows

    def repeat(self, request: Request, attempt: int, started: float, failure: _Again) -> None:
        """Ask again later, and less at a time if that is what is wrong; or give up after the last try."""
        if attempt == self.server.tries:
            words = f"{self.server.base_url}: no answer to row {request.id} in {attempt} tries, the last: {failure}"
            self.fatal.append(UserError(f"{words}; run the same command again later, what was answered is kept"))
            return
        if failure.slow_down and started >= self.cut:  # one cut for all that were under way together
            # what began before this moment will fail of the same load, and does not halve it again
            self.limit, self.cut = max(self.limit / 2, 1.0), time.monotonic()
            logger.info("%s: %s; %d requests at a time from now on", self.server.base_url, failure, int(self.limit))
        # it gives its place free while it waits
        when = time.monotonic() + wait_before(attempt, failure.retry_after)
        heapq.heappush(self.again, (when, next(self.order), attempt + 1, request))

    def pass_over(self, request: Request, words: str) -> None:
        """Note a refused request; one too many of them is a wrong setting rather than so many wrong prompts."""
        row = answer_row(request, ENGINE, "", "refused", 0)
        self.refused.append(row | {"refusal": words})
        self.refusals += 1
        allowed, share = self.server.refused_at_most(self.total), self.server.max_refused
        if self.refusals <= allowed:
            logger.info("%s refuses row %s: %s", self.server.base_url, request.id, words)
            return
        before = f" ({self.refused_before} of them stored before: delete their rows to ask again)"
        self.fatal.append(UserError(
            f"{self.server.base_url} refuses row {request.id}: {words}; {self.refusals} of {self.total} answers "
            f"refused{before if self.refused_before else ''}, max_refused {share:g} allows {allowed}: mend the setting "
            "or prompts it names, or raise max_refused; what was answered is kept"
        ))  # fmt: skip

    async def close(self) -> None:
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)  # until they have let go of the client
        await self.asking.client.close()


def ask_all(
    asking: Asking, requests: Sequence[Any], total: int, runner: asyncio.Runner, refused_before: int = 0
) -> Iterator[list[Any]]:
    """Ask every request until it is answered; yields the answers as they are complete, in any order; see `_Run` for the
    rows of what was refused.

    Args:
        total: answers that are wanted in all, of which `max_refused` is a share.
        runner: whose loop the client is used in; the client is closed at the end.
        refused_before: how many of them were refused in earlier sessions.

    Raises:
        UserError: too much is refused, or a request ends in an error that no other try would mend.
    """
    run = _Run(asking, requests, total, refused_before)
    try:
        while not run.is_over():
            # a turn at a time: between two of them the caller stores what came, and no loop runs
            if answers := runner.run(run.turn()):
                yield answers
            if run.fatal:  # after the yield: what was answered beside it is kept
                raise run.fatal[0]
    finally:
        runner.run(run.close())
    # those that no answer came after; none where too many were refused, for that was fatal
    if run.refused:
        yield run.refused
    if run.refusals:
        logger.info("%s refused %d of %d answers; they are recorded so", run.server.base_url, run.refusals, total)


def open_client(server: Server) -> Any:
    """A client of an OpenAI-compatible server, for one event loop.

    Raises:
        UserError: its package is not installed.
    """
    require_client()
    import openai

    return openai.AsyncOpenAI(
        base_url=server.base_url,
        # the client refuses to be made without one, servers on this machine want none
        api_key=server.key or "none",
        timeout=openai.Timeout(server.timeout, connect=10.0),
        max_retries=0,  # `_Run` repeats
    )


def refuse_half_characters(requests: Sequence[Request]) -> None:
    """Refuse prompts that cannot be sent.

    Raises:
        UserError: half a character (a lone surrogate) in a prompt or a system message; names the row.
    """
    for request in requests:
        for name in ("system", "prompt"):
            text = getattr(request, name) or ""
            if _whole(text) != text:
                raise UserError(
                    f"row {request.id}: half a character (a lone surrogate) in its {name}, which cannot be "
                    "sent; mend it in the dataset file"
                )


def require_client() -> None:
    """Raise a UserError where the package that asks servers is not installed."""
    if importlib.util.find_spec("openai") is None:
        raise UserError("asking a server needs the package openai; pip install -e '.[server]'")


def generate_from_server(
    server: Server,
    requests: Sequence[Request],
    enable_thinking: bool = False,
    ends: Sequence[int] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    total: int | None = None,
    refused_before: int = 0,
    keep_ids: bool = False,
) -> Iterator[list[dict[str, Any]]]:
    """Answer every request; yields rows (see `reply_row`) as they are complete, in any order.

    The server applies the teacher's chat template; it is sent the lowest 31 bits of a request's seed, which every
    server takes. Rows of what it refuses to answer say why in `refusal`; they come with the answers after them, or
    last, and only while they are no more than `server.max_refused` allows.

    Args:
        ends: token ids that end an answer.
        tokenizer: the teacher's, where it is known.
        total: answers that the run wants in all, those of earlier sessions too; `max_refused` is a share of them.
        refused_before: how many of those were refused.
        keep_ids: ask for the token ids that were sampled, and keep them.

    Raises:
        UserError: no client, a prompt that cannot be sent, too much refused, a wrong key, or `tries` in vain.
    """
    refuse_half_characters(requests)
    for sampling in {request.sampling for request in requests}:
        extra_body(server.kind, sampling, enable_thinking, ends)  # complains before anything is asked
    teacher = known_teacher(tokenizer, ends)
    # one loop for all turns: the client's connections belong to it
    with asyncio.Runner() as runner:
        asking = _Asking(open_client(server), server, teacher, enable_thinking, ends, keep_ids)
        yield from ask_all(asking, requests, len(requests) if total is None else total, runner, refused_before)
