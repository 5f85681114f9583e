"""Files survive a crash, errors are one clear line, progress is quiet off a terminal."""

import codecs
import errno
import gzip
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.utils import common
from src.utils.common import (
    ROOT,
    Progress,
    UserError,
    append_jsonl,
    atomic_path,
    finish_stage,
    parse_json,
    provenance,
    read_json,
    read_jsonl,
    refuse_mismatch,
    repair_jsonl_tail,
    require_disk,
    run_cli,
    sha256_file,
    sha256_text,
    stage_state,
    start_stage,
    write_json,
    write_jsonl,
    write_text,
)
from src.utils.stages import hold


@pytest.fixture(autouse=True)
def fresh_logging(monkeypatch):
    """run_cli sets up the logger for good; here each test gets one as it is in a new process."""
    monkeypatch.setattr(common.logger, "handlers", [])
    monkeypatch.setattr(common.logger, "level", logging.INFO)


def test_rows_are_read_in_order_and_blank_lines_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": "\u00e4"}\n   \n', encoding="utf-8")
    assert read_jsonl(path, ["a"]) == [{"a": 1}, {"a": "ä"}]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": 1}\n{"a": \n', ":2: not valid JSON"),
        ('{"a": 1}\n\n\nnonsense\n', ":4: not valid JSON"),
        ('{"a": 1}\n[1, 2]\n', ":2: expected a JSON object, found list"),
        ('{"a": 1}\n{"b": 2, "c": 3}\n', ":2: missing a; found b, c"),
        ("{}\n", ":1: missing a; found no keys"),
        ('{"a": 1}\n{"a": -1}\n', ":2: a is negative"),
        ("", ": the file holds no rows; make it"),
        ("\n \n", ": the file holds no rows; make it"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path, text, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_jsonl(path, ["a"], hint="make it", check=lambda row: "a is negative" if row["a"] < 0 else None)
    assert str(caught.value).startswith(f"{path}{complaint}")
    assert "\n" not in str(caught.value)


MARK = codecs.BOM_UTF8


@pytest.mark.parametrize("data", [MARK + b'{"a": 1}\n{"a": 2}\n', b'{"a": 1}\n' + MARK + b'{"a": 2}\n',
                                  MARK + b'\r\n{"a": 1}\r\n\r\n{"a": 2}'])  # fmt: skip
def test_a_byte_order_mark_is_read_over(tmp_path, data):
    """At the start, as Windows writes it, and where two such files were joined."""
    (tmp_path / "rows.jsonl").write_bytes(data)
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}]
    (tmp_path / "x.json").write_bytes(MARK + b'{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


TEXT = '{"a": 1}\n'


@pytest.mark.parametrize("read", [read_jsonl, read_json])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TEXT.encode("utf-16"), "UTF-16 text; save the file as UTF-8"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "UTF-16 text; save the file as UTF-8"),
        (TEXT.encode("utf-16-le"), "UTF-16 text; save the file as UTF-8"),
        (TEXT.encode("utf-16-be"), "UTF-16 text; save the file as UTF-8"),
        (TEXT.encode("utf-32"), "UTF-32 text; save the file as UTF-8"),
        (gzip.compress(TEXT.encode(), mtime=0), "packed with gzip; unpack it"),
        (b"PK\x03\x04" + bytes(20), "a zip archive or a workbook"),
        (b"PAR1\x15\x04", "a Parquet file; let its name end in .parquet"),
        (bytes(4096), "zero bytes where text should be"),
    ],
)
def test_a_file_that_is_no_utf_8_text_is_called_what_it_is(tmp_path, read, data, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: {words}")
    assert "\n" not in str(caught.value)


def test_gzip_is_read_under_its_own_name(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress(MARK + b'{"a": 1}\n{"a": \n', mtime=0)
    path.write_bytes(packed)
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz:2: not valid JSON"):
        read_jsonl(path)
    whole = gzip.compress(b"".join(b'{"a": %d}\n' % number for number in range(1000)))
    path.write_bytes(whole)
    assert [row["a"] for row in read_jsonl(path)] == list(range(1000))
    flipped = bytearray(whole)
    flipped[-6] ^= 1
    for broken in (whole[:-9], whole[: len(whole) // 2], bytes(flipped), b'{"a": 1}\n'):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"rows\.jsonl\.gz: cannot be unpacked \(") as caught:
            read_jsonl(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[{"a": 1}, {"a": 2}]\n', ": is a JSON list; write each of its objects on a line of its own"),
        ('\n[\n  {"a": 1},\n  {"a": 2}\n]\n', ": is a JSON list; write each"),
        ("[]", ": is a JSON list; write each"),
        ('\n[\n  {"a": 1},\n  {"a" 2}\n]\n', ":4: a JSON list that is not valid here"),
        ('{\n  "a": 1\n}\n', ": its JSON objects go over several lines; write each on one line"),
        ('{\n  "a": 1\n}\n{\n  "a": 2\n}\n', ": its JSON objects go over several lines; write each on one line"),
        ('{"a": 1},\n{"a": 2}\n', ":1: not valid JSON (Extra data); mend or delete this line"),
        ("[1]\n[2]\n", ":1: expected a JSON object, found list"),
        ('{\n{"a": 2}\n', ":1: not valid JSON"),
    ],
)
def test_json_that_is_not_one_object_a_line_is_called_what_it_is(tmp_path, text, complaint):
    """Who deletes line 1 of a JSON list has no JSON list any more."""
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}{complaint}")


HALF = "half a character (lone surrogate) in "


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("NaN", "NaN is not a number that can be kept"),
        ('{"b": [1, -Infinity]}', "-Infinity is not a number that can be kept"),
        ("1e999", "1e999 is not a number that can be kept"),
        ("-1E+400", "-1E+400 is not a number that can be kept"),
        ("1" * 5000, f"{'1' * 40} ... is not a number that can be kept"),
        (r'"so \ud83d it is"', HALF + r'"so \ud83d it is"'),
        (r'{"\uDE00": 1}', HALF + r'"\uDE00"'),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: value[:20],
)
def test_what_could_not_be_written_again_is_refused_where_it_stands(tmp_path, value, complaint):
    """The first line holds the same in a text, which is a text."""
    fine = json.dumps({"a": 'NaN, 1e999, "Infinity" and \U0001f600'})
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{fine}\n\n{{"a": {value}}}\n')
    with pytest.raises(UserError) as caught:
        read_jsonl(path)
    assert str(caught.value).startswith(f"{path}:3: {complaint}")
    path.write_text(f'{{\n"fine": {fine},\n"a": {value}\n}}')
    with pytest.raises(UserError) as caught:
        read_json(path)
    line = 1 if value.startswith("[") else 3  # a depth is nowhere
    assert str(caught.value).startswith(f"{path}:{line}: {complaint}")
    assert "\n" not in str(caught.value)


def test_what_is_read_can_be_written(tmp_path):
    text = r'{"a": [0.1, -2e-300, 12345678901234567890, null, true], "b": "\ud83d\ude00 \\ud83d \u0000"}'
    value = parse_json(text)
    assert value == json.loads(text)
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


def test_a_key_that_stands_twice_is_named_with_both_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "x"}\n\n{"id": "y"}\n{"id": "x", "n": 1}\n')
    assert len(read_jsonl(path)) == 3
    assert len(read_jsonl(path, unique=("id", "n"))) == 3
    with pytest.raises(UserError, match=r"rows\.jsonl:4: id x stands in line 1 too; give each row its own, or delete"):
        read_jsonl(path, unique=("id",))
    path.write_text('{"id": "x"}\n{"id": "x", "n": 0}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: id x, n 0 stands in line 1 too; mend it"):
        read_jsonl(path, unique=("id", "n"), twice="mend it")


@pytest.mark.parametrize(("hint", "end"), [("run scripts/x.py", "; run scripts/x.py"), ("", "no such file")])
def test_a_missing_file_says_what_makes_it(tmp_path, hint, end):
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file") as caught:
        read_jsonl(tmp_path / "gone.jsonl", hint=hint)
    assert str(caught.value).endswith(end)


def test_broken_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"x\.json: not valid JSON.*delete it and run the stage again"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, kind):
    target = tmp_path / "target"

    def make(path, content):
        if kind == "folder":
            path.mkdir()
        (path / "inside" if kind == "folder" else path).write_text(content)

    def fail_halfway(path):
        with atomic_path(path) as temporary:
            make(temporary, "half")
            raise RuntimeError

    make(target, "old")
    for path in (target, tmp_path / "never"):
        with pytest.raises(RuntimeError):
            fail_halfway(path)
        assert list(tmp_path.iterdir()) == [target]
    assert (target / "inside" if kind == "folder" else target).read_text() == "old"


