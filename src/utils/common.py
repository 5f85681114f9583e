"""What every stage shares: clear errors, JSONL files, atomic writes, fingerprints, progress, provenance."""

import codecs
import contextlib
import errno
import gzip
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger("kd")

ROOT = Path(__file__).resolve().parents[2]


class UserError(Exception):
    """Something only the user can put right. The text is one line: what is wrong, where, and the way out."""


# How a file begins that is not UTF-8 text, and the way out. UTF-32's mark begins with UTF-16's, so it stands first.
AS_UTF_8 = "save the file as UTF-8"
BEGINNINGS = (
    (codecs.BOM_UTF32_LE, f"UTF-32 text; {AS_UTF_8}"),
    (codecs.BOM_UTF32_BE, f"UTF-32 text; {AS_UTF_8}"),
    (codecs.BOM_UTF16_LE, f"UTF-16 text; {AS_UTF_8}"),
    (codecs.BOM_UTF16_BE, f"UTF-16 text; {AS_UTF_8}"),
    (b"\x1f\x8b", "packed with gzip; unpack it (prompts are also read packed, if the name ends in .gz)"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd; unpack it"),
    (b"\xfd7zXZ\x00", "packed with xz; unpack it"),
    (b"BZh91AY&SY", "packed with bzip2; unpack it"),
    (b"PK\x03\x04", "a zip archive or a workbook; unpack it, or save it as CSV"),
    (b"PAR1\x15", "a Parquet file; let its name end in .parquet"),
)


def _refuse_other_encodings(path: Path, start: bytes) -> None:
    """Raise a UserError that says what a file is, unless it can be UTF-8 text by its first bytes."""
    for beginning, what in BEGINNINGS:
        if start.startswith(beginning):
            raise UserError(f"{path}: {what}")
    if len(start) > 1 and (start[0] == 0) != (start[1] == 0):  # "{" is 7b 00 in UTF-16, without a mark before it
        raise UserError(f"{path}: UTF-16 text; {AS_UTF_8}")
    if start.startswith(b"\0"):
        raise UserError(
            f"{path}: zero bytes where text should be, it was not written to its end; make or bring it again"
        )


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """A file of UTF-8 text, opened for reading its bytes; one whose name ends in .gz is unpacked.

    Raises:
        UserError: by its beginning the file is something else, or its gzip is broken.
    """
    try:
        # by its name alone: gzip under another name is refused with a word (`BEGINNINGS`)
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            # peek: what is looked at is read again by whoever reads the file
            _refuse_other_encodings(path, file.peek(16)[:16])
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); fetch or pack it again, or mend its name") from None


