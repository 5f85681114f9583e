"""One process at a time on what a stage writes, and what every stage of an experiment must agree on."""

import contextlib
import datetime
import fnmatch
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from src.utils.common import TEMPORARY, UserError, delete, logger, read_json, write_json


@contextlib.contextmanager
def hold(folder: Path, stage: str, name: str = "stage", writes: str = "*") -> Iterator[None]:
    """Keep other processes off a folder until the block ends; it is made if need be.

    The lock is the kernel's (flock, by filelock): that of a process that died is free again.

    Args:
        stage: who holds it, for those who are refused.
        name: of the lock, where parts of a folder can be worked on side by side.
        writes: pattern of the names that are written in this part. What killed processes left of them half-written is
            removed, what they had set aside and not yet replaced is put back, see `atomic_path`.

    Raises:
        UserError: another process holds it; the text names its stage, number and host.
    """
    # innermost first: what is made here goes again if nothing comes of the stage
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / f".{name}.holder"  # who holds the lock: read only where somebody does
    with contextlib.ExitStack() as held:
        # callbacks run backwards: the holder's name goes, then the lock, then folders that stayed empty
        held.callback(_remove_empty, missing)
        try:
            held.enter_context(locked(folder / f".{name}.lock", timeout=0))
        except Timeout:
            raise UserError(
                f"{folder}: {_who_holds(holder)} is working on it; run this again when that has ended, or end it first"
            ) from None
        held.callback(holder.unlink, missing_ok=True)
        holder.write_text(json.dumps({"stage": stage, "pid": os.getpid(), "host": socket.gethostname()}))
        _tidy(folder, writes)  # nobody writes here while the lock is held, so what is left over is of the dead
        yield


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for a stage, the innermost first, where nothing came of it."""
    for folder in folders:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


@contextlib.contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock file, which is there only meanwhile. filelock raises Timeout after `timeout` seconds; -1: never."""
    lock = FileLock(path)
    lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: filelock does not take a file that is gone for the lock
        lock.release()


def _who_holds(holder: Path) -> str:
    try:
        # not by `read_json`: it may be half-written, or gone by now, and that is no mistake of the user's
        facts = json.loads(holder.read_text(encoding="utf-8"))
        return f"{facts['stage']} (process {facts['pid']} on {facts['host']})"
    except (OSError, ValueError, KeyError):  # it has the lock, but has not said yet who it is
        return "another process"


def _tidy(folder: Path, writes: str) -> None:
    """Clear away what writers that were killed left of these names, and put back what has nothing in its place."""
    for path in list(folder.iterdir()):
        found = TEMPORARY.fullmatch(path.name)
        if found is None or not fnmatch.fnmatchcase(found["name"], writes):
            continue
        if found["old"] and not (place := folder / found["name"]).exists():
            logger.info("%s: set aside by a process that was killed before it had replaced it; put back", place)
            path.rename(place)
        else:
            logger.info("%s: left half-written by a process that was killed; removed", path)
            delete(path)


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, the files of its lock aside."""
    return all(path.suffix in (".lock", ".holder") for path in folder.iterdir())


def clear(folder: Path, last: str) -> None:
    """Delete what a folder holds, the files of its lock aside; the file that says what it is goes last."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix not in (".lock", ".holder") and path.name != last:
            path.unlink()
    (folder / last).unlink(missing_ok=True)


def experiment_date(experiment_dir: str | Path) -> datetime.date:
    """The day that chat templates of this experiment read, if they ask for one: that of the first stage that asked.

    It is kept in `experiment_dir`/prompt_date.json, so that prompts do not change from one day to the next.
    """
    path = Path(experiment_dir) / "prompt_date.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(".prompt_date.json.lock")):  # several ranks may be the first
            # asked again: another may have written it while this one waited for the lock
            if not path.is_file():
                write_json(path, {"date": datetime.date.today().isoformat()})
    try:
        return datetime.date.fromisoformat(read_json(path)["date"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f'{path}: expected {{"date": "YYYY-MM-DD"}}; mend it, or delete it to take today') from None


def graders_sha256() -> str:
    """A hash of the code that judges an answer."""
    digest = hashlib.sha256()
    source = Path(__file__).resolve().parents[1]
    # sources as text: a changed comment counts as a change, which costs no more than grading again
    for path in [*sorted((source / "grading").glob("*.py")), source / "utils" / "answers.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
