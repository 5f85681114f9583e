"""A model server that a stage starts, waits for and stops again; how many GPUs each copy of a model takes."""

import contextlib
import http.client
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from src.utils.common import UserError, logger

PATIENCE = 1800.0  # seconds until a server must answer: a large model is loaded and compiled first
SIGN_OF_LIFE = 15.0  # seconds between two lines about a server that is waited for
FAREWELL = 30.0  # seconds it has to end by itself
LAST_WORDS = 200  # characters of the last line of its log that are shown
# a process that outlives ours: its input ends when we do, however we ended, and it kills the group it was given
GUARD = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"


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
    # GPUs of one replica: 1, 2, 3, 6 of 6; the smallest that works leaves the most replicas
    for share in (n for n in range(1, gpus + 1) if gpus % n == 0):
        fits = [
            (tensor, share // tensor)
            for tensor in range(share, 0, -1)  # the widest first: tensor parallelism goes before pipeline stages
            if share % tensor == 0
            and heads % tensor == 0
            and (kv_heads % tensor == 0 or tensor % kv_heads == 0)
            and share // tensor <= layers  # a stage has a layer at least
        ]
        if fits and weight_gb / share <= budget_gb:
            return *fits[0], gpus // share
    raise UserError(
        f"{weight_gb:.1f} GB of weights do not fit on {gpus} GPUs of {budget_gb:.1f} GB each with {heads} heads, "
        f"{kv_heads} KV heads and {layers} layers; name more GPUs, or a quantised model"
    )


@contextlib.contextmanager
def running(
    command: str | Sequence[str],
    base_url: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    patience: float = PATIENCE,
) -> Iterator[None]:
    """Run a server's command until the block ends; its words go to `log`. An empty command starts nothing.

    Args:
        command: as typed in a shell, for example `vllm serve MODEL --port 8000`, or its words; no shell reads it.
        base_url: where it will answer, for example `http://127.0.0.1:8000/v1`.
        environment: variables that it gets beside ours.
        patience: seconds until it must answer.

    Raises:
        UserError: something answers there already, the command cannot be run, it ends, or it does not answer in time.
    """
    if not command:
        yield
        return
    # 1. nothing else may answer there: its answers would pass for those of this server
    if answers(base_url):
        raise UserError(f"{base_url}: a server answers there already; stop it, or name another port in serve")
    # 2. the server
    words = split_command(command) if isinstance(command, str) else list(command)
    log.parent.mkdir(parents=True, exist_ok=True)
    logger.info("starting %s (its log: %s)", shlex.join(words), log)
    with log.open("wb") as output:
        try:
            # a session of its own, so that its workers can be ended with it
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | dict(environment or {}),
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"serve: {words[0]}: {error.strerror}; install it, or mend the command") from None
    with guarded(process, _end):
        # 3. until it answers
        _wait(process, base_url, log, patience)
        yield


@contextlib.contextmanager
def guarded(process: subprocess.Popen, end: Callable[[subprocess.Popen], None]) -> Iterator[None]:
    """End a process that leads a session of its own when the block ends, whatever ends it: by `end`, or by somebody who
    kills its group where this process cannot, even of SIGKILL."""
    guard = None
    try:
        # it waits for the end of its input, which comes with the end of this process, whatever ends it; signals to
        # this process's group, such as Ctrl-C, do not reach it
        guard = subprocess.Popen(
            [sys.executable, "-c", GUARD, str(process.pid)], stdin=subprocess.PIPE, start_new_session=True
        )
        yield
    finally:
        end(process)
        if guard is not None:
            guard.kill()
            guard.wait()
            guard.stdin.close()


def split_command(command: str) -> list[str]:
    """The words of a command line.

    Raises:
        UserError: a quotation in it has no end.
    """
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UserError(f"serve: {error} in {command}") from None


def answers(base_url: str) -> bool:
    """Whether a server lists its models there, or wants a key for it."""
    status = _status(f"{base_url.rstrip('/')}/models")
    if status == 500:  # `transformers serve` fails to list models where the hub's cache is not there yet
        status = _status(urllib.parse.urljoin(base_url, "/health"))
    # 401 and 403: it is there, and wants a key that is not sent here
    return status in (200, 401, 403)


def _status(url: str) -> int:
    """The HTTP status that is answered; 0 for no answer."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError, http.client.HTTPException):
        return 0


def _last_line(log: Path) -> str:
    """What a server said last, cut to one short line that can be printed."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 8192, 0))  # bytes: a progress bar may have made the file long
        text = file.read().decode("utf-8", "replace")
    # splitlines takes a progress bar's returns for line ends as well
    lines = [line for line in text.splitlines() if line.strip()] or ["no word"]
    shown = "".join(letter if letter.isprintable() else " " for letter in lines[-1])  # no escapes for the terminal
    return " ".join(shown.split())[:LAST_WORDS]


def _wait(process: subprocess.Popen, base_url: str, log: Path, patience: float) -> None:
    begin = spoken = time.monotonic()
    while True:
        # asked before the process is looked at: what answers while it lives is the server itself
        answered = answers(base_url)
        if process.poll() is not None:  # and then another server answered
            raise UserError(
                f"the server ended with exit code {process.returncode}: {_last_line(log)}; its log is {log}"
            )
        now = time.monotonic()
        if answered:
            logger.info("%s answers after %.0f s", base_url, now - begin)
            return
        if now - begin > patience:
            raise UserError(f"{base_url}: no answer within {patience:g} s of starting the server; its log is {log}")
        if now - spoken >= SIGN_OF_LIFE:
            spoken = now
            waited, words = now - begin, _last_line(log)
            logger.info("%s: no answer yet, %.0f of %g s; it says: %s", base_url, waited, patience, words)
        time.sleep(0.5)


def _end(process: subprocess.Popen) -> None:
    """Ask the server and its workers to end, then make them; workers may outlive the process that was started."""
    for word in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + FAREWELL
        try:
            os.killpg(process.pid, word)
            while time.monotonic() < deadline:
                process.poll()  # or it would stay in its group as a zombie
                os.killpg(process.pid, 0)  # signal 0 reaches nobody; it raises once the group is empty
                time.sleep(0.05)
        except ProcessLookupError:
            return
