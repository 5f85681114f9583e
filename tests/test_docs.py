"""What the documentation says exists: commands parse, links lead somewhere, settings and messages are the code's."""

import argparse
import ast
import importlib
import json
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from src.distillation import sweep
from src.launch.commands import stage_named
from src.planning.report import duration
from src.utils import common
from src.utils import config as settings
from src.utils.common import ROOT, UserError

PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "outputs/README.md")
    for path in ROOT.glob(pattern)
)
PIPELINE = "tests/test_pipeline.py::test_every_stage_does_its_work"
HARNESS = "tests/evaluation/test_lm_eval_command.py::test_the_harness_judges_the_student_with_its_adapter"
LM_EVAL = "lm_eval --model hf --model_args pretrained=outputs/models/smollm2-135m-20-layers"
LM_EVAL_END = "--tasks gsm8k --apply_chat_template --batch_size 8 --log_samples --output_path outputs/lm_eval"
EMBEDDED = "--config configs/embedded.yaml"
BENCHMARKS = "tests/test_benchmarks.py"
PLAN = "python scripts/plan_hardware.py --config configs/qwen3_30b_to_8b.yaml"
PLANNED = "tests/test_docs.py::test_the_plans_in_the_readme_are_the_planners"
PLANNED_HERE = "tests/test_docs.py::test_the_plans_in_the_hardware_page_are_the_planners"
# its client sends what curl does here
SERVED = "tests/distillation/test_export.py::test_transformers_serve_answers_as_the_evaluation_does"
RECIPES = "tests/test_recipes.py::test_runs_are_made_once_and_the_report_says_what_they_answered"
SWEEP = f"python scripts/sweep.py {EMBEDDED} --alpha 0 0.5 0.8 1 --temperature 1 2.5 --seed 1 2"
# A command that needs no GPU -> the test that runs it (on tiny or reduced inputs), or the script of CI that does.
RUN_BY = {
    "bash run_pipeline.sh": PIPELINE,
    "bash run_tests.sh": ".ci/run",
    "bash run_tests.sh tests/distillation -k losses": ".ci/run",
    f"python scripts/prepare_models.py {EMBEDDED}": PIPELINE,
    f"python scripts/download_datasets.py {EMBEDDED}": PIPELINE,
    f"python scripts/generate_sft_data.py {EMBEDDED}": PIPELINE,
    f"python scripts/fix_sft_data.py {EMBEDDED}": PIPELINE,
    f"python scripts/cache_teacher.py {EMBEDDED}": PIPELINE,
    f"python scripts/run_improved_kd.py {EMBEDDED} --alpha 0": PIPELINE,
    f"python scripts/run_improved_kd.py {EMBEDDED}": PIPELINE,
    f"python scripts/evaluate_distillation.py {EMBEDDED}": PIPELINE,
    f"python scripts/export_model.py {EMBEDDED}":
        "tests/evaluation/test_export_model.py::test_a_finished_run_becomes_a_model_folder",
    f"python scripts/export_model.py {EMBEDDED} --gguf --llama_cpp ../llama.cpp":
        "tests/evaluation/test_export_model.py::test_a_gguf_file_lies_beside_the_weights",
    "transformers serve outputs/export/RUN --device cpu --port 8000 &": SERVED,
    "curl http://localhost:8000/v1/chat/completions -H Content-Type: application/json -d "
    '{"model": "outputs/export/RUN", "messages": [{"role": "user", "content": "What is 17 + 25?"}]}': SERVED,
    f"python scripts/run_improved_kd.py {EMBEDDED} --report_to tensorboard":
        "tests/distillation/test_tracking.py::test_tensorboard_holds_what_metrics_jsonl_holds",
    f"{SWEEP} --dry_run": "tests/distillation/test_sweep.py::test_a_dry_run_writes_nothing",
    SWEEP: "tests/distillation/test_sweep.py::test_a_killed_sweep_goes_on",
    f"{PLAN} --hardware 1x80": PLANNED,
    f"{PLAN} --hardware 1x80 --gpus 1xH100 --json": PLANNED_HERE,
    f"{PLAN} --gpus 8x40": PLANNED_HERE,
    f"python scripts/plan_hardware.py {EMBEDDED}":
        "tests/planning/test_script.py::test_the_shipped_embedded_profile_on_this_machine",
    "bash run_pipeline.sh --profile qwen3_30b_to_8b --hardware 1x80 --dry_run":
        "tests/stages/test_launch.py::test_a_dry_run_ends_with_the_plan",
    "python benchmarks/figures.py": "tests/test_figures.py::test_the_pictures_are_current",
    f"python scripts/evaluate_distillation.py {EMBEDDED} --mode medium --output_dir outputs/evaluation/medium":
        PIPELINE,
    "python scripts/evaluate_distillation.py --model_path R/final_model --output_dir outputs/evaluation/other":
        "tests/evaluation/test_evaluation_scripts.py::test_a_model_path_is_enough_for_the_script",
    "./run_kd_inference_test.sh quick": "tests/test_pipeline.py::test_the_inference_test_finds_the_run",
    "python test_kd_inference_v2.py --mode quick --temperature 0.7":
        "tests/evaluation/test_evaluation_scripts.py::test_test_model_compares_at_one_temperature",
    "bash run_pipeline.sh --profile mine.yaml --hardware 1x80 --dry_run":
        "tests/stages/test_launch.py::test_the_profile_in_the_docs_can_be_run",
    "python scripts/download_datasets.py --config mine.yaml --prompts_file train.jsonl --prompt_column question "
    "--reference_column answer --prompts_grader numeric":
        "tests/stages/test_prompts.py::test_a_grader_for_all_of_your_prompts",
    "python scripts/download_datasets.py --config mine.yaml --domains medical medical_zh --domain_train_rows 300 100 "
    "--domain_eval_rows 60 24": "tests/stages/test_prompts.py::test_prompts_and_their_manifest",
    f"{LM_EVAL},dtype=bfloat16,enable_thinking=False {LM_EVAL_END}/base": HARNESS,
    f"{LM_EVAL},peft=R/final_model,dtype=bfloat16,enable_thinking=False {LM_EVAL_END}/distilled": HARNESS,
    "python benchmarks/kd_loss.py --output benchmarks/results/kd_loss_bf16.json":
        f"{BENCHMARKS}::test_kd_loss_writes_its_record",
    "python benchmarks/kd_loss.py --output benchmarks/results/kd_loss_fp32.json --dtype float32":
        f"{BENCHMARKS}::test_kd_loss_writes_its_record",
    "python benchmarks/kd_loss.py --output benchmarks/results/kd_loss_growth.json --growth":
        f"{BENCHMARKS}::test_kd_loss_writes_its_record",
    "python benchmarks/train_step.py --output benchmarks/results/train_step.json":
        f"{BENCHMARKS}::test_train_step_measures_the_same_work",
    "python benchmarks/teacher_cache.py --output benchmarks/results/teacher_cache.json":
        f"{BENCHMARKS}::test_teacher_cache_tells_exact_from_biased",
    "python benchmarks/teacher_generation.py --teacher outputs/models/smollm2-135m-instruct "
    "--vllm_python VLLM_ENVIRONMENT/bin/python --output benchmarks/results/teacher_generation.json":
        f"{BENCHMARKS}::test_teacher_generation_writes_its_record",
    "python benchmarks/sweep_generation.py --mode medium --output benchmarks/results/sweep_generation.json":
        f"{BENCHMARKS}::test_sweep_generation_asks_both_for_the_same_answers",
    f"python scripts/run_improved_kd.py {EMBEDDED} --temperature 2.5 --alpha 0.8 --teacher_temperature 2.5 "
    "--teacher_top_k 0 --teacher_top_p 1":
        "tests/distillation/test_kd.py::test_what_the_teachers_sampling_kept_is_a_setting_of_the_run",
    f"python scripts/run_improved_kd.py {EMBEDDED} --on_policy_rounds 5 --on_policy_fraction 0.5":
        "tests/distillation/test_rounds.py::test_a_run_killed_anywhere_ends_as_an_uninterrupted_one",
    f"python scripts/run_improved_kd.py {EMBEDDED} --init_from RUN --on_policy_rounds 5 --on_policy_fraction 1":
        "tests/distillation/test_rounds.py::test_a_run_that_begins_from_an_adapter_answers_with_it",
    "python benchmarks/recipes.py prepare":
        "tests/test_recipes.py::test_prepare_runs_the_stages_and_keeps_few_rows_to_measure_on",
    "python benchmarks/recipes.py choose":
        "tests/test_recipes.py::test_runs_are_made_once_and_the_report_says_what_they_answered",
    "python benchmarks/recipes.py table": RECIPES,
    "python benchmarks/recipes.py report": RECIPES,
    "python benchmarks/teacher_goes_on.py outputs/recipes/train/on_policy_after_seed_1 "
    "outputs/recipes/train/on_policy_after_seed_2 outputs/recipes/train/on_policy_after_seed_3 "
    "--output benchmarks/results/teacher_goes_on.json":
        "tests/test_teacher_goes_on.py::test_the_script_asks_both_models",
    "python benchmarks/whose_text.py --output benchmarks/results/whose_text.json":
        "tests/test_recipes.py::test_a_change_on_own_text_is_what_is_learnt_and_where_the_text_goes",
    "python benchmarks/plan.py --hardware none --output benchmarks/results/plan.json":
        f"{BENCHMARKS}::test_plan_measures_every_stage_as_the_overlay_says",
}  # fmt: skip
# A line of a block whose commands no test can run here
MARK = re.compile(r"^# needs (GPUs|the hub|llama\.cpp)", re.MULTILINE)
# Of others: their words are not ours to check
PROGRAMS = ("lm_eval", "vllm", "until", "source", "llama-server", "transformers", "curl", "git", "python3", "export")
FOREIGN_FLAGS = {"--help", "--debug", "--tasks", "--worker", "--logdir"}  # every script's own, or another program's
MADE_UP = {"data/domains/printer_help.yaml", "printer_help", "mine.yaml"}  # examples of names a reader may choose
FOREIGN_WORDS = {"get_offset", "enable_chunked_prefill", "tokenizer_config"}  # vLLM's, and a file of every model
# Messages of Python, torch or the system, which are not in our code
FOREIGN_MESSAGES = ("No module named", "cannot import name", "Killed", "torch sees no GPU")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


