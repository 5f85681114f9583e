"""A grid of runs: what is varied, what one run serves, what is made again, whether the table says what runs said."""

import importlib.util
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from src.distillation import sweep
from src.distillation.kd import run_kd_pipeline
from src.distillation.kd_config import ON_POLICY, SECTION, KDConfig
from src.distillation.sweep import Outcome, idle_settings, make_plan, read_grid, results, run_plan
from src.distillation.teacher_cache import CacheTeacherConfig, make_cache
from src.report.sweep import csv_text, markdown, plot
from src.utils.common import ROOT, Progress, UserError, read_json, read_jsonl
from src.utils.config import build_config, read_profile
from src.utils.stages import hold


@pytest.fixture
def values(tmp_path, tiny_teacher, tiny_student, clean_rows, write_sft):
    return {
        "model_name_or_path": tiny_student,
        "teacher_model_name_or_path": tiny_teacher,
        "experiment_dir": str(write_sft(tmp_path / "runs" / "tiny", clean_rows(60), clean_rows(4, start=100))),
        "teacher_signal": "online",
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "max_length": 256,
        "save_steps": 1,
        "lora_r": 4,
        "bf16": False,
        "compile_loss": False,
    }


@pytest.fixture
def here(monkeypatch) -> list[str]:
    """Runs are made in this process, for speed; the names of those that were, in turn."""
    made = []

    def make(run, overwrite, progress):
        made.append(run.name)
        run_kd_pipeline(run.config)
        return Outcome("finished")

    monkeypatch.setattr(sweep, "_make", make)
    return made


def plan_of(values, folder, words: str):
    return make_plan(read_grid(words.split(), values), folder)


def test_a_grid_is_the_product_of_its_axes_with_seeds_last(values, tmp_path):
    plan = plan_of(values, tmp_path / "sweep", "--seed 1 2 --learning_rate 1e-3 1e-2 --lora_r 2 4 --max_steps 3")
    made = [(run.config.seed, run.config.learning_rate, run.config.lora_r) for run in plan.runs.values()]
    assert made == [(s, lr, r) for s in (1, 2) for lr in (1e-3, 1e-2) for r in (2, 4)]
    assert [cell.settings for cell in plan.cells] == [
        {"learning_rate": lr, "lora_r": r} for lr in (1e-3, 1e-2) for r in (2, 4)
    ]
    for cell in plan.cells:
        assert [plan.runs[name].config.seed for name in cell.runs] == [1, 2]
        assert all(name.startswith("seed_") for name in cell.runs)
    assert all(run.config.max_steps == run.steps == 3 for run in plan.runs.values())
    assert not (tmp_path / "sweep").exists()


def test_one_run_serves_all_cells_that_differ_in_nothing(values, tmp_path):
    words = "--alpha 0 0.5 --temperature 1 2 4 --divergence forward_kl jsd --beta 0.3 0.6"
    plan = plan_of(values, tmp_path, words)
    # 3 temperatures x (forward_kl, jsd at 0.3, jsd at 0.6), and one run for all that have alpha = 0
    assert len(plan.runs) == len(plan.cells) == 10
    [zero] = [cell for cell in plan.cells if cell.settings["alpha"] == 0]
    assert zero.settings == {"alpha": 0.0, "temperature": None, "divergence": None, "beta": None}
    [name] = zero.runs
    control = build_config(KDConfig, values | {"alpha": 0})
    assert plan.runs[name].config.identity() == control.identity()  # the control that anyone would train


@pytest.mark.parametrize(
    ("change", "one", "other"),
    [
        ({"alpha": 0.0}, {"temperature": 1.0}, {"temperature": 3.0}),
        ({"alpha": 0.0}, {"divergence": "jsd", "beta": 0.2}, {"divergence": "reverse_kl"}),
        ({"alpha": 0.0}, {"teacher_top_k": 20}, {"teacher_top_p": 0.9}),
        ({}, {"beta": 0.2}, {"beta": 0.7}),
        ({"lr_scheduler_type": "constant"}, {"warmup_steps": 0}, {"warmup_steps": 2}),
        ({"optim": "sgd"}, {"adam_beta1": 0.5}, {"adam_beta1": 0.9}),
    ],
)
def test_an_idle_setting_changes_nothing(values, tmp_path, change, one, other):
    """It is called so only if two runs that differ in it learn the same."""
    rows = []
    for part in (one, other):
        config = build_config(KDConfig, values | change | part)
        assert part.keys() <= idle_settings(config)
        folder = tmp_path / f"run_{len(rows)}"
        run_kd_pipeline(values | change | part | {"output_dir": str(folder)})
        rows.append([(row["loss"], row["grad_norm"]) for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row])
    assert rows[0] == rows[1]


