"""Run code that a model wrote against a row's tests. The code is taken to be hostile.

`open_sandbox` finds out once what this host allows; `run_tasks` runs tasks in parallel, each in a jail of its own
(sandbox_jail.py). Linux only; elsewhere nothing is executed.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from src.utils.common import logger

JAIL = Path(__file__).with_name("sandbox_jail.py")
# MBPP's own answer to task 123 takes 2.7 s of CPU time on a fast machine and more than twice that on a slow one
CPU_SECONDS = 12
WALL_SECONDS = 60  # for what sleeps or waits; so far above the other that a machine with other work does not decide
GRACE = 20  # seconds more before a jail that does not end by itself is killed from outside: a defect
PAUSE = 1  # seconds before a jail that could not be built is tried again


@dataclass(frozen=True)
class Task:
    """Candidate code and the tests it has to pass.

    sources: programs that are run one after another in the candidate's module.
    setup: run beside the tests, before them, out of the candidate's reach.
    tests: asserts, or a function `check(candidate)`.
    names: what the tests mean when they use these names is the candidate's, whatever else has such a name.
    entry_point: what is passed to `check`; empty without one.
    """

    sources: tuple[str, ...]
    setup: str
    tests: str
    names: tuple[str, ...]
    entry_point: str = ""


@dataclass(frozen=True)
class Verdict:
    """kind: `passed`, `failed`, `timeout`, `error` (the row cannot be judged, whatever the candidate does) or
    `unavailable` (there was no jail to run it in; `run_tasks` makes that an `error`)."""

    kind: str
    detail: str


@dataclass(frozen=True)
class Sandbox:
    """What this host gives.

    level: `namespaces` (no network, no files but Python's own, no sight of other processes), `rlimits` (limits only:
        the code can read your files and reach the network) or `none`.
    reason: why it is not more.
    allow_unsafe: whether `rlimits` is enough.
    workers: tasks that run at once.
    python: the interpreter that runs them.
    cpu_seconds, wall_seconds: what a task may take, of its own processes' CPU time and of time as it passes.
    """

    level: str
    reason: str = ""
    allow_unsafe: bool = False
    workers: int = 1
    python: str = sys.executable
    cpu_seconds: float = CPU_SECONDS
    wall_seconds: float = WALL_SECONDS

    @property
    def executes(self) -> bool:
        return self.level == "namespaces" or (self.level == "rlimits" and self.allow_unsafe)

    @property
    def used_level(self) -> str:
        """The level code is executed at, `none` where it is not: the field `sandbox_level` of a stored answer."""
        return self.level if self.executes else "none"


CLOSED = Sandbox("none", "not opened")


def run_task(task: Task, sandbox: Sandbox) -> Verdict:
    """Run one task in a jail of its own; nothing of it is left afterwards."""
    nonce = secrets.token_hex(16)
    limits = (str(sandbox.cpu_seconds), str(sandbox.wall_seconds))
    # -I: no environment, no user packages, no folder of ours on the path; -S: no site-packages; -B: no bytecode
    command = [sandbox.python, "-I", "-S", "-B", str(JAIL), str(os.getpid()), sandbox.level, *limits]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", env={}, text=True,
        encoding="utf-8", errors="replace", start_new_session=True,
    ) as jail:  # fmt: skip
        try:
            asked = json.dumps(asdict(task) | {"nonce": nonce})
            said, complaint = jail.communicate(asked, timeout=sandbox.wall_seconds + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(jail.pid, signal.SIGKILL)  # its own session, so its own group
            return Verdict("timeout", "the jail did not end by itself")
    last = (complaint.strip().splitlines() or ["no word"])[-1]
    # below 0 is a signal: the candidate may have sent it, so that is no defect of the jail
    if jail.returncode > 0:
        return Verdict("unavailable", f"the jail could not be kept: {last}")
    try:
        known, kind, detail = json.loads(said)
    except (ValueError, TypeError):  # at level rlimits the code can kill its keeper
        return Verdict("failed", f"the jail was killed: {last}")
    # the keeper may say these three without the nonce, which only the judge has read
    if known != nonce and kind not in ("failed", "timeout", "unavailable"):
        return Verdict("failed", "a forged verdict")
    return Verdict(kind, detail)


def run_tasks(tasks: Sequence[Task], sandbox: Sandbox) -> list[Verdict]:
    """One verdict a task, in their order.

    A jail needs processes, memory and namespaces, of which a busy machine may have none left for a moment: where it
    cannot be built it is tried once more. All other verdicts are the same on a busy machine, for CPU time decides.
    """
    assert sandbox.executes, "the caller asks `executes` first"

    def run(task: Task) -> Verdict:
        verdict = run_task(task, sandbox)
        if verdict.kind == "unavailable":
            time.sleep(PAUSE)
            verdict = run_task(task, sandbox)
        return Verdict("error", verdict.detail) if verdict.kind == "unavailable" else verdict

    with ThreadPoolExecutor(sandbox.workers) as pool:  # threads that wait for processes
        return list(pool.map(run, tasks))


PROBE = Task(
    sources=(
        "import os, socket\n"
        "def can(action, *arguments):\n"
        "    try:\n"
        "        action(*arguments)\n"
        "    except OSError:\n"
        "        return False\n"
        "    return True\n"
        "def fork(): return can(os.fork)\n"
        "def reads(path): return can(os.stat, path)\n"
        "def user(): return os.getuid()\n"
        "def process(): return os.getpid()\n"
        "def networks(): return [name for _, name in socket.if_nameindex()]\n",
    ),
    setup="",
    tests="assert fork() is False, 'it can start processes'\n",
    names=("fork", "reads", "user", "process", "networks"),
)
ISOLATED = (
    f"assert reads({str(JAIL)!r}) is False, 'it sees files'\n"
    "assert user() == 65534, 'it has a user of this host'\n"
    "assert process() < 10, 'it sees processes'\n"
    "assert networks() in ([], ['lo']), 'it sees the network'\n"
)


def probe(python: str) -> tuple[str, str]:
    """The highest level at which a candidate that tries to get out cannot, and why not a higher one."""
    if not sys.platform.startswith("linux"):
        return "none", f"{sys.platform} has neither namespaces nor the limits needed"
    reasons = []
    for level, tests in (("namespaces", PROBE.tests + ISOLATED), ("rlimits", PROBE.tests)):
        verdict = run_task(Task(PROBE.sources, "", tests, PROBE.names), Sandbox(level, python=python))
        if verdict.kind == "passed":
            return level, "; ".join(reasons)
        reasons.append(f"no {level}: {verdict.detail}")
    return "none", "; ".join(reasons)


def open_sandbox(allow_unsafe: bool = False) -> Sandbox:
    """Probe the host and say what it gives."""
    python = os.path.realpath(sys._base_executable)  # not the environment's: only the standard library is there
    level, reason = probe(python)
    sandbox = Sandbox(level, reason, allow_unsafe, len(os.sched_getaffinity(0)) if level != "none" else 1, python)
    if sandbox.executes:
        logger.info("sandbox: level %s%s", level, f" ({reason})" if reason else "")
    else:
        way_out = "; --allow_unsafe_execution would run it with limits only" if level == "rlimits" else ""
        logger.warning("sandbox: level %s, code answers are not executed (%s)%s", level, reason, way_out)
    return sandbox