# --- commands


@dataclass(frozen=True)
class Command:
    """A command line of a fenced bash block, without its comment; `marked` if its block says that it needs GPUs."""

    page: str
    text: str
    marked: bool


def commands_of(page: str) -> Iterator[Command]:
    for block in re.findall(r"^```bash\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL):
        marked = MARK.search(block) is not None
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield Command(page, " ".join(words), marked)


COMMANDS = [command for page in PAGES for command in commands_of(page)]


class Parsed(BaseException):
    """A script has read its command line: nothing of what it would do has been done. No `except` of ours catches it."""


def stopping(read: Callable[..., Any]) -> Callable[..., Any]:
    def read_and_stop(*arguments: Any, **more: Any) -> None:
        read(*arguments, **more)
        raise Parsed

    return read_and_stop


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], None]:
    """`parse(script, arguments)` has a Python script of ours read its command line, and no more."""
    for path in (ROOT / "src").rglob("*.py"):  # a module imported later would keep what is laid over here for good
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])  # scripts put themselves there
    monkeypatch.setattr(common, "setup_logging", lambda: None)
    monkeypatch.setattr(settings, "load_config", stopping(settings.load_config))
    for module in (settings, sweep):  # scripts take it from the first, a sweep reads its grid by itself
        monkeypatch.setattr(module, "build_config", stopping(module.build_config))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))

    def parse(script: str, arguments: list[str]) -> None:
        assert re.search(r"load_config|build_config|ArgumentParser", text_of(script)), f"{script} reads no arguments"
        # the profile that docs/own_domain.md has a reader write
        arguments = ["configs/embedded.yaml" if word == "mine.yaml" else word for word in arguments]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(Parsed):
            runpy.run_path(script, run_name="__main__")

    return parse


