"""What the benchmarks share: the peers' environment, a fresh process for every contender, time, memory, the record.

A script calls `main`, which plays two parts. As the parent it runs each contender in turn, `repeats` times over, each
time in a new process, and keeps the best time. As that process (`--worker NAME --job FILE`) it runs one contender once.
"""

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from src.utils.common import ROOT, UserError, provenance, run_cli, write_json

RIVALS = ROOT / ".venv-rivals"
# Without their dependencies: torch, transformers, peft and the rest come from the environment that runs the benchmark,
# so that everybody measures on the same versions. Neither triton nor torchao is needed for what is used of them here.
RIVAL_PACKAGES = ("trl==1.16.0", "liger-kernel==0.8.5", "torchtune==0.6.1")
NOISE = 0.05  # share of the machine in others' hands above which a measurement is called not quiet
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")

Result = dict[str, Any]


def rivals_python() -> str:
    """The interpreter of the peers' environment, which is made once and sees this one's packages beneath its own."""
    python = RIVALS / "bin" / "python"
    # what the environment was made of
    stamp = RIVALS / "installed.txt"
    # not the checkout, nor the standard library, which the other interpreter has of its own
    packages = [path for path in sys.path if path.endswith("site-packages")]
    wanted = "\n".join((*RIVAL_PACKAGES, *packages))
    # other peers are wanted, or it stands on another environment: made anew
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        print(f"making {RIVALS.name} with {', '.join(RIVAL_PACKAGES)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", RIVALS], check=True)
        own = next((RIVALS / "lib").glob("python*/site-packages"))
        # lines of a .pth file go behind the folder that it lies in, so that the peers' own packages are found first
        (own / "running.pth").write_text("\n".join(packages), encoding="utf-8")
        # one by one: what cannot be had is reported as absent by its contenders
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps"]
        missing = [package for package in RIVAL_PACKAGES if subprocess.run([*install, package], check=False).returncode]
        # an environment that was not finished, or lacks a peer, has no stamp: it may have been the network
        if missing:
            print(f"{RIVALS.name} lacks {', '.join(missing)}; the next run makes it anew", file=sys.stderr)
        else:
            stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def device() -> str:
    """What is measured: `cuda` where there is a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def resident_mb() -> float:
    """Memory in use now, MiB: the GPU's allocations, or what is resident after giving free blocks back."""
    if device() == "cuda":
        import torch

        return torch.cuda.memory_allocated() / 2**20
    # glibc: freed blocks that the process still holds would count as in use
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(field: str) -> float:
    # "VmRSS:   123456 kB" -> 120.6 MiB
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{field}:")) / 1024


def forget_peak() -> None:
    """Start the peak of memory again from what is in use now (Linux)."""
    if device() == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    # 5: VmHWM, the peak of resident memory, begins again (man 5 proc, clear_refs)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_mb() -> float:
    """The peak of memory since `forget_peak`, MiB, as the allocator or the kernel has kept it."""
    if device() == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM")


def now() -> float:
    """A clock, in seconds; on a GPU what is queued comes to its end first, for it belongs to what went before."""
    if device() == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def best_seconds(call: Callable[[], Any], runs: int = 2) -> float:
    """The best of some runs; on a GPU between two events, so that its queue is what is timed."""
    return min(_seconds_on_gpu(call) if device() == "cuda" else _seconds(call) for _ in range(runs))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_on_gpu(call: Callable[[], Any]) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    # milliseconds -> seconds
    return start.elapsed_time(end) / 1000


def _processor_seconds() -> tuple[float, float, float]:
    """All there were, those in use by anybody, and those of this process and its children, since they began."""
    # the first line, ticks of all processors together: cpu user nice system idle iowait irq softirq steal ...
    # what follows steal, a guest's, is in user and nice already
    numbers = [int(word) for word in Path("/proc/stat").read_text(encoding="utf-8").split("\n")[0].split()[1:9]]
    tick = os.sysconf("SC_CLK_TCK")
    # waiting for a disk leaves the processor free
    idle = numbers[3] + numbers[4]
    # os.times: user and system, of this process and of its ended children; the fifth is a clock
    return sum(numbers) / tick, (sum(numbers) - idle) / tick, sum(os.times()[:4])


@contextlib.contextmanager
def busy_elsewhere(found: dict[str, float]) -> Iterator[None]:
    """Put into `found` the share of the machine that others used meanwhile; a measurement wants it near 0."""
    # [there were, anybody used, own] before and after
    before = _processor_seconds()
    yield
    there, used, own = (b - a for a, b in zip(before, _processor_seconds(), strict=True))
    found["busy_elsewhere"] = max(0.0, (used - own) / max(there, 1e-9))


def relative_error(found: Any, wanted: Any) -> float:
    """|found - wanted| / |wanted| over whole tensors, in fp64."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def run_worker(python: str, name: str, job: dict[str, Any], minutes: float = 15) -> Result:
    """One contender once; what it could not do is its result: `{"name": ..., "absent": reason}`.

    Here and for every worker the console is told where the machine was not quiet.
    """
    result = _ask_worker(python, name, job, minutes)
    if result.get("busy_elsewhere", 0) > NOISE:
        share = f"others used {result['busy_elsewhere']:.0%} of the machine"
        print(f"{name}: NOT QUIET: {share}", file=sys.stderr, flush=True)
    return result


def _ask_worker(python: str, name: str, job: dict[str, Any], minutes: float) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        # 1. what the contender is told, as a file
        task = Path(folder) / "job.json"
        write_json(task, job)
        # allocator settings and thread counts are left as they are found; the caches of a compiler are kept
        # 2. the script that was started is its own worker
        command = [python, str(Path(sys.argv[0]).resolve()), "--worker", name, "--job", str(task)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            return {"name": name, "absent": f"took more than {minutes:g} minutes"}
        # 3. job.json -> job.result, which the worker has written
        answer = task.with_suffix(".result")
        if done.returncode == 0:
            return {"name": name, **json.loads(answer.read_text(encoding="utf-8"))}
    # 4. of a traceback the last line is the error
    reason = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
    return {"name": name, "absent": reason[:300]}


def best_of(results: Sequence[Result]) -> Result:
    """Several runs of one contender as one: the fastest run's numbers, the largest peak, and why a round failed."""
    present = [result for result in results if "absent" not in result]
    if not present:
        return results[0]
    best = dict(min(present, key=lambda result: result["seconds"]))
    best["seconds_of_runs"] = [result["seconds"] for result in present]
    if best.get("peak_mb") is not None:
        best["peak_mb"] = max(result["peak_mb"] for result in present)
    failed = [result["absent"] for result in results if "absent" in result]
    return best | ({"failed_rounds": failed} if failed else {})