def test_a_file_is_replaced_only_at_the_end(tmp_path):
    target = tmp_path / "new" / "target.txt"
    write_text(target, "old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == target.parent, "a rename is atomic only within one file system"
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "stale").write_text("old")
    with atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "fresh").write_text("new")
        assert (target / "stale").exists()
    assert [path.name for path in target.iterdir()] == ["fresh"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture
def model(tmp_path):
    """A folder of two files, to be replaced."""
    (tmp_path / "model").mkdir()
    for name in ("config", "weights"):
        (tmp_path / "model" / name).write_text("old")
    return tmp_path / "model"


def replace_model(target):
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for name in ("config", "weights"):
            (temporary / name).write_text("new")


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("step", ["fsync", "aside", "rename"])
def test_a_folder_that_was_not_replaced_comes_back(model, monkeypatch, step):
    """Ctrl-C before it is set aside, and on either side of the rename that would give the new one its name."""
    replace = os.replace

    def interrupted(source, place):
        if step == "rename" and place == model and not str(source).endswith(".old.tmp"):
            raise KeyboardInterrupt
        replace(source, place)
        if step == "aside" and place != model:
            monkeypatch.undo()
            raise KeyboardInterrupt

    def not_on_disk(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, *(("fsync", not_on_disk) if step == "fsync" else ("replace", interrupted)))
    with pytest.raises(KeyboardInterrupt):
        replace_model(model)
    assert contents(model) == {"config": "old", "weights": "old"}
    assert list(model.parent.iterdir()) == [model]


@pytest.mark.parametrize("instant", range(5))
def test_killed_at_any_instant_the_old_folder_or_the_new_is_found(model, instant):
    """Five calls replace it: aside, its name, the old one's temporary name, and two files of that one go."""
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom tests.utils.test_common import replace_model\n"
        "left = iter(range(int(sys.argv[2])))\n"
        "def counted(call):\n"
        "    def die_first(*args, **more):\n"
        "        if next(left, None) is None:\n            os.kill(os.getpid(), 9)\n"
        "        return call(*args, **more)\n"
        "    return die_first\n"
        "os.replace, os.unlink = counted(os.replace), counted(os.unlink)\n"
        "replace_model(Path(sys.argv[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(model), str(instant)], cwd=ROOT)
    assert done.returncode == -9
    with hold(model.parent, "the next run", model.name, model.name):
        word = "old" if instant < 2 else "new"
        assert contents(model) == {"config": word, "weights": word}
        assert {path for path in model.parent.iterdir() if path.suffix == ".tmp"} == set()


@pytest.mark.parametrize("write", [lambda path, value: write_json(path, {"a": value}),
                                   lambda path, value: write_jsonl(path, [{"a": 1}, {"a": value}])])  # fmt: skip
def test_a_number_json_has_no_word_for_is_never_written(tmp_path, write):
    path = tmp_path / "x.json"
    write(path, 0.5)
    before = path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(path, float("nan"))
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_json_round_trip(tmp_path):
    rows = [{"text": "naïve\nline \u2028 and 日本"}, {"number": 1e-9}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    write_json(tmp_path / "x.json", rows)
    assert read_jsonl(tmp_path / "x.jsonl") == read_json(tmp_path / "x.json") == rows


def test_appending_goes_on_after_a_torn_line(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    append_jsonl(path, [{"a": 1}, {"a": 2}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"a": 3, "tex')
    assert repair_jsonl_tail(path) == 13
    assert path.read_bytes() == whole
    append_jsonl(path, [{"a": 3}])
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize(("text", "cut", "left"), [(b"", 0, b""), (b"{}\n", 0, b"{}\n"), (b'{"a"', 4, b""),
                                                   (b'{}\n{"\xc3', 3, b"{}\n")])  # fmt: skip
def test_only_a_torn_last_line_is_cut(tmp_path, text, cut, left):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text)
    assert repair_jsonl_tail(path) == cut
    assert path.read_bytes() == left


def test_repairing_a_missing_file_is_nothing(tmp_path):
    assert repair_jsonl_tail(tmp_path / "gone.jsonl") == 0
    assert not (tmp_path / "gone.jsonl").exists()


def test_hashes(tmp_path):
    (tmp_path / "x").write_text("abc")
    assert sha256_text("abc") == sha256_file(tmp_path / "x")
    assert sha256_text("abc").startswith("ba7816bf")


FINGERPRINT = {"seed": 1, "sizes": (3, 4)}  # a tuple is a list once it has been through JSON


@pytest.fixture
def stage(tmp_path):
    """(marker, outputs) of a finished stage."""
    outputs = [tmp_path / "rows.jsonl", tmp_path / "stats.json"]
    for output in outputs:
        output.write_text("{}")
    finish_stage(tmp_path / "stage.json", FINGERPRINT, seconds=3)
    return tmp_path / "stage.json", outputs


def test_a_stage_goes_from_fresh_over_resume_to_done(tmp_path):
    marker, output = tmp_path / "stage.json", tmp_path / "rows.jsonl"
    assert stage_state(marker, FINGERPRINT, False, [output]) == "fresh"
    start_stage(marker, FINGERPRINT)
    output.write_text("half")
    assert stage_state(marker, FINGERPRINT, False, [output]) == "resume"
    finish_stage(marker, FINGERPRINT, seconds=3)
    assert stage_state(marker, FINGERPRINT, False, [output]) == "done"
    assert read_json(marker)["seconds"] == 3


@pytest.mark.parametrize("which", [0, 1])
def test_a_finished_stage_whose_output_is_gone_runs_again(stage, which):
    marker, outputs = stage
    outputs[which].rename(outputs[which].with_name("elsewhere"))
    assert stage_state(marker, FINGERPRINT, False, outputs) == "resume"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 2}, r"seed = 1, this run has 2.*--overwrite"),
        ({"sizes": [3]}, r"sizes = \[3, 4\], this run has \[3\]"),
        ({"added": True}, r"added = None, this run has True"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_fingerprint_is_refused_by_the_field(stage, change, words, finished):
    marker, outputs = stage
    if not finished:
        start_stage(marker, FINGERPRINT)
    with pytest.raises(UserError, match=words) as caught:
        stage_state(marker, FINGERPRINT | change, False, outputs)
    assert str(caught.value).startswith(str(marker.parent))
    assert all(output.exists() for output in outputs)


def test_a_dropped_field_is_a_mismatch_too():
    with pytest.raises(UserError, match=r"^here was made with seed = 1, this run has None"):
        refuse_mismatch("here", {"seed": 1}, {})


def test_overwrite_deletes_marker_and_outputs(stage):
    marker, outputs = stage
    assert stage_state(marker, FINGERPRINT | {"seed": 2}, True, outputs) == "fresh"
    assert not any(path.exists() for path in (marker, *outputs))
    assert stage_state(marker, FINGERPRINT, True, outputs) == "fresh"


@pytest.mark.parametrize("done", range(3))
def test_a_kill_while_it_deletes_never_leaves_outputs_without_their_marker(stage, monkeypatch, done):
    marker, outputs = stage
    unlink, left = Path.unlink, iter(range(done))

    def dying(path, missing_ok=False):
        if next(left, None) is None:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(KeyboardInterrupt):
        stage_state(marker, FINGERPRINT, True, outputs)
    monkeypatch.undo()
    assert stage_state(marker, FINGERPRINT, False, outputs) == ("resume" if done else "done")


def test_disk_space_is_asked_for_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2_000_000_000})())
    require_disk(tmp_path / "not" / "made" / "yet", 2e9, "the run")
    with pytest.raises(UserError, match=r"2\.00 GB free, the run needs 3\.00 GB") as caught:
        require_disk(tmp_path / "not" / "made" / "yet", 3e9, "the run")
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert not (tmp_path / "not").exists()