def shell_flags(script: str) -> set[str]:
    """The flags in a shell script's `case`: `--from|--to|--seed) ...` and `-h|--help) ...`."""
    labels = re.findall(r"^\s*([^\s()]+)\)", text_of(script), re.MULTILINE)
    return {flag for label in labels for flag in re.findall(r"--[a-z_]+", label)}


def check_shell(script: str, arguments: list[str]) -> None:
    assert (ROOT / script).is_file(), f"no {script}"
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if word.startswith("--"):
            assert word in shell_flags(script), f"{script} has no {word}"
        if word == "--profile" and following not in MADE_UP:
            assert (ROOT / "configs" / f"{following}.yaml").is_file(), f"no profile {following}"
        if word == "--hardware":
            assert (ROOT / "configs" / "hardware" / f"{following}.yaml").is_file(), f"no overlay {following}"
        if word in ("--from", "--to"):
            assert stage_named(following, word)
        if word.startswith("tests/"):
            assert (ROOT / word).exists(), f"no {word}"


def check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    for word in arguments:
        named = re.fullmatch(r"\.\[(.+)\]", word)  # .[openai]
        assert named is None or named[1] in extras, f"no extra {word}"
        assert not word.endswith(".txt") or (ROOT / word).is_file(), f"no {word}"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}: {command.text[:60]}")