def test_a_setting_that_matters_is_not_idle(values):
    assert idle_settings(build_config(KDConfig, values | {"alpha": 0.5, "divergence": "jsd"})) == {
        "num_train_epochs", "packing", "tokens_per_batch", *ON_POLICY[1:]
    }  # fmt: skip
    assert "packing" not in idle_settings(build_config(KDConfig, values | {"lora_dropout": 0.1}))


def test_cells_are_means_and_ranges_of_what_runs_measured(values, tmp_path, here):
    folder = tmp_path / "sweep"
    plan = plan_of(values, folder, "--seed 1 2 --alpha 0 1")
    run_plan(plan, folder, profile="it.yaml")
    assert len(here) == 4
    stored = read_json(folder / "sweep.json")
    measured = {}
    for name in here:
        [last] = [row for row in read_jsonl(folder / "runs" / name / "metrics.jsonl") if "validation_nll" in row]
        assert last["step"] == 2
        measured[name] = last
    for cell in stored["cells"]:
        assert cell["n"] == 2
        for measure in ("kl_to_teacher", "nll", "top1_agreement"):
            values_of = [measured[name][f"validation_{measure}"] for name in cell["runs"]]
            assert cell["validation"][measure]["mean"] == pytest.approx(statistics.mean(values_of))
            assert cell["validation"][measure]["min"] == min(values_of)
            assert cell["validation"][measure]["max"] == max(values_of)
        assert "heldout" not in cell  # nobody asked
    best = min(stored["cells"], key=lambda cell: cell["validation"]["nll"]["mean"])
    assert stored["cells"][stored["lowest"]["nll"]["cell"]] == best
    assert "heldout" not in str([run.keys() for run in stored["runs"].values()])
    assert stored["heldout"] is None
    assert "held-out" not in markdown(stored)


def test_held_out_rows_are_shown_of_the_chosen_cell_once_no_run_is_open(values, tmp_path, here):
    folder = tmp_path / "sweep"
    plan = plan_of(values, folder, "--seed 1 2 --alpha 0 1")
    run_plan(plan, folder, heldout="nll")
    stored = read_json(folder / "sweep.json")
    chosen = stored["lowest"]["nll"]["cell"]
    after = [read_json(folder / "runs" / name / "kd_results.json")["after"] for name in plan.cells[chosen].runs]
    assert (stored["heldout"]["cell"], stored["heldout"]["chosen_by"]) == (chosen, "nll")
    assert stored["heldout"]["nll"]["mean"] == pytest.approx(statistics.mean(one["nll"] for one in after))
    assert not [name for cell in stored["cells"] for name in cell if name == "heldout"]
    assert "on which nothing was chosen" in markdown(stored)

    statuses = dict.fromkeys(plan.runs, "finished") | {plan.cells[1 - chosen].runs[1]: "new"}
    under_way = results(plan, statuses, {}, heldout="nll")
    assert under_way["heldout"] is None  # what is chosen may yet change
    assert under_way["lowest"]["nll"] == {"cell": chosen, "overlapping": []}


def test_a_cell_is_ranked_when_all_of_its_seeds_are_there():
    def cell(n: int, nll: float) -> dict:
        return {"n": n, "runs": ["a", "b"], "validation": {"nll": {"mean": nll, "min": nll, "max": nll}} if n else {}}

    assert sweep._lowest([cell(1, 0.1), cell(2, 0.5), cell(2, 0.4), cell(0, 0)], "nll")["cell"] == 2
    assert sweep._lowest([cell(1, 0.1), cell(0, 0)], "nll") is None


def test_training_again_tells_its_own_runs_from_those_of_other_rows(
    values, tmp_path, here, monkeypatch, clean_rows, write_sft
):
    """--overwrite after the rows changed, and its first run fails: the others' old runs are no part of the table."""
    folder = tmp_path / "sweep"
    run_plan(plan_of(values, folder, "--alpha 0 0.5 1"), folder)
    write_sft(values["experiment_dir"], clean_rows(59), clean_rows(4, start=100))
    plan = plan_of(values, folder, "--alpha 0 0.5 1")
    monkeypatch.setattr(sweep, "_make", lambda *_: Outcome("failed", "no memory"))
    with pytest.raises(UserError, match="no memory"):
        run_plan(plan, folder, overwrite=True, stop_on_failure=True)
    stored = read_json(folder / "sweep.json")
    assert [run["status"] for run in stored["runs"].values()] == ["failed", "open", "open"]
    with pytest.raises(UserError, match=r"was made with .*--overwrite"):  # a table of both
        results(plan, dict.fromkeys(plan.runs, "finished"), {})


