"""One process at a time, from another process."""

import json
import os
import signal
import subprocess
import sys
from datetime import date

import pytest

from src.utils.common import ROOT, UserError, atomic_path
from src.utils.stages import clear, experiment_date, hold, is_empty

HOLDER = """
import sys, time
from pathlib import Path
from src.utils.stages import hold
with hold(Path(sys.argv[1]), "other_stage", *sys.argv[2:]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder():
    """`holder(folder, *name)`: a process that holds a folder."""
    processes = []

    def start(folder, *name):
        command = [sys.executable, "-c", HOLDER, str(folder), *name]
        processes.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_the_second_is_refused_and_told_who_holds_it(tmp_path, holder):
    other = holder(tmp_path / "run")
    with pytest.raises(UserError) as refused, hold(tmp_path / "run", "this_stage"):
        pass
    assert f"other_stage (process {other.pid} on {os.uname().nodename}) is working on it" in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / "run"))
    with hold(tmp_path / "another", "this_stage"), hold(tmp_path / "run", "this_stage", "part"):
        pass  # another folder, and another part of it, are free


def test_a_dead_holders_lock_is_taken_over(tmp_path, holder):
    other = holder(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / ".stage.holder").is_file()
    with hold(tmp_path, "this_stage"):
        assert json.loads((tmp_path / ".stage.holder").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".stage.holder").exists()


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="no"), hold(tmp_path, "this_stage"):
        raise ValueError("no")
    with hold(tmp_path, "this_stage"):
        pass


def test_nothing_is_left_of_the_lock(tmp_path):
    with pytest.raises(ValueError, match="no"), hold(tmp_path / "a" / "b", "this_stage"):
        raise ValueError("no")
    assert not (tmp_path / "a").exists()
    with hold(tmp_path / "a" / "b", "this_stage"):
        (tmp_path / "a" / "b" / "made").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["made"]


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom src.utils.common import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as made:\n"
        "    made.mkdir() if sys.argv[2] == 'folder' else made.touch()\n"
        "    print('made', flush=True)\n    os.kill(os.getpid(), 9)\n"
    )
    for name, kind in (("data.jsonl", "file"), ("model", "folder")):
        command = [sys.executable, "-c", script, str(tmp_path / name), kind]
        assert subprocess.run(command, cwd=ROOT, capture_output=True).stdout == b"made\n"
    (tmp_path / "notes.tmp").touch()  # a person's own
    assert len(list(tmp_path.iterdir())) == 3
    with hold(tmp_path, "this_stage", "data", "data.*"):
        assert not list(tmp_path.glob(".data.*.tmp"))
        assert len(list(tmp_path.glob(".model.*.tmp"))) == 1, "another part's may still be written"
    with hold(tmp_path, "this_stage"):
        assert not list(tmp_path.glob(".*.tmp"))
        assert (tmp_path / "notes.tmp").is_file()


def test_what_a_neighbour_writes_is_left_alone(tmp_path):
    """Of models `s` and `s.f32` side by side, each has a lock of its own."""
    for name in (".s.f32.4711.tmp", ".s.f32.4711.old.tmp", ".s.4711.tmp", ".s.4711.old.tmp"):
        (tmp_path / name).mkdir()
    with hold(tmp_path, "this_stage", "s", "s"):
        assert {path.name for path in tmp_path.glob("*s*") if path.is_dir()} == {
            "s", ".s.f32.4711.tmp", ".s.f32.4711.old.tmp",
        }  # fmt: skip


def test_a_folder_with_nothing_but_its_lock_is_empty(tmp_path):
    with hold(tmp_path, "this_stage"):
        assert is_empty(tmp_path)
        with atomic_path(tmp_path / "one" / "file") as made:
            made.touch()
        (tmp_path / "two").touch()
        assert not is_empty(tmp_path)
        clear(tmp_path, last="kd_config.json")
        assert is_empty(tmp_path)
        assert (tmp_path / ".stage.lock").is_file(), "it is still held"


def test_the_date_of_an_experiment_stays(tmp_path):
    assert experiment_date(tmp_path / "experiment") == date.today()
    (tmp_path / "experiment" / "prompt_date.json").write_text('{"date": "2020-02-29"}')
    assert experiment_date(tmp_path / "experiment") == date(2020, 2, 29)


def test_two_that_ask_first_agree(tmp_path):
    script = "import sys\nfrom src.utils.stages import experiment_date\nprint(experiment_date(sys.argv[1]))\n"
    command = [sys.executable, "-c", script, str(tmp_path)]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({process.communicate()[0] for process in started}) == 1
    assert [process.returncode for process in started] == [0, 0, 0]