def test_a_command_is_one_that_its_script_takes(command: Command, parse: Callable[[str, list[str]], None]) -> None:
    words = [word for word in shlex.split(command.text) if not re.match(r"[A-Z_]+=", word)]  # VENV=folder bash ...
    if words[:2] == ["accelerate", "launch"]:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        begin = next(index for index, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[begin:]]
    if words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"no {words[1]}"
        parse(words[1], words[2:])
    elif words[0] == "bash":
        check_shell(words[1], words[2:])
    elif words[0].startswith("./"):
        check_shell(words[0].removeprefix("./"), words[1:])
    elif words[0].endswith("pip") and words[1] == "install":  # ours, or another environment's by its path
        check_pip(words[2:])
    elif words[0] == "sbatch":
        assert (ROOT / words[1]).is_file(), f"no {words[1]}"
    else:
        assert words[0] in PROGRAMS, f"{words[0]}: a program that no test knows"


def test_a_command_is_run_by_a_test_or_marked() -> None:
    unknown = {command.text for command in COMMANDS if not command.marked} - RUN_BY.keys()
    assert not unknown, "no test runs these: name one in RUN_BY, or put `# needs GPUs` into their block"
    assert not RUN_BY.keys() - {command.text for command in COMMANDS}, "no page has these any more"


@pytest.mark.parametrize("place", sorted(set(RUN_BY.values())))
def test_the_test_that_runs_a_command_exists(place: str) -> None:
    path, _, name = place.partition("::")
    if name:
        functions = [node.name for node in ast.walk(ast.parse(text_of(path))) if isinstance(node, ast.FunctionDef)]
        assert name in functions
    else:
        assert "run_tests.sh" in text_of(path)


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("scripts/run_improved_kd.py", ["--config", "configs/embedded.yaml", "--alfa", "0"], "unknown flag --alfa"),
        ("scripts/run_improved_kd.py", ["--config", "configs/none.yaml"], "no such profile"),
        ("scripts/run_improved_kd.py", ["--config", "configs/embedded.yaml", "--alpha", "2"], "alpha must be"),
        ("benchmarks/kd_loss.py", ["--dtype", "int8"], "invalid choice"),
        ("benchmarks/kd_loss.py", ["--repeats", "0"], "at least one round"),
        ("benchmarks/plan.py", ["--repeats", "3"], "unrecognized arguments: --repeats"),  # it measures once
    ],
)
def test_a_wrong_command_is_noticed(parse, capsys, script: str, arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit):
        parse(script, arguments)
    assert words in capsys.readouterr().err