def test_provenance_says_how_to_repeat_the_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/x.py", "--name", "two words"])
    facts = json.loads(json.dumps(provenance()))
    assert facts["command"] == "scripts/x.py --name 'two words'"
    assert {"python", "torch", "transformers", "peft"} <= facts["versions"].keys()
    assert {"git_commit", "git_dirty", "machine", "time"} <= facts.keys()


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it: `clock.now += 10`."""
    clock = type("Clock", (), {"now": 1000.0})()
    monkeypatch.setattr(common.time, "monotonic", lambda: clock.now)
    return clock


def test_off_a_terminal_a_line_comes_every_so_many_seconds_at_most(clock, caplog, capsys):
    with caplog.at_level(logging.INFO, "kd"), Progress(100, "work", every=30) as progress:
        for _ in range(99):
            clock.now += 1
            progress.advance(note="x")
    assert [record.message for record in caplog.records] == [
        f"work: {count} of 100, {100 - count} s left (note x)" for count in (30, 60, 90)
    ]
    assert capsys.readouterr().err == ""


def test_the_end_is_not_announced(clock, caplog):
    with caplog.at_level(logging.INFO, "kd"), Progress(2, "work", every=1) as progress:
        clock.now += 100
        progress.advance(2)
    assert not caplog.records


def test_skipped_units_count_but_take_no_part_in_the_rate(clock, caplog):
    with caplog.at_level(logging.INFO, "kd"), Progress(100, "work", every=10) as progress:
        progress.skip(50)
        assert (progress.count, progress.bar.n) == (50, 50)
        clock.now += 10
        progress.advance(10)
    assert caplog.messages == ["work: 60 of 100, 40 s left"]


def test_on_a_terminal_there_is_a_live_bar_and_no_log_line(clock, caplog, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with caplog.at_level(logging.INFO, "kd"), Progress(10, "work", every=0) as progress:
        progress.skip(3)
        clock.now += 5
        progress.advance(2, loss="0.5")
        progress.bar.refresh()
    assert "work:  50%" in terminal.getvalue()
    assert "5/10" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()
    assert not caplog.records


def fail(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x.jsonl:3: wrong"), 2, "error: x.jsonl:3: wrong"),
        (OSError(errno.ENOSPC, "No space left on device", "out.bin"), 2, "error: out.bin: No space left on device; "),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: writing: No space left on device; "),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "error: out: Permission denied; "),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue"),
    ],
)
def test_a_users_mistake_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code, line):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as caught:
        run_cli(fail(error))
    assert caught.value.code == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_sigterm_unwinds_and_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    before, unwound = signal.getsignal(signal.SIGTERM), []

    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Exception:
            pytest.fail("held up")
        finally:
            unwound.append(True)

    with pytest.raises(SystemExit) as caught:
        run_cli(main)
    assert (caught.value.code, unwound) == (143, [True])
    assert capsys.readouterr().err == "ended by SIGTERM; run the same command again to continue\n"
    assert signal.getsignal(signal.SIGTERM) == before


UNWINDING = """
import os, time
from src.utils.common import unwinding_on_sigterm
there, ready = os.pipe()
with unwinding_on_sigterm():
    try:
        child = os.fork()
        if child:
            os.read(there, 1)  # a signal that comes while Python forks is lost
            os.kill(child, 15)
            print(os.waitpid(child, 0)[1], flush=True)
        else:
            os.write(ready, b"x")
        time.sleep(60)
    finally:
        print("unwinding", flush=True)
        time.sleep(60)