def _decode(data: bytes, where: str | Path) -> str:
    """UTF-8 text, without the byte order mark before it (or several: files get joined)."""
    # ef bb bf
    while data.startswith(codecs.BOM_UTF8):
        data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text; {AS_UTF_8}") from None


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; one whose name ends in .gz is unpacked.

    Raises:
        UserError: it is not UTF-8 text (names what it is), or its gzip is broken.
    """
    with open_text(Path(path)) as file:
        data = file.read()
    return _decode(data, path)


class UnwritableJSON(json.JSONDecodeError):
    """JSON text that Python reads, but that could not be written again as JSON in UTF-8."""


# a text, NaN or a number: "so \"quoted\"", -Infinity, 1e999
JSON_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity|-?[0-9][0-9.eE+-]*')


def _finite(word: str) -> float:
    """The number that a word of JSON says. Raises ValueError for NaN, Infinity and what becomes one (1e999)."""
    number = float(word)  # "1e999" -> inf
    if not math.isfinite(number):
        raise ValueError(word)
    return number


def _refuse_halves(value: Any) -> None:
    """Raise UnicodeEncodeError for a text with half a character: "\\ud83d" without the other half after it."""
    # json reads "\ud83d" without its other half; UTF-8 has no bytes for it
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def _unwritable(text: str) -> UnwritableJSON:
    """The error that names the first word of JSON text that could not be written again."""
    # word by word, with the same reading as the whole: the first that fails is the one to name
    for word in JSON_WORD.finditer(text):
        shown = f"{word[0][:40]} ..." if len(word[0]) > 40 else word[0]
        try:
            _refuse_halves(json.loads(word[0], parse_float=_finite, parse_constant=_finite))
        except UnicodeEncodeError:
            return UnwritableJSON(f"half a character (lone surrogate) in {shown}; mend that text", text, word.start())
        except ValueError:
            return UnwritableJSON(
                f"{shown} is not a number that can be kept; put a finite one or null", text, word.start()
            )
    # every word by itself is fine, so it was a RecursionError
    return UnwritableJSON("nested too deeply; make it flatter", text, 0)


def parse_json(text: str) -> Any:
    """What JSON text says; nothing that could not be written again: no NaN, no Infinity, no half a character.

    Raises:
        UnwritableJSON: it says such a thing, or is nested too deeply; `msg` says it with the way out, `lineno` where.
        json.JSONDecodeError: it is not JSON.
    """
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        # halves begin with \ud8 to \udf; without one the text need not be gone through again
        if "\\ud" in text or "\\uD" in text:
            _refuse_halves(value)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError):
        raise _unwritable(text) from None
    return value


def _refuse_other_layouts(path: Path) -> None:
    """Raise a UserError if the file is JSON, though not an object a line; its first line is known not to be one."""
    whole = read_text(path)
    # 1. the first JSON value in it, and where that ends
    text = whole.lstrip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        if text.startswith("["):
            # counted from the beginning of the file, blank lines before the list too
            line = error.lineno + whole[: len(whole) - len(text)].count("\n")
            raise UserError(f"{path}:{line}: a JSON list that is not valid here ({error.msg}); mend it") from None
        return
    except (ValueError, RecursionError):
        return
    # 2. a list that is the whole file, or an object that does not end in its first line
    if isinstance(value, list) and not text[end:].strip():
        raise UserError(f"{path}: is a JSON list; write each of its objects on a line of its own (jq -c '.[]')")
    if isinstance(value, dict) and "\n" in text[:end]:
        raise UserError(f"{path}: its JSON objects go over several lines; write each on one line (jq -c .)")


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not blank.

    Raises:
        UserError: a line is not a JSON object, or could not be written again; names file and line.
    """
    # only the first line is worth a look at the whole file: where it is good, the layout is
    is_first = True
    with open_text(path) as file:
        for number, data in enumerate(file, start=1):
            where = f"{path}:{number}"
            line = _decode(data, where)  # a mark may begin any line: files get joined
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except UnwritableJSON as error:
                raise UserError(f"{where}: {error.msg}") from None
            except json.JSONDecodeError as error:
                if is_first:
                    _refuse_other_layouts(path)
                raise UserError(f"{where}: not valid JSON ({error.msg}); mend or delete this line") from None
            if not isinstance(row, dict):
                if is_first:
                    _refuse_other_layouts(path)
                raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
            is_first = False
            yield number, row


def read_jsonl(
    path: str | Path,
    required: Iterable[str] = (),
    hint: str = "",
    check: Callable[[dict[str, Any]], str | None] | None = None,
    unique: Sequence[str] = (),
    twice: str = "give each row its own, or delete one",
) -> list[dict[str, Any]]:
    """Read one JSON object a line.

    Args:
        path: the file.
        required: keys that every row must hold.
        hint: what to do when the file is missing (for example the command that makes it).
        check: says what is wrong with a row, or None.
        unique: keys whose values together stand in one row only; one that a row lacks counts as 0.
        twice: what to do about two rows that share them.

    Raises:
        UserError: the file is missing or empty, or a line is not a JSON object, lacks a key or has another line's;
            names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file" + (f"; {hint}" if hint else ""))
    rows = []
    line_of: dict[str, int] = {}
    for number, row in json_lines(path):
        where = f"{path}:{number}"
        missing = [key for key in required if key not in row]
        if missing:
            raise UserError(f"{where}: missing {', '.join(missing)}; found {', '.join(row) or 'no keys'}")
        if check is not None and (complaint := check(row)):
            raise UserError(f"{where}: {complaint}")
        if unique:
            named = ", ".join(f"{key} {row.get(key, 0)}" for key in unique)
            # as JSON: tells "1" from 1, and may be a dict's key
            values = json.dumps([row.get(key, 0) for key in unique])
            if values in line_of:
                raise UserError(f"{where}: {named} stands in line {line_of[values]} too; {twice}")
            line_of[values] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: the file holds no rows" + (f"; {hint}" if hint else ""))
    return rows


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a broken one is a UserError that names it."""
    text = read_text(path)
    try:
        return parse_json(text)
    except UnwritableJSON as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run the stage again") from None


# what `atomic_path` may leave behind: .data.jsonl.4711.tmp of data.jsonl, .student.4711.old.tmp of a replaced student
TEMPORARY = re.compile(r"\.(?P<name>.+)\.\d+(?P<old>\.old)?\.tmp")