def test_a_wrong_flag_of_a_shell_script_is_noticed() -> None:
    check_shell("run_pipeline.sh", ["--profile", "embedded", "--hardware", "2x24", "--from", "distil", "--seed", "7"])
    for arguments in (["--sede", "7"], ["--profile", "none"], ["--hardware", "9x99"], ["--to", "distill"]):
        with pytest.raises((AssertionError, UserError)):
            check_shell("run_pipeline.sh", arguments)


# --- links, figures, languages


def prose_of(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text_of(page), flags=re.MULTILINE | re.DOTALL)


def slug_of(heading: str) -> str:
    """What GitHub makes of a heading for its anchor."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # [text](target) -> text
    return re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize(
    ("heading", "slug"),
    [("What's `a_b`, and why?", "whats-a_b-and-why"), ("results.json", "resultsjson"), ("规划、运行", "规划运行")],
)
def test_anchors_are_githubs(heading: str, slug: str) -> None:
    assert slug_of(heading) == slug


def anchors_of(page: str) -> set[str]:
    """The anchors of a page's headings; the second of two alike ends in -1."""
    times: dict[str, int] = {}
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE):
        slug = slug_of(heading)
        anchors.add(f"{slug}-{times[slug]}" if slug in times else slug)
        times[slug] = times.get(slug, 0) + 1
    return anchors