def test_one_identity_has_one_run_whatever_is_on_disk(values, tmp_path):
    """4 x 1 and 2 x 2 rows make the same step."""
    words = "--batch_size 2 4 --gradient_accumulation_steps 1 2"
    plan = plan_of(values, tmp_path / "sweep", words)
    rows = {tuple(cell.settings.values()): cell.runs for cell in plan.cells}
    assert len(plan.runs) == 3
    assert len(rows) == 4
    assert rows[2, 2] == rows[4, 1]
    for name in plan.runs:
        (tmp_path / "sweep" / "runs" / name).mkdir(parents=True)
    again = plan_of(values, tmp_path / "sweep", words)
    assert list(again.runs) == list(plan.runs)
    assert again.cells == plan.cells


def test_a_bound_is_called_one(values, tmp_path, here):
    folder = tmp_path / "sweep"
    plan = plan_of(values, folder, "--alpha 0 1")
    run_plan(plan, folder)
    assert read_json(folder / "sweep.json")["kl_is"] == "exact"
    for name in plan.runs:
        path = folder / "runs" / name / "kd_results.json"
        path.write_text(path.read_text().replace('"kl_is": "exact"', '"kl_is": "lower bound over the top 4"'))
    assert results(plan, dict.fromkeys(plan.runs, "finished"), {})["kl_is"] == "lower bound over the top 4"


def test_a_failed_run_s_line_has_no_escapes(values, tmp_path):
    """Logs go to a terminal: what a library printed must not recolour or retitle it."""
    run = next(iter(plan_of(values, tmp_path / "sweep", "--alpha 0 1").runs.values()))
    log = tmp_path / "it.log"
    log.write_bytes(b"error: \x1b[31mred\x1b]0;title\x07 end\n")
    assert sweep._outcome(run, 1, log, 0).line == " [31mred ]0;title  end"


def test_a_larger_grid_keeps_the_runs_that_are_there(values, tmp_path, here):
    folder = tmp_path / "sweep"
    run_plan(plan_of(values, folder, "--alpha 0 1"), folder)
    assert len(here) == 2
    run_plan(plan_of(values, folder, "--seed 42 2 --alpha 1 0 --temperature 2.5"), folder)
    assert len(here) == len(set(here)) == 2 + 2  # the default seed was there
    assert all(run["status"] == "finished" for run in read_json(folder / "sweep.json")["runs"].values())


def test_a_failed_run_is_recorded_and_tried_again(values, tmp_path, here, monkeypatch):
    folder = tmp_path / "sweep"
    make = sweep._make

    def fails(run, overwrite, progress):
        if run.config.alpha == 0.5:
            return Outcome("failed", "step 2: loss is nan")
        return make(run, overwrite, progress)

    words = "--alpha 0 0.5 1"
    monkeypatch.setattr(sweep, "_make", fails)
    with pytest.raises(UserError, match=r"1 of 3 runs failed, first alpha_0\.5-\w+: step 2: loss is nan") as caught:
        run_plan(plan_of(values, folder, words), folder)
    assert "\n" not in str(caught.value)
    stored = read_json(folder / "sweep.json")
    assert [run["status"] for run in stored["runs"].values()] == ["finished", "failed", "finished"]
    assert [cell["n"] for cell in stored["cells"]] == [1, 0, 1]
    assert "loss is nan" in markdown(stored)
    assert "| 0 of 1 | - |" in markdown(stored)

    monkeypatch.setattr(sweep, "_make", make)
    run_plan(plan_of(values, folder, words), folder)
    assert [run["status"] for run in read_json(folder / "sweep.json")["runs"].values()] == ["finished"] * 3
    assert len(here) == 3

    monkeypatch.setattr(sweep, "_make", fails)
    other = tmp_path / "other"
    with pytest.raises(UserError, match="1 of 3 runs failed"):
        run_plan(plan_of(values, other, "--alpha 0.5 0 1"), other, stop_on_failure=True)
    assert [run["status"] for run in read_json(other / "sweep.json")["runs"].values()] == ["failed", "open", "open"]


