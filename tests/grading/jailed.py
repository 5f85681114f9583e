"""One task in the sandbox, and what it may leave behind."""

import ctypes
import os
import random
import re
import time
from dataclasses import replace

from src.grading.sandbox import Sandbox, Task, Verdict, run_task

SECRET = str(random.Random().randrange(10**8, 10**9))  # what the tests expect; no candidate can know it
SPARE = 3.0  # seconds that starting and clearing away may take on a busy machine


def task(code: str, tests: str = "") -> Task:
    return Task((code,), "", tests or f"assert f(1) == {SECRET}", ("f",))


def verdict(sandbox: Sandbox, code: str, tests: str = "", **limits: float) -> Verdict:
    """`limits`: `cpu_seconds`, `wall_seconds`."""
    return run_task(task(code, tests), replace(sandbox, **limits))


PR_SET_CHILD_SUBREAPER = 36
# orphans of what is started here become children of this process, so that they can be told from those of other tests
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _parent(process: int) -> int:
    with open(f"/proc/{process}/stat", encoding="utf-8") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def strangers() -> set[str]:
    """Descendants of this process that live in another network namespace."""
    ours, found = os.readlink("/proc/self/ns/net"), set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            ancestor = int(process)
            while ancestor not in (0, os.getpid()):
                ancestor = _parent(ancestor)
            if ancestor and os.readlink(f"/proc/{process}/ns/net") != ours:
                found.add(process)
        except OSError:
            continue
    return found


def gone(before: set[str]) -> bool:
    """Whether nothing is left of what was started; a killed process needs a moment to be cleared away."""
    deadline = time.monotonic() + SPARE
    while strangers() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    return not strangers() - before


def probes(text: str) -> dict[str, str]:
    """Programs by the name in the comment that stands before each."""
    parts = re.split(r"^# (\w+)\n", text, flags=re.MULTILINE)[1:]
    return {name: code.replace("SECRET", SECRET) for name, code in zip(parts[::2], parts[1::2], strict=True)}