def links_of(page: str) -> list[str]:
    """Targets of links and pictures: [text](target), ![text](target)."""
    return re.findall(r"\[[^\]]+\]\(([^)\s]+)\)", prose_of(page))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in links_of(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors_of(str(place.resolve().relative_to(ROOT))), f"{page}: {target}"


def luminance(colour: str) -> float:
    """Relative luminance of a colour such as "#3d83cf" (https://www.w3.org/TR/WCAG22/#dfn-relative-luminance)."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "figures").glob("*.svg")), ids=lambda path: path.name)
def test_a_figure_is_read_shown_and_fetches_nothing(path: Path) -> None:
    assert any(f"figures/{path.name})" in text_of(page) for page in PAGES), "no page shows it"
    root = ElementTree.parse(path).getroot()
    assert root.find("{http://www.w3.org/2000/svg}title") is not None, "a reader who does not see it hears nothing"
    text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    if "prefers-color-scheme" not in text:  # one set of colours for GitHub's light and dark pages
        colours = set(re.findall(r"#[0-9a-f]{6}", text))
        assert all(contrast(colour, page) >= 3 for colour in colours for page in ("#ffffff", "#0d1117"))
    assert not re.search(r"https?://|<script|@import", text)


def tables_of(page: str) -> list[tuple[int, int]]:
    """Rows and columns of each table."""
    shapes = []
    for table in re.findall(r"(?:^\|.*\|\n)+", prose_of(page), re.MULTILINE):
        lines = table.splitlines()
        shapes.append((len(lines), lines[1].count("|") - 1))
    return shapes


def test_nothing_waits_to_be_filled_in() -> None:
    assert not [page for page in PAGES if "FILL" in text_of(page)]


# README.md -> what its table says for `yes`, `to` and the units of a plan
WORDS = {
    "README.md": {},
    "README.zh-CN.md": {"yes": "能", " to ": " 到 ", " min": " 分钟", " s": " 秒", " h": " 小时"},
}


def planned_row(hardware: str, plan: dict[str, Any]) -> str:
    """A line of README's table, from what `plan_hardware.py --json` says."""
    stages = {stage["stage"]: stage for stage in plan["stages"]}
    names = ("generate_sft_data", "cache_teacher", "run_improved_kd (kd)", "evaluate_distillation")
    answers, _, training, _ = shown = [stages[name] for name in names]
    peaks = [f"{stage['peak_gb']:.1f}" for stage in shown]
    times = [duration(hours) for hours in (answers["hours"], training["hours"], plan["hours"])]
    device = plan["hardware"].partition(",")[0]
    said = "yes" if plan["fits"] else "no"
    return f"| `{hardware}` | {device} | {said} | {' / '.join(peaks)} | {' / '.join(times)} |"


@pytest.fixture
def plan(monkeypatch, capsys) -> Callable[..., str]:
    """`plan(*arguments)`: what plan_hardware.py prints for the reference profile; nothing of it needs a network."""

    def plan(*arguments: str) -> str:
        words = ["--config", str(ROOT / "configs" / "qwen3_30b_to_8b.yaml"), *arguments]
        monkeypatch.setattr(sys, "argv", ["plan_hardware.py", *words])
        runpy.run_path(str(ROOT / "scripts" / "plan_hardware.py"), run_name="__main__")
        return capsys.readouterr().out

    return plan


def test_the_plans_in_the_readme_are_the_planners(plan) -> None:
    for path in sorted((ROOT / "configs" / "hardware").glob("*.yaml")):
        row = planned_row(path.stem, json.loads(plan("--hardware", path.stem, "--json")))
        for page, words in WORDS.items():
            for english, other in words.items():
                row = row.replace(english, other)
            assert row in text_of(page).splitlines(), f"{page}: {row}"


def test_the_plans_in_the_hardware_page_are_the_planners(plan) -> None:
    page = " ".join(text_of("docs/hardware.md").split())
    lines = [" ".join(line.split()) for line in plan("--gpus", "8x40").splitlines() if not line.startswith("note:")]
    assert len(lines) > 20
    assert not [line for line in lines if line not in page]
    hours = json.loads(plan("--hardware", "1x80", "--gpus", "1xH100", "--json"))["hours"]
    assert f"`1x80` on an H100 (`--gpus 1xH100`) is planned at {duration(hours)}" in page


def test_both_languages_say_the_same() -> None:
    english, chinese = "README.md", "README.zh-CN.md"
    assert [c.text for c in commands_of(english)] == [c.text for c in commands_of(chinese)]
    assert [c.marked for c in commands_of(english)] == [c.marked for c in commands_of(chinese)]
    assert tables_of(english) == tables_of(chinese)
    headings = [re.findall(r"^(#+) ", prose_of(page), re.MULTILINE) for page in (english, chinese)]
    assert headings[0] == headings[1]
    targets = [[link for link in links_of(page) if not link.startswith("README")] for page in (english, chinese)]
    assert targets[0] == targets[1]
    numbers = [sorted(set(re.findall(r"\d+(?:\.\d+)?", prose_of(page)))) for page in (english, chinese)]
    assert numbers[0] == numbers[1]


def test_the_readme_is_short() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 170
    assert next(index for index, line in enumerate(lines) if line.startswith("|")) <= 40, "one screen, then a table"


# --- names and words of the code


def source_files() -> list[Path]:
    folders = ("src", "scripts", "tests", "benchmarks", "examples", "configs", "data/domains")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".sh")
    ]
    here = [path for pattern in ("*.py", "*.sh", "*.txt", "*.toml", ".ci/run") for path in ROOT.glob(pattern)]
    return [*files, *here]


@cache
def code_words() -> frozenset[str]:
    words: set[str] = set()
    for path in source_files():
        words.add(path.stem)
        if path != Path(__file__):  # its own lists are no proof
            words |= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return frozenset(words)