def test_runs_of_other_rows_are_not_taken_for_these(values, tmp_path, here, clean_rows, write_sft):
    folder = tmp_path / "sweep"
    run_plan(plan_of(values, folder, "--alpha 0 1"), folder)
    write_sft(values["experiment_dir"], clean_rows(59), clean_rows(4, start=100))
    with pytest.raises(UserError, match=r"was made with .*--overwrite"):
        run_plan(plan_of(values, folder, "--alpha 0 1"), folder)
    assert len(here) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--alpha 0.5", "no setting has several values; name some"),
        ("--alhpa 0 1", "unknown setting --alhpa; did you mean alpha"),
        ("--alpha 0 1 --kd_ratio 0.5", "--kd_ratio: alpha is set twice"),
        ("--alpha 0 2", "alpha must be between 0 and 1"),
        ("--alpha 0 x", "invalid float value: 'x'"),
        ("--alpha 0.5 .50", "--alpha 0.5 .50: a value stands twice"),
        ("--divergence forward_kl kl", "invalid choice: 'kl'"),
        ("--teacher_signal hidden topk", "one value of teacher_signal, for it has one cache"),
        ("--validation_fraction 0.1 0.2", "all cells are measured on the same rows"),
        ("--alpha 0 1 --save_steps 1 2", "--save_steps: it does not change what is learned"),
        ("--tokens_per_batch 0 64", "--tokens_per_batch: it does not change what is learned"),
        ("--alpha 0 1 --output_dir here", "a sweep names its runs' folders"),
        ("--alpha 0 1 --no_resume --resume", "a sweep names its runs' folders"),
        ("--alpha 0 1 --eval_steps 0", "set --eval_steps and --validation_fraction above 0"),
        ("--alpha 0 1 --validation_fraction 0.0001", "none of 60 rows is set aside for validation"),
        ("0.5 --alpha 0 1", "unexpected argument '0.5'"),
        ("--alpha 0 1 --teacher_signal hidden", "teacher_cache"),
    ],
)
def test_wrong_grids(values, tmp_path, words, said):
    with pytest.raises(UserError) as caught:
        plan_of(values, tmp_path / "sweep", words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_is_one_value_and_switches_hold_for_all(values):
    grid = read_grid(
        ["--lora_target_modules", "q_proj", "v_proj", "--no_packing", "--kd_alpha", "0", "1", "--lora_r=8"], values
    )
    assert grid.axes == {"alpha": ("0", "1")}
    assert grid.fixed == ("--lora_target_modules", "q_proj", "v_proj", "--no_packing", "--lora_r", "8")


def load_script():
    spec = importlib.util.spec_from_file_location("script", ROOT / "scripts" / "sweep.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def run_script(monkeypatch, *words: str) -> None:
    """The script's main in this process, which has its libraries already."""
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words])
    load_script().main()


def test_a_dry_run_writes_nothing(values, tmp_path, monkeypatch, capsys):
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump({SECTION: values}))
    words = ["--alpha", "0", "1", "--temperature", "1", "2", "--dry_run"]
    run_script(monkeypatch, "--config", str(path), "--output_dir", str(tmp_path / "sweep"), *words)
    printed = capsys.readouterr().out
    assert "4 points of the grid, 3 cells, 3 runs" in printed
    assert "cell alpha 0.0, temperature any: 1 run\n" in printed
    assert printed.count("new, 2 steps: ") == printed.count("scripts/run_improved_kd.py --config") == 3
    assert not (tmp_path / "sweep").exists()
    # its folder is of the experiment that it works on, whoever names that
    other = shutil.copytree(values["experiment_dir"], tmp_path / "other")
    for said, folder in ((["--experiment_dir", str(other)], other), ([], Path(values["experiment_dir"]))):
        run_script(monkeypatch, "--config", str(path), *said, *words)
        assert f"3 runs: outputs/sweep/{folder.name}\n" in capsys.readouterr().out


def test_the_picture_of_a_smaller_grid_goes(tmp_path, capsys):
    """Where the grid of today cannot be drawn."""
    for name, there in (("drawn", True), ("not", False)):
        (tmp_path / "sweep.svg").write_text("of before")
        script = load_script()
        script.read_json, script.markdown, script.csv_text = lambda _: {}, lambda _: "", lambda _: ""
        script.plot = lambda _, name=name, there=there: name if there else None
        script.render(tmp_path)
        assert (tmp_path / "sweep.svg").is_file() == there
        assert ("sweep.svg" in capsys.readouterr().out) == there


