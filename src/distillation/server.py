"""A model server that a stage starts, waits for and stops again."""

import contextlib
import http.client
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from src.utils.common import UserError, logger

PATIENCE = 1800.0  # seconds until a server must answer: a large model is loaded and compiled first
FAREWELL = 30.0  # seconds it has to end by itself
GUARD = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"


@contextlib.contextmanager
def running(command: str, base_url: str, log: Path, patience: float = PATIENCE) -> Iterator[None]:
    """Run a server's command until the block ends; its words go to `log`. An empty command starts nothing.

    Args:
        command: as typed in a shell, for example `vllm serve MODEL --port 8000`; no shell reads it.
        base_url: where it will answer, for example `http://localhost:8000/v1`.

    Raises:
        UserError: something answers there already, the command cannot be run, it ends, or it does not answer in time.
    """
    if not command:
        yield
        return
    if answers(base_url):
        raise UserError(f"{base_url}: a server answers there already; stop it, or leave server_command out to use it")
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"server_command: {error} in {command}") from None
    logger.info("starting %s (its log: %s)", command, log)
    with log.open("wb") as output:
        try:
            # a session of its own, so that its workers can be ended with it
            process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            raise UserError(f"server_command: {words[0]}: {error.strerror}; install it, or mend the command") from None
    # it waits for the end of its input, which comes with the end of this process, whatever ends it
    guard = subprocess.Popen([sys.executable, "-c", GUARD, str(process.pid)], stdin=subprocess.PIPE)
    try:
        _wait(process, base_url, log, patience)
        yield
    finally:
        _end(process)
        guard.kill()
        guard.wait()
        guard.stdin.close()


def answers(base_url: str) -> bool:
    """Whether a server lists its models there."""
    try:
        with urllib.request.urlopen(f"{base_url.rstrip('/')}/models", timeout=5) as reply:
            return reply.status == 200
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # it is there, and wants a key
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _wait(process: subprocess.Popen, base_url: str, log: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        answered = answers(base_url)
        if process.poll() is not None:  # and then another server answered
            last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no word"])[-1]
            raise UserError(f"the server ended with exit code {process.returncode}: {last[:200]}; its log is {log}")
        if answered:
            return
        if time.monotonic() > deadline:
            raise UserError(f"{base_url}: no answer within {patience:g} s of starting the server; its log is {log}")
        time.sleep(0.5)


def _end(process: subprocess.Popen) -> None:
    """Ask the server and its workers to end, then make them; workers may outlive the process that was started."""
    for word in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + FAREWELL
        try:
            os.killpg(process.pid, word)
            while time.monotonic() < deadline:
                process.poll()  # or it would stay in its group as a zombie
                os.killpg(process.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return