def spans_of(page: str) -> list[str]:
    """What stands in backticks, a line break in it read as a blank."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose_of(page))]


@pytest.mark.parametrize("page", PAGES)
def test_names_in_backticks_are_the_codes(page: str) -> None:
    """Settings, fields, functions and files: whatever is written with an underscore, or as a path of the house."""
    wrong = []
    for span in spans_of(page):
        for word in re.findall(r"(?<![\w-])[a-z][a-z0-9]*(?:_[a-z0-9]+)+\b", span):
            known = word in code_words() or word in MADE_UP | FOREIGN_WORDS
            if not known and word.removeprefix("validation_") not in code_words():  # as metrics.jsonl names them
                wrong.append(word)
        path = re.fullmatch(r"(?:src|tests|scripts|configs|docs|benchmarks|examples|data/domains)/[\w./-]+", span)
        if path and span not in MADE_UP and not (ROOT / span).exists():
            wrong.append(span)
    assert not wrong


@cache
def flags() -> frozenset[str]:
    """Every flag of ours: of the config classes (by their fields' names), of argparse, of the shell scripts."""
    found: set[str] = set(FOREIGN_FLAGS)
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".sh":
            found |= shell_flags(str(path.relative_to(ROOT)))
        found |= set(re.findall(r'add_argument\(\s*"(--\w+)"', text))
        if "setting(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
                called = node.value.func
                if isinstance(called, ast.Name) and called.id == "setting":
                    aliases = [word.value for word in node.value.args[2:] if isinstance(word, ast.Constant)]
                    names = [ast.unparse(node.target), *map(str, aliases)]
                    found |= {f"--{name}" for name in names} | {f"--no_{name}" for name in names}
    return frozenset(found | {"--config"})


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_backticks_are_ours(page: str) -> None:
    """Ours have underscores; a word with a hyphen in it (`--tensor-parallel-size`) is another program's."""
    for span in spans_of(page):
        for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", span):
            assert "-" in flag[2:] or flag in (*flags(), "--field"), f"{page}: {flag}"


@cache
def message_parts() -> str:
    """All constant text of the code's strings, f-strings included, each on a line of its own."""
    parts = []
    for path in source_files():
        if path.suffix == ".sh":
            parts.append(path.read_text(encoding="utf-8"))
        elif path.suffix == ".py" and "tests" not in path.relative_to(ROOT).parts:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    parts.append(node.value)
    return "\n".join(parts)


def test_the_messages_in_troubleshooting_are_the_codes() -> None:
    """The first column quotes what is printed; `...`, capitals and numbers stand for what varies."""
    wrong, right = [], 0
    for row in re.findall(r"^\| (?!it says)(.+?) \|", prose_of("docs/troubleshooting.md"), re.MULTILINE):
        for quoted in re.findall(r"`([^`]+)`", row):
            if quoted.startswith(FOREIGN_MESSAGES) or row.startswith(FOREIGN_MESSAGES):
                continue
            for part in re.split(r"\.\.\.|\b[A-Z]+\b|\d+|'\w+'|[();:,]", quoted):
                if len(part.strip()) >= 8:
                    right += part.strip() in message_parts()
                    wrong += [] if part.strip() in message_parts() else [f"{quoted}: {part.strip()}"]
    assert not wrong
    assert right > 50


def test_the_python_in_the_pages_imports_what_there_is() -> None:
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(str(node.module))
                    assert all(hasattr(module, name.name) for name in node.names)


def test_the_softmax_in_learn_md_is_right() -> None:
    """`torch.softmax(logits / 2.5, -1)  # T = 2.5: 0.543 ...`: the numbers behind the colon."""
    page = text_of("learn.md")
    logits = torch.tensor(ast.literal_eval(re.search(r"^logits = torch\.tensor\((.*?)\)", page, re.MULTILINE)[1]))
    said = re.findall(r"^torch\.softmax\(logits(?: / ([\d.]+))?, -1\) .*: +([\d. ]+)$", page, re.MULTILINE)
    assert len(said) == 2
    for temperature, numbers in said:
        right = torch.softmax(logits / float(temperature or 1), -1).tolist()
        assert [float(number) for number in numbers.split()] == pytest.approx(right, abs=6e-4)