def test_two_sweeps_do_not_share_a_folder(values, tmp_path, monkeypatch, here):
    path, folder = tmp_path / "profile.yaml", tmp_path / "sweep"
    path.write_text(yaml.safe_dump({SECTION: values}))
    words = ["--config", str(path), "--output_dir", str(folder), "--alpha", "0", "1"]
    with hold(folder, "sweep"), pytest.raises(UserError, match=r"sweep \(process \d+ on .* is working on it"):
        run_script(monkeypatch, *words)
    assert here == []
    assert not (folder / "sweep.json").exists()


@pytest.mark.parametrize(("guard_is_there", "error"), [(True, KeyboardInterrupt), (False, OSError)])
def test_nothing_is_left_of_a_run_that_is_interrupted(values, tmp_path, monkeypatch, guard_is_there, error):
    """A terminal's Ctrl-C reaches the sweep alone, not the run's guard; where that cannot be had, the run ends."""
    run = next(iter(plan_of(values, tmp_path / "sweep", "--alpha 0 1").runs.values()))
    started: list[subprocess.Popen] = []
    sessions: list[int] = []
    popen = subprocess.Popen

    def start(*words, **named):
        if started and not guard_is_there:
            raise OSError("no more processes")
        started.append(popen(*words, **named))
        return started[-1]

    def interrupted(_):
        sessions.extend(os.getsid(process.pid) for process in started)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(sweep, "POLL", 0.5)
    monkeypatch.setattr(sweep, "_last_row", interrupted)
    monkeypatch.setattr(sweep, "command_of", lambda run: [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(error), Progress(1, "sweep") as progress:
        sweep._make(run, True, progress)
    assert sessions == ([process.pid for process in started] if guard_is_there else [])
    assert all(process.poll() is not None for process in started)


def unfinished(folder: Path) -> list[Path]:
    """The logs of runs that can be gone on with, and have not finished."""
    found = []
    for path in (folder / "runs").glob("*/metrics.jsonl"):
        if list(path.parent.glob("checkpoint-*/complete.json")) and not (path.parent / "kd_results.json").exists():
            found.append(path)
    return found


def wait_for(condition) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_free(folder: Path) -> bool:
    try:
        with hold(folder, "test"):
            return True
    except UserError:
        return False


@pytest.mark.slow
def test_a_killed_sweep_goes_on(values, tmp_path, monkeypatch, capsys):
    """On a cache whose teacher is gone, one of two runs finished: SIGKILL while the other trains in its process."""
    teacher = shutil.copytree(values["teacher_model_name_or_path"], tmp_path / "teacher")
    values["teacher_model_name_or_path"] = str(teacher)
    names = ("teacher_model_name_or_path", "experiment_dir", "max_length", "bf16")
    make_cache(build_config(CacheTeacherConfig, {name: values[name] for name in names}))
    shutil.rmtree(teacher)
    profile, folder = tmp_path / "profile.yaml", tmp_path / "sweep"
    values |= {"teacher_signal": "hidden", "max_steps": 24, "save_steps": 3, "eval_steps": 8}
    profile.write_text(yaml.safe_dump({SECTION: values}))
    words = ["--config", str(profile), "--output_dir", str(folder), "--alpha", "0.5", "0", "--seed", "7"]
    plan = make_plan(read_grid(words[4:], values), folder)
    first = Path(run_kd_pipeline(next(iter(plan.runs.values())).config)["run_dir"]) / "kd_results.json"
    stamp = first.stat().st_mtime_ns

    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([sys.executable, "scripts/sweep.py", *words], cwd=ROOT, env=environment)
    wait_for(lambda: unfinished(folder) or killed.poll() is not None)
    [second] = unfinished(folder)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_for(lambda: is_free(second.parent))  # its process has ended with the sweep's
    assert not (second.parent / "kd_results.json").exists()

    run_script(monkeypatch, *words)
    assert first.stat().st_mtime_ns == stamp
    assert "going on from step" in second.parent.with_name(f"{second.parent.name}.log").read_text()
    assert [row["step"] for row in read_jsonl(second) if "loss" in row] == list(range(1, 25))
    assert not list(second.parent.glob("checkpoint-*"))  # a grid of them would fill the disk
    stored = read_json(folder / "sweep.json")
    assert [run["status"] for run in stored["runs"].values()] == ["finished", "finished"]
    assert (folder / "sweep.md").read_text() in capsys.readouterr().out
    assert (folder / "sweep.csv").read_text() == csv_text(stored)
    assert (folder / "sweep.svg").read_text() == plot(stored)

    again = read_profile(second.parent.with_name(f"{second.parent.name}.yaml"), SECTION, KDConfig)
    identity = build_config(KDConfig, again).identity()
    assert read_json(second.parent / "kd_config.json")["fingerprint"].items() >= identity.items()