def delete(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` (file or folder) and rename it to `path` once the block has succeeded.

    A folder that is replaced is all there, under its own name or set aside, until the new one has the name. `hold` puts
    back what a kill between the two renames leaves set aside.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # hidden, on the same file system, and known to `stages.hold` by `TEMPORARY` if they are left behind
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    try:
        yield temporary
        # on the disk before it has its name: else a machine that goes down may leave the name with nothing behind it
        for written in [temporary, *temporary.rglob("*")]:
            if written.is_file():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
        # a folder cannot be renamed over one that holds something
        if temporary.is_dir() and path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
    finally:
        if aside.exists():
            # replaced, it goes under the temporary name: what is set aside is whole, for it may be put back, as here
            os.replace(aside, temporary if path.exists() else path)
        delete(temporary)


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def to_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(to_line(row) for row in rows)


def append_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows and wait until they are on the disk, so that a kill can tear the last line at most."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        # one write, so that rows of a batch come together
        file.write("".join(to_line(row) for row in rows))
        file.flush()
        os.fsync(file.fileno())


def repair_jsonl_tail(path: str | Path) -> int:
    """Cut a torn last line (no newline at its end) off an append-only file. Returns the number of bytes cut."""
    path = Path(path)
    if not path.is_file():
        return 0
    data = path.read_bytes()
    keep = data.rfind(b"\n") + 1  # up to and with the last line end; 0 where there is none
    if keep < len(data):
        logger.warning("%s: cut a torn last line of %d bytes", path, len(data) - keep)
        os.truncate(path, keep)
    return len(data) - keep


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


OVERWRITE = "pass --overwrite to replace it, or name another folder"


def refuse_mismatch(
    where: str | Path, stored: dict[str, Any], wanted: dict[str, Any], way_out: str = OVERWRITE
) -> None:
    """Raise a UserError that names the first field in which two fingerprints differ."""
    # keys of either: one that is missing counts as null
    for key in sorted(stored.keys() | wanted.keys()):
        if stored.get(key) != wanted.get(key):
            raise UserError(
                f"{where} was made with {key} = {stored.get(key)!r}, this run has {wanted.get(key)!r}; {way_out}"
            )


def stage_state(
    marker: str | Path,
    fingerprint: dict[str, Any],
    overwrite: bool,
    outputs: Iterable[Path] = (),
    way_out: str = OVERWRITE,
) -> str:
    """Decide what a stage has to do, from the fingerprint an earlier run left in `marker`.

    Returns:
        "done" if that run finished with the same fingerprint and its `outputs`, all files, are there; "resume" if it
        started with the same one but did not finish; "fresh" if there is nothing, or `overwrite` is set: marker and
        outputs are then deleted, so ask with it once nothing is left to refuse. The caller writes the marker with
        `start_stage` and `finish_stage`.

    Raises:
        UserError: the fingerprint differs in a field (the text names it), or an output is there that no run has marked.
    """
    marker = Path(marker)
    outputs = list(outputs)
    # as it will be read back: a tuple becomes a list
    fingerprint = json.loads(json.dumps(fingerprint))
    # 1. nothing to go on with
    if overwrite or not marker.is_file():
        # outputs that no marker speaks of: somebody else's
        for output in () if overwrite else outputs:
            if output.exists():
                raise UserError(f"{output} is there but was not made by this stage; move it away or pass --overwrite")
        if overwrite:
            # the marker last: outputs without one would pass for somebody else's, a marker without them is not "done"
            for path in (*outputs, marker):
                path.unlink(missing_ok=True)
        return "fresh"
    # 2. something was made: is it the same?
    stored = read_json(marker)
    refuse_mismatch(marker.parent, stored.get("fingerprint", {}), fingerprint, way_out)
    return "done" if stored.get("finished") and all(output.exists() for output in outputs) else "resume"


def start_stage(marker: str | Path, fingerprint: dict[str, Any], **facts: Any) -> None:
    write_json(marker, {"finished": False, "fingerprint": fingerprint, **facts})


def finish_stage(marker: str | Path, fingerprint: dict[str, Any], **facts: Any) -> None:
    """Mark the stage finished; `facts` (seconds, versions, ...) are kept beside the fingerprint but not compared."""
    write_json(marker, {"finished": True, "fingerprint": fingerprint, **facts})


def require_disk(folder: str | Path, needed_bytes: float, what: str) -> None:
    """Raise a UserError unless the file system of `folder` has `needed_bytes` free."""
    folder = Path(folder).absolute()
    while not folder.exists():  # it may be made later; the disk is that of the nearest folder there is
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{folder}: {free / 1e9:.2f} GB free, {what} needs {needed_bytes / 1e9:.2f} GB; "
            "free some space or point the profile at another disk"
        )


def provenance() -> dict[str, Any]:
    """What one needs to run this again: command, commit (and whether files differ from it), versions, machine."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    packages = ("torch", "transformers", "tokenizers", "peft", "accelerate", "numpy")
    return {
        "command": shlex.join(sys.argv),
        "git_commit": git("rev-parse", "HEAD"),
        # None: no git here, or no repository
        "git_dirty": None if changed is None else bool(changed),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def speaks() -> bool:
    """Whether this process is the one that says what all processes of a training run do: the first one."""
    return os.environ.get("RANK", "0") == "0"  # torchrun and accelerate launch number them so


def setup_logging() -> None:
    """Plain `kd` log lines on standard error; the libraries keep to warnings, and off a terminal draw no bars."""
    # imported here: common itself loads neither torch nor transformers
    import transformers.utils.logging as library

    if not logger.handlers:  # called twice, every line would come twice
        handler = logging.StreamHandler()
        # "14:03:22 round 1: 80 answers in 41 s"
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if speaks() else logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the end of them is reported
    if not sys.stderr.isatty():
        library.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft's call


class Progress:
    """A live bar with rate and time left on a terminal; off one, a log line every `every` seconds at most.

    Args:
        total: units in all.
        description: what is being done.
        unit: the word for one unit.
        every: seconds between two lines when there is no terminal.
    """

    def __init__(self, total: int, description: str, unit: str = "row", every: float = 30.0) -> None:
        from tqdm import tqdm

        self.live = sys.stderr.isatty() and speaks()
        self.bar = tqdm(total=total, desc=description, unit=unit, disable=not self.live, dynamic_ncols=True)
        self.total, self.description, self.unit, self.every = total, description, unit, every
        self.count, self.first, self.note = 0, 0, ""
        self.started = self.spoken = time.monotonic()

    def say(self, **note: Any) -> None:
        """Show these values beside the bar from now on."""
        self.note = ", ".join(f"{key} {value}" for key, value in note.items())
        self.bar.set_postfix_str(self.note, refresh=False)

    def advance(self, count: int = 1, **note: Any) -> None:
        self.count += count
        if note:
            self.say(**note)
        self.bar.update(count)
        # the end is not announced
        if not self.live and time.monotonic() - self.spoken >= self.every and self.count < self.total:
            self.spoken = time.monotonic()
            new = self.count - self.first  # of this session
            # seconds a unit x units left
            left = (self.spoken - self.started) / max(new, 1) * (self.total - self.count)
            note_text = f" ({self.note})" if self.note else ""
            logger.info(f"{self.description}: {self.count} of {self.total}, {left:.0f} s left{note_text}")

    def skip(self, count: int) -> None:
        """Count units that an earlier run has done; they take no part in the rate."""
        self.count += count
        self.first += count
        # tqdm's rate is (n - initial) / seconds
        self.bar.initial = self.bar.n = self.count
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Terminated(SystemExit):
    """SIGTERM came. As a SystemExit it also leaves asyncio's loops, and no `except Exception` holds it up."""


@contextlib.contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated`, so that servers end, locks go and temporary files are removed.

    A second one kills at once, as it does a process that was forked off meanwhile.
    """
    owner = os.getpid()  # a process that is forked within the block inherits the handler

    def unwind(number: int, _: object) -> None:
        # from here on SIGTERM kills, for whoever sends a second one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != owner:
            os.kill(os.getpid(), signal.SIGTERM)
        raise Terminated(128 + number)  # what a shell says of a process that a signal ended

    previous = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's `main`: a user's mistake ends it with one clear line and exit code 2; `--debug` shows more.

    Ctrl-C ends it with exit code 130, SIGTERM with 143, both in good order.
    """
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")  # no script's parser knows it
    setup_logging()
    # with it, what is finished by then would be made once more
    again = "run the same command again" + (" without --overwrite" if "--overwrite" in sys.argv else "")
    try:
        with unwinding_on_sigterm():
            main()
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # a full disk, a quota, no right to write: the user's affair; any other is a defect and keeps its traceback
        if debug or error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        where = error.filename or "writing"
        print(f"error: {where}: {error.strerror}; mend it and run again, what was finished is kept", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":  # torch's; common does not load it
            raise
        first = str(error).splitlines()[0]
        print(f"error: {first}; lower the batch size, or name more devices, and run again, what was finished is kept",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"interrupted; {again} to continue", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT
    except Terminated as end:
        print(f"ended by SIGTERM; {again} to continue", file=sys.stderr)
        sys.exit(end.code)
