"""Imports point one way: scripts, tests -> evaluation, planning, data -> grading, distillation, report -> utils."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# What a module may import from src, by the longest prefix of its own name: module names or whole packages.
ALLOWED = {
    "src": set(),
    "src.utils": {"src.utils"},
    "src.distillation": {"src.distillation", "src.utils"},
    "src.distillation.losses": {  # pure tensors in, tensors out
        f"src.distillation.{name}" for name in ("filters", "loss_kernel")
    },
    "src.distillation.loss_kernel": set(),
    "src.distillation.filters": set(),
    "src.grading": {"src.grading", "src.utils"},
    "src.launch": {"src.launch", "src.utils"} | {
        f"src.distillation.{name}" for name in ("engines", "kd_config", "rounds", "serving", "teacher_cache")
    },
    "src.data": {"src.data", "src.grading", "src.utils"},
    "src.planning": {"src.planning", "src.distillation", "src.utils"},
    "src.evaluation.verdict": set(),
    "src.report": {"src.report", "src.utils", "src.evaluation.verdict", "src.evaluation.results_schema"},
    "src.evaluation": {"src.evaluation", "src.grading", "src.report", "src.utils"} | {
        f"src.distillation.{name}"
        for name in ("base", "engines", "heldout", "serving", "sft")
    },
    "scripts": {"src"},
    "examples": {"src"},
    "tests": {"src", "benchmarks", "tests"},
    "benchmarks": {"src"} | {
        f"benchmarks.{name}"
        for name in (
            "harness", "kd_reference", "recipe_arms", "recipe_report", "recipe_runs", "step_parts", "train_job",
            "train_peers",
        )
    },
}  # fmt: skip


def within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def imported_modules(source: str, module: str) -> set[str]:
    """All modules that a file names in an import, wherever it stands; `from src import data` counts as src.data."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(part for part in (package, node.module) if part)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def wrong_imports(source: str, module: str, scripts: set[str]) -> list[str]:
    """Imports of `module` (its dotted name, such as src.data.cleaning) that point the wrong way.

    `scripts` are the names under which a script could be imported: from its own folder it needs no package.
    """
    allowed = ALLOWED[max((key for key in ALLOWED if within(module, key)), key=len)]
    wrong = []
    for name in sorted(imported_modules(source, module)):
        ours = any(within(name, top) for top in ("src", "scripts", "examples", "tests", "benchmarks", *scripts))
        if ours and not any(within(name, package) for package in allowed):
            wrong.append(name)
    return wrong


def python_files() -> dict[str, Path]:
    """Dotted name -> file, of the whole house; a script at the root counts as one of scripts/."""
    found = {}
    for top in ("src", "scripts", "examples", "tests", "benchmarks"):
        for path in (ROOT / top).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return found | {f"scripts.{path.stem}": path for path in ROOT.glob("*.py")}


FILES = python_files()
SCRIPTS = {name.removeprefix("scripts.") for name in FILES if within(name, "scripts")}


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_one_way(module):
    assert wrong_imports(FILES[module].read_text(encoding="utf-8"), module, SCRIPTS) == []


def test_all_folders_are_walked():
    assert {"src.utils.common", "src.distillation.kd", "src.grading.graders", "src.data.cleaning"} <= set(FILES)
    assert {"scripts.run_improved_kd", "tests.test_imports", "tests.conftest"} <= set(FILES)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("src.utils.common", "from src.distillation.base import load_model"),
        ("src.utils.common", "import src.data"),
        ("src.distillation.kd", "from src.grading.graders import grade"),
        ("src.distillation.kd", "from src.data import cleaning"),
        ("src.distillation.kd", "from src import data"),
        ("src.distillation.kd", "def late():\n    from src.evaluation import results"),
        ("src.distillation.kd", "from ..evaluation import results"),
        ("src.distillation.losses", "from src.utils.common import UserError"),
        ("src.data.sources", "from src.evaluation.verdict import headline"),
        ("src.grading.code", "from src.data.sources import gsm8k_rows"),
        ("src.data.sources", "from src.distillation.base import load_tokenizer"),
        ("src.distillation.kd", "from src.grading.numeric import find_number"),
        ("src.data.cleaning", "from src.report.page import write_reports"),
        ("src.evaluation.evaluator", "from src.distillation.kd import run_kd_pipeline"),
        ("src.distillation.kd", "from src.planning.plan import make_plan"),
        ("src.planning.rows", "from src.evaluation.answers import MODES"),
        ("src.evaluation.evaluator", "from src.data.cleaning import clean"),
        ("src.evaluation.evaluator", "import scripts.one"),
        ("src.evaluation.evaluator", "from tests.conftest import TinyModels"),
        ("src.evaluation.verdict", "from src.report.tables import sections"),
        ("src.report.page", "from src.evaluation.results import make_results"),
        ("src.report.tables", "from src.grading.rows import OUTCOMES"),
        ("scripts.one", "from scripts.two import main"),
        ("scripts.one", "from scripts import two"),
        ("scripts.one", "import two"),
        ("scripts.one", "from two import main"),
        ("tests.test_it", "import two"),
        ("benchmarks.kd_loss", "from benchmarks.train_step import measure"),
        ("src.distillation.kd", "from benchmarks.harness import machine"),
    ],
)
def test_the_walk_can_fail(module, source):
    assert len(wrong_imports(source, module, {"one", "two"})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("src.utils.config", "from src.utils.common import UserError"),
        ("src.distillation.kd", "from src.distillation.losses import kd_loss\nfrom .base import load_model"),
        ("src.data.cleaning", "from src.grading.graders import grade\nfrom src.grading import sandbox"),
        ("src.data.sources", "from src.grading.rows import dataset_row"),
        ("src.planning.setup", "from src.distillation.kd_config import KDConfig"),
        ("src.evaluation.evaluator", "from src.distillation.sft import generate\nfrom src.distillation import base"),
        ("src.grading.graders", "from src.grading.numeric import find_number"),
        ("scripts.one", "import torch\nfrom src.distillation.kd import KDConfig\nimport twofold"),
        ("src.report.page", "from src.evaluation.verdict import headline\nfrom src.report.tables import markdown"),
        ("tests.test_it", "from src.report.page import write_reports"),
        ("benchmarks.kd_loss", "from benchmarks import harness\nfrom src.distillation.losses import kd_loss"),
    ],
)
def test_the_walk_can_pass(module, source):
    assert wrong_imports(source, module, {"one", "two"}) == []
