"""One task in the sandbox, and what it may leave behind."""

import os
import random
import re
import time
from dataclasses import replace

from src.grading.sandbox import Sandbox, Task, Verdict, run_task

SECRET = str(random.Random().randrange(10**8, 10**9))  # what the tests expect; no candidate can know it
SPARE = 3.0  # seconds that starting and clearing away may take on a busy machine


def task(code: str, tests: str = "", **changes) -> Task:
    return replace(Task((code,), "", tests or f"assert f(1) == {SECRET}", ("f",)), **changes)


def verdict(sandbox: Sandbox, code: str, tests: str = "", seconds: int = 10, **changes) -> Verdict:
    return run_task(task(code, tests, **changes), sandbox.level, sandbox.python, seconds)


def strangers() -> set[str]:
    """Processes that live in another network namespace than this one."""
    ours, found = os.readlink("/proc/self/ns/net"), set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{process}/ns/net") != ours:
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