"""


def test_a_second_sigterm_kills_and_a_forked_child_dies_of_the_first():
    process = subprocess.Popen([sys.executable, "-c", UNWINDING], cwd=common.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == f"{signal.SIGTERM:d}\n"
    process.terminate()
    assert process.stdout.readline() == "unwinding\n"
    process.terminate()
    assert process.wait(timeout=20) == -signal.SIGTERM
    process.stdout.close()


@pytest.mark.parametrize("error", [ValueError("a defect"), FileNotFoundError(errno.ENOENT, "No such file", "x")])
def test_a_defect_keeps_its_traceback(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(type(error)):
        run_cli(fail(error))


@pytest.mark.parametrize("error", [UserError("wrong"), OSError(errno.ENOSPC, "No space left on device")])
def test_debug_shows_the_traceback(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["script.py", "--debug", "--alpha", "1"])
    with pytest.raises(type(error)):
        run_cli(fail(error))
    assert sys.argv == ["script.py", "--alpha", "1"]


def test_success_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    run_cli(lambda: print("made it"))
    assert capsys.readouterr() == ("made it\n", "")


def test_log_lines_go_to_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    run_cli(lambda: common.logger.info("at work"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(" at work\n")


def test_a_file_that_is_not_utf_8_is_named_by_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "ok"}\n{"a": "\xe4"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: "):
        read_jsonl(path)


@pytest.mark.parametrize(("rank", "said"), [(None, True), ("0", True), ("1", False)])
def test_of_several_processes_the_first_one_speaks(monkeypatch, capsys, rank, said):
    """A warning is said by whichever process has it."""
    monkeypatch.delenv("RANK", raising=False)
    if rank:
        monkeypatch.setenv("RANK", rank)
    run_cli(lambda: (common.logger.info("32 rows"), common.logger.warning("a broken file")))
    err = capsys.readouterr().err
    assert ("32 rows" in err, "a broken file" in err) == (said, True)