def round_robin(contenders: dict[str, str], jobs: Callable[[str], dict[str, Any]], repeats: int) -> list[Result]:
    """Run contenders (name -> interpreter) in turn, `repeats` rounds; best of each."""
    found: dict[str, list[Result]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, python in contenders.items():
            # what could not be done once is not tried again: it may have taken all its minutes
            if found[name] and "absent" in found[name][-1]:
                continue
            found[name].append(run_worker(python, name, jobs(name)))
            last = found[name][-1]
            said = f"absent: {last['absent']}" if "absent" in last else f"{last['seconds']:.3f} s"
            print(f"round {turn + 1} of {repeats}: {name}: {said}", file=sys.stderr, flush=True)
    return [best_of(results) for results in found.values()]


def ratios(results: Sequence[Result], ours: Sequence[str], floors: dict[str, float]) -> dict[str, dict[str, float]]:
    """For each of ours: `seconds` of another divided by ours, `memory` likewise, and our own time over its own floor.

    Args:
        floors: seconds by name; where a floor could not be measured it is missing here too.
    """
    present = {result["name"]: result for result in results if "absent" not in result}
    found = {}
    for name in ours:
        if name in present:
            own = present[name]
            # not ours against ours
            others = {other: result for other, result in present.items() if other not in ours}
            over_floor = {"over_floor": own["seconds"] / floors[name]} if name in floors else {}
            found[name] = over_floor | {
                # 1e-9: a peak above what was there may be 0
                f"{what}_of_{other}": result[key] / max(own[key], 1e-9)
                for other, result in others.items()
                for what, key in (("seconds", "seconds"), ("memory", "peak_mb"))
            }
    return found


def machine() -> dict[str, Any]:
    import torch

    # a block of "key : value" for every processor, which are alike: the last one's is kept
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in lines.items()}
    flags = info.get("flags", "").split()
    return {
        "cpu": info.get("model name"),
        "flags": [flag for flag in FLAGS if flag in flags],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average_before": os.getloadavg()[0],
    }


def write_report(path: Path, report: dict[str, Any], before: dict[str, Any]) -> None:
    """Write the record with the machine and the versions: ours, and the peers' own."""
    facts = provenance()
    # what the peers' environment has of its own; other packages are ours, and in `facts`
    own = next((RIVALS / "lib").glob("python*/site-packages"), None)
    peers = {d.metadata["Name"]: d.version for d in metadata.distributions(path=[str(own)])} if own else {}
    peers = {name: version for name, version in peers.items() if name not in ("pip", "setuptools")}
    write_json(
        path,
        report
        | {"versions": facts["versions"] | peers, "machine": before}
        | {key: facts[key] for key in ("command", "git_commit", "git_dirty", "time")},
    )


def print_table(results: Sequence[Result], columns: dict[str, str]) -> None:
    """Print results as a table: `columns` maps a key to the format of its values."""
    from rich.console import Console
    from rich.table import Table

    table = Table("name", *columns)
    for result in results:
        # what a contender does not have is a dash
        cells = [
            "-" if result.get(key) is None else format(result[key], style) for key, style in columns.items()
        ]  # fmt: skip
        name = result["name"]
        if "failed_rounds" in result:
            name += f" ({len(result['failed_rounds'])} of its rounds failed)"
        # why it is absent stands in the first cell, the others stay empty
        table.add_row(name, *([f"absent: {result['absent']}", *cells[1:]] if "absent" in result else cells))
    Console(width=160).print(table)


def _rounds(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"at least one round is needed, got {number}")
    return number


def main(
    parser: argparse.ArgumentParser,
    parent: Callable[..., None],
    worker: Callable[[str, dict], Result],
    in_rounds: bool = True,
) -> None:
    """Play the parent or the worker, whichever the command line asks for.

    Args:
        in_rounds: the parent measures `--repeats` times; without it the flag is unknown.
    """
    parser.add_argument("--output", type=Path, help="the JSON record to write")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, which measure nothing: is it all in order?")
    if in_rounds:
        parser.add_argument("--repeats", type=_rounds, default=2, metavar="K", help="rounds; the best counts (2)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # as a worker: the work, and how quiet the machine was from its beginning to its end
    if arguments.worker:
        job = json.loads(arguments.job.read_text(encoding="utf-8"))
        quiet: dict[str, float] = {}
        with busy_elsewhere(quiet):
            result = worker(arguments.worker, job)
        write_json(arguments.job.with_suffix(".result"), result | quiet)
        return

    # as the parent; `run_cli` says a UserError without its traceback
    def checked() -> None:
        if arguments.output is None:
            raise UserError("--output FILE.json is needed: the record of the run")
        parent(arguments)

    run_cli(checked)
