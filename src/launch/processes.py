"""A stage as a process of its own: the GPUs it finds free, the signals it hears of, its end."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from src.utils.common import logger

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 90.0  # seconds a stage has to end by itself: it gives a server that it started twice 30
TICK = 0.2  # seconds between two looks at a stage
BUSY = 0.1  # of a GPU's memory: a desktop or a driver holds less
PATIENCE = 60.0  # seconds in which a driver has taken back the memory of a process that ended


@contextlib.contextmanager
def _caught(numbers: Sequence[int]) -> Iterator[list[int]]:
    """The signals that arrive until the block ends, in a list instead of at this process."""
    arrived: list[int] = []
    # what is ignored stays so, here and in what is started: nohup makes SIGHUP so, that a lost terminal ends nothing
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in heard}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_family(pid: int) -> None:
    """Kill a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        # children are asked for before their parent dies, or they would be nobody's
        process = psutil.Process(pid)
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def run_to_end(argv: Sequence[str], environment: Mapping[str, str], folder: Path, grace: float = GRACE) -> int:
    """Run a command until it ends; its exit code, as a shell counts: 128 + the signal that ended it.

    SIGINT, SIGTERM or SIGHUP at this process is passed on to the command, which then has `grace` seconds to end in its
    own way. After that, or at a second signal, it is killed with all that it started.

    Args:
        environment: all of it.
        folder: the command's working folder.
    """
    with _caught(PASSED_ON) as arrived:
        # a group of its own, so that a terminal's Ctrl-C comes to it from here alone, and once; nothing to read, for
        # who reads a terminal from another group is stopped
        process = subprocess.Popen(list(argv), env=dict(environment), cwd=folder, stdin=subprocess.DEVNULL,
                                   process_group=0)  # fmt: skip
        told = None  # when the signal was passed on
        while True:
            try:
                # not for ever: between two looks a signal that arrived is passed on
                code = process.wait(TICK)
                break
            except subprocess.TimeoutExpired:
                pass
            if arrived and told is None:
                # to the stage alone: it ends its server and its runs in its own way
                process.send_signal(arrived[0])
                told = time.monotonic()
            elif told is not None and (len(arrived) > 1 or time.monotonic() - told > grace):
                _kill_family(process.pid)
    if arrived:
        return 128 + arrived[0]  # whatever the stage made of it
    return code if code >= 0 else 128 - code  # Popen's -9 is a shell's 137


@dataclass(frozen=True)
class Held:
    """What is held of a GPU's memory, in MiB."""

    gpu: str
    used: float
    total: float


def _nvidia_smi(gpus: Sequence[str], *query: str) -> list[list[str]]:
    """The rows of an answer of nvidia-smi about some GPUs (numbers or UUIDs); none where there is no nvidia-smi."""
    command = ["nvidia-smi", "-i", ",".join(gpus), *query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    # "0, 1024, 81559" -> ["0", "1024", "81559"]
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _busy(gpus: Sequence[str]) -> list[Held]:
    busy = []
    for gpu, used, total in _nvidia_smi(gpus, "--query-gpu=index,memory.used,memory.total"):
        if used.isdecimal() and total.isdecimal() and int(used) > BUSY * int(total):  # some drivers say [N/A]
            busy.append(Held(gpu, int(used), int(total)))
    return busy


def wait_until_free(gpus: Sequence[str], patience: float = PATIENCE) -> bool:
    """Wait until the memory of these GPUs is free; one line names who holds it after `patience` seconds.

    Returns:
        Whether it is free, or nothing can be said: there is no nvidia-smi.
    """
    deadline = time.monotonic() + patience
    while gpus and (busy := _busy(gpus)):
        if time.monotonic() >= deadline:
            holders = [f"{name} (process {pid})" for pid, name in _nvidia_smi(gpus, "--query-compute-apps=pid,name")]
            held = ", ".join(f"GPU {one.gpu}: {one.used / 1024:.1f} of {one.total / 1024:.1f} GiB" for one in busy)
            who = ", ".join(holders) or "another process"
            logger.warning("%s are held by %s; end it if this stage runs out of memory", held, who)
            return False
        time.sleep(min(1.0, patience))
    return True
